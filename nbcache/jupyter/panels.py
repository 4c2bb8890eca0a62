"""The status as HTML: the tiers as bars, a row for each entry, which opens to its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape

from nbcache.errors import NBCacheError
from nbcache.jupyter.display import device_names, made_how, render_status, short_name, where
from nbcache.manifest import Manifest
from nbcache.pages import TensorRow, bar, details, page, table, tag, tensor_table
from nbcache.protocol.messages import EntryStatus, Status
from nbcache.units import format_idle, format_size


class StatusView:
    """A status document that shows itself as a table, in HTML where that is wanted. The document is ``.status``."""

    def __init__(self, status: Status, manifest_of: Callable[[str], Manifest], private_bytes: Mapping[str, int]) -> None:
        self.status = status
        self._manifest_of = manifest_of
        self._private_bytes = private_bytes

    def __repr__(self) -> str:
        return render_status(self.status, self._private_bytes)

    def _repr_html_(self) -> str:
        return render_status_html(self.status, self._manifest_of, self._private_bytes)


def render_status_html(status: Status, manifest_of: Callable[[str], Manifest], private_bytes: Mapping[str, int]) -> str:
    """The panel that ``%weights`` shows.

    ``manifest_of`` gives an entry's tensors by its key; ``private_bytes`` is what this process holds for itself, by key.
    """
    if not status.entries:
        return page(_tiers(status), '<p class="dim">nothing cached</p>')
    gpus = device_names(status)
    head = ("entry", "size", "where", "used by", "private here")
    rows = [_row(entry, gpus, private_bytes.get(entry.key, 0)) for entry in status.entries]
    opened = [_opened(entry, manifest_of) for entry in status.entries]
    return page(_tiers(status), table(head, rows, (1, 4), opened))


def _tiers(status: Status) -> str:
    host = status.host
    rows = [
        ("host", bar(host.used_bytes, host.limit_bytes), f"{format_size(host.used_bytes)} of {format_size(host.limit_bytes)}")
    ]
    for gpu, name in zip(status.devices, device_names(status).values(), strict=True):
        total = f" of {format_size(gpu.total_bytes)}" if gpu.total_bytes else ""
        used = f"{format_size(gpu.slab_bytes)}{total}, {escape(gpu.name)}"
        rows.append((name, bar(gpu.slab_bytes, gpu.total_bytes), used))
    return table(("tier", "", f"daemon {status.pid}, nbcache {status.version}"), rows)


def _row(entry: EntryStatus, gpus: Mapping[str, str], private_bytes: int) -> tuple[str, ...]:
    users = dict.fromkeys(f"{short_name(lease.label) or 'process'} (pid {lease.pid})" for lease in entry.used_by)
    remarks = [word for word in ("pinned" if entry.pinned else "", made_how(entry)) if word]
    name = f'<b title="{escape(entry.name)}">{escape(short_name(entry.name))}</b> {" ".join(map(tag, remarks))}'
    if entry.host == "staging":
        name += f' <span class="small">{bar(entry.staged_bytes, entry.bytes)}</span>'
    since = "yet" if entry.host == "staging" else f"for {format_idle(entry.last_used_s)}"
    return (
        name,
        format_size(entry.bytes),
        escape(", ".join(where(entry, gpus))),
        "<br>".join(map(escape, users)) or f'<span class="dim">nobody {since}</span>',
        format_size(private_bytes) if private_bytes else "-",
    )


def _opened(entry: EntryStatus, manifest_of: Callable[[str], Manifest]) -> str:
    try:
        manifest = manifest_of(entry.key)
    except NBCacheError:  # evicted between two questions
        return ""
    rows = [TensorRow(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in manifest.tensors]
    return details(f'<span class="dim">{entry.tensors} tensor{"s" if entry.tensors != 1 else ""}</span>', tensor_table(rows))
