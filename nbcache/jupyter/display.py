"""What people see: the status as a table, a load as one line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from nbcache.protocol.messages import EntryStatus, Lease, Status
from nbcache.settings import Setting
from nbcache.units import format_duration, format_idle, format_size

if TYPE_CHECKING:
    from nbcache.client.weights import Weights
    from nbcache.models.assembly import Assembled
    from nbcache.models.lora import LoadedLora

BAR_CELLS = 24
READ, COPIED = "read from disk", "copied from host memory"
"""Where what was not there yet came from."""
_IN_HUB_CACHE = re.compile(r"^/.*/models--(?P<repository>[^/]+)/snapshots/[^/]+/?(?P<inside>.*)$")


def summary(weights: Weights, seconds: float, how: str = "", sharers: int = 0) -> str:
    """``flux-dev: 1160 tensors, 23.8 GB on cuda:0 in 19.0 ms (resident, shared with 1 notebook, 0 B private)``.

    ``sharers`` are the other processes that use the entry.
    """
    count = f"{len(weights)} tensor{'s' if len(weights) != 1 else ''}"
    place = "cached" if weights.device.type == "cpu" else "resident"
    words = [how or (place if weights.hit else READ if weights.read else COPIED)]
    if sharers:
        words.append(f"shared with {sharers} notebook{'s' if sharers != 1 else ''}")
    if weights.private_bytes or (weights.hit and not how):
        words.append(f"{format_size(weights.private_bytes)} private")
    size, taken = format_size(weights.nbytes), format_duration(seconds)
    return f"{short_name(weights.name)}: {count}, {size} on {weights.device} in {taken} ({', '.join(words)})"


def count_sharers(status: Status, key: str, pid: int) -> int:
    """How many processes other than this one use an entry."""
    return len({lease.pid for entry in status.entries if entry.key == key for lease in entry.used_by} - {pid})


def model_summary(made: Assembled, name: str) -> str:
    """``flux-dev: FluxPipeline, 1779 tensors, 33.7 GB on cuda:0 in 7.4 s (imports 7.1 s, build 288 ms, map 24 ms; cached)``."""
    spent, tally = made.spent, made.tally
    parts = {"imports": spent.imports_s, "build": spent.build_s, "map": spent.map_s}
    how = ", ".join(f"{part} {format_duration(seconds)}" for part, seconds in parts.items())
    private = f", {format_size(tally.private_bytes)} private" if tally.private_bytes else ""
    size = f"{tally.tensors} tensors, {format_size(tally.nbytes)} on {made.device}"
    source = "cached" if tally.hit else "converted" if tally.converted else READ if tally.read else COPIED
    total = format_duration(sum(parts.values()))
    return f"{short_name(name)}: {made.what}, {size} in {total} ({how}; {source}{private})"


def lora_summary(loaded: LoadedLora) -> str:
    """``pixel.safetensors: 494 modules of rank 16, 328.0 MB, swapped into adapter default in 12 ms (hot)``."""
    count = f"{loaded.modules} module{'s' if loaded.modules != 1 else ''} of rank {loaded.rank}"
    scale = f" at {loaded.scale:g}" if loaded.scale != 1 else ""
    done = f"{loaded.how} as adapter {loaded.adapter}{scale} in {format_duration(loaded.seconds)} ({loaded.found})"
    return f"{Path(loaded.name).name}: {count}, {format_size(loaded.nbytes)}, {done}"


def short_name(name: str) -> str:
    """The last two parts of a path, which say more than the last one (``model.safetensors``); a plain name as it is.

    In the hub's cache, where folders are named by commits, the repository is a part: ``FLUX.1-dev/vae``.
    """
    if found := _IN_HUB_CACHE.search(name):
        return "/".join([*found["repository"].split("--"), *Path(found["inside"]).parts][-2:])
    return str(Path(*Path(name).parts[-2:])) if name.startswith("/") and len(Path(name).parts) > 3 else name


def render_status(status: Status, private_bytes: Mapping[str, int] = MappingProxyType({})) -> str:
    """The status as lines of text. ``private_bytes`` is what this process holds for itself, by key."""
    host, gpus = status.host, device_names(status)
    used = f"{format_size(host.used_bytes)} of {format_size(host.limit_bytes)} used"
    if not status.entries:
        return f"host tier: {used}; daemon {status.pid}; nothing cached"
    tiers = [f"host tier: {used} {cells(host.used_bytes, host.limit_bytes)}; daemon {status.pid}"]
    for gpu in status.devices:
        slabs = f"{format_size(gpu.slab_bytes)} of weights"
        bar = f" {cells(gpu.slab_bytes, gpu.total_bytes)} of {format_size(gpu.total_bytes)}" if gpu.total_bytes else ""
        tiers.append(f"{gpus[gpu.uuid]}: {gpu.name}, {slabs}{bar}")
    rows: list[tuple[str, ...]] = [("name", "size", "tensors", "where", "used by", "idle", "")]
    rows += [_row(entry, gpus, private_bytes.get(entry.key, 0)) for entry in status.entries]
    return "\n".join([*tiers, *columns(rows)])


def cells(part: float, whole: float, width: int = BAR_CELLS) -> str:
    """A bar, in characters. What is there but small has one cell, so that it is seen."""
    full = min(width, round(width * part / whole)) if whole > 0 else 0
    full = max(full, 1 if part > 0 and whole > 0 else 0)
    return "█" * full + "░" * (width - full)


def device_names(status: Status) -> dict[str, str]:
    """What to call each GPU, by its UUID."""
    return {gpu.uuid: f"gpu {number}" for number, gpu in enumerate(status.devices)}


def render_settings(settings: Sequence[Setting]) -> str:
    """Options as lines of text: name, value, and what set it."""
    rows = [("option", "value", "set by"), *((each.option, _text(each.value), each.source) for each in settings)]
    others = [f"{each.option} = {each.daemon or '-'}" for each in settings if each.daemon is not None]
    remark = [f"the daemon that runs was started with {', '.join(others)}; `nbcache restart` starts one anew"] if others else []
    return "\n".join([*columns(rows), *remark])


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "(none)"
    return "-" if value is None or value == "" else str(value)


def idle_slab_bytes(status: Status) -> int:
    """GPU memory that holds weights which no kernel uses."""
    return sum(
        slab.bytes
        for entry in status.entries
        for slab in entry.devices
        if slab.state == "resident" and not slab.leases and not entry.pinned
    )


def made_how(entry: EntryStatus) -> str:
    """In a word, how an entry came about that no file holds as it is; empty for the others."""
    return {"put": "saved", "derived": "converted"}.get(entry.provenance, "")


def _row(entry: EntryStatus, gpus: Mapping[str, str], private_bytes: int) -> tuple[str, ...]:
    users = ", ".join(dict.fromkeys(_user(lease) for lease in entry.used_by))
    remarks = [remark for remark in ("pinned" if entry.pinned else "", made_how(entry)) if remark]
    return (
        short_name(entry.name),
        format_size(entry.bytes),
        str(entry.tensors),
        ", ".join(where(entry, gpus)),
        users or "-",
        "-" if entry.leases else format_idle(entry.last_used_s),
        ", ".join([*remarks, *([f"{format_size(private_bytes)} private here"] if private_bytes else [])]),
    )


def _user(lease: Lease) -> str:
    return f"{short_name(lease.label)} (pid {lease.pid})" if lease.label else f"pid {lease.pid}"


def where(entry: EntryStatus, gpus: Mapping[str, str]) -> list[str]:
    """The tiers that an entry is in, in words."""
    host = [] if entry.host == "absent" else ["host" if entry.host == "staged" else "host (staging)"]
    slabs = [
        gpus.get(slab.uuid, slab.uuid)
        + (f" as {slab.dtype}" if slab.dtype else "")
        + (" (filling)" if slab.state == "filling" else "")
        for slab in entry.devices
    ]
    return host + slabs


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, each column as wide as its widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
