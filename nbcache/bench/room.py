"""Whether a machine has room for a measurement: disk, GPU and host memory, asked before the first byte is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from nbcache.bench.footprint import free_gpu_bytes
from nbcache.config import available_memory_bytes
from nbcache.errors import BenchmarkFailed
from nbcache.memory.driver import open_driver
from nbcache.units import format_size

PADDING = 1.1
"""What tensors take in the cache, over their bytes in files, at most."""
CONTEXT_BYTES = 1_000_000_000
"""What a process with a GPU context takes beside its tensors, at most."""
SPARE = 1.02
"""File systems want a little more than the files' bytes."""


def check_disk(folder: Path, nbytes: int) -> None:
    """BenchmarkFailed if a folder's file system has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < nbytes * SPARE:
        raise BenchmarkFailed(
            f"{folder} has no room for {format_size(nbytes)}, {format_size(free)} are free; set TMPDIR to a folder that has"
        )


def check_gpu(nbytes: int) -> None:
    """BenchmarkFailed if the first GPU has less free memory; DriverError if there is none. Makes no context."""
    gpus = open_driver().gpus()
    if not gpus:
        raise BenchmarkFailed("no GPU is visible")
    free = free_gpu_bytes(gpus[0].uuid)
    if free is not None and free < nbytes:
        raise BenchmarkFailed(
            f"GPU {gpus[0].uuid} has {format_size(free)} of {format_size(gpus[0].total_bytes)} free, and {format_size(nbytes)} "
            "are wanted: end what else is on it, or choose another with CUDA_VISIBLE_DEVICES"
        )


def note_host(nbytes: int, on_step: Callable[[str], None]) -> None:
    """Say so if the machine has less memory than will be used. No error: some machines' memory grows as it is used."""
    there = available_memory_bytes()
    if there < nbytes:
        on_step(
            f"this machine has {format_size(there)} of memory now, and {format_size(nbytes)} will be used, page cache and all"
        )
