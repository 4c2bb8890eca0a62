"""Warnings: what a user is told without being stopped, at the line of theirs that asked."""

from __future__ import annotations

import sys
import warnings


class SourceGone(UserWarning):
    """The file of an entry is gone; the cached copy serves on."""


class NoSharedGpuMemory(UserWarning):
    """The GPU tier cannot be used; weights were copied to the GPU the ordinary way."""


class CopyOnWriteUnavailable(UserWarning):
    """This torch lacks what copy-on-write needs; weights were copied."""


class NotServed(UserWarning):
    """A stock loader was to be served from the cache, and was not; it loaded as it always does."""


class LoraReinjected(UserWarning):
    """A LoRA did not fit into what was prepared for swapping; the adapter was injected anew."""


class LoraIncomplete(UserWarning):
    """The pipeline lacks some of a LoRA's modules; they were left out."""


class SetTooLate(UserWarning):
    """A notebook has set what a package would have read when it was imported; it was imported ahead, and cannot be anew."""


class ImportedAnew(UserWarning):
    """A package that was imported ahead of a kernel was imported again, for the notebook has set what it reads then."""


def notify(category: type[UserWarning], message: str) -> None:
    """Warn at the nearest caller outside this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "nbcache":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
