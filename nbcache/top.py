"""``nbcache top``: the tiers as bars, loads with their speed, leases by notebook, again and again until Ctrl-C.

A frame is a pure function of two status documents and the time between them. Starts no daemon, and waits where there is none.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nbcache.client import api
from nbcache.errors import DaemonUnavailable
from nbcache.jupyter.display import device_names, short_name, where
from nbcache.protocol.messages import EntryStatus, Status
from nbcache.units import format_duration, format_idle, format_size

BAR_WIDTH = 40


@dataclass
class Speeds:
    """How fast entries are staged: told each status and its time, it gives bytes per second since the one before."""

    _before: dict[str, int] = field(default_factory=dict)
    _then_s: float = 0.0

    def measure(self, status: Status, now_s: float) -> dict[str, float]:
        """Bytes per second of each entry that is being staged, by key; without those that were not staging before."""
        staged = {entry.key: entry.staged_bytes for entry in status.entries if entry.host == "staging"}
        passed, before = now_s - self._then_s, self._before
        self._before, self._then_s = staged, now_s
        return {key: (done - before[key]) / passed for key, done in staged.items() if key in before and passed > 0}


def render_frame(status: Status, speeds: dict[str, float]) -> RenderableType:
    """One frame."""
    head = f"nbcache {status.version}, process {status.pid}, up {format_duration(status.uptime_s)}"
    parts: list[RenderableType] = [Text(head, style="bold"), _tiers(status)]
    loading = [entry for entry in status.entries if entry.host == "staging" or _filled(entry, {})]
    if loading:
        parts += [Text("\nloads", style="bold"), _loads(loading, speeds, device_names(status))]
    if status.entries:
        parts += [Text("\nentries", style="bold"), _entries(status)]
    users = Counter((short_name(lease.label), lease.pid) for entry in status.entries for lease in entry.used_by)
    if users:
        parts += [Text("\nin use by", style="bold"), _users(status, users)]
    return Group(*parts)


def _grid(*justify: str) -> Table:
    table = Table.grid(padding=(0, 2))
    for each in justify:
        table.add_column(justify="right" if each == "right" else "left", no_wrap=True, overflow="ellipsis")
    return table


def _tiers(status: Status) -> Table:
    table = _grid("left", "left", "right")
    host = status.host
    used = f"{format_size(host.used_bytes)} of {format_size(host.limit_bytes)}"
    table.add_row("host", _bar(host.used_bytes, host.limit_bytes), used)
    for gpu, name in zip(status.devices, device_names(status).values(), strict=True):
        total = f" of {format_size(gpu.total_bytes)}" if gpu.total_bytes else ""
        table.add_row(name, _bar(gpu.slab_bytes, gpu.total_bytes), f"{format_size(gpu.slab_bytes)}{total}, {gpu.name}")
    return table


def _bar(part: float, whole: float) -> ProgressBar:
    return ProgressBar(total=max(whole, 1), completed=part, width=BAR_WIDTH)


def _loads(entries: list[EntryStatus], speeds: dict[str, float], gpus: Mapping[str, str]) -> Table:
    table = _grid("left", "left", "right", "right", "left")
    for entry in entries:
        filled = ", ".join(f"filling {gpu}" for gpu in _filled(entry, gpus))
        if entry.host != "staging":
            table.add_row(short_name(entry.name), "", format_size(entry.bytes), "", filled)
            continue
        speed = speeds.get(entry.key, 0.0)
        left_s = (entry.bytes - entry.staged_bytes) / speed if speed else 0.0
        table.add_row(
            short_name(entry.name),
            _bar(entry.staged_bytes, entry.bytes),
            f"{format_size(entry.staged_bytes)} of {format_size(entry.bytes)}",
            f"{speed / 1e9:.2f} GB/s" if speed else "",
            ", ".join([*([f"{format_duration(left_s)} left"] if speed else []), *([filled] if filled else [])]),
        )
    return table


def _filled(entry: EntryStatus, gpus: Mapping[str, str]) -> list[str]:
    """The GPUs whose slab of an entry is being filled, by the kernel that copies; how far it is, it alone knows."""
    return [gpus.get(slab.uuid, slab.uuid) for slab in entry.devices if slab.state == "filling"]


def _entries(status: Status) -> Table:
    table, gpus = _grid("left", "right", "right", "left", "right"), device_names(status)
    for entry in sorted(status.entries, key=lambda entry: entry.last_used_s):
        idle = "in use" if entry.leases else f"idle {format_idle(entry.last_used_s)}"
        place = ", ".join(where(entry, gpus)) + (", pinned" if entry.pinned else "")
        table.add_row(short_name(entry.name), format_size(entry.bytes), f"{entry.tensors} tensors", place, idle)
    return table


def _users(status: Status, users: Counter[tuple[str, int]]) -> Table:
    table = _grid("left", "right", "left")
    for (label, pid), _ in sorted(users.items()):
        names = [short_name(entry.name) for entry in status.entries if any(lease.pid == pid for lease in entry.used_by)]
        table.add_row(label or "-", f"pid {pid}", ", ".join(names))
    return table


def frames(clock: Callable[[], float] = time.monotonic) -> Iterator[RenderableType]:
    """A frame each time one is asked for."""
    speeds = Speeds()
    while True:
        try:
            status = api.status()
        except DaemonUnavailable as error:
            yield Text(str(error))
        else:
            yield render_frame(status, speeds.measure(status, clock()))


def run_top(interval_s: float, once: bool) -> None:
    """Show frames until Ctrl-C; a single one if ``once``, or if stdout is no terminal."""
    console, source = Console(), frames()
    if once or not console.is_terminal:
        console.print(next(source))
        return
    try:
        with Live(next(source), console=console, auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(interval_s)
                live.update(next(source), refresh=True)
    except KeyboardInterrupt:
        return
