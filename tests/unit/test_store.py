"""The policy: what gives way to what, what never does, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbcache.daemon.store import TRANSITIONS, Entry, Event, Host, IllegalTransition, Store
from nbcache.errors import EntryInUse, EntryNotFound, HostMemoryFull

GB = 10**9


class Clock:
    """A clock that moves when it is asked to, and a little at each look, so that no two moments are equal."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        self.now_s += 0.001
        return self.now_s


class Shelf:
    """A store with entries of one letter each."""

    def __init__(self, limit_bytes: int = 10 * GB) -> None:
        self.limit_bytes = limit_bytes
        self.clock = Clock()
        self.store = Store(lambda: self.limit_bytes, self.clock)
        self.leases = itertools.count(1)

    def admit(self, key: str, size_bytes: int = GB, provenance: str = "file", name: str | None = None) -> list[str]:
        """Start staging, evicting what the store chose. Returns what went."""
        name = name or f"/{key}"
        victims = self.store.admit(Entry(key, name, provenance, (name,), size_bytes, size_bytes, 1))
        for victim in victims:
            self.store.evict(victim)
        self.store.give_name(key, name)
        return victims

    def put_in(self, key: str, size_bytes: int = GB, provenance: str = "file", name: str | None = None) -> list[str]:
        """Stage and complete. Returns what went, for room and for being superseded."""
        gone = self.admit(key, size_bytes, provenance, name)
        freed = self.store.complete(key)
        for superseded in freed:
            self.store.evict(superseded)
        return gone + freed

    def lease(self, key: str, pid: int = 7) -> int:
        lease = next(self.leases)
        self.store.grant(key, lease, pid)
        return lease

    def release(self, key: str, lease: int) -> list[str]:
        freed = self.store.release(key, lease)
        for superseded in freed:
            self.store.evict(superseded)
        return freed

    @property
    def keys(self) -> set[str]:
        return set(self.store.entries)


def photograph(store: Store) -> Any:
    return copy.deepcopy((store.entries, store._names))


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


# The table


@pytest.mark.parametrize(("state", "event"), list(itertools.product(Host, Event)))
def test_a_pair_that_the_table_lacks_raises_and_changes_nothing(state, event):
    entry = Entry("k", "/k", "file", (), 1, 1, 1, host=state)
    if (state, event) in TRANSITIONS:
        entry.happen(event)
        assert entry.host is TRANSITIONS[state, event]
        return
    before = copy.deepcopy(entry)
    with pytest.raises(IllegalTransition, match="k: "):
        entry.happen(event)
    assert entry == before


def test_the_table_has_the_documented_transitions_alone():
    assert TRANSITIONS == {
        (Host.ABSENT, Event.STAGE): Host.STAGING,
        (Host.STAGING, Event.SEAL): Host.STAGED,
        (Host.STAGING, Event.FAIL): Host.ABSENT,
        (Host.STAGED, Event.EVICT): Host.ABSENT,
    }


@pytest.mark.parametrize("method", ["complete", "fail"])
def test_a_method_in_the_wrong_state_changes_nothing(shelf, method):
    shelf.put_in("a")
    before = photograph(shelf.store)
    with pytest.raises(IllegalTransition):
        getattr(shelf.store, method)("a")
    assert photograph(shelf.store) == before


def test_evicting_what_is_staged_used_or_pinned_is_a_broken_invariant(shelf):
    shelf.admit("staging")
    shelf.put_in("used")
    shelf.lease("used")
    shelf.put_in("pinned")
    shelf.store.pin(["/pinned"], True)
    before = photograph(shelf.store)
    for key in ("staging", "used", "pinned"):
        with pytest.raises(IllegalTransition):
            shelf.store.evict(key)
    assert photograph(shelf.store) == before


def test_a_lease_on_what_is_not_complete_is_a_broken_invariant(shelf):
    """I2: nothing unsealed is handed to anyone."""
    shelf.admit("a")
    before = photograph(shelf.store)
    with pytest.raises(AssertionError):
        shelf.lease("a")
    assert photograph(shelf.store) == before


def test_one_key_is_admitted_once(shelf):
    shelf.put_in("a")
    before = photograph(shelf.store)
    with pytest.raises(AssertionError):
        shelf.admit("a")
    assert photograph(shelf.store) == before


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


def test_what_is_put_leased_pinned_or_staging_never_goes(shelf):
    shelf.put_in("put", 2 * GB, "put", "put")
    shelf.put_in("leased", 2 * GB)
    shelf.lease("leased")
    shelf.put_in("pinned", 2 * GB)
    shelf.store.pin(["/pinned"], True)
    shelf.admit("staging", 2 * GB)
    shelf.put_in("idle", 2 * GB)
    before = photograph(shelf.store)
    with pytest.raises(HostMemoryFull):
        shelf.admit("new", 3 * GB)
    assert photograph(shelf.store) == before
    assert shelf.admit("new", 2 * GB) == ["idle"]


def test_a_plan_alone_changes_nothing(shelf):
    shelf.put_in("a", 9 * GB)
    before = photograph(shelf.store)
    assert shelf.store.plan_eviction(5 * GB, "x") == ["a"]
    assert photograph(shelf.store) == before


def test_a_superseded_entry_goes_before_a_less_recently_used_one(shelf):
    shelf.put_in("old", 3 * GB, name="/model")
    lease = shelf.lease("old")
    shelf.put_in("idle", 3 * GB)
    shelf.put_in("new", 3 * GB, name="/model")
    shelf.store.pin(["old"], True)  # by key: it outlives its lease
    shelf.release("old", lease)
    shelf.store.pin(["old"], False)
    assert shelf.store.plan_eviction(4 * GB, "x") == ["old"]


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
    shelf.admit("a", 6 * GB)
    shelf.store.fail("a")
    assert shelf.keys == set()
    assert shelf.store.find(["/a"]) is None
    assert shelf.admit("a", 10 * GB) == []


# Names and generations


def test_a_name_is_found_once_its_entry_is_complete(shelf):
    shelf.admit("a")
    assert shelf.store.find(["/a"]) is None
    assert shelf.store.find([], "a").key == "a"
    shelf.store.complete("a")
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


def test_names_given_while_staging_are_all_given_at_its_end(shelf):
    shelf.put_in("old", name="/second")
    shelf.admit("new", name="/first")
    assert shelf.store.give_name("new", "/second") == []
    assert shelf.store.find(["/second"]).key == "old"
    assert shelf.store.complete("new") == ["old"]
    assert shelf.store.find(["/second"]).key == "new"


def test_a_pin_follows_the_name_to_the_newer_generation(shelf):
    shelf.put_in("one", name="/model")
    shelf.store.pin(["/model"], True)
    assert shelf.put_in("two", name="/model") == ["one"]
    assert shelf.store.entries["two"].pinned


def test_a_pin_stays_with_a_generation_that_keeps_a_name(shelf):
    shelf.put_in("one", name="/model")
    shelf.store.give_name("one", "/alias")
    shelf.store.pin(["/alias"], True)
    assert shelf.put_in("two", name="/model") == []
    assert shelf.store.entries["one"].pinned
    assert not shelf.store.entries["two"].pinned


def test_a_put_of_the_same_name_replaces_the_older(shelf):
    shelf.put_in("one", provenance="put", name="kept")
    assert shelf.put_in("two", provenance="put", name="kept") == ["one"]


def test_a_superseded_put_is_freed_when_it_is_unpinned(shelf):
    """No name leads to it and policy never takes it: nobody else would free it."""
    shelf.put_in("one", provenance="put", name="kept")
    lease = shelf.lease("one")
    shelf.put_in("two", provenance="put", name="kept")
    shelf.store.pin(["one"], True)
    shelf.release("one", lease)
    freed = shelf.store.pin(["one"], False)
    assert freed == ["one"] or "one" not in shelf.store.entries


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
    shelf.store.pin(["/pinned"], True)
    with pytest.raises(EntryInUse, match="/pinned is pinned; unpin it first"):
        shelf.store.check_evictable(["/pinned"])
    shelf.admit("staging")
    with pytest.raises(EntryInUse, match="being staged"):
        shelf.store.check_evictable(["staging"])
    with pytest.raises(EntryNotFound):
        shelf.store.check_evictable(["/none"])


def test_evicting_everything_spares_what_is_used_pinned_staged_or_put(shelf):
    shelf.put_in("idle")
    shelf.put_in("used")
    shelf.lease("used")
    shelf.put_in("pinned")
    shelf.store.pin(["/pinned"], True)
    shelf.put_in("put", provenance="put", name="kept")
    shelf.admit("staging")
    going, kept = shelf.store.evictable_by_all()
    assert going == ["idle"]
    assert [text.split(" ")[0] for text in kept] == ["/used", "/pinned", "kept", "/staging"]


# Messages


def test_a_full_tier_names_what_is_in_the_way_with_numbers(shelf):
    shelf.put_in("used", 2 * GB)
    shelf.lease("used", pid=4711)
    shelf.put_in("pinned", 1 * GB)
    shelf.store.pin(["/pinned"], True)
    shelf.put_in("put", 3 * GB, "put", "kept")
    shelf.admit("staging", 1 * GB)
    shelf.clock.now_s += 12 * 60
    with pytest.raises(HostMemoryFull) as caught:
        shelf.admit("new", 4 * GB)
    message = str(caught.value)
    assert message.startswith("host tier full: /new needs 4.0 GB, 3.0 GB free of 10.0 GB; in the way: ")
    for part in (
        "/used (2.0 GB, used by process 4711)", "/pinned (1.0 GB, pinned)", "kept (3.0 GB, saved with put, idle 12 min)",
        "/staging (1.0 GB, being staged)", "raise NBCache.host_limit",
    ):  # fmt: skip
        assert part in message


def test_a_tier_too_small_for_the_entry_blames_nobody(shelf):
    shelf.put_in("put", GB, "put", "kept")
    with pytest.raises(HostMemoryFull) as caught:
        shelf.admit("new", 11 * GB)
    assert str(caught.value) == "host tier full: /new needs 11.0 GB, 9.0 GB free of 10.0 GB; raise NBCache.host_limit"


# Anything at all

KEYS = st.sampled_from("abcde")
NAMES = st.sampled_from(["/1", "/2", "/3"])


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of what the server does with its store, the server's own part (freeing what it is told to) included."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf(limit_bytes=10)
        self.store = self.shelf.store
        self.leases: dict[int, str] = {}
        self.evicted_by_policy: list[Entry] = []

    def _keys(self, host: Host) -> list[str]:
        return sorted(key for key, entry in self.store.entries.items() if entry.host is host)

    def _free(self, keys: list[str]) -> None:
        for key in keys:
            entry = self.store.entries[key]
            assert not entry.leases, "I4"
            assert not entry.pinned, "I4"
            self.store.evict(key)

    def _attempt(self, call: Any, *errors: type[Exception]) -> Any:
        """Call; if it raises one of these, it must have changed nothing."""
        before = photograph(self.store)
        try:
            return call()
        except errors:
            assert photograph(self.store) == before
            return None

    @initialize()
    def start(self) -> None:
        assert self.store.used_bytes == 0

    @rule(
        key=KEYS, name=NAMES, size=st.sampled_from([1, 1, 1, 2, 3, 5, 11]), provenance=st.sampled_from(["file", "file", "put"])
    )
    def admit(self, key: str, name: str, size: int, provenance: str) -> None:
        if key in self.store.entries:
            return
        before = {k: copy.deepcopy(e) for k, e in self.store.entries.items()}
        in_order = sorted(before.values(), key=lambda e: (bool(e.names), e.last_used_s))
        candidates = [e.key for e in in_order if e.idle and e.provenance == "file"]
        room = self.store.limit_bytes - self.store.used_bytes + sum(before[k].extent_bytes for k in candidates)
        entry = Entry(key, name, provenance, (), size, size, 1)
        victims = self._attempt(lambda: self.store.admit(entry), HostMemoryFull)
        assert (victims is not None) == (size <= room)
        if victims is None:
            return
        assert victims == candidates[: len(victims)], "superseded first, then the least recently used"
        assert all(before[v].provenance == "file" and before[v].idle for v in victims), "I7"
        if victims:
            kept = sum(before[v].extent_bytes for v in victims[:-1])
            used = sum(e.extent_bytes for e in before.values())
            assert used - kept + size > self.store.limit_bytes, "more went than must"
        self._free(victims)
        assert self.store.used_bytes <= self.store.limit_bytes
        self._free(self.store.give_name(key, name))

    @rule(key=KEYS, name=NAMES, provenance=st.sampled_from(["file", "put"]), leased=st.booleans())
    def replace_a_generation(self, key: str, name: str, provenance: str, leased: bool) -> None:
        """The common course of things in one step: what has this name now is used by somebody, and a newer one arrives."""
        older = self.store.find([name])
        if key in self.store.entries or self.store.used_bytes >= self.store.limit_bytes:
            return
        if older is not None and leased:
            self.leases[self.shelf.lease(older.key)] = older.key
        self.admit(key, name, 1, provenance)
        self._free(self.store.complete(key))
        assert self.store.find([name]).key == key

    @precondition(lambda self: self._keys(Host.STAGING))
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self._keys(Host.STAGING)))
        names = list(self.store.entries[key].names)
        self._free(self.store.complete(key))
        assert all(self.store.find([name]).key == key for name in names)

    @precondition(lambda self: self._keys(Host.STAGING))
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self._keys(Host.STAGING)))
        self.store.fail(key)
        assert key not in self.store.entries

    @precondition(lambda self: self.store.entries)
    @rule(data=st.data(), name=NAMES)
    def give_name(self, data: st.DataObject, name: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.store.entries)))
        older = self.store.find([name])
        protected = older is not None and older.pinned and older.names == [name] and older.key != key
        self._free(self.store.give_name(key, name))
        if self.store.entries[key].host is Host.STAGED:
            assert self.store.find([name]).key == key
            assert self.store.entries[key].pinned or not protected, "a pin follows the name"

    @precondition(lambda self: self._keys(Host.STAGED))
    @rule(data=st.data())
    def grant(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self._keys(Host.STAGED)))
        self.leases[self.shelf.lease(key)] = key

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.leases)))
        self._free(self.store.release(self.leases.pop(lease), lease))

    @rule(name=st.one_of(NAMES, KEYS), pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        freed = self._attempt(lambda: self.store.pin([name], pinned), EntryNotFound)
        self._free(freed or [])

    @rule(name=st.one_of(NAMES, KEYS))
    def evict_by_name(self, name: str) -> None:
        entry = self._attempt(lambda: self.store.check_evictable([name]), EntryNotFound, EntryInUse)
        if entry is not None:
            assert entry.idle
            self._free([entry.key])

    @rule()
    def evict_everything(self) -> None:
        going, kept = self.store.evictable_by_all()
        assert len(going) + len(kept) == len(self.store.entries)
        assert all(self.store.entries[key].provenance == "file" for key in going)
        self._free(going)

    @precondition(lambda self: self.store.entries)
    @rule(data=st.data(), method=st.sampled_from(["evict", "complete", "fail"]))
    def break_an_invariant(self, data: st.DataObject, method: str) -> None:
        """Called out of turn, a method raises and changes nothing."""
        key = data.draw(st.sampled_from(sorted(self.store.entries)))
        entry = self.store.entries[key]
        allowed = entry.idle if method == "evict" else entry.host is Host.STAGING
        if not allowed:
            before = photograph(self.store)
            with pytest.raises(IllegalTransition):
                getattr(self.store, method)(key)
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
            if entry.host is Host.STAGED:
                assert all(self.store._names[name] == key for name in entry.names)
                assert not entry.names or entry.name in entry.names, "shown under a name that leads elsewhere"

    @invariant()
    def nothing_absent_is_kept_and_nothing_leased_is_lost(self) -> None:
        assert all(entry.host is not Host.ABSENT for entry in self.store.entries.values())
        held: dict[str, set[int]] = {}
        for lease, key in self.leases.items():
            held.setdefault(key, set()).add(lease)
        for key, leases in held.items():
            assert set(self.store.entries[key].leases) == leases, "I4: a leased entry is never in no tier"
        assert {key for key, entry in self.store.entries.items() if entry.leases} == set(held)


StoreMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStoreMachine = StoreMachine.TestCase
