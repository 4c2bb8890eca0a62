"""When idle slabs leave a GPU: after a while, or when others need the memory."""

from __future__ import annotations

from dataclasses import dataclass

from nbcache.daemon.entries import Residences
from nbcache.daemon.store import Store
from nbcache.errors import DriverError
from nbcache.memory.arena import BLOCK_BYTES
from nbcache.memory.driver import Driver


@dataclass(frozen=True)
class GpuPolicy:
    """``keep_s``: how long an idle slab stays (0: not at all, negative: for ever); ``low_bytes``: free memory it must leave."""

    keep_s: float = 600.0
    low_bytes: int = 2_000_000_000
    block_bytes: int = BLOCK_BYTES

    def expired(self, store: Store, driver: Driver | None) -> Residences:
        """The idle slabs that are to go now: too old, or in the way."""
        idle = store.idle_slabs()
        if not idle or driver is None:
            return []
        old = store.idle_slabs(unused_s=self.keep_s) if self.keep_s >= 0 else []
        return old + [slab for slab in self._in_the_way(store, driver) if slab not in old]

    def _in_the_way(self, store: Store, driver: Driver) -> Residences:
        """On each GPU that runs low, the least recently used idle slabs that bring it above the mark again."""
        going: Residences = []
        for uuid in {place.uuid for _, place in store.idle_slabs()}:
            try:
                free = driver.free_bytes(uuid)
            except DriverError:  # asked again at the next tick
                continue
            for key, place in store.idle_slabs(uuid):
                if free >= self.low_bytes:
                    break
                going.append((key, place))
                free += store.entries[key].residences[place].extent_bytes
        return going
