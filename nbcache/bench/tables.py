"""The report of ``nbcache bench gpu`` as a person reads it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from nbcache.bench.disk import COLD_SHARE
from nbcache.bench.figures import count, ms, rate
from nbcache.bench.footprint import Footprint
from nbcache.bench.gpu import GpuReport, Load
from nbcache.bench.peers import Peer
from nbcache.jupyter.display import columns
from nbcache.units import format_duration, format_size


def render_gpu(report: GpuReport) -> str:
    """The report as lines of text."""
    return "\n".join(_lines(report))


def _lines(report: GpuReport) -> Iterator[str]:
    card, first = report.card, report.loads[0]
    yield f"{card.name}, torch {card.torch}; {report.checkpoint}"
    yield f"{first.tensors} tensors, {format_size(first.nbytes)} in {count(report.files, 'file')}"
    yield f"link, pinned host to device:  {rate(card.link_per_s)} (median of 5 copies of {format_size(card.probe_bytes)})"
    yield f"device copy, one way:         {rate(card.copy_per_s)}"
    if report.disk_per_s:
        state = "cold" if (report.disk_cached or 0.0) <= COLD_SHARE else f"{report.disk_cached:.0%} was in the page cache"
        yield f"disk, plain parallel reads:   {', '.join(map(rate, report.disk_per_s))} ({state})"
    yield ""
    yield from _load_table((*report.loads, *report.loras))
    yield f"each the first load of a fresh process, context ready; medians of {count(len(first.runs_s), 'run')}"
    if report.loras:
        yield "LoRAs: again in a process that loaded the same before"
    yield ""
    if report.footprint is not None:
        yield _comparison(report)
        yield from _footprint(report.footprint)
    if report.peers:
        yield ""
        yield from _peer_table(report.peers)
        if report.best_peer:
            yield f"first load, hot, over the best of them ({report.best_peer}): {report.best_peer_ratio:.2f}"


def _load_table(loads: Sequence[Load]) -> Iterator[str]:
    yield from columns(
        [
            ("what", "share", "ms", "GB/s", "floor ms", "ratio", "us/tensor", "private", "runs, ms"),
            *(
                (
                    load.what,
                    load.share,
                    ms(load.median_s),
                    f"{load.per_s / 1e9:.1f}" if load.floor else "-",
                    f"{ms(statistics.median(load.floors_s))} {load.floor}" if load.floors_s else "-",
                    "-" if load.ratio is None else f"{load.ratio:.2f}",
                    f"{load.per_tensor_s * 1e6:.1f}",
                    format_size(load.private_bytes) if load.private_bytes else "-",
                    " ".join(map(ms, load.runs_s)),
                )
                for load in loads
            ),
        ]
    )


def _peer_table(peers: Sequence[Peer]) -> Iterator[str]:
    yield from columns(
        [
            ("other loaders, page cache hot", "version", "ms", "GB/s", "over link", "runs, ms", ""),
            *(
                (
                    peer.name,
                    peer.version or "-",
                    "-" if peer.median_s is None else ms(peer.median_s),
                    "-" if peer.per_s is None else f"{peer.per_s / 1e9:.1f}",
                    "-" if peer.ratio is None else f"{peer.ratio:.2f}",
                    " ".join(map(ms, peer.runs_s)),
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


def _footprint(cost: Footprint) -> Iterator[str]:
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
