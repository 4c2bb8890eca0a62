"""LoRAs into a live FLUX pipeline: the first of an adapter and each swap, hot and from pinned memory, beside the stock loader.

All is measured in one fresh process (``lora_swaps``) with a daemon of its own, and told as it comes. Needs a GPU (or the tests'
emulated driver), diffusers and peft.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from nbcache.bench import kernel
from nbcache.bench.flux import flux_shapes, nbytes_of_shapes
from nbcache.bench.isolation import own_daemon, run_fresh, run_fresh_telling
from nbcache.bench.lora_files import FLUX, Shape
from nbcache.bench.lora_report import Churn, LoraReport, Row
from nbcache.bench.lora_swaps import Failure, measure_swaps
from nbcache.bench.room import check_disk, check_gpu, note_host
from nbcache.config import lora_gpu_limit_bytes
from nbcache.errors import BenchmarkFailed
from nbcache.units import format_size

LORA_BYTES = (328_000_000, 642_000_000, 1_200_000_000, 2_000_000_000)
KOHYA_BYTES = 180_000_000
"""A little more than the one of kohya's layout has."""
RUNS = 7
CHURN = 200
SPARE_GPU_BYTES = 4_000_000_000
"""Contexts, activations, and what torch keeps of what it freed."""


def measure_lora(
    sizes: tuple[int, ...] = LORA_BYTES,
    shape: Shape = FLUX,
    runs: int = RUNS,
    swaps: int = CHURN,
    probe_bytes: int = 1 << 30,
    on_step: Callable[[str], None] = lambda _: None,
    on_report: Callable[[LoraReport], None] = lambda _: None,
) -> LoraReport:
    """Measure LoRAs of these sizes, and one of kohya's layout, on the first GPU.

    Raises BenchmarkFailed, and as :func:`load_lora`; a size that fails is told of in the report, and the others are measured.
    Writes two files of each to TMPDIR. ``on_report`` is given the report so far after each.
    """
    for package in ("diffusers", "peft"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise BenchmarkFailed(f"needs {package}: pip install {package}") from error
    files_bytes = 2 * (sum(sizes) + KOHYA_BYTES)
    host_bytes = 2 * files_bytes + files_bytes // 4  # of each the converted copy and the pinned one
    check_disk(Path(tempfile.gettempdir()), files_bytes)
    if shape == FLUX:
        transformer_bytes = nbytes_of_shapes(flux_shapes())
        check_gpu(transformer_bytes + lora_gpu_limit_bytes() + 3 * max(sizes) + SPARE_GPU_BYTES)
        note_host(host_bytes + files_bytes, on_step)
    with own_daemon(host_bytes) as directory:
        card = run_fresh(partial(kernel.measure_card, probe_bytes))
        on_step(f"{card.name}: link {card.link_per_s / 1e9:.1f} GB/s")
        versions = {package: importlib.metadata.version(package) for package in ("torch", "diffusers", "peft")}
        found = _Found(LoraReport(card, versions), on_step, on_report)
        run_fresh_telling(partial(measure_swaps, str(directory), sizes, shape, runs, swaps, card.uuid), found.add)
    return found.finish()


class _Found:
    """The report as it grows."""

    def __init__(self, report: LoraReport, on_step: Callable[[str], None], on_report: Callable[[LoraReport], None]) -> None:
        self._report = report
        self._on_step = on_step
        self._on_report = on_report

    def add(self, found: str | Row | Churn | Failure) -> None:
        """Something that the measuring process tells."""
        if isinstance(found, str):
            self._on_step(found)
            return
        report = self._report
        if isinstance(found, Row):
            times = (found.stock_hotswap_s, found.swap_pinned_s, found.swap_hot_s)
            stock, pinned, hot = (f"{statistics.median(each) * 1000:.1f}" for each in times)
            self._on_step(f"{found.name}, {format_size(found.nbytes)}: swap {pinned} ms pinned, {hot} ms hot, {stock} ms stock")
            self._keep(msgspec.structs.replace(report, rows=(*report.rows, found)))
        elif isinstance(found, Failure):
            self._on_step(f"{found.name}: {found.why}")
            self._keep(msgspec.structs.replace(report, failed={**report.failed, found.name: found.why}))
        else:
            self._on_step(f"{found.swaps} random swaps: {found.seconds / found.swaps * 1000:.1f} ms each")
            self._keep(msgspec.structs.replace(report, churn=found))

    def finish(self) -> LoraReport:
        """All has been told."""
        self._keep(msgspec.structs.replace(self._report, complete=True))
        return self._report

    def _keep(self, report: LoraReport) -> None:
        self._report = report
        self._on_report(report)
