"""Attaching and staging on the CPU, beside stock ``load_file`` and plain reading."""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from nbcache.bench.disk import CHUNK_BYTES, reading_threads
from nbcache.bench.isolation import own_daemon, run_fresh, time_call
from nbcache.client import api
from nbcache.errors import UnsupportedFormat
from nbcache.units import format_duration, format_size


class Attach(msgspec.Struct, frozen=True):
    """Attaching a cached entry in fresh processes, with torch and nbcache imported. Seconds."""

    what: str
    tensors: int
    nbytes: int
    first_s: float
    """The first load of a fresh process: median over processes."""
    median_s: float
    """Later loads in the same processes."""
    stock_first_s: float
    stock_median_s: float
    processes: int
    loads: int

    @property
    def per_tensor_s(self) -> float:
        """Time per tensor, the whole load divided by their number."""
        return self.median_s / max(1, self.tensors)


class Stage(msgspec.Struct, frozen=True):
    """Staging a file from a hot page cache, beside plain parallel ``preadv`` into a fresh memfd. Bytes per second, medians."""

    nbytes: int
    staged_per_s: float
    plain_per_s: float
    ratio: float
    """Median of the ratios of neighbouring runs."""
    rounds: int
    threads: int


def measure_attach(checkpoint: str | None, processes: int = 5, loads: int = 20) -> list[Attach]:
    """Attach ``checkpoint``, or synthetic checkpoints of 100 to 20 000 tensors and a put entry, beside stock ``load_file``."""
    with own_daemon() as directory:
        if checkpoint:
            return [_measure_attach(checkpoint, checkpoint, processes, loads)]
        results = []
        for count in (104, 1000, 5000, 20_000):
            path = directory / f"{count}.safetensors"
            _write_synthetic(path, count, max(4096, 90_000_000 // count))
            results.append(_measure_attach(f"{count} tensors", str(path), processes, loads))
            path.unlink()
        return [*results, _measure_put(processes, loads)]


def _measure_attach(what: str, name: str, processes: int, loads: int) -> Attach:
    entry, _ = api.stage(name)
    runs = [run_fresh(partial(_time_loads, name, loads)) for _ in range(processes)]
    ours, stock = [run[0] for run in runs], [run[1] for run in runs]
    return Attach(
        what=what,
        tensors=entry.tensors,
        nbytes=entry.bytes,
        first_s=statistics.median(times[0] for times in ours),
        median_s=statistics.median(time_s for times in ours for time_s in times[1:]),
        stock_first_s=statistics.median(times[0] for times in stock) if stock[0] else float("nan"),
        stock_median_s=statistics.median(t for times in stock for t in times[1:]) if stock[0] else float("nan"),
        processes=processes,
        loads=loads,
    )


def _measure_put(processes: int, loads: int) -> Attach:
    import torch

    api.put("bench", {f"layer.{i}": torch.zeros(218_400) for i in range(104)}).release()
    runs = [run_fresh(partial(_time_loads, "bench", loads))[0] for _ in range(processes)]
    return Attach(
        what="put entry",
        tensors=104,
        nbytes=104 * 4 * 218_400,
        first_s=statistics.median(times[0] for times in runs),
        median_s=statistics.median(time_s for times in runs for time_s in times[1:]),
        stock_first_s=float("nan"),
        stock_median_s=float("nan"),
        processes=processes,
        loads=loads,
    )


def _time_loads(name: str, loads: int) -> tuple[list[float], list[float]]:
    """In a fresh process: our loads and stock ones, taking turns; the first of each is first in turn too."""
    import torch

    assert torch.get_num_threads()  # imported before the clock starts, as in a kernel
    api.prepare()
    stock: Callable[[], object] | None = None
    if os.path.exists(name):
        from safetensors.torch import load_file

        stock = lambda: load_file(name)  # noqa: E731
    ours_s, stock_s = [], []
    for _ in range(loads):
        ours_s.append(time_call(lambda: api.load(name, device="cpu")))
        if stock:
            stock_s.append(time_call(stock))
    return ours_s, stock_s


def _write_synthetic(path: Path, count: int, nbytes: int) -> None:
    """A checkpoint of ``count`` float32 tensors, written without torch."""
    elements = nbytes // 4
    header = {
        f"model.layers.{i}.weight": {
            "dtype": "F32",
            "shape": [elements],
            "data_offsets": [i * elements * 4, (i + 1) * elements * 4],
        }
        for i in range(count)
    }
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = count * elements * 4
        block = os.urandom(min(left, 16 << 20))
        while left:
            left -= file.write(block[:left])


def measure_stage(nbytes: int = 4 << 30, rounds: int = 3, directory: str | None = None) -> Stage:
    """Stage a synthetic checkpoint of ``nbytes`` from a hot page cache, and read the same file plainly, in turns."""
    with own_daemon() as runtime:
        folder = Path(directory or runtime)
        if shutil.disk_usage(folder).free < nbytes * 1.1:
            raise UnsupportedFormat(f"{folder}: no room for a file of {format_size(nbytes)}; name another with --directory")
        path = folder / "stage.safetensors"
        try:
            _write_synthetic(path, 64, nbytes // 64)
            return _measure_stage(path, rounds)
        finally:
            path.unlink(missing_ok=True)


def _measure_stage(path: Path, rounds: int) -> Stage:
    threads = reading_threads()
    size = path.stat().st_size
    _read_plainly(path, threads)  # heats the page cache, and this process
    api.stage(str(path))
    staged, plain = [], []
    for _ in range(rounds):
        api.evict(str(path))
        plain.append(time_call(lambda: _read_plainly(path, threads)))
        staged.append(time_call(lambda: api.stage(str(path))))
    ratio = statistics.median(p / s for p, s in zip(plain, staged, strict=True))
    return Stage(size, size / statistics.median(staged), size / statistics.median(plain), ratio, rounds, threads)


def _read_plainly(path: Path, threads: int) -> None:
    """The floor: parallel ``preadv`` of a file into a fresh memfd, and nothing else."""
    size = path.stat().st_size
    fd, memfd = os.open(path, os.O_RDONLY), os.memfd_create("nbcache-bench", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memfd, size)
        with mmap.mmap(memfd, size) as area, memoryview(area) as view:

            def read(offset: int) -> None:
                with view[offset : offset + CHUNK_BYTES] as part:
                    os.preadv(fd, [part], offset)

            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(read, range(0, size, CHUNK_BYTES)))
    finally:
        os.close(fd)
        os.close(memfd)


def render_attach(results: list[Attach]) -> str:
    """The attach table: first loads of a process, and later ones, beside stock's."""
    lines = [f"{'':24}{'':8}{'first load of a process':>27}{'later loads':>31}"]
    lines += [f"{'what':24}{'tensors':>8}{'ours':>10}{'load_file':>11}{'':6}{'ours':>10}{'/tensor':>10}{'load_file':>11}{'':6}"]
    for r in results:
        first, later = _beside(r.first_s, r.stock_first_s), _beside(r.median_s, r.stock_median_s)
        lines.append(
            f"{Path(r.what).name:24}{r.tensors:>8}{format_duration(r.first_s):>10}{first}"
            f"{format_duration(r.median_s):>10}{r.per_tensor_s * 1e6:>7.1f} us{later}".rstrip()
        )
    lines.append(
        f"{results[0].processes} fresh processes, {results[0].loads} loads each, in turns with load_file; medians; hot"
    )
    return "\n".join(lines)


def _beside(ours_s: float, stock_s: float) -> str:
    return f"{format_duration(stock_s):>11}{stock_s / ours_s:>5.1f}x" if stock_s == stock_s else f"{'-':>11}{'':6}"


def render_stage(result: Stage) -> str:
    """The staging figures."""
    return (
        f"staging {format_size(result.nbytes)}, page cache hot: {format_size(int(result.staged_per_s))}/s\n"
        f"plain preadv into a fresh memfd:  {format_size(int(result.plain_per_s))}/s\n"
        f"ratio {result.ratio:.2f} (median of {result.rounds} neighbouring pairs, {result.threads} threads)"
    )
