"""Whether a thread reads files past the switch: as the stock functions read them, whatever is switched on.

Owns one flag for each thread. Imports nothing, so that the switch can look at it. It exists because an original that is being
converted is not to be cached beside what comes of it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_local = threading.local()


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Inside, this thread's stock calls are stock."""
    before = is_aside()
    _local.on = True
    try:
        yield
    finally:
        _local.on = before


def is_aside() -> bool:
    """Whether this thread is in such a block."""
    return getattr(_local, "on", False)
