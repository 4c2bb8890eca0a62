"""Figures as text."""

from __future__ import annotations


def ms(seconds: float) -> str:
    """Milliseconds, without their unit."""
    return f"{seconds * 1000:.1f}"


def rate(per_s: float) -> str:
    """Bytes per second."""
    return f"{per_s / 1e9:.1f} GB/s"


def count(number: int, noun: str) -> str:
    """``1 run``, ``3 runs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
