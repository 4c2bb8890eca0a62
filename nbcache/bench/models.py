"""A pipeline loaded whole, as after a restart: the part that is not importing, beside the library's own load.

Every load is the first of a fresh process that has torch and a context; the clock stops when the device is synchronised. Needs
diffusers, transformers and accelerate, and a GPU (or the tests' emulated driver).
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import msgspec

from nbcache.bench import disk, kernel
from nbcache.bench.isolation import own_daemon, run_fresh
from nbcache.bench.room import CONTEXT_BYTES, PADDING, check_gpu, note_host
from nbcache.errors import BenchmarkFailed
from nbcache.memory.driver import open_driver
from nbcache.units import format_duration, format_size


class ModelLoad(msgspec.Struct, frozen=True):
    """One load of a pipeline. Seconds."""

    whole_s: float
    """From the call until the device is synchronised, imports and all."""
    imports_s: float
    map_s: float
    build_s: float
    tensors: int
    nbytes: int
    private_bytes: int
    allocated_bytes: int
    """GPU memory that torch counts beside the weights, in this process."""
    hit: bool

    @property
    def beyond_imports_s(self) -> float:
        """What a kernel waits that has imported the libraries."""
        return self.whole_s - self.imports_s


class ModelReport(msgspec.Struct, frozen=True):
    """What ``nbcache bench models`` measured: the first load, those after it, and the library's own, page cache hot."""

    folder: str
    gpu: str
    torch: str
    first: ModelLoad
    cached: tuple[ModelLoad, ...] = ()
    stock_s: tuple[float, ...] = ()
    """Stock ``from_pretrained(...).to(device)``, beyond imports."""
    stock_cached: float | None = None
    """Which part of the files was in the page cache when that began, at least."""
    complete: bool = False
    """Whether the run came to its end; a report of one that was cut off does not say so."""


def check_room(nbytes: int) -> None:
    """BenchmarkFailed if the GPU has no room for a pipeline of so many bytes; DriverError if there is no GPU."""
    check_gpu(int(nbytes * PADDING) + CONTEXT_BYTES)


def measure_models(
    folder: str,
    runs: int = 5,
    stock: bool = True,
    on_step: Callable[[str], None] = lambda _: None,
    on_report: Callable[[ModelReport], None] = lambda _: None,
) -> ModelReport:
    """Load the pipeline in ``folder`` in fresh processes onto the first GPU, with a daemon of its own.

    BenchmarkFailed, and what :func:`nbcache.load_model` raises. ``on_report`` is given the report so far after each load.
    """
    files = [str(path) for path in Path(folder).rglob("*") if path.is_file()]
    nbytes = disk.size_of(files)
    check_room(nbytes)
    note_host(int(nbytes * (1 + PADDING)), on_step)
    with own_daemon(int(nbytes * PADDING)):
        first = run_fresh(partial(time_model, folder))
        on_step(f"first: {_parts(first)}")
        report = ModelReport(folder, open_driver().gpus()[0].name, version("torch"), first)
        on_report(report)
        for _ in range(runs):
            load = run_fresh(partial(time_model, folder))
            if not load.hit:
                raise BenchmarkFailed(f"{folder}: was not cached any more; is the GPU or the host tier short of memory?")
            on_step(f"cached: {_parts(load)}")
            report = msgspec.structs.replace(report, cached=(*report.cached, load))
            on_report(report)
    for _ in range(min(runs, 2) if stock else 0):
        disk.read_plainly(files)
        share = min(disk.cached_share(files), 1.0 if report.stock_cached is None else report.stock_cached)
        seconds = run_fresh(partial(time_stock, folder))
        on_step(f"stock: {format_duration(seconds)} beyond imports")
        report = msgspec.structs.replace(report, stock_s=(*report.stock_s, seconds), stock_cached=share)
        on_report(report)
    report = msgspec.structs.replace(report, complete=True)
    on_report(report)
    return report


def time_model(folder: str) -> ModelLoad:
    """The first load of this process."""
    import torch

    kernel.start_context()
    from nbcache.client import api
    from nbcache.client.notices import NoSharedGpuMemory
    from nbcache.models.api import assemble_name

    api.prepare()
    warnings.simplefilter("error", NoSharedGpuMemory)
    start = time.perf_counter()
    made = assemble_name(folder, device=kernel.DEVICE)
    kernel.synchronize()
    whole_s = time.perf_counter() - start
    slabs = made.tally.nbytes if kernel.physical_device() != "cpu" else 0
    allocated = torch.cuda.memory_allocated() if slabs else 0
    spent, tally = made.spent, made.tally
    return ModelLoad(
        whole_s,
        spent.imports_s,
        spent.map_s,
        spent.build_s,
        tally.tensors,
        tally.nbytes,
        tally.private_bytes,
        allocated - slabs,
        tally.hit,
    )


def time_stock(folder: str) -> float:
    """The library's own load of this process, beyond imports."""
    kernel.start_context()
    import diffusers

    from nbcache.checkpoints.folders import read_pipeline
    from nbcache.models import pipelines

    index = read_pipeline(folder)
    pipelines.model_components(index)
    pipelines.import_the_rest()
    import torch

    pipeline_class = getattr(diffusers, index.class_name)  # which imports it
    start = time.perf_counter()
    pipe = pipeline_class.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.to(kernel.physical_device())
    kernel.synchronize()
    return time.perf_counter() - start


def _parts(load: ModelLoad) -> str:
    return (
        f"{format_duration(load.beyond_imports_s)} beyond imports (build {format_duration(load.build_s)}, "
        f"map {format_duration(load.map_s)}); imports {format_duration(load.imports_s)}"
    )


def render_models(report: ModelReport) -> str:
    """The report as lines of text, of a run that was cut off too."""
    return "\n".join(_lines(report))


def _lines(report: ModelReport) -> Iterator[str]:
    last = (report.first, *report.cached)[-1]
    yield f"{report.folder}: {last.tensors} tensors, {format_size(last.nbytes)}; {report.gpu}, torch {report.torch}"
    yield f"first load:       {_parts(report.first)}"
    if report.cached:
        median = statistics.median(load.beyond_imports_s for load in report.cached)
        yield f"after a restart:  {format_duration(median)} beyond imports, median of {len(report.cached)}"
        yield from (f"                  {_parts(load)}" for load in report.cached)
    yield (
        f"memory of its own: {format_size(last.private_bytes)} of weights copied, "
        f"{format_size(max(0, last.allocated_bytes))} on the GPU beside the slabs"
    )
    if report.stock_s and report.stock_cached is not None:
        times = ", ".join(map(format_duration, report.stock_s))
        yield f"stock from_pretrained and .to: {times} beyond imports, {report.stock_cached:.0%} of the files in the page cache"
