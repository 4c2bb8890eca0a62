"""Mapped host blocks between loads: which stay, for how long, and what ends them."""

from __future__ import annotations

import threading

import pytest

from nbcache.client import blocks as room
from nbcache.client.blocks import Copy, MappedBlocks
from nbcache.errors import DaemonUnavailable, DriverError
from tests.support.waiting import eventually

COPY = Copy("k", 1, "GPU-0")


class HostBlock:
    """A mapped host block that counts its ends, or refuses them."""

    def __init__(self, size_bytes=1, refuses=False):
        self.address, self.size_bytes, self.refuses, self.ends = 0, size_bytes, refuses, 0

    @property
    def closed(self):
        assert self.ends <= 1
        return self.ends == 1

    def close(self):
        if self.refuses:
            raise DriverError("cuMemUnmap: invalid argument (1)")
        self.ends += 1


class Watch:
    """A session that watches a copy, until either side ends it."""

    def __init__(self):
        self.ended, self.closed = threading.Event(), False

    def await_end(self, timeout_s):
        self.ended.wait(timeout_s)

    def shut(self):
        self.ended.set()

    def close(self):
        self.closed = True


@pytest.fixture
def watches(monkeypatch):
    """Those that were begun, by copy. None can be begun of a copy of number 0."""
    begun = {}

    def watch(copy):
        return begun.setdefault(copy, Watch()) if copy.number else None

    monkeypatch.setattr(room, "_watch", watch)
    monkeypatch.setattr(room, "LINGER_S", 0)
    yield begun
    for each in begun.values():
        each.shut()
    eventually(lambda: all(each.closed for each in begun.values()))


def kept(blocks, copy):
    eventually(lambda: copy in blocks._kept)


def test_host_blocks_of_many_quick_loads_linger_no_longer_than_those_of_one(monkeypatch):
    monkeypatch.setattr(room, "LINGER_S", 0.3)
    found, blocks = [HostBlock() for _ in range(20)], MappedBlocks()
    for block in found:
        blocks.put([block])
    assert not any(block.closed for block in found)
    eventually(lambda: all(block.closed for block in found), timeout_s=2)


def test_a_block_that_is_not_unmapped_does_not_keep_others(watches):
    others, blocks = (HostBlock(), HostBlock()), MappedBlocks()
    blocks.put([HostBlock(refuses=True), others[0]])
    eventually(lambda: others[0].closed)
    blocks.put([others[1]])
    eventually(lambda: others[1].closed)


def test_much_pinned_memory_does_not_linger(monkeypatch):
    """But that of the last load, whatever it takes: to unmap it at once would slow down what follows."""
    monkeypatch.setattr(room, "LINGER_S", 60)
    large, blocks = [HostBlock(3 << 30) for _ in range(4)], MappedBlocks()
    for block in large:
        blocks.put([block])
    eventually(lambda: [block.closed for block in large] == [True, True, True, False])


def test_what_lingers_can_be_taken(monkeypatch):
    monkeypatch.setattr(room, "LINGER_S", 60)
    mine, other, blocks = HostBlock(), HostBlock(), MappedBlocks()
    blocks.put([other])
    blocks.put([mine], COPY)
    assert blocks.take(Copy("k", 2, "GPU-0")) == blocks.take(Copy("k", 1, "GPU-1")) == []
    assert blocks.take(COPY) == [mine]
    assert blocks.take(COPY) == []


def test_what_is_kept_is_taken_once_and_watched_no_more(watches):
    mine, blocks = [HostBlock(), HostBlock()], MappedBlocks()
    for _ in range(3):
        blocks.put(mine, COPY)
        kept(blocks, COPY)
        watch = watches.pop(COPY)
        assert blocks.take(COPY) == mine
        eventually(lambda watch=watch: watch.closed)
    assert blocks.take(COPY) == []
    assert not any(block.closed for block in mine)


def test_what_the_daemon_freed_is_unmapped(watches):
    mine, blocks = [HostBlock(), HostBlock()], MappedBlocks()
    blocks.put(mine, COPY)
    kept(blocks, COPY)
    watches[COPY].ended.set()
    eventually(lambda: all(block.closed for block in mine))
    assert blocks.take(COPY) == []


def test_what_cannot_be_watched_is_unmapped(watches):
    mine, blocks = HostBlock(), MappedBlocks()
    blocks.put([mine], Copy("k", 0, "GPU-0"))
    eventually(lambda: mine.closed)
    assert watches == {}


def test_what_nobody_wants_for_long_is_unmapped(watches, monkeypatch):
    monkeypatch.setattr(room, "KEEP_S", 0.1)
    mine, blocks = HostBlock(), MappedBlocks()
    blocks.put([mine], COPY)
    eventually(lambda: mine.closed)


def test_a_large_copy_is_not_kept(watches):
    large, blocks = HostBlock(room.KEEP_BYTES + 1), MappedBlocks()
    blocks.put([large], COPY)
    eventually(lambda: large.closed)


def test_the_oldest_give_way(watches):
    copies = [Copy("k", number, "GPU-0") for number in range(1, 6)]
    mine, blocks = [HostBlock(1 << 30) for _ in copies], MappedBlocks()
    for copy, block in zip(copies, mine, strict=True):
        blocks.put([block], copy)
        kept(blocks, copy)
    eventually(lambda: [block.closed for block in mine] == [True, False, False, False, False])
    assert [bool(blocks.take(copy)) for copy in copies] == [False, True, True, True, True]


def test_no_more_than_a_few_copies_are_kept(watches, monkeypatch):
    monkeypatch.setattr(room, "KEEP_COPIES", 2)
    copies = [Copy("k", number, "GPU-0") for number in range(1, 5)]
    mine, blocks = [HostBlock() for _ in copies], MappedBlocks()
    for copy, block in zip(copies, mine, strict=True):
        blocks.put([block], copy)
        kept(blocks, copy)
    eventually(lambda: [block.closed for block in mine] == [True, True, False, False])


def test_where_no_thread_can_be_had_nothing_is_kept_and_nothing_lost(watches, monkeypatch):
    """Neither for what is to be watched, nor, at first, for the unmapping."""
    stock, refused = threading.Thread.start, ["nbcache-watch", "nbcache-unmap"]

    def start(thread):
        if thread.name in refused:
            raise RuntimeError("can't start new thread")
        stock(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    first, second, blocks = HostBlock(), HostBlock(), MappedBlocks()
    blocks.put([first], COPY)
    refused.remove("nbcache-unmap")
    blocks.put([second])
    eventually(lambda: first.closed and second.closed)
    assert blocks.take(COPY) == []


def test_what_goes_wrong_with_the_watch_costs_the_keeping_alone(monkeypatch):
    monkeypatch.setattr(room, "LINGER_S", 0)
    for error in (OSError(24, "Too many open files"), DaemonUnavailable("gone"), ValueError("a bug")):

        def refuse(*_, error=error, **__):
            raise error

        monkeypatch.setattr(room.Session, "open", refuse)
        mine, after, blocks = HostBlock(), HostBlock(), MappedBlocks()
        blocks.put([mine], COPY)
        eventually(lambda mine=mine: mine.closed)
        blocks.put([after])
        eventually(lambda after=after: after.closed)


def test_the_same_copy_mapped_twice_is_kept_once(watches):
    """Two threads loaded it at once."""
    first, second, blocks = HostBlock(), HostBlock(), MappedBlocks()
    blocks.put([first], COPY)
    kept(blocks, COPY)
    watches.pop(COPY)
    blocks.put([second], COPY)
    eventually(lambda: first.closed)
    kept(blocks, COPY)
    assert blocks.take(COPY) == [second]


def test_taken_while_the_daemon_frees_it(watches):
    """Whoever is first has it; it is never both taken and unmapped."""
    blocks, taken, left = MappedBlocks(), [], []
    for _ in range(50):
        mine = HostBlock()
        blocks.put([mine], COPY)
        kept(blocks, COPY)
        watch = watches.pop(COPY)
        watch.ended.set()
        (taken if blocks.take(COPY) else left).append(mine)
        eventually(lambda watch=watch: watch.closed)
    eventually(lambda: all(block.closed for block in left))
    assert not any(block.closed for block in taken)
