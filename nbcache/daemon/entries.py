"""Entries and their residences: what the daemon keeps of a checkpoint, where, and in which state.

An entry is known by its key and lives in *residences*: a shared or a pinned copy in host memory, a slab on a GPU. Each
residence has a state and leases of its own, and they are independent: a slab may stay when the host copy was evicted.

Owns the words and the one table of transitions. Knows no other entry, no name's meaning and no policy (that is the store), and
no memory. It stands apart so that all rooms of the daemon can name a place or a state without knowing who decides.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace


class State(enum.Enum):
    """States of a residence. In words: staging and staged for the host, filling and resident for a GPU."""

    ABSENT = "absent"
    FILLING = "filling"
    READY = "ready"


class Event(enum.Enum):
    """What can happen to a residence."""

    FILL = "fill"
    COMPLETE = "complete"
    FAIL = "fail"
    EVICT = "evict"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.ABSENT, Event.FILL): State.FILLING,
    (State.FILLING, Event.COMPLETE): State.READY,
    (State.FILLING, Event.FAIL): State.ABSENT,
    (State.READY, Event.EVICT): State.ABSENT,
}
"""The one table of transitions; a pair that is not in it is a broken invariant."""


class IllegalTransition(RuntimeError):
    """An event that a state does not know. A bug: the daemon stops loudly rather than guess."""


class Kind(enum.Enum):
    """Sorts of residences."""

    SHARED = "shared"
    PINNED = "pinned"
    DEVICE = "device"


@dataclass(frozen=True)
class Place:
    """Where a residence is. ``uuid`` and ``dtype`` (empty: the file's own) tell the slabs of an entry apart."""

    kind: Kind
    uuid: str = ""
    dtype: str = ""

    @property
    def on_host(self) -> bool:
        """Whether it counts against the host tier's limit."""
        return self.kind is not Kind.DEVICE


SHARED = Place(Kind.SHARED)
PINNED = Place(Kind.PINNED)


@dataclass
class Residence:
    """An entry's bytes in one place. ``leases`` maps lease to process id."""

    place: Place
    extent_bytes: int
    state: State = State.ABSENT
    leases: dict[int, int] = field(default_factory=dict)
    last_used_s: float = 0.0
    number: int = 0
    """Tells it from every other that the store took in, in the same place too."""

    def happen(self, event: Event) -> None:
        """Change state by the table; IllegalTransition, and no change, if the table has no such pair."""
        try:
            self.state = TRANSITIONS[self.state, event]
        except KeyError:
            raise IllegalTransition(f"{self.place}: {event} in state {self.state}") from None

    @property
    def idle(self) -> bool:
        """Complete, and leased by nobody."""
        return self.state is State.READY and not self.leases


@dataclass
class Entry:
    """One cached checkpoint or put. ``bytes`` are the tensors' own, ``extent_bytes`` what a host copy takes."""

    key: str
    name: str
    provenance: str
    source: tuple[str, ...]
    bytes: int
    extent_bytes: int
    tensors: int
    float_dtypes: frozenset[str] | None = None
    """The floating-point dtypes among its tensors; None if that is not known."""
    names: list[str] = field(default_factory=list)
    pinned: bool = False
    generation: int = 0
    """Counts up with each entry that the store took in."""
    residences: dict[Place, Residence] = field(default_factory=dict)

    def state(self, place: Place) -> State:
        """The state in one place."""
        residence = self.residences.get(place)
        return residence.state if residence else State.ABSENT

    def place_as_stored(self, place: Place) -> Place:
        """The same place, without a dtype where a cast to it would change nothing: one slab will do."""
        known = self.float_dtypes
        return replace(place, dtype="") if place.dtype and known is not None and known <= {place.dtype} else place

    @property
    def host(self) -> State:
        """The best state of its host copies."""
        states = {residence.state for place, residence in self.residences.items() if place.on_host}
        return next((state for state in (State.READY, State.FILLING) if state in states), State.ABSENT)

    @property
    def ready(self) -> bool:
        """Whether it is complete anywhere; before that it has no name yet."""
        return any(residence.state is State.READY for residence in self.residences.values())

    @property
    def leases(self) -> dict[int, int]:
        """The leases of all its residences."""
        return {lease: pid for residence in self.residences.values() for lease, pid in residence.leases.items()}

    @property
    def last_used_s(self) -> float:
        """When any of its residences was last used."""
        return max((residence.last_used_s for residence in self.residences.values()), default=0.0)

    @property
    def superseded(self) -> bool:
        """Its last name went to a newer generation."""
        return self.ready and not self.names


Residences = list[tuple[str, Place]]
"""Residences by key and place, to be freed."""
