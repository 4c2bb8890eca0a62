"""What a mistyped word may have meant, in the words that every error uses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(typed: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """The nearest of ``known``; empty where none is as near as ``likeness``, from 0 to 1."""
    return next(iter(difflib.get_close_matches(typed, known, 1, likeness)), "")


def did_you_mean(typed: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """The end of an error: ``; did you mean flux-dev?``, or nothing where none of ``known`` is as near as ``likeness``."""
    near = nearest(typed, known, likeness)
    return f"; did you mean {near}?" if near else ""
