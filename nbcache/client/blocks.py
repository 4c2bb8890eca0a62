"""Host blocks that this process has mapped for a GPU, once the load is over that mapped them.

To map blocks takes as long as to copy them. So those of a small copy, such as a LoRA that is swapped in and out, stay mapped
for the next load until the daemon frees the copy, which ends a connection that watches it; all others are unmapped in the
background. Owns the maps meanwhile, and the threads that wait. Must not know what is copied from them. No torch here.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import lru_cache

from nbcache.client.session import Session, expect
from nbcache.memory.driver import Mapped
from nbcache.protocol import messages as m

LINGER_S = 0.25
"""When host blocks are unmapped, after a load: that takes locks of the driver's which what follows a load wants as well."""
KEEP_BYTES = 4 << 30
"""What may stay mapped; and what may linger, but for the blocks of the last load, which may linger whatever they take."""
KEEP_COPIES = 16
"""Of how many copies blocks may stay mapped. Each takes a thread, and descriptors here and in the daemon."""
KEEP_S = 600.0
"""For how long blocks stay mapped that are not copied from again."""
PATIENCE_S = 2.0
"""How long the daemon may take to answer: to have blocks mapped already is not worth more."""


@dataclass(frozen=True)
class Copy:
    """A pinned copy of an entry, by the number that the daemon gave it, as one GPU sees it."""

    key: str
    number: int
    gpu: str


@dataclass(eq=False)
class _Parked:
    """Blocks that nobody copies from just now. ``session`` watches their copy."""

    mapped: list[Mapped]
    copy: Copy | None
    due_s: float
    session: Session | None = None

    @property
    def size_bytes(self) -> int:
        """Of all blocks."""
        return sum(each.size_bytes for each in self.mapped)

    def stop_watching(self) -> None:
        """Wake the thread that watches."""
        if self.session is not None:
            self.session.shut()

    def unmap(self) -> None:
        """Unmap all; what refuses stays."""
        for each in self.mapped:
            with contextlib.suppress(Exception):  # of this one alone: the others are to go, and those that come
                each.close()


class MappedBlocks:
    """Blocks between loads.

    Notes
    -----
    Any thread may put and take. The blocks of a copy are right for as long as the daemon calls it by the same number; the watch
    is there so that its memory is free as soon as the daemon frees it, and this process can run.
    """

    def __init__(self) -> None:
        self._lingering: deque[_Parked] = deque()
        self._kept: dict[Copy, _Parked] = {}
        self._changed = threading.Condition()
        self._is_tidied = False

    def put(self, mapped: list[Mapped], copy: Copy | None = None) -> None:
        """Unmap these by and by; or, all blocks of a ``copy``, keep them for the next load if they are not too large."""
        if mapped:
            with self._changed:
                self._lingering.append(_Parked(mapped, copy, time.monotonic() + LINGER_S))
                self._changed.notify()
                if not self._is_tidied:
                    with contextlib.suppress(RuntimeError):  # no more threads can be had: the next to put here tries again
                        threading.Thread(target=self._tidy, name="nbcache-unmap", daemon=True).start()
                        self._is_tidied = True

    def take(self, copy: Copy) -> list[Mapped]:
        """All blocks of a copy, the caller's from now on; none if they are not mapped."""
        with self._changed:
            if copy in self._kept:
                found = self._kept.pop(copy)
                found.stop_watching()
                return found.mapped
            for each in self._lingering:
                if each.copy == copy:
                    self._lingering.remove(each)
                    return each.mapped
        return []

    def _tidy(self) -> None:
        while True:
            parked = self._next()
            if parked.copy is not None and parked.size_bytes <= KEEP_BYTES:
                with contextlib.suppress(RuntimeError):  # no more threads can be had
                    threading.Thread(target=self._keep, args=(parked, parked.copy), name="nbcache-watch", daemon=True).start()
                    continue
            parked.unmap()

    def _next(self) -> _Parked:
        """Wait for what is due next."""
        with self._changed:
            while (left_s := self._left_s()) > 0:
                self._changed.wait(left_s)
            return self._lingering.popleft()

    def _left_s(self) -> float:
        """For how long nothing is due, if nothing is put here meanwhile."""
        if not self._lingering:
            return threading.TIMEOUT_MAX
        crowded = len(self._lingering) > 1 and sum(each.size_bytes for each in self._lingering) > KEEP_BYTES
        return 0.0 if crowded else self._lingering[0].due_s - time.monotonic()

    def _keep(self, parked: _Parked, copy: Copy) -> None:
        """Keep blocks until they are taken, the daemon frees their copy, or nobody has wanted them for long."""
        session = _watch(copy)
        if session is None:
            parked.unmap()
            return
        parked.session = session
        with self._changed:
            going = [self._kept.pop(copy)] if copy in self._kept else []
            self._kept[copy] = parked
            while len(self._kept) > KEEP_COPIES or sum(each.size_bytes for each in self._kept.values()) > KEEP_BYTES:
                going.append(self._kept.pop(next(iter(self._kept))))
            for each in going:
                each.stop_watching()
        for each in going:
            each.unmap()
        session.await_end(KEEP_S)
        with self._changed:
            is_kept = self._kept.get(copy) is parked
            if is_kept:
                del self._kept[copy]
        session.close()
        if is_kept:
            parked.unmap()


def _watch(copy: Copy) -> Session | None:
    """A session that the daemon ends with the copy; None if the copy is gone already, or it cannot be watched."""
    try:
        session = Session.open(start=False, reply_timeout_s=PATIENCE_S)
        try:
            expect(session.request(m.Watch(copy.key, copy.number)), m.Watched)
        except BaseException:
            session.close()
            raise
    except Exception:  # noqa: BLE001 - whatever it is, the blocks are not kept, and that is all
        return None
    return session


def mapped_blocks() -> MappedBlocks:
    """This process's; a forked child has none of its parent's."""
    return _mapped_blocks(os.getpid())


@lru_cache(1)
def _mapped_blocks(pid: int) -> MappedBlocks:
    return MappedBlocks()
