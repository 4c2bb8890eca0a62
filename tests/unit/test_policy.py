"""When idle slabs leave a GPU: how long they stay, what a low GPU takes, and what stays whatever happens."""

from __future__ import annotations

import pytest

from nbcache.daemon.entries import PINNED, SHARED, Entry, Kind, Place
from nbcache.daemon.policy import GpuPolicy
from nbcache.daemon.store import Store
from nbcache.errors import DriverError
from tests.support.emulated import EmulatedDriver

GB = 10**9
ONE, TWO = (gpu.uuid for gpu in EmulatedDriver().gpus())


class Meter:
    """The part of a driver that policy reads: free memory by GPU. None: the driver refuses."""

    def __init__(self, **free_bytes: int | None) -> None:
        self.free = {ONE: free_bytes.get("one", 80 * GB), TWO: free_bytes.get("two", 80 * GB)}
        self.asked: list[str] = []

    def free_bytes(self, uuid: str) -> int:
        self.asked.append(uuid)
        free = self.free[uuid]
        if free is None:
            raise DriverError(f"GPU {uuid} fell off the bus")
        return free


class Bench:
    """A store full of slabs, and a clock that moves when it is asked to."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.store = Store(lambda: 100 * GB, lambda: self.now_s)

    def slab(self, key: str, uuid: str = ONE, size_bytes: int = GB, provenance: str = "file") -> tuple[str, Place]:
        """An idle slab, a second younger than the last."""
        self.now_s += 1
        place = Place(Kind.DEVICE, uuid)
        self.fill(key, place, size_bytes, provenance)
        assert self.store.complete(key, place) == []
        return key, place

    def fill(self, key: str, place: Place, size_bytes: int = GB, provenance: str = "file") -> None:
        known = self.store.entries.get(key)
        entry = known or Entry(key, f"/{key}", provenance, (), size_bytes, size_bytes, 1)
        assert self.store.fill(entry, place, size_bytes) == []
        self.store.give_name(key, f"/{key}")


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_slab_stays_as_long_as_it_is_to_be_kept(bench):
    slab, policy = bench.slab("a"), GpuPolicy(keep_s=60, low_bytes=0)
    bench.now_s += 59.9
    assert policy.expired(bench.store, Meter()) == []
    bench.now_s += 0.1
    assert policy.expired(bench.store, Meter()) == [slab]


def test_the_end_of_a_lease_begins_the_time(bench):
    key, place = bench.slab("a")
    bench.store.grant(key, place, 1, 7)
    bench.now_s += 600
    assert bench.store.release(key, place, 1) == []
    policy = GpuPolicy(keep_s=60, low_bytes=0)
    assert policy.expired(bench.store, Meter()) == []
    bench.now_s += 60
    assert policy.expired(bench.store, Meter()) == [(key, place)]


def test_only_those_that_are_old_go_oldest_first(bench):
    old = [bench.slab(key, uuid) for key, uuid in (("a", TWO), ("b", ONE))]
    bench.now_s += 60
    bench.slab("c")
    assert GpuPolicy(keep_s=60, low_bytes=0).expired(bench.store, Meter()) == old


def test_kept_for_0_seconds_goes_at_once(bench):
    slabs = [bench.slab("a"), bench.slab("a", TWO), bench.slab("b")]
    assert GpuPolicy(keep_s=0, low_bytes=0).expired(bench.store, Meter()) == slabs


@pytest.mark.parametrize("keep_s", [-1.0, -0.001, float("-inf")])
def test_a_negative_time_is_for_ever(bench, keep_s):
    bench.slab("a")
    bench.now_s += 1e9
    assert GpuPolicy(keep_s=keep_s, low_bytes=0).expired(bench.store, Meter()) == []


def test_for_ever_ends_where_the_gpu_runs_low(bench):
    slab = bench.slab("a")
    assert GpuPolicy(keep_s=-1, low_bytes=2 * GB).expired(bench.store, Meter(one=GB)) == [slab]


def test_a_gpu_that_runs_low_gives_up_the_least_recently_used_until_it_does_not(bench):
    a, b, c = bench.slab("a", size_bytes=2 * GB), bench.slab("b", size_bytes=3 * GB), bench.slab("c", size_bytes=3 * GB)
    policy = GpuPolicy(keep_s=-1, low_bytes=6 * GB)
    assert policy.expired(bench.store, Meter(one=6 * GB)) == []
    assert policy.expired(bench.store, Meter(one=6 * GB - 1)) == [a]
    assert policy.expired(bench.store, Meter(one=4 * GB)) == [a]
    assert policy.expired(bench.store, Meter(one=4 * GB - 1)) == [a, b]
    assert policy.expired(bench.store, Meter(one=0)) == [a, b, c]


def test_that_all_idle_slabs_do_not_suffice_is_no_reason_to_keep_them(bench):
    slabs = [bench.slab("a"), bench.slab("b")]
    assert GpuPolicy(keep_s=-1, low_bytes=50 * GB).expired(bench.store, Meter(one=0)) == slabs


def test_each_gpu_is_looked_at_alone(bench):
    bench.slab("a", ONE)
    two = bench.slab("a", TWO)
    bench.slab("b", TWO)
    policy = GpuPolicy(keep_s=-1, low_bytes=2 * GB)
    assert policy.expired(bench.store, Meter(one=2 * GB, two=GB)) == [two]


def test_what_goes_for_its_age_makes_room_too_and_nothing_goes_twice(bench):
    old = bench.slab("a", size_bytes=2 * GB)
    bench.now_s += 60
    young = bench.slab("b", size_bytes=2 * GB)
    bench.slab("c", size_bytes=2 * GB)
    policy = GpuPolicy(keep_s=60, low_bytes=4 * GB)
    assert policy.expired(bench.store, Meter(one=2 * GB)) == [old]
    assert policy.expired(bench.store, Meter(one=GB)) == [old, young]


@pytest.mark.parametrize("keep_s", [0, 60, -1])
def test_what_is_leased_pinned_or_being_filled_never_goes(bench, keep_s):
    key, place = bench.slab("leased")
    bench.store.grant(key, place, 1, 7)
    bench.slab("pinned")
    bench.store.pin(["/pinned"], True)
    bench.fill("filling", Place(Kind.DEVICE, ONE))
    bench.now_s += 1e6
    policy = GpuPolicy(keep_s=keep_s, low_bytes=50 * GB)
    assert policy.expired(bench.store, Meter(one=0)) == []
    idle = bench.slab("idle")
    bench.now_s += 60
    assert policy.expired(bench.store, Meter(one=0)) == [idle]


def test_host_copies_never_go(bench):
    for place in (SHARED, PINNED):
        bench.fill("a", place)
        assert bench.store.complete("a", place) == []
    bench.fill("put", SHARED, provenance="put")
    assert bench.store.complete("put", SHARED) == []
    slabs = [bench.slab("a"), bench.slab("put")]
    bench.now_s += 1e6
    assert GpuPolicy(keep_s=0, low_bytes=50 * GB).expired(bench.store, Meter(one=0)) == slabs


def test_a_gpu_that_cannot_be_asked_is_left_alone_and_the_others_are_not(bench):
    lost = bench.slab("a", ONE)
    low = bench.slab("b", TWO)
    meter = Meter(one=None, two=0)
    assert GpuPolicy(keep_s=-1, low_bytes=GB).expired(bench.store, meter) == [low]
    assert set(meter.asked) == {ONE, TWO}
    bench.now_s += 60
    assert set(GpuPolicy(keep_s=60, low_bytes=GB).expired(bench.store, Meter(one=None, two=None))) == {lost, low}


@pytest.mark.parametrize("keep_s", [0, 60, -1])
def test_without_slabs_the_driver_is_not_even_asked(bench, keep_s):
    bench.fill("a", PINNED)
    meter = Meter(one=0)
    assert GpuPolicy(keep_s=keep_s).expired(bench.store, meter) == []
    assert meter.asked == []
    assert GpuPolicy(keep_s=keep_s).expired(bench.store, None) == []


def test_asking_changes_nothing(bench):
    slab = bench.slab("a")
    bench.now_s += 1e6
    for _ in range(2):
        assert GpuPolicy().expired(bench.store, Meter(one=0)) == [slab]


def test_over_a_driver_that_really_counts(bench):
    """As the daemon does it: the slabs are the driver's, and going means closing."""
    driver = EmulatedDriver(limit_bytes=10 << 20)
    slabs = {bench.slab(key, ONE, 3 << 20): driver.create_slab(ONE, 3 << 20) for key in "abc"}
    policy = GpuPolicy(keep_s=-1, low_bytes=5 << 20)
    try:
        going = policy.expired(bench.store, driver)
        assert [key for key, _ in going] == ["a", "b"]
        for residence in going:
            bench.store.evict(*residence)
            driver.close(slabs.pop(residence))
        assert policy.expired(bench.store, driver) == []
    finally:
        for fd in slabs.values():
            driver.close(fd)
