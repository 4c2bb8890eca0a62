"""When Python's garbage collector is not to run. Owns that one switch, for all who make thousands of objects at once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Let no garbage collection run: thousands of new objects set off several, each over all that torch brought along."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
