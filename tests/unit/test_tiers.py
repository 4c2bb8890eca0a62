"""Host copies and slabs over the emulated driver: filled from files and from each other, and given back however it ends."""

from __future__ import annotations

import errno
import itertools
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbcache.daemon.entries import PINNED, SHARED, Kind, Place
from nbcache.daemon.reader import FileSource, Reader, Staging
from nbcache.daemon.tiers import Tiers
from nbcache.errors import CheckpointChanged, CheckpointUnreadable, DeviceMemoryFull, DriverError, HostMemoryFull
from nbcache.manifest import Extent, Fingerprint, Manifest, Member, place_tensors
from nbcache.memory.arena import PinnedBlock, block_sizes
from nbcache.memory.shared import check_sealed, map_private, seal_bytes
from tests.support.emulated import EmulatedDriver, plain_array

MIB = 1 << 20
BLOCK = 2 * MIB


class WatchedDriver(EmulatedDriver):
    """Fails the Nth block, map or array as told; knows what lives, and what was closed that did not."""

    def __init__(self) -> None:
        super().__init__(limit_bytes=64 * MIB)
        self.fails = ""
        self.alive: set[int] = set()
        self.closed_twice: list[int] = []
        self._counts = {what: itertools.count(1) for what in ("block", "map", "array")}

    def _step(self, what: str) -> None:
        if self.fails == f"{what} {next(self._counts[what])}":
            raise DriverError(f"emulated: no {what}")

    def open_arrays(self) -> Callable[[object], object]:
        def make(mapped: object) -> object:
            self._step("array")
            return plain_array(mapped)

        return make

    def create_block(self, size_bytes: int) -> int:
        self._step("block")
        return super().create_block(size_bytes)

    def map_block(self, fd: int, size_bytes: int) -> object:
        self._step("map")
        return super().map_block(fd, size_bytes)

    def _create(self, owner: str, size_bytes: int) -> int:
        fd = super()._create(owner, size_bytes)
        self.alive.add(fd)
        return fd

    def close(self, fd: int) -> None:
        if fd not in self.alive:
            self.closed_twice.append(fd)
            return
        self.alive.remove(fd)
        super().close(fd)


class Bench:
    """Tiers, and the thread that owns them: this one, which calls what was posted."""

    def __init__(self) -> None:
        self.driver = WatchedDriver()
        self.opened = 0
        self.posts: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.tiers = Tiers(self._open, self.posts.put, Reader(threads=2), BLOCK)
        self.results: list[Exception | None] = []
        self.blocks: list[int] = []
        """How many blocks could be read, at each call of ``on_block``."""
        self._closed = False

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.tiers.close()

    def _open(self) -> EmulatedDriver:
        self.opened += 1
        return self.driver

    def done(self, error: Exception | None) -> None:
        self.results.append(error)

    def wait(self) -> Exception | None:
        """Call what is posted until a filling is done; how it ended."""
        while not self.results:
            self.posts.get(timeout=10)()
        return self.results.pop()

    def on_block(self) -> None:
        count = next(n for n in itertools.count() if self.tiers.pinned_block("k", n) is None)
        self.blocks.append(count)

    def fill_pinned(self, source: FileSource, extent_bytes: int) -> Staging:
        return self.tiers.fill_pinned("k", source, extent_bytes, self.on_block, self.done)

    def fill_shared(self, source: FileSource, extent_bytes: int) -> Staging:
        self.tiers.create_shared("k", "model", extent_bytes)
        return self.tiers.fill_shared("k", source, self.done)

    def pinned(self) -> bytes:
        """All blocks of the pinned copy."""
        blocks = (self.tiers.pinned_block("k", number) for number in itertools.count())
        return b"".join(bytes(block.view()) for block in itertools.takewhile(lambda block: block is not None, blocks))

    def shared(self, extent_bytes: int) -> bytes:
        """The shared copy, as a kernel maps it."""
        with map_private(self.tiers.shared_fd("k"), extent_bytes) as area:
            return bytes(area)


@pytest.fixture
def bench(no_leaks: None) -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()
    assert bench.driver.alive == set(), "memory that nobody gave back"
    assert bench.driver.closed_twice == [], "I8: a descriptor was closed twice"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.write_bytes(random.Random(5).randbytes(14 * MIB))
    return path


@pytest.fixture
def manifest(path: Path) -> Manifest:
    """A small tensor, and two of several blocks each; 22 MiB in all."""
    ranges = [(100, 1000), (2000, 10 * MIB), (2000 + 10 * MIB, 3 * MIB), (1100, 0)]
    tensors = [Extent(f"t{i}", "U8", (nbytes,), 0, offset, nbytes, 0) for i, (offset, nbytes) in enumerate(ranges)]
    return place_tensors(tensors, [Member(str(path), Fingerprint.of(path.stat()))], {})


def source_of(manifest: Manifest) -> FileSource:
    return FileSource(manifest, [os.open(member.path, os.O_RDONLY) for member in manifest.members])


def assert_holds(found: bytes, manifest: Manifest, path: Path) -> None:
    assert len(found) == manifest.extent_bytes
    for tensor in manifest.tensors:
        assert found[tensor.place :][: tensor.nbytes] == path.read_bytes()[tensor.offset :][: tensor.nbytes], tensor.name


# From files


def test_a_shared_copy_is_filled_from_files_and_sealed(bench, manifest, path):
    source = source_of(manifest)
    staging = bench.fill_shared(source, manifest.extent_bytes)
    assert bench.wait() is None
    assert_holds(bench.shared(manifest.extent_bytes), manifest, path)
    assert check_sealed(bench.tiers.shared_fd("k"), 0) == manifest.extent_bytes
    assert staging.staged_bytes == staging.total_bytes == manifest.nbytes
    assert source.files == ()
    assert bench.opened == 0, "a shared copy needs no driver"
    assert bench.tiers.driver_in_use is None


def test_a_pinned_copy_is_filled_from_files_block_by_block(bench, manifest, path):
    source = source_of(manifest)
    staging = bench.fill_pinned(source, manifest.extent_bytes)
    assert bench.wait() is None
    count = -(-manifest.extent_bytes // BLOCK)
    assert count > 5
    assert len(bench.blocks) == count
    assert bench.blocks == sorted(bench.blocks)
    assert bench.blocks[-1] == count
    assert all(readable >= number for number, readable in enumerate(bench.blocks, 1)), "called before its block can be read"
    assert_holds(bench.pinned(), manifest, path)
    assert staging.staged_bytes == staging.total_bytes == manifest.nbytes
    assert source.files == ()
    assert bench.opened == 1


def test_blocks_are_full_when_they_can_be_read(bench, manifest, path, monkeypatch):
    """A kernel copies a block to its GPU while the next is read: the reading stops here until this block was looked at."""
    gate, real = threading.Semaphore(0), os.preadv
    monkeypatch.setattr("nbcache.daemon.reader.os.preadv", lambda *arguments: (gate.acquire(timeout=10), real(*arguments))[1])
    expected = bytearray(manifest.extent_bytes)
    for tensor in manifest.tensors:
        expected[tensor.place : tensor.place + tensor.nbytes] = path.read_bytes()[tensor.offset :][: tensor.nbytes]

    def covered(start: int, end: int) -> list[tuple[int, int]]:
        spans = ((max(start, t.place), min(end, t.place + t.nbytes)) for t in manifest.tensors)
        return [(first, last) for first, last in spans if first < last]

    looked: list[int] = []

    def on_block() -> None:
        number = len(looked)
        block = bench.tiers.pinned_block("k", number)
        with block.view() as view:
            for first, last in covered(number * BLOCK, number * BLOCK + block.size_bytes):
                assert view[first - number * BLOCK : last - number * BLOCK] == expected[first:last]
        looked.append(number)
        gate.release(4)

    gate.release(4)
    bench.tiers.fill_pinned("k", source_of(manifest), manifest.extent_bytes, on_block, bench.done)
    assert bench.wait() is None
    assert len(looked) == manifest.extent_bytes // BLOCK


def test_a_last_block_takes_the_rest_alone(bench, manifest, path):
    bench.tiers.block_bytes = 5 * MIB
    bench.fill_pinned(source_of(manifest), manifest.extent_bytes)
    assert bench.wait() is None
    sizes = [bench.tiers.pinned_block("k", number).size_bytes for number in range(len(bench.blocks))]
    assert sum(sizes) == manifest.extent_bytes
    assert set(sizes[:-1]) == {5 * MIB}
    assert 0 < sizes[-1] < 5 * MIB
    assert_holds(bench.pinned(), manifest, path)


@settings(deadline=None)
@given(st.integers(1, 1 << 40), st.sampled_from([2 * MIB, 64 * MIB, 512 * MIB]))
def test_blocks_begin_small_and_grow_so_that_a_large_entry_has_few(extent_bytes, largest_bytes):
    sizes = block_sizes(extent_bytes, largest_bytes)
    assert sum(sizes) == extent_bytes
    assert max(sizes) <= largest_bytes
    assert sizes[0] <= 64 * MIB
    assert all(size % (2 * MIB) == 0 for size in sizes[:-1])
    assert all(one <= other <= 1.5 * one for one, other in itertools.pairwise(sizes[:-1]))
    assert len(sizes) <= 7 + extent_bytes / largest_bytes


def test_one_block_is_enough_for_a_small_entry(bench, manifest, path):
    bench.tiers.block_bytes = 64 * MIB
    bench.fill_pinned(source_of(manifest), manifest.extent_bytes)
    assert bench.wait() is None
    assert bench.blocks == [1]
    assert_holds(bench.pinned(), manifest, path)


# From each other


def test_a_pinned_copy_is_filled_from_the_shared_one(bench, manifest, path):
    bench.fill_shared(source_of(manifest), manifest.extent_bytes)
    assert bench.wait() is None
    staging = bench.fill_pinned(bench.tiers.copy_source("k", "model"), manifest.extent_bytes)
    bench.tiers.free("k", SHARED)  # it may give way at once: the source has a descriptor of its own
    assert bench.wait() is None
    assert_holds(bench.pinned(), manifest, path)
    assert staging.staged_bytes == staging.total_bytes == manifest.extent_bytes


def test_a_shared_copy_is_filled_from_the_pinned_one_and_sealed(bench, manifest, path):
    bench.fill_pinned(source_of(manifest), manifest.extent_bytes)
    assert bench.wait() is None
    bench.tiers.create_shared("k", "model", manifest.extent_bytes)
    staging = bench.tiers.fill_shared_from_pinned("k", bench.done)
    assert bench.wait() is None
    assert_holds(bench.shared(manifest.extent_bytes), manifest, path)
    check_sealed(bench.tiers.shared_fd("k"), 0)
    assert staging.staged_bytes == staging.total_bytes == manifest.extent_bytes


# Failures


@pytest.mark.parametrize("block_bytes", [BLOCK, 64 * MIB], ids=["several blocks", "one block"])
@pytest.mark.parametrize("kind", ["shared", "pinned"])
def test_a_file_that_changed_leaves_nothing_once_it_is_freed(bench, manifest, path, kind, block_bytes):
    bench.tiers.block_bytes = block_bytes
    source = source_of(manifest)
    os.utime(path, ns=(1, 1))
    (bench.fill_shared if kind == "shared" else bench.fill_pinned)(source, manifest.extent_bytes)
    assert isinstance(bench.wait(), CheckpointChanged)
    assert source.files == ()
    assert bench.blocks == []
    bench.tiers.free("k", SHARED if kind == "shared" else PINNED)
    bench.tiers.settle()
    assert bench.driver.alive == set()


@pytest.mark.parametrize(
    ("block_bytes", "failing"), [(BLOCK, 1), (BLOCK, 2), (BLOCK, 10), (BLOCK, 11), (64 * MIB, 1)],
    ids=["first", "second", "last but one", "last", "only"],
)  # fmt: skip
def test_a_read_that_fails_leaves_only_full_blocks_and_closes_each_once(bench, manifest, monkeypatch, block_bytes, failing):
    """I8. Also where it is the last block, or the only one: a descriptor closed twice may be somebody else's by then."""
    bench.tiers.block_bytes = block_bytes
    assert failing <= -(-manifest.extent_bytes // BLOCK) == 11
    real = Staging._fill
    numbers = itertools.count(1)

    def fill(self, *arguments):
        if next(numbers) == failing:
            raise CheckpointUnreadable("read failed")
        return real(self, *arguments)

    monkeypatch.setattr(Staging, "_fill", fill)
    source = source_of(manifest)
    bench.fill_pinned(source, manifest.extent_bytes)
    assert isinstance(bench.wait(), CheckpointUnreadable)
    assert source.files == ()
    assert len(bench.blocks) == failing - 1
    assert len(bench.driver.alive) == failing - 1
    assert bench.driver.closed_twice == []
    bench.tiers.free("k", PINNED)
    bench.tiers.settle()
    assert bench.driver.alive == set()


@pytest.mark.parametrize("number", [1, 2, 11])
@pytest.mark.parametrize("what", ["block", "map", "array"])
def test_a_block_that_cannot_be_made_ends_the_filling_and_leaves_nothing(bench, manifest, what, number):
    bench.driver.fails = f"{what} {number}"
    source = source_of(manifest)
    bench.fill_pinned(source, manifest.extent_bytes)
    error = bench.wait()
    assert isinstance(error, DriverError)
    assert str(error) == f"emulated: no {what}"
    assert source.files == ()
    assert len(bench.blocks) <= number - 1
    bench.tiers.free("k", PINNED)
    bench.tiers.settle()
    assert bench.driver.alive == set()


@pytest.mark.parametrize("what", ["block", "map", "array"])
def test_a_block_that_cannot_be_made_is_neither_mapped_nor_open(bench, what):
    """The autouse fixture sees a map that is left."""
    bench.driver.fails = f"{what} 1"
    with pytest.raises(DriverError):
        PinnedBlock(bench.driver, bench.driver.open_arrays(), BLOCK)
    assert bench.driver.alive == set()


@pytest.mark.parametrize("step", ["create_block", "map_block"])
def test_pinned_memory_that_runs_out_is_host_memory_full(bench, manifest, monkeypatch, step):
    """The driver has one word for any memory that runs out; what is hot on a GPU must not go for the host's."""

    def refuse(*_: object) -> None:
        raise DeviceMemoryFull("cuMemCreate: out of memory (2)")

    monkeypatch.setattr(bench.driver, step, refuse)
    bench.fill_pinned(source_of(manifest), manifest.extent_bytes)
    error = bench.wait()
    assert type(error) is HostMemoryFull
    assert str(error).startswith(f"the system gives no {BLOCK} bytes of pinned memory (cuMemCreate: out of memory (2)); evict ")


def test_no_driver_is_told_at_once_and_asked_for_again(manifest):
    posts: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    opened = []

    def refuse() -> EmulatedDriver:
        opened.append(1)
        raise DriverError("no GPU here")

    tiers = Tiers(refuse, posts.put, Reader(threads=1), BLOCK)
    source = source_of(manifest)
    try:
        for _ in range(2):
            with pytest.raises(DriverError, match="no GPU here"):
                tiers.fill_pinned("k", source, manifest.extent_bytes, lambda: None, lambda error: None)
        assert tiers.driver_in_use is None
        assert len(opened) == 2
        tiers.free("k", PINNED)  # nothing was begun
    finally:
        source.close()
        tiers.close()


def test_a_shared_copy_for_which_there_is_no_memory_is_host_memory_full(bench, monkeypatch):
    def refuse(fd: int, size_bytes: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("nbcache.memory.shared.os.ftruncate", refuse)
    with pytest.raises(HostMemoryFull, match="model: the system gives no"):
        bench.tiers.create_shared("k", "model", MIB)
    bench.tiers.free("k", SHARED)


def test_a_pinned_copy_can_be_made_after_one_failed(bench, manifest, path):
    bench.driver.fails = "block 2"
    bench.fill_pinned(source_of(manifest), manifest.extent_bytes)
    assert isinstance(bench.wait(), DriverError)
    bench.tiers.free("k", PINNED)
    bench.blocks.clear()
    bench.fill_pinned(source_of(manifest), manifest.extent_bytes)
    assert bench.wait() is None
    assert_holds(bench.pinned(), manifest, path)


# Giving back


def test_what_is_freed_is_given_back_and_the_rest_is_not(bench, manifest, path):
    bench.fill_shared(source_of(manifest), manifest.extent_bytes)
    assert bench.wait() is None
    bench.fill_pinned(source_of(manifest), manifest.extent_bytes)
    assert bench.wait() is None
    bench.tiers.free("k", PINNED)
    bench.tiers.settle()
    assert bench.driver.alive == set()
    assert_holds(bench.shared(manifest.extent_bytes), manifest, path)
    fd = bench.tiers.shared_fd("k")
    bench.tiers.free("k", SHARED)
    bench.tiers.settle()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_what_is_not_there_can_be_freed(bench):
    bench.tiers.free("k", SHARED)
    bench.tiers.free("k", PINNED)
    bench.tiers.settle()


def test_a_slab_is_made_found_and_given_back(bench):
    gpu = bench.driver.gpus()[1]
    place, cast = Place(Kind.DEVICE, gpu.uuid), Place(Kind.DEVICE, gpu.uuid, "F16")
    fds = [bench.tiers.create_slab("k", where, 8 * MIB) for where in (place, cast)]
    assert [bench.tiers.slab_fd("k", where) for where in (place, cast)] == fds
    assert bench.tiers.free_bytes(gpu.uuid) == 48 * MIB
    with pytest.raises(DeviceMemoryFull):
        bench.tiers.create_slab("l", place, 49 * MIB)
    assert bench.tiers.free_bytes(gpu.uuid) == 48 * MIB
    bench.tiers.free("k", place)
    bench.tiers.settle()
    assert bench.tiers.free_bytes(gpu.uuid) == 56 * MIB
    assert bench.tiers.slab_fd("k", cast) == fds[1]


def test_a_forgotten_entry_gives_its_manifest_back(bench):
    bench.tiers.keep_manifest("k", seal_bytes("manifest", b"{}"))
    fd = bench.tiers.manifest_fd("k")
    bench.tiers.forget("k")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(KeyError):
        bench.tiers.manifest_fd("k")


def test_closing_gives_back_all_there_is(bench, manifest):
    """The fixtures see what is left."""
    bench.fill_shared(source_of(manifest), manifest.extent_bytes)
    assert bench.wait() is None
    bench.fill_pinned(source_of(manifest), manifest.extent_bytes)
    assert bench.wait() is None
    bench.tiers.create_slab("k", Place(Kind.DEVICE, bench.driver.gpus()[0].uuid), MIB)
    bench.tiers.keep_manifest("k", seal_bytes("manifest", b"{}"))


@pytest.mark.parametrize("kind", ["shared", "pinned"])
def test_closing_while_filling_ends_it_and_gives_everything_back(bench, manifest, monkeypatch, kind):
    reading, closing, real = threading.Event(), threading.Event(), os.preadv

    def slow(*arguments):
        reading.set()
        assert closing.wait(10)
        return real(*arguments)

    monkeypatch.setattr("nbcache.daemon.reader.os.preadv", slow)
    source = source_of(manifest)
    staging = (bench.fill_shared if kind == "shared" else bench.fill_pinned)(source, manifest.extent_bytes)
    assert reading.wait(10)
    cancel = staging.cancel

    def cancelled() -> None:
        cancel()
        closing.set()

    monkeypatch.setattr(staging, "cancel", cancelled)
    bench.close()
    assert source.files == ()
    assert bench.driver.alive == set()
    assert isinstance(bench.wait(), CheckpointUnreadable)
