"""What the store counts and what the tiers hold, kept the same: decisions of the one are carried out on the other.

Owns the pair. Knows no connection, and decides nothing. It exists so that memory is freed in one place only: never without the
store's word, and never forgotten by the store while it is still taken.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from nbcache.daemon.entries import Place, Residences
from nbcache.daemon.store import Store
from nbcache.daemon.tiers import Tiers

log = logging.getLogger("nbcache.daemon")


class Holdings:
    """The store, and the memory of which it speaks.

    Notes
    -----
    The server's thread owns it. ``on_freed`` is told what was given back. An :class:`IllegalTransition` of the store's is let
    through, and nothing is freed then.
    """

    def __init__(self, store: Store, tiers: Tiers, on_freed: Callable[[str, Place], None] = lambda *_: None) -> None:
        self.store = store
        self.tiers = tiers
        self._on_freed = on_freed

    def free(self, residences: Residences) -> None:
        """Evict residences that the store chose."""
        for key, place in residences:
            log.info("evicting %s from %s (%s)", self.store.entries[key].name, place.kind.value, key)
            self.store.evict(key, place)
            self._give_back(key, place)

    def abandon(self, key: str, place: Place) -> None:
        """Forget a residence whose filling came to nothing (I2)."""
        self.store.fail(key, place)
        self._give_back(key, place)

    def _give_back(self, key: str, place: Place) -> None:
        self.tiers.free(key, place)
        if key not in self.store.entries:
            self.tiers.forget(key)
        self._on_freed(key, place)

    @contextlib.contextmanager
    def undone_on_error(self, key: str, place: Place) -> Iterator[None]:
        """Abandon a residence if what begins to fill it raises."""
        try:
            yield
        except BaseException:
            self.abandon(key, place)
            raise
