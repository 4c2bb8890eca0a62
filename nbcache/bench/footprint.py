"""What the daemon itself costs: memory beside the weights, on the host and on the GPU, and time while nobody asks anything."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import msgspec

from nbcache.client import api
from nbcache.client.session import Session
from nbcache.errors import DriverError
from nbcache.memory.driver import open_driver


class Footprint(msgspec.Struct, frozen=True):
    """A daemon that holds weights in host memory and on a GPU, and no kernel alive."""

    start_s: float
    """From no daemon to a first connection."""
    rss_anon_bytes: int
    rss_file_bytes: int
    host_tier_bytes: int
    rss_beside_bytes: int
    """Resident memory beside the host tier: anonymous and file pages, less the tier's where they are among those."""
    idle_cpu_s: float
    idle_s: float
    idle_share: float
    """Of one core, while idle."""
    slab_bytes: int
    gpu_taken_bytes: int | None
    """What left the GPU's free memory since before the daemon started; None where the driver does not say."""
    gpu_beside_bytes: int | None
    """The same, beside the slabs."""


def time_start() -> float:
    """Start the daemon; seconds until the first connection."""
    start = time.perf_counter()
    Session.open().close()
    return time.perf_counter() - start


def free_gpu_bytes(uuid: str) -> int | None:
    """Free memory of a GPU, as NVML tells it, without a context; None if it does not."""
    try:
        driver = open_driver()
        return None if hasattr(driver, "emulation") else driver.free_bytes(uuid)
    except DriverError:
        return None


def measure_footprint(uuid: str, start_s: float, free_before_bytes: int | None, idle_s: float) -> Footprint:
    """What the daemon takes now, and during ``idle_s`` of nothing to do. ``free_before_bytes``: before it was started."""
    status = api.status()
    clock = _cpu_clock(status.pid)
    busy = time.clock_gettime(clock)
    start = time.perf_counter()
    time.sleep(idle_s)
    idle_cpu_s, elapsed_s = time.clock_gettime(clock) - busy, time.perf_counter() - start
    anon, file, shared = (_status_bytes(status.pid, field) for field in ("RssAnon", "RssFile", "RssShmem"))
    slab_bytes = sum(gpu.slab_bytes for gpu in status.devices if gpu.uuid == uuid)
    free = free_gpu_bytes(uuid)
    taken = None if free is None or free_before_bytes is None else free_before_bytes - free
    return Footprint(
        start_s=start_s,
        rss_anon_bytes=anon,
        rss_file_bytes=file,
        host_tier_bytes=status.host.used_bytes,
        rss_beside_bytes=_beside(anon + file, shared, status.host.used_bytes),
        idle_cpu_s=idle_cpu_s,
        idle_s=elapsed_s,
        idle_share=idle_cpu_s / elapsed_s,
        slab_bytes=slab_bytes,
        gpu_taken_bytes=taken,
        gpu_beside_bytes=None if taken is None else taken - slab_bytes,
    )


def _beside(resident_bytes: int, shared_bytes: int, pinned_bytes: int) -> int:
    """Pinned pages may count as anonymous or file pages, as shared ones, or (device mappings) not at all: by driver."""
    elsewhere = shared_bytes >= pinned_bytes or resident_bytes < pinned_bytes
    return resident_bytes if elsewhere else resident_bytes - pinned_bytes


def _status_bytes(pid: int, field: str) -> int:
    """A line of ``/proc/PID/status``, which counts in kB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    return 0


def _cpu_clock(pid: int) -> int:
    """The clock of a process's CPU time, in nanoseconds where ``/proc/PID/stat`` has hundredths; see clock_getcpuclockid(3)."""
    clock = ctypes.c_int()
    status = ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock))
    if status:
        raise ProcessLookupError(status, "no CPU clock", str(pid))
    return clock.value
