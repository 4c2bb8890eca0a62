"""Loads onto a GPU, cold and hot, from pinned memory and from the slab, each beside its floor; and what the daemon costs.

Every load is the first of a fresh process that has torch, a context and ``nbcache.load``; the clock runs around that one call
and a synchronisation of the device. Needs a GPU (or the tests' emulated driver).
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from nbcache.bench import disk, kernel
from nbcache.bench.flux import write_lora_sized
from nbcache.bench.footprint import Footprint, free_gpu_bytes, measure_footprint, time_start
from nbcache.bench.isolation import own_daemon, run_fresh
from nbcache.bench.kernel import Card, Compared, Timed
from nbcache.bench.peers import Peer, measure_peers
from nbcache.bench.room import PADDING
from nbcache.checkpoints.catalog import SUFFIX, resolve
from nbcache.client import api
from nbcache.client.options import Share
from nbcache.errors import BenchmarkFailed, EntryNotFound
from nbcache.units import format_size

LORA_BYTES = (328_000_000, 642_000_000, 1_200_000_000, 2_000_000_000)
ATTACH_MODES: tuple[Share, ...] = ("readonly", "cow", "private")
SWAP_MODES: tuple[Share, ...] = ("readonly", "cow")
PROBE_BYTES = 1 << 30

LINK, COPY, DISK = "link", "device copy", "disk"


class Load(msgspec.Struct, frozen=True):
    """Loads of one kind. Seconds, a number for each run; the rest are medians over runs."""

    what: str
    share: str
    tensors: int
    nbytes: int
    runs_s: tuple[float, ...]
    median_s: float
    per_s: float
    """Bytes per second."""
    per_tensor_s: float
    private_bytes: int
    floor: str
    """What bounds it: ``link``, ``device copy`` or ``disk``; empty for a map, which moves no bytes."""
    floors_s: tuple[float, ...] = ()
    """The time that the same bytes take on it."""
    ratio: float | None = None
    """Median of each run over its floor."""
    cached: float | None = None
    """Which part of the files was in the page cache: at most for a cold load, at least for a hot one."""


class GpuReport(msgspec.Struct, frozen=True):
    """What ``nbcache bench gpu`` measured in one run on one machine."""

    card: Card
    checkpoint: str
    files: int
    loads: tuple[Load, ...] = ()
    loras: tuple[Load, ...] = ()
    disk_per_s: tuple[float, ...] = ()
    """Plain reading of the dropped files, before each cold load. Empty if none was wished."""
    disk_cached: float | None = None
    """Which part of the files was in the page cache all the same when it was read plainly, at most."""
    footprint: Footprint | None = None
    compared: Compared | None = None
    """None if safetensors is not installed."""
    peers: tuple[Peer, ...] = ()
    best_peer: str = ""
    best_peer_ratio: float | None = None
    """Our first load, page cache hot, over the best peer's."""
    complete: bool = False
    """Whether the run came to its end; a report of one that was cut off does not say so."""


@dataclass
class _Series:
    """Loads of one kind, as they come in."""

    what: str
    share: Share
    floor: str
    times: list[Timed] = field(default_factory=list)
    floors_s: list[float] = field(default_factory=list)
    cached: float | None = None

    def add(self, timed: Timed, per_s: float | None) -> None:
        self.times.append(timed)
        if per_s is not None:
            self.floors_s.append(timed.nbytes / per_s)

    def result(self) -> Load:
        seconds = tuple(timed.seconds for timed in self.times)
        median, last = statistics.median(seconds), self.times[-1]
        ratios = [time_s / floor_s for time_s, floor_s in zip(seconds, self.floors_s, strict=bool(self.floors_s))]
        return Load(
            what=self.what,
            share=self.share,
            tensors=last.tensors,
            nbytes=last.nbytes,
            runs_s=seconds,
            median_s=median,
            per_s=last.nbytes / median,
            per_tensor_s=median / max(1, last.tensors),
            private_bytes=last.private_bytes,
            floor=self.floor,
            floors_s=tuple(self.floors_s),
            ratio=statistics.median(ratios) if ratios else None,
            cached=self.cached,
        )


class _Bench:
    """One checkpoint on one card, with a daemon of its own."""

    def __init__(self, checkpoint: str, card: Card, runs: int, on_step: Callable[[str], None], prefix: str = "") -> None:
        members = resolve(checkpoint).members
        self.checkpoint = checkpoint
        self.files = tuple(member.path for member in members if member.path.endswith(SUFFIX))
        self.disk_per_s: list[float] = []
        self.disk_cached: float | None = None
        self._card = card
        self._runs = runs
        self._on_step = on_step
        self._prefix = prefix

    def first_loads_cold(self) -> Load:
        """Nothing cached, the files' pages dropped. The disk is measured before each, the same way."""
        series = _Series(f"{self._prefix}first load, cold", "cow", DISK, cached=0.0)
        for _ in range(self._runs):
            self.evict()
            disk.drop_pages(self.files)
            self.disk_cached = max(self.disk_cached or 0.0, disk.cached_share(self.files))
            self.disk_per_s.append(disk.read_plainly(self.files))
            disk.drop_pages(self.files)
            series.cached = max(series.cached or 0.0, disk.cached_share(self.files))
            series.add(self._load("cow", hit=False), self.disk_per_s[-1])
        if series.cached is not None and series.cached > disk.COLD_SHARE:
            series.what = f"{self._prefix}first load, {series.cached:.0%} in the page cache"
        return self._done(series)

    def first_loads_hot(self) -> Load:
        """Nothing cached, the files in the page cache."""
        series = _Series(f"{self._prefix}first load, hot", "cow", LINK, cached=1.0)
        for _ in range(self._runs):
            self.evict()
            disk.read_plainly(self.files)
            series.cached = min(series.cached or 0.0, disk.cached_share(self.files))
            series.add(self._load("cow", hit=False), self._card.link_per_s)
        if series.cached is not None and series.cached < disk.HOT_SHARE:
            series.what = f"{self._prefix}first load, {series.cached:.0%} in the page cache"
        return self._done(series)

    def attaches(self, modes: tuple[Share, ...] = ATTACH_MODES) -> list[Load]:
        """The slab resident, as after a restart; the modes take turns."""
        found = [_Series(f"{self._prefix}attach", share, COPY if share == "private" else "") for share in modes]
        for _ in range(self._runs):
            for series in found:
                timed = self._load(series.share, hit=True)
                series.add(timed, self._card.copy_per_s if series.floor else None)
        return [self._done(series) for series in found]

    def fills(self) -> Load:
        """The slab dropped, the host copy there."""
        series = _Series(f"{self._prefix}from pinned host", "cow", LINK)
        for _ in range(self._runs):
            if not api.free_gpu(self.checkpoint).names:
                raise BenchmarkFailed(f"{self.checkpoint}: no slab was there to be dropped; is the GPU short of memory?")
            series.add(self._load("cow", hit=False), self._card.link_per_s)
        return self._done(series)

    def swaps(self) -> list[Load]:
        """The slab dropped, the host copy there, in a process that goes on: each mode in a process of its own."""
        found = []
        for share in SWAP_MODES:
            series = _Series(f"{self._prefix}from pinned host, again", share, LINK)
            for timed in run_fresh(partial(kernel.time_fills, self.checkpoint, share, self._runs)):
                series.add(timed, self._card.link_per_s)
            found.append(self._done(series))
        return found

    def compare(self) -> Compared | None:
        """Whether what arrives is what the files hold."""
        return run_fresh(partial(kernel.compare_load, self.checkpoint, self.files, "cow"))

    def evict(self) -> None:
        """Forget the entry, if it is cached."""
        with contextlib.suppress(EntryNotFound):
            api.evict(self.checkpoint)

    def _load(self, share: Share, hit: bool) -> Timed:
        timed = run_fresh(partial(kernel.time_load, self.checkpoint, share))
        if timed.hit is not hit:
            raise BenchmarkFailed(
                f"{self.checkpoint}: was {'cached' if timed.hit else 'not cached'} where the opposite was to be measured; is "
                "the GPU or the host tier short of memory?"
            )
        return timed

    def _done(self, series: _Series) -> Load:
        load = series.result()
        times = ", ".join(f"{seconds * 1000:.1f}" for seconds in load.runs_s)
        self._on_step(f"{load.what} ({load.share}): {times} ms")
        return load


def measure_gpu(
    checkpoint: str,
    runs: int = 3,
    cold: bool = True,
    peers: bool = False,
    loras: bool = False,
    *,
    probe_bytes: int = PROBE_BYTES,
    lora_bytes: tuple[int, ...] = LORA_BYTES,
    idle_s: float = 5.0,
    on_step: Callable[[str], None] = lambda _: None,
    on_report: Callable[[GpuReport], None] = lambda _: None,
) -> GpuReport:
    """Measure loads of ``checkpoint`` (a file, an index or a folder) on the first GPU, with a daemon of its own.

    ``runs`` fresh processes for each kind of load; ``cold`` drops the files from the page cache and reads each twice from the
    disk; ``peers`` runs other loaders on them; ``loras`` writes LoRA-sized files and loads those as well. ``on_step`` is told
    each result as it comes, ``on_report`` given the report so far. Raises as :func:`nbcache.load`, and BenchmarkFailed.
    """
    nbytes = disk.size_of(member.path for member in resolve(checkpoint).members)
    with own_daemon(int(PADDING * nbytes) + (max(lora_bytes) if loras else 0)) as directory:
        card = run_fresh(partial(kernel.measure_card, probe_bytes))
        free_before = free_gpu_bytes(card.uuid)
        start_s = time_start()
        bench = _Bench(checkpoint, card, runs, on_step)
        found = _Found(GpuReport(card, checkpoint, len(bench.files)), on_report)
        if cold:
            found.add_loads(bench.first_loads_cold())
            found.note(disk_per_s=tuple(bench.disk_per_s), disk_cached=bench.disk_cached)
        found.add_loads(bench.first_loads_hot())
        found.add_loads(*bench.attaches())
        found.add_loads(bench.fills())
        found.note(compared=bench.compare())
        found.note(footprint=measure_footprint(card.uuid, start_s, free_before, idle_s))
        for nbytes in lora_bytes if loras else ():
            found.note(loras=(*found.report.loras, *_measure_lora(directory, nbytes, card, runs, on_step)))
    if peers:
        found.add_peers(measure_peers(bench.files, runs, card.link_per_s, on_step=on_step))
    found.note(complete=True)
    return found.report


class _Found:
    """The report as it grows."""

    def __init__(self, report: GpuReport, on_report: Callable[[GpuReport], None]) -> None:
        self.report = report
        self._on_report = on_report

    def note(self, **found: Any) -> None:  # noqa: ANN401 - fields of the report
        """Some fields are known."""
        self.report = msgspec.structs.replace(self.report, **found)
        self._on_report(self.report)

    def add_loads(self, *loads: Load) -> None:
        """More of the checkpoint's loads."""
        self.note(loads=(*self.report.loads, *loads))

    def add_peers(self, peers: tuple[Peer, ...]) -> None:
        """What other loaders took, and the best of them."""
        hot = next(load for load in self.report.loads if load.floor == LINK)
        best = min((peer for peer in peers if peer.sound), key=lambda peer: peer.median_s or 0.0, default=None)
        ratio = hot.median_s / best.median_s if best and best.median_s else None
        self.note(peers=peers, best_peer=best.name if best else "", best_peer_ratio=ratio)


def _measure_lora(directory: Path, nbytes: int, card: Card, runs: int, on_step: Callable[[str], None]) -> list[Load]:
    path = directory / f"lora-{nbytes}{SUFFIX}"
    run_fresh(partial(write_lora_sized, str(path), nbytes))
    bench = _Bench(str(path), card, runs, on_step, f"LoRA {format_size(nbytes)}: ")
    found = bench.swaps()
    bench.evict()
    path.unlink()
    return found
