"""What people see: the status as a table, a load as one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbcache.protocol.messages import EntryStatus, Status
from nbcache.units import format_duration, format_size

if TYPE_CHECKING:
    from nbcache.client.weights import Weights
    from nbcache.models.lora import LoadedLora


class StatusView:
    """A status document that shows itself as a table. The document is ``.status``."""

    def __init__(self, status: Status) -> None:
        self.status = status

    def __repr__(self) -> str:
        return render_status(self.status)


def summary(weights: Weights, seconds: float, how: str = "") -> str:
    """``minilm: 104 tensors, 90.9 MB on cpu in 1.2 ms (cached)``."""
    count = f"{len(weights)} tensor{'s' if len(weights) != 1 else ''}"
    private = f", {format_size(weights.private_bytes)} private" if weights.private_bytes else ""
    how = how or ("cached" if weights.hit else "read from disk")
    size = format_size(weights.nbytes)
    return f"{short_name(weights.name)}: {count}, {size} on {weights.device} in {format_duration(seconds)} ({how}{private})"


def lora_summary(loaded: LoadedLora) -> str:
    """``pixel.safetensors: 494 modules of rank 16, 328.0 MB, swapped into adapter default in 12 ms (hot)``."""
    count = f"{loaded.modules} module{'s' if loaded.modules != 1 else ''} of rank {loaded.rank}"
    scale = f" at {loaded.scale:g}" if loaded.scale != 1 else ""
    done = f"{loaded.how} as adapter {loaded.adapter}{scale} in {format_duration(loaded.seconds)} ({loaded.found})"
    return f"{Path(loaded.name).name}: {count}, {format_size(loaded.nbytes)}, {done}"


def short_name(name: str) -> str:
    """The last two parts of a path, which say more than the last one (``model.safetensors``); a plain name as it is."""
    return str(Path(*Path(name).parts[-2:])) if name.startswith("/") and len(Path(name).parts) > 3 else name


def render_status(status: Status) -> str:
    """The status as lines of text."""
    host = status.host
    head = f"host tier: {format_size(host.used_bytes)} of {format_size(host.limit_bytes)} used; daemon {status.pid}"
    if not status.entries:
        return f"{head}; nothing cached"
    gpus = {gpu.uuid: f"gpu {number}" for number, gpu in enumerate(status.devices)}
    lines = [head, *(f"{gpus[gpu.uuid]}: {gpu.name}, {format_size(gpu.slab_bytes)} of weights" for gpu in status.devices)]
    rows: list[tuple[str, ...]] = [("name", "size", "tensors", "where", "used by", "idle", "")]
    rows += [_row(entry, gpus) for entry in status.entries]
    return "\n".join([*lines, *_columns(rows)])


def idle_slab_bytes(status: Status) -> int:
    """GPU memory, in bytes of tensors, that holds weights which no kernel uses."""
    return sum(
        entry.bytes
        for entry in status.entries
        for slab in entry.devices
        if slab.state == "resident" and not slab.leases and not entry.pinned
    )


def _row(entry: EntryStatus, gpus: Mapping[str, str]) -> tuple[str, ...]:
    users = ", ".join(dict.fromkeys(short_name(lease.label) or f"pid {lease.pid}" for lease in entry.used_by))
    made = {"put": "saved", "derived": "converted"}.get(entry.provenance, "")
    remarks = [remark for remark in ("pinned" if entry.pinned else "", made) if remark]
    return (
        short_name(entry.name),
        format_size(entry.bytes),
        str(entry.tensors),
        ", ".join(_where(entry, gpus)),
        users or "-",
        "-" if entry.leases else format_duration(entry.last_used_s),
        ", ".join(remarks),
    )


def _where(entry: EntryStatus, gpus: Mapping[str, str]) -> list[str]:
    host = [] if entry.host == "absent" else ["host" if entry.host == "staged" else "host (staging)"]
    slabs = [
        gpus.get(slab.uuid, slab.uuid)
        + (f" as {slab.dtype}" if slab.dtype else "")
        + (" (filling)" if slab.state == "filling" else "")
        for slab in entry.devices
    ]
    return host + slabs


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
