"""What this process has let go of, and is ending behind the caller.

To unmap a slab of 24 GB takes the driver a while, and it can only begin when the last copy out of it is done; a load need not
wait for either. Owns the threads that do. It exists so that whoever asks the daemon next finds ended what was let go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

_running: set[threading.Thread] = set()


def behind(end: Callable[[], None]) -> None:
    """Do this in a thread; an interpreter that ends waits for it."""

    def run() -> None:
        try:
            end()
        finally:
            _running.discard(thread)

    thread = threading.Thread(target=run, name="nbcache-end")
    _running.add(thread)
    try:
        thread.start()
    except RuntimeError:  # no more threads, or the interpreter is ending
        run()


def wait() -> None:
    """Wait for all that was begun."""
    for thread in list(_running):
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join()
