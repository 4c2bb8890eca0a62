"""What the service does between store and memory that no peer can bring about at will: it is called here without a server."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from nbcache.daemon.connection import Connection, Phase
from nbcache.daemon.entries import PINNED, SHARED, Entry, Kind, Place, State
from nbcache.daemon.policy import GpuPolicy
from nbcache.daemon.service import Service
from nbcache.errors import CheckpointChanged, DeviceMemoryFull, DriverError, HostMemoryFull, NBCacheError, ProtocolError
from nbcache.memory.shared import map_private, seal_bytes
from nbcache.protocol import messages as m
from tests.support.emulated import EmulatedDriver
from tests.support.waiting import eventually

MIB = 1 << 20
EXTENT = 6 * MIB


class Port:
    """A port without peers: what is posted waits for :meth:`Bench.until`, what is answered is kept."""

    def __init__(self) -> None:
        self.connections: dict[int, Connection] = {}
        self.reports: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.answers: list[m.Message] = []
        self.post = self.reports.put

    def reply(self, connection: Connection, message: m.Message, descriptors: Sequence[int] = ()) -> None:
        self.answers.append(message)

    def end(self, connection: Connection, why: str) -> None:
        del self.connections[connection.number]

    def fail(self, connection: Connection, error: NBCacheError) -> None:
        self.answers.append(m.Failed(type(error).__name__, str(error)))


class Bench:
    """A service without a server: this thread is its loop."""

    def __init__(self, keep_s: float = 600.0) -> None:
        self.driver = EmulatedDriver()
        policy = GpuPolicy(keep_s, low_bytes=0, block_bytes=2 * MIB)
        self.port = Port()
        self.service = Service(self.port, lambda: 2 * EXTENT, lambda: self.driver, policy)
        self.store, self.tiers, self.free = self.service._store, self.service._tiers, self.service._holdings.free

    def entry(self, key: str, name: str = "/model") -> Entry:
        self.tiers.keep_manifest(key, seal_bytes("manifest", b"{}"))
        return Entry(key, name, "file", (), EXTENT, EXTENT, 1)

    def slab(self, key: str, name: str = "/model") -> Place:
        place = Place(Kind.DEVICE, self.driver.gpus()[0].uuid)
        self.tiers.create_slab(key, place, EXTENT)
        self.free(self.store.fill(self.entry(key, name), place, EXTENT))
        self.free(self.store.give_name(key, name))
        self.free(self.store.complete(key, place))
        return place

    def until(self, key: str, place: Place) -> None:
        """Do what other threads report until a residence is no longer being filled."""
        while key in self.store.entries and self.store.entries[key].state(place) is State.FILLING:
            self.port.reports.get(timeout=10)()


@pytest.fixture
def make(no_leaks: None) -> Iterator[Callable[..., Bench]]:
    with contextlib.ExitStack() as stack:

        def make(keep_s: float = 600.0) -> Bench:
            bench = Bench(keep_s)
            stack.callback(bench.service.close)
            return bench

        yield make


@pytest.mark.parametrize("keep_s", [0, 600])
def test_the_last_lease_on_a_superseded_slab_ends_with_the_entry(make, keep_s):
    """The entry is forgotten with it: there is nothing left to look for idle slabs in."""
    bench = make(keep_s)
    place = bench.slab("one")
    bench.store.grant("one", place, 1, os.getpid())
    bench.slab("two")
    assert bench.store.entries["one"].superseded
    bench.service.let_go(Connection(1, os.getpid(), 0.0, Phase.HOLDING, key="one", place=place))
    assert set(bench.store.entries) == {"two"}


@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_of_a_superseded_entry_goes_when_it_is_complete_unless_somebody_waits_for_it(make, waits):
    bench = make()
    entry, connection = offered(bench)
    if waits:
        connection.phase, connection.key, connection.place = Phase.WAITING, "k", PINNED
    bench.slab("two")
    assert entry.superseded
    bench.until("k", PINNED)
    assert set(bench.store.entries) == ({"k", "two"} if waits else {"two"})
    if waits:
        assert {place: each.leases for place, each in entry.residences.items()} == {PINNED: {1: os.getpid()}}
        bench.service.let_go(connection)
        assert set(bench.store.entries) == {"two"}


def test_a_pinned_copy_is_not_pulled_away_while_the_shared_one_is_filled_from_it(make, monkeypatch):
    """Whether it is kept meanwhile, or given back only afterwards: the shared copy has its bytes."""
    bench, payload = make(), os.urandom(EXTENT)
    entry = bench.entry("k")
    assert bench.store.fill(entry, SHARED, EXTENT) == []
    bench.tiers.create_shared("k", "/model", EXTENT)
    with bench.tiers._shared("k").block.writable() as view:
        view[:] = payload
    bench.tiers.seal_shared("k")
    assert bench.store.complete("k", SHARED) == []
    assert bench.store.give_name("k", "/model") == []
    assert bench.service._host._fill_from(entry, SHARED, PINNED)
    bench.until("k", PINNED)
    bench.free([("k", SHARED)])

    copying, go, real = threading.Event(), threading.Event(), os.pwrite

    def slow(*arguments):
        copying.set()
        assert go.wait(10)
        return real(*arguments)

    monkeypatch.setattr("nbcache.daemon.tiers.os.pwrite", slow)
    assert bench.service._host._fill_from(entry, PINNED, SHARED)
    assert copying.wait(10)
    with contextlib.suppress(HostMemoryFull):  # another entry comes, and wants the room
        bench.free(bench.store.plan_eviction(EXTENT, "/another"))
        with contextlib.suppress(AssertionError):  # evicted: its memory goes at once, or it is kept until the copying is over
            eventually(lambda: len(bench.driver._used) < 3, timeout_s=0.5)
    go.set()
    bench.until("k", SHARED)
    assert bench.store.entries["k"].state(SHARED) is State.READY
    with map_private(bench.tiers.shared_fd("k"), EXTENT) as area:
        assert area[:] == payload


def test_who_waits_for_a_slab_is_granted_once_when_its_commit_waits_for_the_host_copy(make):
    """A second Granted would be taken for the answer to the next request, and its lease would never end (I1)."""
    bench = make()
    place = Place(Kind.DEVICE, bench.driver.gpus()[0].uuid)
    entry = bench.entry("k")
    assert bench.store.fill(entry, SHARED, EXTENT) == []
    bench.tiers.create_shared("k", "/model", EXTENT)
    bench.tiers.seal_shared("k")
    assert bench.store.complete("k", SHARED) == []
    assert bench.store.give_name("k", "/model") == []
    assert bench.service._host.is_coming(entry, PINNED)  # begun; nothing that other threads report is done yet
    bench.tiers.create_slab("k", place, EXTENT)
    assert bench.store.fill(entry, place, EXTENT) == []
    wish = m.Find(device=m.DeviceWish(place.uuid))
    filler = Connection(1, os.getpid(), 0.0, Phase.COMMITTING, key="k", place=place, find=wish)
    waiters = [Connection(n, os.getpid(), 0.0, Phase.WAITING, key="k", place=place, find=wish) for n in (2, 3)]
    bench.port.connections = {each.number: each for each in [filler, *waiters]}
    bench.until("k", PINNED)
    assert [type(answer) for answer in bench.port.answers] == [m.Granted] * 3
    assert sorted(entry.residences[place].leases) == [1, 2, 3]
    assert entry.residences[PINNED].leases == {}


def test_who_was_offered_a_slab_hears_why_the_copy_behind_it_came_to_nothing(make):
    """Its Fill comes after the end of the staging: not an eviction, which it would ask again after."""
    bench = make()
    entry = bench.entry("k")
    assert bench.store.fill(entry, PINNED, EXTENT) == []
    wish = m.Find(device=m.DeviceWish(bench.driver.gpus()[0].uuid))
    connection = Connection(1, os.getpid(), 0.0, Phase.IDLE, find=wish)
    bench.port.connections = {1: connection}
    bench.service._leases.attend(connection, entry)
    assert connection.phase is Phase.OFFERED
    bench.service.staging_failed(entry, PINNED, CheckpointChanged("/model changed while it was read"))
    with pytest.raises(CheckpointChanged, match="/model changed while it was read"):
        bench.service._slabs.fill(connection, m.Fill(EXTENT), [])
    assert connection.phase is Phase.IDLE


def offered(bench: Bench, **wish) -> tuple[Entry, Connection]:
    """An entry whose pinned copy is on its way, and who wishes for a slab of it; not attended to yet."""
    entry = bench.entry("k")
    bench.free(bench.store.fill(entry, SHARED, EXTENT))
    bench.tiers.create_shared("k", "/model", EXTENT)
    bench.tiers.seal_shared("k")
    bench.free(bench.store.complete("k", SHARED))
    bench.free(bench.store.give_name("k", "/model"))
    assert bench.service._host.is_coming(entry, PINNED)
    find = m.Find(device=m.DeviceWish(bench.driver.gpus()[0].uuid, **wish))
    connection = Connection(1, os.getpid(), 0.0, Phase.IDLE, find=find)
    bench.port.connections = {1: connection}
    return entry, connection


def test_who_wishes_ahead_fills_at_once_and_gets_its_first_blocks_as_they_are_staged(make):
    bench = make()
    entry, connection = offered(bench, ahead=2)
    bench.service._leases.attend(connection, entry)
    assert bench.port.answers == [m.Vacant("k", True), m.Filling((2 * MIB,) * 3, entry.residences[PINNED].number)]
    assert connection.phase is Phase.FILLING
    bench.until("k", PINNED)
    assert bench.port.answers[2:] == [m.Block(0, 2 * MIB), m.Block(1, 2 * MIB)]
    assert connection.wanted == []


def test_no_more_blocks_come_ahead_than_there_are(make):
    bench = make()
    entry, connection = offered(bench, ahead=20)
    bench.service._leases.attend(connection, entry)
    bench.until("k", PINNED)
    assert bench.port.answers[2:] == [m.Block(number, 2 * MIB) for number in range(3)]


def test_who_wishes_ahead_hears_that_there_is_no_room(make):
    bench = make()
    bench.driver._gpus = tuple(replace(gpu, total_bytes=EXTENT - 1) for gpu in bench.driver.gpus())
    entry, connection = offered(bench, ahead=2)
    with pytest.raises(DeviceMemoryFull, match="/model"):
        bench.service._leases.attend(connection, entry)
    assert bench.port.answers == [m.Vacant("k", True)]
    assert connection.phase is Phase.IDLE


@pytest.mark.parametrize("wish", [{"ahead": 1, "dtype": "F16"}, {"ahead": -1}, {"ahead": 65}])
def test_a_wish_ahead_that_cannot_be_is_a_protocol_error(make, wish):
    """The size of a slab of another dtype is the client's to say."""
    bench = make()
    entry, connection = offered(bench, **wish)
    with pytest.raises(ProtocolError, match="ahead"):
        bench.service._leases.attend(connection, entry)


def watching(bench: Bench, number: int, key: str, copy: int) -> Connection:
    connection = Connection(number, os.getpid(), 0.0, Phase.IDLE)
    bench.port.connections[number] = connection
    bench.service.requests[connection.phase, m.Watch](connection, m.Watch(key, copy), [])
    return connection


def test_who_watches_a_pinned_copy_hears_of_its_end_and_of_no_other(make):
    bench = make()
    entry, filler = offered(bench)
    bench.service._leases.attend(filler, entry)
    bench.until("k", PINNED)
    place = filler.place
    bench.tiers.create_slab("k", place, EXTENT)
    bench.free(bench.store.fill(entry, place, EXTENT))
    bench.free(bench.store.complete("k", place))
    bench.port.answers.clear()
    copy = entry.residences[PINNED].number
    assert [watching(bench, 11, "k", copy).phase, watching(bench, 12, "k", copy).phase] == [Phase.WATCHING] * 2
    strangers = [watching(bench, 13, "k", copy + 9), watching(bench, 14, "other", copy)]
    assert [each.phase for each in strangers] == [Phase.IDLE] * 2
    assert bench.port.answers == [m.Watched(), m.Watched(), m.Absent(), m.Absent()]
    bench.free([("k", SHARED), ("k", place)])
    assert {11, 12} <= set(bench.port.connections)
    bench.free([("k", PINNED)])
    assert {11, 12}.isdisjoint(bench.port.connections) and {13, 14} <= set(bench.port.connections)


def test_a_copy_that_is_made_anew_has_another_number(make):
    bench = make()
    entry, filler = offered(bench)
    numbers = []
    for _ in range(2):
        filler.phase = Phase.IDLE
        bench.service._leases.attend(filler, entry)
        bench.until("k", PINNED)
        numbers.append(entry.residences[PINNED].number)
        bench.free([("k", PINNED)])
    assert len(set(numbers)) == 2


def test_who_wants_shared_memory_is_not_told_that_there_is_no_pinned_memory(make):
    """It waited for the pinned copy only because that was on its way."""
    bench = make()
    entry = bench.entry("k")
    assert bench.store.fill(entry, PINNED, EXTENT) == []
    connection = Connection(1, os.getpid(), 0.0, Phase.IDLE)
    bench.port.connections = {1: connection}
    bench.service._leases.attend(connection, entry)
    assert connection.phase is Phase.WAITING
    bench.store.fail(entry.key, PINNED)
    bench.service.staging_failed(entry, PINNED, DriverError("export refused"))
    assert bench.port.answers == [m.Absent()]
    assert connection.phase is Phase.IDLE


@pytest.mark.parametrize(
    ("need", "message"),
    [
        (12 * MIB, "/model needs 12.6 MB, 2.1 MB free; nbcache holds /idle"),
        (17 * MIB, "free of 16.8 MB in all; it can never fit"),
    ],
)
def test_idle_slabs_stay_when_all_of_them_would_not_suffice(make, need, message):
    """They are somebody's next hit, and going does not help."""
    bench = make()
    bench.driver._gpus = tuple(replace(gpu, total_bytes=16 * MIB) for gpu in bench.driver.gpus())
    idle = bench.slab("idle", "/idle")
    others = bench.driver.create_slab(idle.uuid, 8 * MIB)
    entry, connection = offered(bench)
    bench.service._leases.attend(connection, entry)
    with pytest.raises(DeviceMemoryFull, match=message):
        bench.service._slabs.fill(connection, m.Fill(need), [])
    assert connection.phase is Phase.IDLE
    assert bench.store.entries["idle"].state(idle) is State.READY
    bench.driver.close(others)


def test_idle_slabs_stay_when_what_is_being_freed_already_suffices(make):
    bench = make()
    bench.driver._gpus = tuple(replace(gpu, total_bytes=2 * EXTENT) for gpu in bench.driver.gpus())
    idle, going = bench.slab("idle", "/idle"), bench.slab("going", "/going")
    freeing = threading.Event()
    bench.tiers._disposer.submit(freeing.wait)
    bench.free([("going", going)])
    threading.Timer(0.2, freeing.set).start()
    entry, connection = offered(bench, ahead=2)
    bench.service._leases.attend(connection, entry)
    assert connection.phase is Phase.FILLING
    assert bench.store.entries["idle"].state(idle) is State.READY


@pytest.mark.parametrize("device", [True, False])
def test_pinned_memory_that_runs_out_is_told_by_the_entrys_name_to_who_needs_it(make, monkeypatch, device):
    """Not to who waited for it only because it was on its way."""

    def refuse(_: int) -> int:
        raise DeviceMemoryFull("cuMemCreate: out of memory (2)")

    bench = make()
    monkeypatch.setattr(bench.driver, "create_block", refuse)
    entry, connection = offered(bench)
    if device:
        bench.service._leases.attend(connection, entry)
        bench.until("k", PINNED)
        with pytest.raises(HostMemoryFull, match="/model: the system gives no 2097152 bytes of pinned memory"):
            bench.service._slabs.fill(connection, m.Fill(EXTENT), [])
    else:
        connection.phase, connection.key, connection.find = Phase.WAITING, "k", m.Find()
        connection.place = SHARED
        bench.until("k", PINNED)
        assert [type(answer) for answer in bench.port.answers] == [m.Granted]
