"""Host copies on their way: begun from a checkpoint's files or from the entry's copy of the other kind, and ended.

Owns the stagings that run. Knows entries and memory; no connection, no request: who waits for a copy is told by whoever made
this. It exists because a copy that began for one connection goes on without it, and serves all that ask meanwhile (I3).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import Protocol

from nbcache.daemon.entries import PINNED, SHARED, Entry, Place, State
from nbcache.daemon.holdings import Holdings
from nbcache.daemon.reader import FileSource, Source, Staging
from nbcache.errors import HostMemoryFull, NBCacheError

log = logging.getLogger("nbcache.daemon")

OWN_LEASE = 0
"""The daemon's own lease on a host copy that it copies; connections count from 1."""


class HostCopies:
    """Begins host copies and sees them to their end.

    Notes
    -----
    The server's thread owns it; reading and copying run in the reader's threads. A copy that cannot even begin raises, and
    nothing of it is left.
    """

    def __init__(self, holdings: Holdings, watcher: Watcher) -> None:
        self._holdings, self._store, self._tiers = holdings, holdings.store, holdings.tiers
        self._watcher = watcher
        self._stagings: dict[tuple[str, Place], Staging] = {}

    def staging_of(self, key: str) -> Staging | None:
        """The staging of an entry's host copy, if one runs."""
        return next((staging for (each, _), staging in self._stagings.items() if each == key), None)

    def is_coming(self, entry: Entry, place: Place) -> bool:
        """Whether a host copy is there or on its way, be it through the other kind; if it can be begun from that one, it is."""
        other = SHARED if place == PINNED else PINNED
        return (
            entry.state(place) is not State.ABSENT
            or entry.state(other) is State.FILLING
            or (entry.state(other) is State.READY and self._fill_from(entry, other, place))
        )

    def _fill_from(self, entry: Entry, other: Place, place: Place) -> bool:
        """Begin a host copy from the one of the other kind; False if there is room for one only, which is then neither."""
        self._holdings.free(self._store.fill(entry, place, entry.extent_bytes))
        if entry.state(other) is not State.READY:
            self._holdings.abandon(entry.key, place)
            return False
        self._store.grant(entry.key, other, OWN_LEASE, os.getpid())  # I4: it stays while it is copied
        with self._holdings.undone_on_error(entry.key, place), self._released_on_error(entry):
            if place == PINNED:
                source = self._tiers.copy_source(entry.key, entry.name)
                self._start_pinned(entry, source)
            else:
                self._tiers.create_shared(entry.key, entry.name, entry.extent_bytes)
                self._track(entry, SHARED, self._tiers.fill_shared_from_pinned(entry.key, partial(self._ended, entry, SHARED)))
        return True

    @contextlib.contextmanager
    def _released_on_error(self, entry: Entry) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._release_source(entry)
            raise

    def read(self, entry: Entry, place: Place, source: FileSource) -> None:
        """Begin to fill a host copy, for which the store has made room, from files. Takes the source over, and closes it."""
        log.info("staging %s: %d bytes in %d tensors, %s", entry.name, entry.bytes, entry.tensors, place.kind.value)
        try:
            if place == PINNED:
                self._start_pinned(entry, source)
                return
            self._tiers.create_shared(entry.key, entry.name, entry.extent_bytes)
            self._track(entry, SHARED, self._tiers.fill_shared(entry.key, source, partial(self._ended, entry, SHARED)))
        except BaseException:
            source.close()
            raise

    def _start_pinned(self, entry: Entry, source: Source) -> None:
        on_block, done = partial(self._watcher.block_staged, entry.key), partial(self._ended, entry, PINNED)
        self._track(entry, PINNED, self._tiers.fill_pinned(entry.key, source, entry.extent_bytes, on_block, done))

    def _track(self, entry: Entry, place: Place, staging: Staging) -> None:
        self._stagings[entry.key, place] = staging

    def _release_source(self, entry: Entry) -> None:
        for place in [each.place for each in entry.residences.values() if OWN_LEASE in each.leases]:
            self._holdings.free(self._store.release(entry.key, place, OWN_LEASE))

    def _ended(self, entry: Entry, place: Place, error: Exception | None) -> None:
        """A host copy is complete, or came to nothing."""
        del self._stagings[entry.key, place]
        self._release_source(entry)
        if error is None:
            log.info("staged %s, %s", entry.name, place.kind.value)
            self._holdings.free(self._store.complete(entry.key, place))
            self._watcher.staged(entry, place)
            self._holdings.free(self._store.superseded(entry))  # nobody waited for it, and no name leads to it
            return
        log.warning("staging %s failed: %s", entry.name, error)
        known = error if isinstance(error, NBCacheError) else NBCacheError(f"{entry.name}: {type(error).__name__}: {error}")
        if isinstance(error, HostMemoryFull):
            known = HostMemoryFull(f"{entry.name}: {error}")
        self._holdings.abandon(entry.key, place)
        self._watcher.staging_failed(entry, place, known)


class Watcher(Protocol):
    """Who is told how host copies fare, in the server's thread."""

    def block_staged(self, key: str) -> None:
        """One more block of a pinned copy is full."""

    def staged(self, entry: Entry, place: Place) -> None:
        """A host copy is complete."""

    def staging_failed(self, entry: Entry, place: Place, error: NBCacheError) -> None:
        """A host copy came to nothing, and is forgotten; the entry too, if it has no other residence."""
