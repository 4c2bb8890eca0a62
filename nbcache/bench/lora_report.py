"""The figures of LoRAs in a live pipeline, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import msgspec

from nbcache.bench.figures import ms, rate
from nbcache.bench.kernel import Card
from nbcache.jupyter.display import columns
from nbcache.units import format_duration, format_size


class Row(msgspec.Struct, frozen=True):
    """One LoRA. Seconds; where there are several runs, all of them. ``found`` is what each is measured from."""

    name: str
    nbytes: int
    tensors: int
    rank: int
    stock_load_s: float
    stock_hotswap_s: tuple[float, ...]
    first_converted_s: float
    first_pinned_s: float
    first_hot_s: float
    swap_pinned_s: tuple[float, ...]
    swap_hot_s: tuple[float, ...]
    equal: bool
    """Whether the transformer's output is that after the stock loader, bit for bit."""

    @property
    def ratio(self) -> float:
        """The stock hotswap over ours from pinned memory, medians."""
        return statistics.median(self.stock_hotswap_s) / statistics.median(self.swap_pinned_s)


class Churn(msgspec.Struct, frozen=True):
    """Random swaps among several LoRAs. Bytes are growth over them, after as many as make every LoRA known."""

    swaps: int
    loras: int
    hot: int
    """Swaps that found their LoRA on the GPU."""
    seconds: float
    torch_bytes: int
    gpu_bytes: int | None
    rss_bytes: int
    cache_bytes: int
    equal: bool
    """Whether the last output is that of a fresh load."""


class LoraReport(msgspec.Struct, frozen=True):
    """What ``nbcache bench lora`` measured in one run on one machine."""

    card: Card
    versions: dict[str, str]
    rows: tuple[Row, ...] = ()
    churn: Churn | None = None
    failed: dict[str, str] = {}
    """What could not be measured, and why."""
    complete: bool = False
    """Whether the run came to its end; a report of one that was cut off does not say so."""


def render_lora(report: LoraReport) -> str:
    """The report as lines of text, of a run that was cut off too."""
    return "\n".join(_lines(report))


def _lines(report: LoraReport) -> Iterator[str]:
    versions = ", ".join(f"{package} {version}" for package, version in report.versions.items())
    yield f"{report.card.name}, link {rate(report.card.link_per_s)}; {versions}"
    yield "from the call to a pipeline that uses the LoRA, device synchronised; ms, medians of several, (most)"
    yield ""
    yield from columns([HEADER, *map(_row, report.rows)])
    yield from (f"not measured: {name}: {why}" for name, why in report.failed.items())
    if report.churn is not None:
        yield ""
        yield from _churn(report.churn)


HEADER = (
    "LoRA", "size", "stock load", "hotswap", "first", "first, pinned", "first, hot", "swap, pinned", "swap, hot",
    "over hotswap", "output",
)  # fmt: skip


def _row(row: Row) -> tuple[str, ...]:
    return (
        f"{row.name}, {row.tensors} tensors",
        format_size(row.nbytes),
        ms(row.stock_load_s),
        _spread(row.stock_hotswap_s),
        ms(row.first_converted_s),
        ms(row.first_pinned_s),
        ms(row.first_hot_s),
        _spread(row.swap_pinned_s),
        _spread(row.swap_hot_s),
        f"{row.ratio:.0f}x",
        "as stock" if row.equal else "OTHER THAN STOCK",
    )


def _churn(churn: Churn) -> Iterator[str]:
    gpu = "" if churn.gpu_bytes is None else f", of the GPU beside slabs {format_size(max(0, churn.gpu_bytes))}"
    each = format_duration(churn.seconds / churn.swaps)
    yield f"{churn.swaps} random swaps among {churn.loras}: {each} each, {churn.hot} hot"
    yield (
        f"growth: reserved by torch {format_size(max(0, churn.torch_bytes))}{gpu}, of this process "
        f"{format_size(max(0, churn.rss_bytes))}, of the cache {format_size(max(0, churn.cache_bytes))}"
    )
    yield f"then the output is {'that of' if churn.equal else 'OTHER THAN'} a fresh stock load"


def _spread(seconds: Sequence[float]) -> str:
    return f"{ms(statistics.median(seconds))} ({ms(max(seconds))})"
