"""Sizes and durations as people write and read them."""

from __future__ import annotations

import re
from fractions import Fraction

from nbcache.errors import InvalidOption

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes in ``48G``, ``48 GB`` (10^9 each), ``48GiB`` (2^30 each) or ``1024``. InvalidOption if it is none of them."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise InvalidOption(f"{text!r} is not a size: write bytes, or a number with K, M, G, T or KiB, MiB, GiB, TiB")
    unit = match[2].upper()
    return int(Fraction(match[1]) * (_BINARY[unit] if match[3] else _DECIMAL[unit]))


def format_size(size_bytes: int) -> str:
    """``23.8 GB``, ``512 kB``, ``7 B``: three digits, decimal units."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_idle(idle_s: float) -> str:
    """How long nobody has used something: ``under 1 s``, ``12 s``, ``12 min``, ``5 h``."""
    if idle_s < 1:
        return "under 1 s"
    return f"{idle_s:.0f} s" if idle_s < 100 else format_duration(idle_s)


def format_duration(duration_s: float) -> str:
    """``0.8 ms``, ``3.2 s``, ``12 min``, ``5 h``."""
    if duration_s < 1:
        return f"{duration_s * 1000:.1f} ms"
    if duration_s < 100:
        return f"{duration_s:.1f} s"
    if duration_s < 100 * 60:
        return f"{duration_s / 60:.0f} min"
    return f"{duration_s / 3600:.0f} h"
