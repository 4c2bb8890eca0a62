"""The reports of a GPU as a person reads them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from nbcache.bench.disk import COLD_SHARE
from nbcache.bench.gpu import GpuReport, Load
from nbcache.bench.lora import LoraReport
from nbcache.bench.peers import Peer
from nbcache.units import format_duration, format_size


def render_gpu(report: GpuReport) -> str:
    """The report as lines of text."""
    return "\n".join(_lines(report))


def render_lora(report: LoraReport) -> str:
    """The report as lines of text."""
    return "\n".join(_lora_lines(report))


def _lora_lines(report: LoraReport) -> Iterator[str]:
    versions = ", ".join(f"{package} {version}" for package, version in report.versions.items())
    yield f"{report.card.name}, link {_rate(report.card.link_per_s)}; {versions}"
    yield "from the call to a pipeline that uses the LoRA, device synchronised; ms, medians of several, (most)"
    yield ""
    header = (
        "LoRA",
        "size",
        "stock load",
        "hotswap",
        "first",
        "first, pinned",
        "first, hot",
        "swap, pinned",
        "swap, hot",
    )
    rows = [
        (
            f"{row.name}, {row.tensors} tensors",
            format_size(row.nbytes),
            _ms(row.stock_load_s),
            _spread(row.stock_hotswap_s),
            _ms(row.first_converted_s),
            _ms(row.first_pinned_s),
            _ms(row.first_hot_s),
            _spread(row.swap_pinned_s),
            _spread(row.swap_hot_s),
            f"{row.ratio:.0f}x",
            "as stock" if row.equal else "OTHER THAN STOCK",
        )
        for row in report.rows
    ]
    yield from _columns([(*header, "over hotswap", "output"), *rows])
    yield ""
    churn = report.churn
    gpu = "" if churn.gpu_bytes is None else f", of the GPU beside slabs {format_size(max(0, churn.gpu_bytes))}"
    each = format_duration(churn.seconds / churn.swaps)
    yield f"{churn.swaps} random swaps among {churn.loras}: {each} each, {churn.hot} hot"
    yield (
        f"growth: reserved by torch {format_size(max(0, churn.torch_bytes))}{gpu}, of this process "
        f"{format_size(max(0, churn.rss_bytes))}, of the cache {format_size(max(0, churn.cache_bytes))}"
    )
    yield f"then the output is {'that of' if churn.equal else 'OTHER THAN'} a fresh stock load"


def _spread(seconds: Sequence[float]) -> str:
    return f"{_ms(statistics.median(seconds))} ({_ms(max(seconds))})"


def _lines(report: GpuReport) -> Iterator[str]:
    card, first = report.card, report.loads[0]
    yield f"{card.name}, torch {card.torch}; {report.checkpoint}"
    yield f"{first.tensors} tensors, {format_size(first.nbytes)} in {_count(report.files, 'file')}"
    yield f"link, pinned host to device:  {_rate(card.link_per_s)} (median of 5 copies of {format_size(card.probe_bytes)})"
    yield f"device copy, one way:         {_rate(card.copy_per_s)}"
    if report.disk_per_s:
        state = "cold" if (report.disk_cached or 0.0) <= COLD_SHARE else f"{report.disk_cached:.0%} was in the page cache"
        yield f"disk, plain parallel reads:   {', '.join(map(_rate, report.disk_per_s))} ({state})"
    yield ""
    yield from _load_table((*report.loads, *report.loras))
    yield f"each the first load of a fresh process, context ready; medians of {_count(len(first.runs_s), 'run')}"
    if report.loras:
        yield "LoRAs: again in a process that loaded the same before"
    yield ""
    yield _comparison(report)
    yield from _footprint(report)
    if report.peers:
        yield ""
        yield from _peer_table(report.peers)
        if report.best_peer:
            yield f"first load, hot, over the best of them ({report.best_peer}): {report.best_peer_ratio:.2f}"


def _load_table(loads: Sequence[Load]) -> Iterator[str]:
    yield from _columns(
        [
            ("what", "share", "ms", "GB/s", "floor ms", "ratio", "us/tensor", "private", "runs, ms"),
            *(
                (
                    load.what,
                    load.share,
                    _ms(load.median_s),
                    f"{load.per_s / 1e9:.1f}" if load.floor else "-",
                    f"{_ms(statistics.median(load.floors_s))} {load.floor}" if load.floors_s else "-",
                    "-" if load.ratio is None else f"{load.ratio:.2f}",
                    f"{load.per_tensor_s * 1e6:.1f}",
                    format_size(load.private_bytes) if load.private_bytes else "-",
                    " ".join(map(_ms, load.runs_s)),
                )
                for load in loads
            ),
        ]
    )


def _peer_table(peers: Sequence[Peer]) -> Iterator[str]:
    yield from _columns(
        [
            ("other loaders, page cache hot", "version", "ms", "GB/s", "over link", "runs, ms", ""),
            *(
                (
                    peer.name,
                    peer.version or "-",
                    "-" if peer.median_s is None else _ms(peer.median_s),
                    "-" if peer.per_s is None else f"{peer.per_s / 1e9:.1f}",
                    "-" if peer.ratio is None else f"{peer.ratio:.2f}",
                    " ".join(map(_ms, peer.runs_s)),
                    peer.remark,
                )
                for peer in peers
            ),
        ]
    )


def _comparison(report: GpuReport) -> str:
    compared = report.compared
    if compared is None:
        return "content: not compared, safetensors is not installed"
    if compared.equal:
        return f"content: {compared.tensors} of {compared.tensors} tensors as safetensors reads them"
    return f"content: WRONG in {', '.join(compared.differing)}"


def _footprint(report: GpuReport) -> Iterator[str]:
    cost = report.footprint
    yield f"daemon: starts in {format_duration(cost.start_s)}"
    yield (
        f"        {format_size(cost.rss_beside_bytes)} resident beside the host tier of {format_size(cost.host_tier_bytes)} "
        f"(anonymous {format_size(cost.rss_anon_bytes)}, file {format_size(cost.rss_file_bytes)})"
    )
    yield (
        f"        {cost.idle_share:.2%} of a core while idle "
        f"({cost.idle_cpu_s * 1000:.1f} ms in {format_duration(cost.idle_s)})"
    )
    if cost.gpu_beside_bytes is not None:
        beside = f"{cost.gpu_beside_bytes / (1 << 20):.0f} MiB"
        yield f"        {beside} of GPU memory beside slabs of {format_size(cost.slab_bytes)}, no kernel alive"


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


def _rate(per_s: float) -> str:
    return f"{per_s / 1e9:.1f} GB/s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
