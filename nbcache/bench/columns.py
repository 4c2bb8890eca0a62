"""Figures as text, in columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines, each column as wide as its widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def ms(seconds: float) -> str:
    """Milliseconds, without their unit."""
    return f"{seconds * 1000:.1f}"


def rate(per_s: float) -> str:
    """Bytes per second."""
    return f"{per_s / 1e9:.1f} GB/s"


def count(number: int, noun: str) -> str:
    """``1 run``, ``3 runs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
