"""The policy: what gives way to what, what never does, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbcache.daemon.entries import (
    PINNED,
    SHARED,
    TRANSITIONS,
    Entry,
    Event,
    IllegalTransition,
    Kind,
    Place,
    Residence,
    Residences,
    State,
)
from nbcache.daemon.store import RAISE_LIMIT, Store
from nbcache.errors import DeviceMemoryFull, EntryInUse, EntryNotFound, HostMemoryFull

GB = 10**9
SLAB = Place(Kind.DEVICE, "GPU-0")
CAST = Place(Kind.DEVICE, "GPU-0", "F16")
OTHER = Place(Kind.DEVICE, "GPU-1")
PLACES = [SHARED, PINNED, SLAB, CAST, OTHER]


class Clock:
    """A clock that moves when it is asked to, and a little at each look, so that no two moments are equal."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        self.now_s += 0.001
        return self.now_s


class Shelf:
    """A store with entries of one letter each, and the server's part: it frees what it is told to."""

    def __init__(self, limit_bytes: int = 10 * GB) -> None:
        self.limit_bytes = limit_bytes
        self.clock = Clock()
        self.store = Store(lambda: self.limit_bytes, self.clock)
        self.leases = itertools.count(1)

    def free(self, residences: Residences) -> list[str]:
        for key, place in residences:
            self.store.evict(key, place)
        return [told(key, place) for key, place in residences]

    def fill(
        self, key: str, size_bytes: int = GB, provenance: str = "file", name: str | None = None, place: Place = SHARED
    ) -> list[str]:
        """Start filling, evicting what the store chose. Returns what went."""
        name = name or f"/{key}"
        known = self.store.entries.get(key)
        entry = known or Entry(key, name, provenance, (name,), size_bytes, size_bytes, 1)
        gone = self.free(self.store.fill(entry, place, size_bytes))
        if not known:
            self.store.give_name(key, name)
        return gone

    def put_in(
        self, key: str, size_bytes: int = GB, provenance: str = "file", name: str | None = None, place: Place = SHARED
    ) -> list[str]:
        """Fill and complete. Returns what went, for room and for being superseded."""
        gone = self.fill(key, size_bytes, provenance, name, place)
        return gone + self.free(self.store.complete(key, place))

    def lease(self, key: str, pid: int = 7, place: Place = SHARED) -> int:
        lease = next(self.leases)
        self.store.grant(key, place, lease, pid)
        return lease

    def release(self, key: str, lease: int, place: Place = SHARED) -> list[str]:
        return self.free(self.store.release(key, place, lease))

    def pin(self, name: str, pinned: bool = True) -> list[str]:
        return self.free(self.store.pin([name], pinned))

    @property
    def keys(self) -> set[str]:
        return set(self.store.entries)

    def places(self, key: str) -> set[Place]:
        return set(self.store.entries[key].residences)


def told(key: str, place: Place) -> str:
    """A residence in short: a shared copy by its key alone."""
    return key if place == SHARED else f"{key} {' '.join((place.uuid or place.kind.value, place.dtype)).strip()}"


def all_told(residences: Residences) -> list[str]:
    return [told(key, place) for key, place in residences]


def photograph(store: Store) -> Any:
    return copy.deepcopy((store.entries, store._names))


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


# The table


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_a_pair_that_the_table_lacks_raises_and_changes_nothing(state, event):
    residence = Residence(SLAB, 1, state, {3: 7}, 5.0)
    if (state, event) in TRANSITIONS:
        residence.happen(event)
        assert residence.state is TRANSITIONS[state, event]
        return
    before = copy.deepcopy(residence)
    with pytest.raises(IllegalTransition, match="GPU-0"):
        residence.happen(event)
    assert residence == before


def test_the_table_has_the_documented_transitions_alone():
    assert TRANSITIONS == {
        (State.ABSENT, Event.FILL): State.FILLING,
        (State.FILLING, Event.COMPLETE): State.READY,
        (State.FILLING, Event.FAIL): State.ABSENT,
        (State.READY, Event.EVICT): State.ABSENT,
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", ["complete", "fail"])
def test_a_method_in_the_wrong_state_changes_nothing(shelf, method, place):
    shelf.put_in("a", place=place)
    before = photograph(shelf.store)
    with pytest.raises(IllegalTransition):
        getattr(shelf.store, method)("a", place)
    assert photograph(shelf.store) == before


@pytest.mark.parametrize("method", ["complete", "fail", "evict"])
def test_what_is_not_in_a_place_is_not_changed_there(shelf, method):
    shelf.fill("a", place=PINNED)
    before = photograph(shelf.store)
    for key, place in (("a", SHARED), ("a", SLAB), ("b", PINNED)):
        with pytest.raises((IllegalTransition, KeyError)):
            getattr(shelf.store, method)(key, place)
    assert photograph(shelf.store) == before


@pytest.mark.parametrize("place", PLACES)
def test_evicting_what_is_filled_used_or_pinned_is_a_broken_invariant(shelf, place):
    shelf.fill("filling", place=place)
    shelf.put_in("used", place=place)
    shelf.lease("used", place=place)
    shelf.put_in("pinned", place=place)
    shelf.pin("/pinned")
    before = photograph(shelf.store)
    for key in ("filling", "used", "pinned"):
        with pytest.raises(IllegalTransition):
            shelf.store.evict(key, place)
    assert photograph(shelf.store) == before


@pytest.mark.parametrize("place", PLACES)
def test_a_lease_on_what_is_not_complete_is_a_broken_invariant(shelf, place):
    """I2: nothing unsealed or uncommitted is handed to anyone, not even where the entry is complete elsewhere."""
    shelf.put_in("a", place=PINNED if place == SHARED else SHARED)
    if place != PINNED:
        shelf.fill("a", place=place)
    else:
        shelf.fill("b", place=PINNED)
    before = photograph(shelf.store)
    with pytest.raises(IllegalTransition):
        shelf.lease("b" if place == PINNED else "a", place=place)
    assert photograph(shelf.store) == before


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_place_is_filled_once(shelf, place, complete):
    (shelf.put_in if complete else shelf.fill)("a", place=place)
    before = photograph(shelf.store)
    with pytest.raises(IllegalTransition, match="filled twice"):
        shelf.fill("a", place=place)
    assert photograph(shelf.store) == before


# Places


def test_residences_have_states_and_leases_of_their_own(shelf):
    shelf.put_in("a", place=PINNED)
    shelf.fill("a", place=SLAB)
    entry = shelf.store.entries["a"]
    assert [entry.state(place) for place in PLACES] == [
        State.ABSENT, State.READY, State.FILLING, State.ABSENT, State.ABSENT,
    ]  # fmt: skip
    assert entry.ready
    assert entry.host is State.READY
    lease = shelf.lease("a", 12, PINNED)
    shelf.store.complete("a", SLAB)
    other = shelf.lease("a", 13, SLAB)
    assert entry.residences[PINNED].leases == {lease: 12}
    assert entry.residences[SLAB].leases == {other: 13}
    assert entry.leases == {lease: 12, other: 13}
    shelf.release("a", other, SLAB)
    assert entry.leases == {lease: 12}


def test_a_slab_may_be_complete_before_any_host_copy_is(shelf):
    shelf.fill("a", place=PINNED)
    shelf.put_in("a", place=SLAB)
    entry = shelf.store.entries["a"]
    assert (entry.host, entry.ready) == (State.FILLING, True)
    assert shelf.store.find(["/a"]) is entry


def test_the_best_host_copy_tells_the_state_of_the_host(shelf):
    shelf.put_in("a", place=SLAB)
    assert shelf.store.entries["a"].host is State.ABSENT
    shelf.fill("a", place=SHARED)
    assert shelf.store.entries["a"].host is State.FILLING
    shelf.put_in("a", place=PINNED)
    assert shelf.store.entries["a"].host is State.READY


@pytest.mark.parametrize(("first", "last"), list(itertools.permutations([SHARED, PINNED, SLAB], 2)))
def test_an_entry_lives_on_in_its_other_place_and_is_forgotten_with_the_last(shelf, first, last):
    shelf.put_in("a", place=first)
    shelf.put_in("a", place=last)
    shelf.store.evict("a", first)
    assert shelf.places("a") == {last}
    assert shelf.store.find(["/a"]).key == "a"
    shelf.store.evict("a", last)
    assert shelf.keys == set()
    assert shelf.store.find(["/a"]) is None


def test_a_filling_that_fails_leaves_the_other_residences_alone(shelf):
    shelf.put_in("a", place=SHARED)
    lease = shelf.lease("a")
    shelf.fill("a", place=PINNED)
    shelf.store.fail("a", PINNED)
    assert shelf.places("a") == {SHARED}
    assert shelf.store.entries["a"].leases == {lease: 7}
    assert shelf.put_in("a", place=PINNED) == []


def test_an_entry_survives_the_eviction_of_its_only_complete_residence_while_another_is_filled(shelf):
    shelf.put_in("a", place=SLAB)
    shelf.fill("a", place=PINNED)
    shelf.store.evict("a", SLAB)
    assert shelf.store.find(["/a"]).key == "a"
    shelf.store.complete("a", PINNED)
    assert shelf.store.find(["/a"]).ready


def test_only_host_copies_count_against_the_limit(shelf):
    shelf.put_in("a", 4 * GB, place=SHARED)
    shelf.put_in("a", 4 * GB, place=PINNED)
    for place in (SLAB, CAST, OTHER):
        assert shelf.put_in("a", 40 * GB, place=place) == []
    assert shelf.store.used_bytes == 8 * GB
    assert shelf.store.slab_bytes("GPU-0") == 80 * GB
    assert shelf.store.slab_bytes("GPU-1") == 40 * GB
    assert shelf.store.slab_bytes("GPU-2") == 0


def test_a_slab_never_evicts_and_is_never_evicted_for_a_host_copy(shelf):
    shelf.put_in("a", 9 * GB)
    shelf.put_in("slab", 9 * GB, place=SLAB)
    assert shelf.put_in("b", 9 * GB) == ["a"]
    assert shelf.keys == {"slab", "b"}


def test_the_two_host_copies_of_an_entry_go_one_by_one(shelf):
    shelf.put_in("a", 3 * GB, place=SHARED)
    shelf.put_in("a", 3 * GB, place=PINNED)
    shelf.put_in("b", 3 * GB)
    assert shelf.put_in("c", 3 * GB) == ["a"]
    assert shelf.places("a") == {PINNED}
    lease = shelf.lease("a", place=PINNED)
    assert shelf.put_in("d", 3 * GB) == ["b"]
    shelf.release("a", lease, PINNED)


def test_a_copy_of_the_other_kind_may_take_the_room_of_the_one_there_is(shelf):
    """The server asks which is left before it copies from it."""
    shelf.put_in("a", 6 * GB, place=SHARED)
    assert shelf.fill("a", 6 * GB, place=PINNED) == ["a"]
    assert shelf.places("a") == {PINNED}


def test_a_lease_on_one_residence_does_not_keep_the_other(shelf):
    shelf.put_in("a", 6 * GB, place=PINNED)
    shelf.put_in("a", 6 * GB, place=SLAB)
    shelf.lease("a", place=SLAB)
    assert shelf.put_in("b", 6 * GB) == ["a pinned"]
    assert shelf.places("a") == {SLAB}


def test_a_pin_keeps_every_residence(shelf):
    for place in (SHARED, PINNED, SLAB):
        shelf.put_in("a", 3 * GB, place=place)
    shelf.pin("/a")
    assert shelf.store.idle_slabs() == []
    with pytest.raises(HostMemoryFull, match=r"/a \(3.0 GB, pinned\)"):
        shelf.fill("b", 5 * GB)


# Eviction


def test_the_least_recently_used_goes_first(shelf):
    for key in "abc":
        shelf.put_in(key, 3 * GB)
    shelf.release("a", shelf.lease("a"))
    assert shelf.put_in("d", 3 * GB) == ["b"]
    assert shelf.put_in("e", 3 * GB) == ["c"]


def test_the_end_of_a_lease_counts_as_use(shelf):
    for key in "abc":
        shelf.put_in(key, 3 * GB)
    lease = shelf.lease("a")
    shelf.release("b", shelf.lease("b"))
    shelf.release("a", lease)
    assert shelf.put_in("d", 3 * GB) == ["c"]
    assert shelf.put_in("e", 3 * GB) == ["b"]


def test_no_more_goes_than_must(shelf):
    for key in "abcd":
        shelf.put_in(key, 2 * GB)
    assert shelf.put_in("e", 2 * GB) == []
    assert shelf.put_in("f", 4 * GB) == ["a", "b"]
    assert shelf.store.used_bytes == 10 * GB


def test_what_is_derived_goes_as_files_do(shelf):
    shelf.put_in("derived", 2 * GB, "derived", "converted")
    assert shelf.store.evictable_by_all() == (["derived"], [])
    assert shelf.put_in("large", 9 * GB) == ["derived"]


def test_what_is_put_leased_pinned_or_filling_never_goes(shelf):
    shelf.put_in("put", 2 * GB, "put", "put")
    shelf.put_in("leased", 2 * GB)
    shelf.lease("leased")
    shelf.put_in("pinned", 2 * GB)
    shelf.pin("/pinned")
    shelf.fill("filling", 2 * GB)
    shelf.put_in("idle", 2 * GB)
    before = photograph(shelf.store)
    with pytest.raises(HostMemoryFull):
        shelf.fill("new", 3 * GB)
    assert photograph(shelf.store) == before
    assert shelf.fill("new", 2 * GB) == ["idle"]


def test_a_plan_alone_changes_nothing(shelf):
    shelf.put_in("a", 9 * GB)
    before = photograph(shelf.store)
    assert shelf.store.plan_eviction(5 * GB, "x") == [("a", SHARED)]
    assert photograph(shelf.store) == before


def test_a_superseded_entry_goes_before_a_less_recently_used_one(shelf):
    shelf.put_in("idle", 3 * GB)
    shelf.fill("old", 3 * GB, name="/model")
    shelf.put_in("new", 3 * GB, name="/model")
    assert shelf.free(shelf.store.complete("old", SHARED)) == []  # too late for its name
    assert shelf.store.plan_eviction(4 * GB, "x") == [("old", SHARED)]


def test_a_limit_that_shrank_counts_at_once(shelf):
    shelf.put_in("a", 4 * GB)
    shelf.put_in("b", 4 * GB)
    shelf.limit_bytes = 5 * GB
    assert shelf.put_in("c", GB) == ["a"]
    assert shelf.store.used_bytes == 5 * GB


def test_an_entry_as_large_as_the_limit_is_admitted(shelf):
    shelf.put_in("a")
    assert shelf.put_in("all", 10 * GB) == ["a"]


def test_what_failed_is_forgotten(shelf):
    shelf.fill("a", 6 * GB)
    shelf.store.fail("a", SHARED)
    assert shelf.keys == set()
    assert shelf.store.find(["/a"]) is None
    assert shelf.fill("a", 10 * GB) == []


# Names and generations


def test_a_name_is_found_once_its_entry_is_complete(shelf):
    shelf.fill("a")
    assert shelf.store.find(["/a"]) is None
    assert shelf.store.find([], "a").key == "a"
    shelf.store.complete("a", SHARED)
    assert shelf.store.find(["/none", "/a"]).key == "a"


def test_a_key_that_is_asked_for_is_never_replaced_by_a_name(shelf):
    shelf.put_in("a")
    assert shelf.store.find(["/a"], key="other") is None


def test_a_newer_generation_takes_the_name_and_frees_the_older(shelf):
    shelf.put_in("one", name="/model")
    assert shelf.put_in("two", name="/model") == ["one"]
    assert shelf.store.find(["/model"]).key == "two"
    assert shelf.keys == {"two"}


def test_a_generation_in_use_goes_when_its_last_lease_ends(shelf):
    shelf.put_in("one", name="/model")
    leases = [shelf.lease("one"), shelf.lease("one")]
    assert shelf.put_in("two", name="/model") == []
    assert shelf.store.entries["one"].superseded
    assert shelf.release("one", leases[0]) == []
    assert shelf.release("one", leases[1]) == ["one"]


def test_a_generation_with_another_name_stays_and_is_called_by_it(shelf):
    shelf.put_in("one", name="/model")
    assert shelf.store.give_name("one", "/alias") == []
    assert shelf.put_in("two", name="/model") == []
    assert shelf.store.find(["/alias"]).key == "one"
    assert shelf.store.entries["one"].name == "/alias"


def test_a_superseded_entry_that_is_named_again_is_called_by_that_name(shelf):
    """Two entries would otherwise both be shown, and evicted, under the name that only one of them has."""
    shelf.put_in("one", name="/model")
    shelf.lease("one")
    shelf.put_in("two", name="/model")
    shelf.store.give_name("one", "/other")
    assert shelf.store.entries["one"].name == "/other"
    assert shelf.store.entries["two"].name == "/model"


def test_giving_a_name_twice_changes_nothing(shelf):
    shelf.put_in("one", name="/model")
    before = photograph(shelf.store)
    assert shelf.store.give_name("one", "/model") == []
    assert photograph(shelf.store) == before


def test_names_given_while_filling_are_all_given_at_its_end(shelf):
    shelf.put_in("old", name="/second")
    shelf.fill("new", name="/first")
    assert shelf.store.give_name("new", "/second") == []
    assert shelf.store.find(["/second"]).key == "old"
    assert all_told(shelf.store.complete("new", SHARED)) == ["old"]
    assert shelf.store.find(["/second"]).key == "new"


def test_a_pin_follows_the_name_to_the_newer_generation(shelf):
    shelf.put_in("one", name="/model")
    shelf.pin("/model")
    assert shelf.put_in("two", name="/model") == ["one"]
    assert shelf.store.entries["two"].pinned


def test_a_pin_stays_with_a_generation_that_keeps_a_name(shelf):
    shelf.put_in("one", name="/model")
    shelf.store.give_name("one", "/alias")
    shelf.pin("/alias")
    assert shelf.put_in("two", name="/model") == []
    assert shelf.store.entries["one"].pinned
    assert not shelf.store.entries["two"].pinned


def test_a_put_of_the_same_name_replaces_the_older(shelf):
    shelf.put_in("one", provenance="put", name="kept")
    assert shelf.put_in("two", provenance="put", name="kept") == ["one"]


@pytest.mark.parametrize("provenance", ["put", "file"])
def test_a_superseded_entry_is_freed_when_it_is_unpinned(shelf, provenance):
    """No name leads to it and policy never takes a put: nobody else would free it."""
    shelf.put_in("one", provenance=provenance, name="kept")
    shelf.put_in("one", place=SLAB)
    leases = {place: shelf.lease("one", place=place) for place in (SHARED, SLAB)}
    shelf.put_in("two", provenance=provenance, name="kept")
    assert shelf.pin("one") == []  # by key: it outlives its leases
    assert [shelf.release("one", lease, place) for place, lease in leases.items()] == [[], []]
    assert shelf.pin("one", False) == ["one", "one GPU-0"]
    assert shelf.keys == {"two"}


def test_unpinning_a_superseded_entry_frees_what_is_idle_of_it(shelf):
    shelf.put_in("one", name="/model")
    shelf.put_in("one", place=SLAB)
    leases = {place: shelf.lease("one", place=place) for place in (SHARED, SLAB)}
    shelf.put_in("two", name="/model")
    shelf.pin("one")
    assert shelf.release("one", leases[SLAB], SLAB) == []
    assert shelf.pin("one", False) == ["one GPU-0"]
    assert shelf.release("one", leases[SHARED]) == ["one"]


def test_pinning_frees_nothing(shelf):
    shelf.put_in("one")
    assert shelf.pin("/one") == []
    assert shelf.pin("/one", False) == []
    assert shelf.keys == {"one"}


@pytest.mark.parametrize("first", ["older", "newer"])
def test_of_two_generations_that_fill_at_once_the_name_stays_with_the_newer(shelf, first):
    shelf.fill("older", name="/model")
    shelf.fill("newer", name="/model")
    second = "newer" if first == "older" else "older"
    assert shelf.free(shelf.store.complete(first, SHARED)) == []
    assert shelf.store.find(["/model"]).key == first
    freed = shelf.free(shelf.store.complete(second, SHARED))
    assert freed == (["older"] if first == "older" else [])
    assert shelf.store.find(["/model"]).key == "newer"
    if first == "newer":
        assert shelf.store.entries["older"].superseded


def test_a_generation_that_comes_too_late_for_one_name_keeps_its_others(shelf):
    shelf.fill("older", name="/model")
    shelf.store.give_name("older", "/alias")
    shelf.put_in("newer", name="/model")
    assert shelf.free(shelf.store.complete("older", SHARED)) == []
    assert shelf.store.find(["/model"]).key == "newer"
    assert shelf.store.find(["/alias"]).key == "older"
    assert shelf.store.entries["older"].name == "/alias"


def test_a_generation_that_lost_its_name_does_not_take_it_back_with_its_next_residence(shelf):
    shelf.put_in("older", name="/model")
    shelf.lease("older")
    shelf.fill("older", place=SLAB)
    shelf.put_in("newer", name="/model")
    assert shelf.free(shelf.store.complete("older", SLAB)) == []
    assert shelf.store.find(["/model"]).key == "newer"
    assert shelf.store.entries["older"].superseded


def test_a_second_residence_changes_no_name(shelf):
    shelf.put_in("one", name="/model")
    shelf.store.give_name("one", "/alias")
    assert shelf.put_in("one", place=SLAB) == []
    assert shelf.store.entries["one"].names == ["/model", "/alias"]
    assert shelf.store.entries["one"].name == "/model"


def test_a_superseded_entry_goes_residence_by_residence_as_they_fall_idle(shelf):
    shelf.put_in("one", name="/model")
    for place in (PINNED, SLAB, CAST):
        shelf.put_in("one", place=place)
    leases = {place: shelf.lease("one", place=place) for place in (SHARED, SLAB)}
    assert shelf.put_in("two", name="/model") == ["one pinned", "one GPU-0 F16"]
    assert shelf.release("one", leases[SLAB], SLAB) == ["one GPU-0"]
    assert shelf.release("one", leases[SHARED]) == ["one"]
    assert shelf.keys == {"two"}


# By hand


def test_pinning_what_is_not_there_names_what_is(shelf):
    shelf.put_in("a")
    before = photograph(shelf.store)
    with pytest.raises(EntryNotFound, match="/b: not cached; cached: /a"):
        shelf.store.pin(["/b"], True)
    assert photograph(shelf.store) == before


def test_pinning_in_an_empty_store_says_that_nothing_is_cached(shelf):
    with pytest.raises(EntryNotFound, match="cached: nothing"):
        shelf.store.pin([], True)


def test_what_may_be_evicted_by_name(shelf):
    shelf.put_in("file")
    shelf.put_in("put", provenance="put", name="put")
    assert shelf.store.check_evictable(["/file"]).key == "file"
    assert shelf.store.check_evictable(["put"]).key == "put"


def test_what_may_not_be_evicted_by_name_says_why(shelf):
    shelf.put_in("used")
    shelf.lease("used", pid=4711)
    shelf.lease("used", pid=12)
    with pytest.raises(EntryInUse, match=r"/used \(1.0 GB, used by process 12, 4711\)"):
        shelf.store.check_evictable(["/used"])
    shelf.put_in("pinned")
    shelf.pin("/pinned")
    with pytest.raises(EntryInUse, match="/pinned is pinned; unpin it first"):
        shelf.store.check_evictable(["/pinned"])
    shelf.fill("filling")
    with pytest.raises(EntryInUse, match="being filled"):
        shelf.store.check_evictable(["filling"])
    with pytest.raises(EntryNotFound):
        shelf.store.check_evictable(["/none"])


def test_evicting_everything_spares_what_is_used_pinned_filled_or_put(shelf):
    shelf.put_in("idle")
    shelf.put_in("used")
    shelf.lease("used")
    shelf.put_in("pinned")
    shelf.pin("/pinned")
    shelf.put_in("put", provenance="put", name="kept")
    shelf.fill("filling")
    going, kept = shelf.store.evictable_by_all()
    assert going == ["idle"]
    assert [text.split(" ")[0] for text in kept] == ["/used", "/pinned", "kept", "/filling"]


def test_an_entry_with_a_leased_slab_is_not_evicted_by_name(shelf):
    shelf.put_in("a", 2 * GB, place=PINNED)
    shelf.put_in("a", 3 * GB, place=SLAB)
    lease = shelf.lease("a", 4711, SLAB)
    with pytest.raises(EntryInUse, match=r"/a \(3.0 GB, used by process 4711\)"):
        shelf.store.check_evictable(["/a"])
    assert shelf.places("a") == {PINNED, SLAB}
    shelf.release("a", lease, SLAB)
    assert shelf.store.check_evictable(["/a"]).key == "a"


def test_an_entry_of_which_one_copy_is_being_filled_is_not_evicted_by_name(shelf):
    shelf.put_in("a", place=PINNED)
    shelf.fill("a", place=SHARED)
    with pytest.raises(EntryInUse, match=r"/a \(1.0 GB, being filled\)"):
        shelf.store.check_evictable(["/a"])


def test_evicting_everything_spares_an_entry_of_which_any_residence_is_busy(shelf):
    for key in ("idle", "filling", "used"):
        shelf.put_in(key, place=PINNED)
    shelf.put_in("idle", place=SLAB)
    shelf.fill("filling", 2 * GB, place=SLAB)
    shelf.put_in("used", 3 * GB, place=SLAB)
    shelf.lease("used", 12, SLAB)
    shelf.put_in("kept", 4 * GB, "put", "kept")
    shelf.clock.now_s += 120
    going, kept = shelf.store.evictable_by_all()
    assert going == ["idle"]
    assert kept == [
        "/filling (2.0 GB, being filled)",
        "/used (3.0 GB, used by process 12)",
        "kept (4.0 GB, saved with put, idle 2 min)",
    ]


# Slabs


def test_idle_slabs_are_those_that_nobody_leases_pins_or_fills_oldest_first(shelf):
    for key in ("old", "young", "leased", "pinned"):
        shelf.put_in(key, place=SLAB)
    shelf.fill("filling", place=SLAB)
    shelf.lease("leased", place=SLAB)
    shelf.pin("/pinned")
    shelf.put_in("old", place=OTHER)
    assert all_told(shelf.store.idle_slabs()) == ["old GPU-0", "young GPU-0", "old GPU-1"]
    shelf.release("old", shelf.lease("old", place=SLAB), SLAB)
    assert all_told(shelf.store.idle_slabs()) == ["young GPU-0", "old GPU-1", "old GPU-0"]


def test_idle_slabs_of_one_gpu_or_of_one_entry(shelf):
    for key in "ab":
        for place in (SHARED, SLAB, CAST, OTHER):
            shelf.put_in(key, place=place)
    assert all_told(shelf.store.idle_slabs("GPU-1")) == ["a GPU-1", "b GPU-1"]
    assert all_told(shelf.store.idle_slabs(names=["/b"])) == ["b GPU-0", "b GPU-0 F16", "b GPU-1"]
    assert all_told(shelf.store.idle_slabs("GPU-0", ["a"])) == ["a GPU-0", "a GPU-0 F16"]
    assert shelf.store.idle_slabs("GPU-2") == []
    with pytest.raises(EntryNotFound, match="/c: not cached; cached: /a, /b"):
        shelf.store.idle_slabs(names=["/c"])


def test_idle_slabs_that_were_not_used_for_a_while(shelf):
    shelf.put_in("old", place=SLAB)
    shelf.put_in("used", place=SLAB)
    lease = shelf.lease("used", place=SLAB)
    shelf.clock.now_s += 60
    shelf.release("used", lease, SLAB)
    shelf.put_in("young", place=SLAB)
    assert all_told(shelf.store.idle_slabs(unused_s=59)) == ["old GPU-0"]
    assert shelf.store.idle_slabs(unused_s=61) == []
    assert all_told(shelf.store.idle_slabs()) == ["old GPU-0", "used GPU-0", "young GPU-0"]


def test_a_slab_of_a_put_entry_may_go_but_not_its_host_copy(shelf):
    """The slab can be filled again from the host copy; the host copy exists nowhere else (I7)."""
    shelf.put_in("put", 6 * GB, "put", "kept")
    shelf.put_in("put", 6 * GB, place=SLAB)
    assert all_told(shelf.store.idle_slabs()) == ["put GPU-0"]
    with pytest.raises(HostMemoryFull, match=r"kept \(6.0 GB, saved with put, "):
        shelf.fill("new", 6 * GB)
    shelf.free(shelf.store.idle_slabs())
    assert shelf.places("put") == {SHARED}


def test_neither_host_copy_of_a_put_entry_goes_for_the_other(shelf):
    shelf.put_in("put", 6 * GB, "put", "kept")
    before = photograph(shelf.store)
    with pytest.raises(HostMemoryFull):
        shelf.fill("put", 6 * GB, place=PINNED)
    assert photograph(shelf.store) == before


def test_a_slab_that_is_all_that_is_left_of_a_put_entry_with_a_name_stays(shelf):
    """I7. Superseded, its host copy went while its slab was in use; then it was given a name, and is somebody's again."""
    shelf.put_in("one", provenance="put", name="kept")
    shelf.put_in("one", place=SLAB)
    lease = shelf.lease("one", place=SLAB)
    shelf.put_in("two", provenance="put", name="kept")
    assert shelf.places("one") == {SLAB}
    shelf.store.give_name("one", "again")
    shelf.release("one", lease, SLAB)
    assert shelf.store.idle_slabs() == []


# Messages


def test_a_full_gpu_names_what_nbcache_holds_there(shelf):
    shelf.put_in("used", 2 * GB, place=SLAB)
    shelf.lease("used", 4711, SLAB)
    shelf.put_in("pinned", GB, place=CAST)
    shelf.pin("/pinned")
    shelf.fill("filling", 3 * GB, place=SLAB)
    shelf.put_in("elsewhere", GB, place=OTHER)
    shelf.put_in("host", GB)
    error = shelf.store.device_full("GPU-0", "/new", 24 * GB, 5 * GB, 24 * GB)
    assert isinstance(error, DeviceMemoryFull)
    assert str(error) == (
        "GPU GPU-0 full: /new needs 24.0 GB, 5.0 GB free; nbcache holds /used (2.0 GB, used by process 4711), "
        "/pinned (1.0 GB, pinned), /filling (3.0 GB, being filled); free memory in the kernels that use this GPU, "
        "or release weights there"
    )


def test_a_gpu_that_others_filled_is_not_blamed_on_nbcache(shelf):
    shelf.put_in("elsewhere", GB, place=OTHER)
    message = str(shelf.store.device_full("GPU-0", "/new", 24 * GB, 5 * GB, 80 * GB))
    assert message == (
        "GPU GPU-0 full: /new needs 24.0 GB, 5.0 GB free; free memory in the kernels that use this GPU, "
        "or release weights there"
    )


def test_a_slab_that_can_never_fit_is_told_how_much_the_gpu_has_in_all(shelf):
    shelf.put_in("used", 2 * GB, place=SLAB)
    message = str(shelf.store.device_full("GPU-0", "/new", 25 * GB, 5 * GB, 24 * GB))
    assert message == (
        "GPU GPU-0 full: /new needs 25.0 GB, 5.0 GB free of 24.0 GB in all; it can never fit: load it with another dtype, "
        "or device='cpu'"
    )


def test_a_full_tier_names_both_copies_of_an_entry(shelf):
    shelf.put_in("a", 4 * GB)
    shelf.put_in("a", 5 * GB, place=PINNED)
    shelf.lease("a", 11)
    shelf.lease("a", 12, PINNED)
    with pytest.raises(HostMemoryFull) as caught:
        shelf.fill("b", 2 * GB)
    assert "/a (4.0 GB, used by process 11), /a (5.0 GB, used by process 12)" in str(caught.value)


def test_a_full_tier_names_what_is_in_the_way_with_numbers(shelf):
    shelf.put_in("used", 2 * GB)
    shelf.lease("used", pid=4711)
    shelf.put_in("pinned", 1 * GB)
    shelf.pin("/pinned")
    shelf.put_in("put", 3 * GB, "put", "kept")
    shelf.fill("filling", 1 * GB)
    shelf.clock.now_s += 12 * 60
    with pytest.raises(HostMemoryFull) as caught:
        shelf.fill("new", 4 * GB)
    message = str(caught.value)
    assert message.startswith("host tier full: /new needs 4.0 GB, 3.0 GB free of 10.0 GB; in the way: ")
    for part in (
        "/used (2.0 GB, used by process 4711)", "/pinned (1.0 GB, pinned)", "kept (3.0 GB, saved with put, idle 12 min)",
        "/filling (1.0 GB, being filled)", "raise NBCache.host_limit",
    ):  # fmt: skip
        assert part in message


def test_a_tier_too_small_for_the_entry_blames_nobody(shelf):
    shelf.put_in("put", GB, "put", "kept")
    with pytest.raises(HostMemoryFull) as caught:
        shelf.fill("new", 11 * GB)
    assert str(caught.value) == "host tier full: /new needs 11.0 GB, 9.0 GB free of 10.0 GB; " + RAISE_LIMIT


# Anything at all

KEYS = st.sampled_from("abcde")
NAMES = st.sampled_from(["/1", "/2", "/3"])
SIZES = st.sampled_from([1, 1, 1, 2, 3, 5, 11])


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of what the server does with its store, the server's own part (freeing what it is told to) included."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf(limit_bytes=10)
        self.store = self.shelf.store
        self.leases: dict[int, tuple[str, Place]] = {}
        self.filling: set[tuple[str, Place]] = set()
        self.ready: set[tuple[str, Place]] = set()
        """What there must be: nothing comes or goes but by a rule."""

    def _begin(self, entry: Entry, place: Place, size: int) -> bool:
        """Fill, check the victims, and free them. Whether there was room."""
        before = copy.deepcopy(self.store.entries)
        candidates = [
            (e.superseded, r.last_used_s, (e.key, r.place), r.extent_bytes)
            for e in before.values()
            for r in e.residences.values()
            if r.place.on_host and r.state is State.READY and not r.leases and not e.pinned and e.provenance == "file"
        ]
        candidates.sort(key=lambda c: (not c[0], c[1]))
        free = self.store.limit_bytes - self.store.used_bytes
        fits = not place.on_host or size <= free + sum(c[3] for c in candidates)
        victims = self._attempt(lambda: self.store.fill(entry, place, size), HostMemoryFull)
        assert (victims is not None) == fits
        if victims is None:
            return False
        self.filling.add((entry.key, place))
        if not place.on_host:
            assert victims == [], "room on a GPU is not made by evicting host copies"
            return True
        chosen = candidates[: len(victims)]
        assert victims == [c[2] for c in chosen], "superseded first, then the least recently used"
        assert not chosen or free + sum(c[3] for c in chosen[:-1]) < size, "more went than must"
        self._free(victims)
        assert self.store.used_bytes <= self.store.limit_bytes
        return True

    def _free(self, residences: Residences) -> None:
        assert len(set(residences)) == len(residences)
        for key, place in residences:
            entry = self.store.entries[key]
            residence = entry.residences[place]
            assert not residence.leases, "I4"
            assert not entry.pinned, "I4"
            assert residence.state is State.READY, "I2"
            self.store.evict(key, place)
            self.ready.remove((key, place))

    def _attempt(self, call: Any, *errors: type[Exception]) -> Any:
        """Call; if it raises one of these, it must have changed nothing."""
        before = photograph(self.store)
        try:
            return call()
        except errors:
            assert photograph(self.store) == before
            return None

    def _finish(self, key: str, place: Place) -> None:
        """Complete; each name then means the newest generation that had it."""
        entry = self.store.entries[key]
        names = list(entry.names)
        owners = {name: self.store.entries[owner] for name, owner in self.store._names.items()}
        freed = self.store.complete(key, place)
        self.filling.remove((key, place))
        self.ready.add((key, place))
        for name in names:
            owner = owners.get(name)
            newest = owner if owner is not None and owner.generation > entry.generation else entry
            assert self.store.find([name]) is newest
            assert name in newest.names
        assert all(self.store.entries[k].superseded for k, _ in freed), "only what was superseded goes"
        self._free(freed)

    @initialize()
    def start(self) -> None:
        assert self.store.used_bytes == 0

    @rule(key=KEYS, name=NAMES, size=SIZES, provenance=st.sampled_from(["file", "file", "put"]), place=st.sampled_from(PLACES))
    def fill(self, key: str, name: str, size: int, provenance: str, place: Place) -> None:
        known = self.store.entries.get(key)
        if known is not None and known.state(place) is not State.ABSENT:
            return
        entry = known or Entry(key, name, provenance, (), size, size, 1)
        if self._begin(entry, place, entry.extent_bytes if place.on_host else size):
            self._free(self.store.give_name(key, name))

    @rule(
        key=KEYS, name=NAMES, provenance=st.sampled_from(["file", "put"]), leased=st.booleans(), place=st.sampled_from(PLACES)
    )
    def replace_a_generation(self, key: str, name: str, provenance: str, leased: bool, place: Place) -> None:
        """The common course of things in one step: what has this name now is used by somebody, and a newer one arrives."""
        older = self.store.find([name])
        if key in self.store.entries:
            return
        if older is not None and leased:
            ready = [p for p, r in older.residences.items() if r.state is State.READY]
            if ready:
                self.leases[self.shelf.lease(older.key, place=ready[0])] = older.key, ready[0]
        if self._begin(Entry(key, name, provenance, (), 1, 1, 1), place, 1):
            self._free(self.store.give_name(key, name))
            self._finish(key, place)
            assert self.store.find([name]).key == key

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        self._finish(*data.draw(st.sampled_from(sorted(self.filling, key=str))))

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        key, place = data.draw(st.sampled_from(sorted(self.filling, key=str)))
        others = set(self.store.entries[key].residences) - {place}
        self.store.fail(key, place)
        self.filling.remove((key, place))
        assert (set(self.store.entries[key].residences) if key in self.store.entries else set()) == others

    @precondition(lambda self: self.store.entries)
    @rule(data=st.data(), name=NAMES)
    def give_name(self, data: st.DataObject, name: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.store.entries)))
        older = self.store.find([name])
        protected = older is not None and older.pinned and older.names == [name] and older.key != key
        self._free(self.store.give_name(key, name))
        if self.store.entries[key].ready:
            assert self.store.find([name]).key == key
            assert self.store.entries[key].pinned or not protected, "a pin follows the name"

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def grant(self, data: st.DataObject) -> None:
        key, place = data.draw(st.sampled_from(sorted(self.ready, key=str)))
        self.leases[self.shelf.lease(key, place=place)] = key, place

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def grant_too_soon(self, data: st.DataObject) -> None:
        """I2: nobody is handed what is not complete."""
        key, place = data.draw(st.sampled_from(sorted(self.filling, key=str)))
        before = photograph(self.store)
        with pytest.raises(IllegalTransition):
            self.store.grant(key, place, 0, 7)
        assert photograph(self.store) == before

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.leases)))
        key, place = self.leases.pop(lease)
        self._free(self.store.release(key, place, lease))

    @rule(name=st.one_of(NAMES, KEYS), pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        freed = self._attempt(lambda: self.store.pin([name], pinned), EntryNotFound)
        assert not (freed and pinned)
        self._free(freed or [])

    @rule(name=st.one_of(NAMES, KEYS))
    def evict_by_name(self, name: str) -> None:
        entry = self._attempt(lambda: self.store.check_evictable([name]), EntryNotFound, EntryInUse)
        if entry is not None:
            self._free([(entry.key, place) for place in entry.residences])
            assert entry.key not in self.store.entries

    @rule()
    def evict_everything(self) -> None:
        going, kept = self.store.evictable_by_all()
        assert len(going) + len(kept) == len(self.store.entries)
        assert all(self.store.entries[key].provenance == "file" for key in going)
        self._free([(key, place) for key in going for place in self.store.entries[key].residences])

    @rule(
        uuid=st.sampled_from(["", "GPU-0", "GPU-1"]),
        names=st.lists(st.one_of(NAMES, KEYS), max_size=1),
        how_many=st.integers(1, 9),
    )
    def free_slabs(self, uuid: str, names: list[str], how_many: int) -> None:
        idle = self._attempt(lambda: self.store.idle_slabs(uuid, names), EntryNotFound)
        if idle is None:
            return
        times = [self.store.entries[key].residences[place].last_used_s for key, place in idle]
        assert times == sorted(times)
        assert all(place.kind is Kind.DEVICE and place.uuid.startswith(uuid) for _, place in idle), "I7: no host copy"
        self._free(idle[:how_many])

    @precondition(lambda self: self.store.entries)
    @rule(data=st.data(), method=st.sampled_from(["evict", "complete", "fail"]))
    def break_an_invariant(self, data: st.DataObject, method: str) -> None:
        """Called out of turn, a method raises and changes nothing."""
        key, place = data.draw(st.sampled_from(sorted(self.filling | self.ready, key=str)))
        entry = self.store.entries[key]
        evictable = entry.residences[place].idle and not entry.pinned
        allowed = evictable if method == "evict" else (key, place) in self.filling
        if not allowed:
            before = photograph(self.store)
            with pytest.raises(IllegalTransition):
                getattr(self.store, method)(key, place)
            assert photograph(self.store) == before

    @precondition(lambda self: self.filling | self.ready)
    @rule(data=st.data())
    def fill_twice(self, data: st.DataObject) -> None:
        key, place = data.draw(st.sampled_from(sorted(self.filling | self.ready, key=str)))
        before = photograph(self.store)
        with pytest.raises((IllegalTransition, HostMemoryFull)):
            self.store.fill(self.store.entries[key], place, 1)
        assert photograph(self.store) == before

    @rule(limit_bytes=st.integers(0, 20))
    def move_the_limit(self, limit_bytes: int) -> None:
        self.shelf.limit_bytes = limit_bytes

    @invariant()
    def names_and_entries_agree(self) -> None:
        for name, key in self.store._names.items():
            assert name in self.store.entries[key].names
        for key, entry in self.store.entries.items():
            assert entry.key == key
            assert len(set(entry.names)) == len(entry.names)
            if entry.ready:
                assert all(self.store._names[name] == key for name in entry.names)
                assert not entry.names or entry.name in entry.names, "shown under a name that leads elsewhere"

    @invariant()
    def nothing_comes_or_goes_but_by_a_rule(self) -> None:
        """I7: what is not filled, failed or evicted stays, entry and residence, in the state it was in."""
        found: dict[State, set[tuple[str, Place]]] = {state: set() for state in State}
        for key, entry in self.store.entries.items():
            assert entry.residences, "an entry that is nowhere"
            for place, residence in entry.residences.items():
                assert residence.place == place
                found[residence.state].add((key, place))
        assert found == {State.ABSENT: set(), State.FILLING: self.filling, State.READY: self.ready}

    @invariant()
    def nothing_leased_is_lost(self) -> None:
        """I4: a leased residence is there, complete, and knows its leases."""
        held: dict[tuple[str, Place], set[int]] = {residence: set() for residence in self.filling | self.ready}
        for lease, residence in self.leases.items():
            assert residence in self.ready
            held[residence].add(lease)
        for (key, place), leases in held.items():
            assert set(self.store.entries[key].residences[place].leases) == leases

    @invariant()
    def bytes_are_counted_where_they_are(self) -> None:
        sizes = [(p, self.store.entries[k].residences[p].extent_bytes) for k, p in self.filling | self.ready]
        assert self.store.used_bytes == sum(size for place, size in sizes if place in (SHARED, PINNED))
        for uuid in ("GPU-0", "GPU-1"):
            assert self.store.slab_bytes(uuid) == sum(size for place, size in sizes if place.uuid == uuid)


StoreMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStoreMachine = StoreMachine.TestCase
