"""The daemon's policy: entries, names, leases, and what gives way to what.

Pure: no sockets, no memory, no clock of its own. It decides; the server acts. Each decision that frees something is a list
of keys, and the server frees what the list names.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from nbcache.errors import EntryInUse, EntryNotFound, HostMemoryFull
from nbcache.units import format_duration, format_size


class Host(enum.Enum):
    """States of an entry's host copy."""

    ABSENT = "absent"
    STAGING = "staging"
    STAGED = "staged"


class Event(enum.Enum):
    """What can happen to a host copy."""

    STAGE = "stage"
    SEAL = "seal"
    FAIL = "fail"
    EVICT = "evict"


TRANSITIONS: dict[tuple[Host, Event], Host] = {
    (Host.ABSENT, Event.STAGE): Host.STAGING,
    (Host.STAGING, Event.SEAL): Host.STAGED,
    (Host.STAGING, Event.FAIL): Host.ABSENT,
    (Host.STAGED, Event.EVICT): Host.ABSENT,
}
"""The one table of transitions; a pair that is not in it is a broken invariant."""


class IllegalTransition(RuntimeError):
    """An event that a state does not know. A bug: the daemon stops loudly rather than guess."""


@dataclass
class Entry:
    """One cached checkpoint or put. ``bytes`` are the tensors' own, ``extent_bytes`` what it takes in the tier."""

    key: str
    name: str
    provenance: str
    source: tuple[str, ...]
    bytes: int
    extent_bytes: int
    tensors: int
    host: Host = Host.ABSENT
    names: list[str] = field(default_factory=list)
    leases: dict[int, int] = field(default_factory=dict)
    """Lease to process id."""
    pinned: bool = False
    last_used_s: float = 0.0

    def happen(self, event: Event) -> None:
        """Change state by the table; IllegalTransition, and no change, if the table has no such pair."""
        try:
            self.host = TRANSITIONS[self.host, event]
        except KeyError:
            raise IllegalTransition(f"{self.key}: {event} in state {self.host}") from None

    @property
    def idle(self) -> bool:
        """Complete, and used by nobody (a pin counts as a use)."""
        return self.host is Host.STAGED and not self.leases and not self.pinned

    @property
    def superseded(self) -> bool:
        """Its last name went to a newer generation."""
        return self.host is Host.STAGED and not self.names


class Store:
    """All entries. ``limit_bytes`` is asked whenever room is needed; ``clock`` gives monotonic seconds.

    Notes
    -----
    Single-threaded: the server's loop owns it. A method that raises has changed nothing.
    """

    def __init__(self, limit_bytes: Callable[[], int], clock: Callable[[], float]) -> None:
        self._limit_bytes = limit_bytes
        self._clock = clock
        self.entries: dict[str, Entry] = {}
        self._names: dict[str, str] = {}

    @property
    def limit_bytes(self) -> int:
        """The most that entries may take, now."""
        return self._limit_bytes()

    @property
    def used_bytes(self) -> int:
        """What they take."""
        return sum(entry.extent_bytes for entry in self.entries.values())

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
        if entry is None:
            known = ", ".join(sorted(self._names)) or "nothing"
            raise EntryNotFound(f"{names[0] if names else ''}: not cached; cached: {known}")
        return entry

    def admit(self, entry: Entry) -> list[str]:
        """Take a new entry in as STAGING. Returns the keys to evict first; HostMemoryFull if that cannot make room."""
        assert entry.key not in self.entries, entry.key
        victims = self.plan_eviction(entry.extent_bytes, entry.name)
        entry.happen(Event.STAGE)
        entry.last_used_s = self._clock()
        self.entries[entry.key] = entry
        return victims

    def plan_eviction(self, need_bytes: int, name: str) -> list[str]:
        """Which idle ``file`` entries give way: superseded ones first, then the least recently used.

        HostMemoryFull, with what is in the way, if they do not suffice.
        """
        limit = self.limit_bytes
        free = limit - self.used_bytes
        victims = []
        for entry in sorted(self._evictable(), key=lambda e: (not e.superseded, e.last_used_s)):
            if free >= need_bytes:
                break
            victims.append(entry.key)
            free += entry.extent_bytes
        if free < need_bytes:
            raise HostMemoryFull(self._full(name, need_bytes, limit))
        return victims

    def _evictable(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.idle and entry.provenance == "file"]  # I7

    def _full(self, name: str, need_bytes: int, limit: int) -> str:
        free = max(0, limit - self.used_bytes)
        message = f"host tier full: {name} needs {format_size(need_bytes)}, {format_size(free)} free of {format_size(limit)}"
        if need_bytes > limit:
            return f"{message}; raise NBCache.host_limit"
        in_the_way = [self._why_kept(entry) for entry in self.entries.values() if entry not in self._evictable()]
        return f"{message}; in the way: {', '.join(in_the_way)}; evict or release one of them, or raise NBCache.host_limit"

    def _why_kept(self, entry: Entry) -> str:
        if entry.host is Host.STAGING:
            why = "being staged"
        elif entry.leases:
            why = f"used by process {', '.join(str(pid) for pid in sorted(set(entry.leases.values())))}"
        elif entry.pinned:
            why = "pinned"
        else:
            why = f"saved with put, idle {format_duration(self._clock() - entry.last_used_s)}"
        return f"{entry.name} ({format_size(entry.extent_bytes)}, {why})"

    def complete(self, key: str) -> list[str]:
        """Staging is done and sealed. Its names now mean this generation; returns the superseded keys to free."""
        entry = self.entries[key]
        entry.happen(Event.SEAL)
        names, entry.names = entry.names, []
        return [freed for name in names for freed in self.give_name(key, name)]

    def fail(self, key: str) -> None:
        """Staging came to nothing: the entry is forgotten (I2)."""
        self.entries[key].happen(Event.FAIL)
        del self.entries[key]

    def give_name(self, key: str, name: str) -> list[str]:
        """Let a name mean this entry. Returns the key of the entry that thereby lost its last name and is idle, to free.

        A pin follows the name to the newer generation.
        """
        entry = self.entries[key]
        if entry.host is Host.STAGING:
            if name not in entry.names:
                entry.names.append(name)
            return []
        older = self.entries.get(self._names.get(name, ""))
        if older is entry:
            return []
        self._names[name] = key
        entry.names.append(name)
        if older is None:
            return []
        older.names.remove(name)
        if older.names:
            older.name = older.names[0] if older.name == name else older.name
            return []
        entry.pinned, older.pinned = entry.pinned or older.pinned, False
        return self._free_superseded(older)

    def grant(self, key: str, lease: int, pid: int) -> None:
        """Note a lease on a complete entry."""
        entry = self.entries[key]
        assert entry.host is Host.STAGED, entry  # I2
        entry.leases[lease] = pid
        entry.last_used_s = self._clock()

    def release(self, key: str, lease: int) -> list[str]:
        """End a lease (I1). Returns the key if the entry is superseded and now idle, to free."""
        entry = self.entries[key]
        del entry.leases[lease]
        entry.last_used_s = self._clock()
        return self._free_superseded(entry)

    def _free_superseded(self, entry: Entry) -> list[str]:
        return [entry.key] if entry.superseded and entry.idle else []

    def pin(self, names: Sequence[str], pinned: bool) -> None:
        """Pin or unpin; EntryNotFound if there is no such entry."""
        self.named(names).pinned = pinned

    def check_evictable(self, names: Sequence[str]) -> Entry:
        """The entry, if a person may evict it by name; EntryNotFound or EntryInUse, with who uses it, if not (I4)."""
        entry = self.named(names)
        if entry.pinned:
            raise EntryInUse(f"{entry.name} is pinned; unpin it first (%weights unpin {entry.name})")
        if not entry.idle:
            raise EntryInUse(
                f"{self._why_kept(entry)}; release it there (del the weights, or restart that kernel), then evict it"
            )
        return entry

    def evictable_by_all(self) -> tuple[list[str], list[str]]:
        """For "evict everything": the keys that go, and the names that stay because only their own name evicts them."""
        going = self._evictable()
        return [e.key for e in going], [self._why_kept(e) for e in self.entries.values() if e not in going]

    def evict(self, key: str) -> None:
        """Forget an entry whose memory the server frees. IllegalTransition if it is not complete, or is in use (I4)."""
        entry = self.entries[key]
        if entry.leases or entry.pinned:
            raise IllegalTransition(f"{key}: evicted while in use")
        entry.happen(Event.EVICT)
        for name in entry.names:
            del self._names[name]
        del self.entries[key]
