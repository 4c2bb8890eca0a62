"""The figures of restarts, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import msgspec

from nbcache.units import format_duration


class Series(msgspec.Struct, frozen=True):
    """Restarts of one kernel. Seconds, a number for each."""

    runs_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The median."""
        return statistics.median(self.runs_s)

    @property
    def worst_s(self) -> float:
        """The slowest."""
        return max(self.runs_s)


class Restarts(msgspec.Struct, frozen=True):
    """Both kernels with the same first cell."""

    imports: str
    """What the first cell imports beside torch."""
    stock: Series
    ours: Series
    stock_median_s: float
    stock_worst_s: float
    ours_median_s: float
    ours_worst_s: float
    ratio: float
    """How many times as long the stock kernel takes, of the medians."""
    forked: int
    """How many of our kernels were forked; the others started the ordinary way."""


class RestartReport(msgspec.Struct, frozen=True):
    """What ``nbcache bench restart`` measured in one run on one machine."""

    client: str
    checkpoint: str
    device: str
    tensors: int
    python: str
    processors: int
    restarts: tuple[Restarts, ...]
    preloaded: dict[str, float]
    """What the zygote had imported ahead, and how many seconds each took it."""
    left_out: dict[str, str]
    """What it could not, and why."""
    failed: dict[str, str] = {}
    """First cells that could not be measured, and why."""
    complete: bool = False
    """Whether the run came to its end; a report of one that was cut off does not say so."""


def compare(line: str, stock_s: Sequence[float], ours_s: Sequence[float], forked: int) -> Restarts:
    """Restarts with one first cell, at least one of each kernel."""
    stock, ours = Series(tuple(stock_s)), Series(tuple(ours_s))
    return Restarts(
        imports=line,
        stock=stock,
        ours=ours,
        stock_median_s=stock.median_s,
        stock_worst_s=stock.worst_s,
        ours_median_s=ours.median_s,
        ours_worst_s=ours.worst_s,
        ratio=stock.median_s / ours.median_s,
        forked=forked,
    )


def render_restart(report: RestartReport) -> str:
    """The report as a person reads it, of a run that was cut off too."""
    return "\n".join(_lines(report))


def _lines(report: RestartReport) -> Iterator[str]:
    yield (
        f"{report.checkpoint}: {report.tensors} tensors to {report.device}; Python {report.python}, "
        f"{report.processors} processors, client: {report.client}"
    )
    yield "from the request to restart to all that the first cell shows, which uses the weights"
    yield f"{'the cell also needs':44}{'stock':>10}{'worst':>10}{'nbcache':>10}{'worst':>10}{'':6}{'restarts':>9}"
    for each in report.restarts:
        times = (each.stock_median_s, each.stock_worst_s, each.ours_median_s, each.ours_worst_s)
        figures = "".join(f"{format_duration(seconds):>10}" for seconds in times)
        yield f"{each.imports or 'nothing':44}{figures}{each.ratio:>5.1f}x{len(each.ours.runs_s):>9}"
    yield from (f"not measured: {line or 'nothing'}: {why}" for line, why in report.failed.items())
    forked, total = sum(each.forked for each in report.restarts), sum(len(each.ours.runs_s) for each in report.restarts)
    yield f"medians of restarts, in turns, page cache hot; {forked} of {total} forked"
    if report.preloaded:
        slow = [(name, seconds) for name, seconds in report.preloaded.items() if seconds > 0.1]
        ahead = ", ".join(f"{name} ({format_duration(seconds)})" for name, seconds in slow)
        yield f"imported ahead: {ahead}"
    yield from (f"left out: {name}: {why}" for name, why in report.left_out.items())
