"""A pipeline loaded whole, as after a restart: the part that is not importing, beside the library's own load.

Every load is the first of a fresh process that has torch and a context. Needs diffusers, transformers and accelerate, and a GPU
(or the tests' emulated driver).
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import msgspec

from nbcache.bench import kernel
from nbcache.bench.isolation import own_daemon, run_fresh
from nbcache.errors import BenchmarkFailed
from nbcache.units import format_duration, format_size


class ModelLoad(msgspec.Struct, frozen=True):
    """One load of a pipeline. Seconds."""

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
        return self.map_s + self.build_s


class ModelReport(msgspec.Struct, frozen=True):
    """What ``nbcache bench models`` measured: the loads after the first, and the library's own, page cache hot."""

    folder: str
    torch: str
    first: ModelLoad
    cached: tuple[ModelLoad, ...]
    stock_s: tuple[float, ...]
    """Stock ``from_pretrained(...).to(device)``, beyond imports."""


def measure_models(
    folder: str, runs: int = 5, stock: bool = True, on_step: Callable[[str], None] = lambda _: None
) -> ModelReport:
    """Load the pipeline in ``folder`` in fresh processes onto the first GPU, with a daemon of its own. BenchmarkFailed."""
    with own_daemon():
        first = run_fresh(partial(time_model, folder))
        on_step(f"first: {_parts(first)}")
        cached = []
        for _ in range(runs):
            load = run_fresh(partial(time_model, folder))
            if not load.hit:
                raise BenchmarkFailed(f"{folder}: was not cached any more; is the GPU or the host tier short of memory?")
            cached.append(load)
            on_step(f"cached: {_parts(load)}")
    times = [run_fresh(partial(time_stock, folder)) for _ in range(min(runs, 2) if stock else 0)]
    return ModelReport(folder, version("torch"), first, tuple(cached), tuple(times))


def time_model(folder: str) -> ModelLoad:
    """The first load of this process."""
    import torch

    kernel.start_context()
    from nbcache.client import api
    from nbcache.client.notices import NoSharedGpuMemory
    from nbcache.models.api import assemble_name

    api.prepare()
    warnings.simplefilter("error", NoSharedGpuMemory)
    made = assemble_name(folder, device=kernel.DEVICE)
    kernel.synchronize()
    slabs = made.tally.nbytes if kernel.physical_device() != "cpu" else 0
    allocated = torch.cuda.memory_allocated() if slabs else 0
    spent, tally = made.spent, made.tally
    return ModelLoad(
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

    start = time.perf_counter()
    pipe = getattr(diffusers, index.class_name).from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.to(kernel.physical_device())
    kernel.synchronize()
    return time.perf_counter() - start


def _parts(load: ModelLoad) -> str:
    return (
        f"{format_duration(load.beyond_imports_s)} beyond imports (build {format_duration(load.build_s)}, "
        f"map {format_duration(load.map_s)}); imports {format_duration(load.imports_s)}"
    )


def render_models(report: ModelReport) -> str:
    """The report as lines of text."""
    first, last = report.first, report.cached[-1]
    median = statistics.median(load.beyond_imports_s for load in report.cached)
    lines = [
        f"{report.folder}: {last.tensors} tensors, {format_size(last.nbytes)}; torch {report.torch}",
        f"first load:       {_parts(first)}",
        f"after a restart:  {format_duration(median)} beyond imports, median of {len(report.cached)}",
        *(f"                  {_parts(load)}" for load in report.cached),
        f"memory of its own: {format_size(last.private_bytes)} of weights copied",
    ]
    if report.stock_s:
        lines.append(
            f"stock from_pretrained and .to: {', '.join(map(format_duration, report.stock_s))} beyond imports, files cached"
        )
    return "\n".join(lines)
