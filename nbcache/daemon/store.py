"""The daemon's policy: entries, names, leases, and what gives way to what.

Pure: no sockets, no memory, no clock of its own. It decides; the holdings act. A decision that frees something is a list of
residences, and the holdings free what the list names. What an entry, a residence and a state are stands in ``entries``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from nbcache.daemon.entries import (
    Entry,
    Event,
    IllegalTransition,
    Kind,
    Place,
    Residence,
    Residences,
    State,
)
from nbcache.errors import DeviceMemoryFull, EntryInUse, EntryNotFound, HostMemoryFull
from nbcache.units import format_duration, format_size

RAISE_LIMIT = "raise NBCache.host_limit (NBCACHE_HOST_LIMIT=..., then `nbcache restart`, which drops what was saved)"


class Store:
    """All entries. ``limit_bytes`` is asked whenever room is needed; ``clock`` gives monotonic seconds.

    Notes
    -----
    Single-threaded: the thread of the server's loop owns it. A method that raises has changed nothing.
    """

    def __init__(self, limit_bytes: Callable[[], int], clock: Callable[[], float]) -> None:
        self._limit_bytes = limit_bytes
        self._clock = clock
        self.entries: dict[str, Entry] = {}
        self._names: dict[str, str] = {}
        self._generations = itertools.count(1)
        self._numbers = itertools.count(1)

    # What there is

    @property
    def limit_bytes(self) -> int:
        """The most that host copies may take, now."""
        return self._limit_bytes()

    @property
    def used_bytes(self) -> int:
        """What they take."""
        return sum(residence.extent_bytes for _, residence in self._residences() if residence.place.on_host)

    def slab_bytes(self, uuid: str) -> int:
        """What slabs take on one GPU."""
        return sum(residence.extent_bytes for _, residence in self._residences() if residence.place.uuid == uuid)

    def _residences(self) -> Iterable[tuple[Entry, Residence]]:
        return ((entry, residence) for entry in self.entries.values() for residence in entry.residences.values())

    def find(self, names: Iterable[str], key: str = "") -> Entry | None:
        """The entry with this key, else the first that one of the names names."""
        if key:
            return self.entries.get(key)
        for name in names:
            if name in self._names:
                return self.entries[self._names[name]]
        return None

    def named(self, names: Sequence[str]) -> Entry:
        """The entry of the first of these names, or keys, that is one; EntryNotFound, with the names there are, if none is."""
        entry = self.find(names) or next((self.entries[name] for name in names if name in self.entries), None)
        entry = entry or next((e for e in self.entries.values() if not set(names).isdisjoint(e.names)), None)  # being filled
        if entry is None:
            known = ", ".join(sorted(self._names)) or "nothing"
            raise EntryNotFound(f"{names[0] if names else ''}: not cached; cached: {known}")
        return entry

    # Filling

    def fill(self, entry: Entry, place: Place, extent_bytes: int) -> Residences:
        """Begin to fill a residence of an entry, new or known. Returns what to evict first.

        HostMemoryFull if policy cannot make room in the host tier; room on a GPU is the driver's to find.
        """
        victims = self.plan_eviction(extent_bytes, entry.name) if place.on_host else []
        residence = Residence(place, extent_bytes, last_used_s=self._clock(), number=next(self._numbers))
        residence.happen(Event.FILL)
        if entry.state(place) is not State.ABSENT:
            raise IllegalTransition(f"{entry.key}: filled twice in {place}")
        entry.residences[place] = residence
        if entry.key not in self.entries:
            entry.generation = next(self._generations)
            self.entries[entry.key] = entry
        return [victim for victim in victims if victim != (entry.key, place)]

    def complete(self, key: str, place: Place) -> Residences:
        """A residence is whole. With the entry's first, its names come to mean this generation. Returns what it superseded.

        A name that a newer generation has taken meanwhile stays with that one.
        """
        entry = self.entries[key]
        entry.residences[place].happen(Event.COMPLETE)
        names, entry.names = entry.names, []
        mine = [name for name in names if self._generation_of(name) <= entry.generation]
        return [freed for name in mine for freed in self.give_name(key, name)]

    def _generation_of(self, name: str) -> int:
        return self.entries[self._names[name]].generation if name in self._names else 0

    def fail(self, key: str, place: Place) -> None:
        """Filling came to nothing (I2); an entry without any residence is forgotten."""
        self.entries[key].residences[place].happen(Event.FAIL)
        self._forget(self.entries[key], place)

    def _forget(self, entry: Entry, place: Place) -> None:
        del entry.residences[place]
        if entry.residences:
            return
        for name in entry.names:
            if self._names.get(name) == entry.key:
                del self._names[name]
        del self.entries[entry.key]

    # Names

    def give_name(self, key: str, name: str) -> Residences:
        """Let a name mean this entry. Returns what is idle of the entry that thereby lost its last name, to free.

        A pin follows the name to the newer generation.
        """
        entry = self.entries[key]
        if not entry.ready:
            if name not in entry.names:
                entry.names.append(name)
            return []
        older = self.entries.get(self._names.get(name, ""))
        self._names[name] = key
        if name not in entry.names:
            entry.names.append(name)
        if entry.name not in entry.names:
            entry.name = name
        if older is None or older is entry:
            return []
        older.names.remove(name)
        if older.names:
            older.name = older.names[0] if older.name == name else older.name
            return []
        entry.pinned, older.pinned = entry.pinned or older.pinned, False
        return self.superseded(older)

    def superseded(self, entry: Entry) -> Residences:
        """What is idle of an entry, to free, if its last name went to a newer generation and nobody pinned it."""
        if not entry.superseded or entry.pinned:
            return []
        return [(entry.key, place) for place, residence in entry.residences.items() if residence.idle]

    # Leases

    def grant(self, key: str, place: Place, lease: int, pid: int) -> None:
        """Note a lease on a complete residence."""
        residence = self.entries[key].residences[place]
        if residence.state is not State.READY:  # I2
            raise IllegalTransition(f"{key}: granted in {place} while {residence.state}")
        residence.leases[lease] = pid
        residence.last_used_s = self._clock()

    def release(self, key: str, place: Place, lease: int) -> Residences:
        """End a lease (I1). Returns what is idle of the entry if it is superseded, to free."""
        entry = self.entries[key]
        residence = entry.residences[place]
        del residence.leases[lease]
        residence.last_used_s = self._clock()
        return self.superseded(entry)

    def pin(self, names: Sequence[str], pinned: bool) -> Residences:
        """Pin or unpin; EntryNotFound if there is no such entry. Returns what is idle of it if it is superseded, to free."""
        entry = self.named(names)
        entry.pinned = pinned
        return self.superseded(entry)

    # Eviction

    def plan_eviction(self, need_bytes: int, name: str) -> Residences:
        """Which idle host copies, but those of ``put`` entries, give way: superseded ones first, then the least recently used.

        HostMemoryFull, with what is in the way, if they do not suffice.
        """
        limit = self.limit_bytes
        free = limit - self.used_bytes
        victims: Residences = []
        for entry, residence in sorted(self._evictable(), key=lambda pair: (not pair[0].superseded, pair[1].last_used_s)):
            if free >= need_bytes:
                break
            victims.append((entry.key, residence.place))
            free += residence.extent_bytes
        if free < need_bytes:
            raise HostMemoryFull(self._host_full(name, need_bytes, limit))
        return victims

    def _evictable(self) -> list[tuple[Entry, Residence]]:
        """Host copies that policy may take (I4, I7)."""
        return [
            (entry, residence)
            for entry, residence in self._residences()
            if residence.place.on_host and residence.idle and not entry.pinned and entry.provenance != "put"
        ]

    def _host_full(self, name: str, need_bytes: int, limit: int) -> str:
        free = max(0, limit - self.used_bytes)
        message = f"host tier full: {name} needs {format_size(need_bytes)}, {format_size(free)} free of {format_size(limit)}"
        if need_bytes > limit:
            return f"{message}; {RAISE_LIMIT}"
        going = {id(residence) for _, residence in self._evictable()}
        ways = [
            self._why_kept(entry, residence)
            for entry, residence in self._residences()
            if residence.place.on_host and id(residence) not in going
        ]
        return f"{message}; in the way: {', '.join(ways)}; evict or release one of them, or {RAISE_LIMIT}"

    def _why_kept(self, entry: Entry, residence: Residence) -> str:
        if residence.state is State.FILLING:
            why = "being filled"
        elif residence.leases:
            why = f"used by process {', '.join(str(pid) for pid in sorted(set(residence.leases.values())))}"
        elif entry.pinned:
            why = "pinned"
        else:
            idle = format_duration(self._clock() - residence.last_used_s)
            why = f"saved with put, idle {idle}" if entry.provenance == "put" else f"idle {idle}"
        return f"{entry.name} ({format_size(residence.extent_bytes)}, {why})"

    def idle_slabs(self, uuid: str = "", names: Sequence[str] = (), unused_s: float = 0.0) -> Residences:
        """Slabs that nobody leases or pins, least recently used first: on one GPU, of one entry, unused for so long, as asked.

        EntryNotFound if ``names`` name no entry.
        """
        only = self.named(names) if names else None
        now = self._clock()
        found = [
            (residence.last_used_s, entry.key, residence.place)
            for entry, residence in self._residences()
            if not residence.place.on_host
            and residence.idle
            and not entry.pinned
            and not (entry.provenance == "put" and entry.names and entry.host is not State.READY)  # I7: its only bytes
            and (not uuid or residence.place.uuid == uuid)
            and (only is None or entry is only)
            and now - residence.last_used_s >= unused_s
        ]
        return [(key, place) for _, key, place in sorted(found, key=lambda item: item[0])]

    def device_full(self, uuid: str, name: str, need_bytes: int, free_bytes: int, total_bytes: int) -> DeviceMemoryFull:
        """The error for a slab that does not fit, with who holds what; or, if it never can, with how much the GPU has."""
        held = [self._why_kept(e, r) for e, r in self._residences() if r.place.uuid == uuid and r.place.kind is Kind.DEVICE]
        message = f"GPU {uuid} full: {name} needs {format_size(need_bytes)}, {format_size(free_bytes)} free"
        if need_bytes > total_bytes:
            return DeviceMemoryFull(
                f"{message} of {format_size(total_bytes)} in all; it can never fit: load it with another dtype, or device='cpu'"
            )
        if held:
            message += f"; nbcache holds {', '.join(held)}"
        return DeviceMemoryFull(f"{message}; free memory in the kernels that use this GPU, or release weights there")

    def check_evictable(self, names: Sequence[str]) -> Entry:
        """The entry, if a person may evict it by name; EntryNotFound or EntryInUse, with who uses it, if not (I4)."""
        entry = self.named(names)
        if entry.pinned:
            raise EntryInUse(f"{entry.name} is pinned; unpin it first (%weights unpin, nbcache unpin)")
        for residence in entry.residences.values():
            if not residence.idle:
                raise EntryInUse(
                    f"{self._why_kept(entry, residence)}; release it there (del the weights, or restart that kernel), "
                    "then evict it"
                )
        return entry

    def evictable_by_all(self) -> tuple[list[str], list[str]]:
        """For "evict everything": the keys that go, and what stays because it is in use or only its own name evicts it."""
        going, kept = [], []
        for entry in self.entries.values():
            busy = next((residence for residence in entry.residences.values() if not residence.idle), None)
            if busy is None and not entry.pinned and entry.provenance != "put":
                going.append(entry.key)
            else:
                kept.append(self._why_kept(entry, busy or next(iter(entry.residences.values()))))
        return going, kept

    def evict(self, key: str, place: Place) -> None:
        """Forget a residence whose memory the holdings free. IllegalTransition if it is not complete, or is in use (I4)."""
        entry = self.entries[key]
        residence = entry.residences[place]
        if residence.leases or entry.pinned:
            raise IllegalTransition(f"{key}: evicted from {place} while in use")
        residence.happen(Event.EVICT)
        self._forget(entry, place)
