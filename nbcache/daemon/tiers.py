"""The memory of entries: host copies and slabs, made, filled and freed. Acts on what the store decided.

Holds descriptors and, of pinned copies, maps and arrays; never a GPU context. A host copy is filled from a checkpoint's files
or from the entry's copy of the other kind.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Protocol

from nbcache.daemon.entries import PINNED, SHARED, Place
from nbcache.daemon.reader import CopySource, Reader, Source, Staging
from nbcache.errors import HostMemoryFull
from nbcache.memory.arena import BLOCK_BYTES, Arena, PinnedBlock, block_sizes
from nbcache.memory.driver import Driver
from nbcache.memory.shared import SharedBlock

log = logging.getLogger("nbcache.daemon")


class Memory(Protocol):
    """What a residence holds."""

    def close(self) -> None:
        """Give it back."""


@dataclass(eq=False)
class SharedCopy:
    """A host copy in one memfd."""

    block: SharedBlock

    def close(self) -> None:
        """Give the memory back."""
        self.block.close()


@dataclass(eq=False)
class PinnedCopy:
    """A host copy in pinned blocks; ``blocks`` grows while it is filled, and holds only full ones."""

    blocks: list[PinnedBlock] = field(default_factory=list)

    def close(self) -> None:
        """Give the memory back."""
        for block in self.blocks:
            block.close()


@dataclass(eq=False)
class Slab:
    """Device memory, as a descriptor."""

    driver: Driver
    fd: int

    def close(self) -> None:
        """Give the memory back, once no kernel maps it."""
        self.driver.close(self.fd)


class Tiers:
    """Memory by entry and place. ``open_driver`` is called when the first GPU load comes; it may raise DriverError, each time.

    Notes
    -----
    The server's thread owns it; filling runs in the reader's threads and reports through ``post``, which must hand a callable
    over to the server's thread.
    """

    def __init__(
        self,
        open_driver: Callable[[], Driver],
        post: Callable[[Callable[[], None]], None],
        reader: Reader,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.reader = reader
        self.block_bytes = block_bytes
        self._open_driver = open_driver
        self._post = post
        self._driver: Driver | None = None
        self._arena: Arena | None = None
        self._disposer = ThreadPoolExecutor(1, thread_name_prefix="nbcache-free")
        self._creator = ThreadPoolExecutor(1, thread_name_prefix="nbcache-create")
        self._manifests: dict[str, int] = {}
        self._memory: dict[tuple[str, Place], Memory] = {}

    def block_sizes(self, extent_bytes: int) -> tuple[int, ...]:
        """How the pinned copy of an extent is cut into blocks."""
        return block_sizes(extent_bytes, self.block_bytes)

    @property
    def driver(self) -> Driver:
        """The GPU driver. DriverError if there is none."""
        if self._driver is None:
            self._driver = self._open_driver()
        return self._driver

    @property
    def driver_in_use(self) -> Driver | None:
        """The driver, if any GPU load has come yet."""
        return self._driver

    def manifest_fd(self, key: str) -> int:
        """The sealed manifest of an entry."""
        return self._manifests[key]

    def keep_manifest(self, key: str, fd: int) -> None:
        """Take over the manifest of an entry."""
        self._manifests[key] = fd

    def forget(self, key: str) -> None:
        """Close the manifest of an entry that has no residence left."""
        os.close(self._manifests.pop(key))

    def free(self, key: str, place: Place) -> None:
        """Give a residence's memory back, elsewhere: 24 GB take the system a while."""
        memory = self._memory.pop((key, place), None)
        if memory is not None:
            self._disposer.submit(memory.close)

    # Shared copies

    def create_shared(self, key: str, name: str, extent_bytes: int) -> SharedBlock:
        """An empty shared copy. HostMemoryFull if the system gives no memory."""
        try:
            block = SharedBlock.create(name, extent_bytes)
        except OSError as error:
            raise HostMemoryFull(f"{name}: the system gives no {extent_bytes} bytes: {error.strerror}") from error
        self._memory[key, SHARED] = SharedCopy(block)
        return block

    def shared_fd(self, key: str) -> int:
        """The descriptor of a shared copy."""
        return self._shared(key).block.fd

    def _shared(self, key: str) -> SharedCopy:
        memory = self._memory[key, SHARED]
        assert isinstance(memory, SharedCopy)
        return memory

    def seal_shared(self, key: str) -> None:
        """Seal a shared copy that a client filled. OSError while it is still mapped writable."""
        self._shared(key).block.seal()

    def fill_shared(self, key: str, source: Source, done: Callable[[Exception | None], None]) -> Staging:
        """Fill a shared copy from a source in the background, seal it, and report."""
        block, staging = self._shared(key).block, Staging(source)

        def fill() -> None:
            with block.writable() as view:
                staging.run([(0, view)], self.reader.threads)
            block.seal()

        self._start(staging, fill, done)
        return staging

    def fill_shared_from_pinned(self, key: str, done: Callable[[Exception | None], None]) -> Staging:
        """Fill a shared copy from the pinned one."""
        block, pinned = self._shared(key).block, self._pinned(key)
        staging = Staging(CopySource(key, block.fd, block.size_bytes))

        def fill() -> None:
            at = 0
            for part in pinned.blocks:
                with part.view() as view:
                    while view:
                        got = os.pwrite(block.fd, view[: 1 << 28], at)
                        at, view = at + got, view[got:]
                        staging.staged_bytes = at
            block.seal()

        self._start(staging, fill, done)
        return staging

    # Pinned copies

    def fill_pinned(
        self,
        key: str,
        source: Source,
        extent_bytes: int,
        on_block: Callable[[], None],
        done: Callable[[Exception | None], None],
    ) -> Staging:
        """Make and fill a pinned copy block by block, in the background; ``on_block`` is called after each, ``done`` last.

        DriverError if there is no driver or no CuPy; through ``done``, HostMemoryFull if the system pins no more memory.
        """
        if self._arena is None:
            driver = self.driver
            self._arena = Arena(driver, getattr(driver, "open_arrays", None))
        arena, staging, copy = self._arena, Staging(source), PinnedCopy()
        self._memory[key, PINNED] = copy

        def areas() -> Generator[tuple[int, memoryview]]:
            sizes = self.block_sizes(extent_bytes)
            ahead: Future[PinnedBlock] | None = self._creator.submit(arena.acquire, sizes[0])
            start = 0
            try:
                for number, size in enumerate(sizes):
                    assert ahead is not None
                    block, ahead = ahead.result(), None
                    if number + 1 < len(sizes):  # made while this one is filled
                        ahead = self._creator.submit(arena.acquire, sizes[number + 1])
                    with block.view() as view:
                        try:
                            yield start, view
                        except BaseException:
                            block.close()
                            raise
                    start += size
                    copy.blocks.append(block)
                    self._post(on_block)
            finally:
                if ahead is not None:  # failed on the way, and nobody has the block that was made ahead
                    with suppress(Exception):
                        ahead.result().close()

        def fill() -> None:
            with closing(areas()) as parts:
                staging.run(parts, self.reader.threads)

        self._start(staging, fill, done)
        return staging

    def _pinned(self, key: str) -> PinnedCopy:
        memory = self._memory[key, PINNED]
        assert isinstance(memory, PinnedCopy)
        return memory

    def pinned_block(self, key: str, number: int) -> PinnedBlock | None:
        """A block of a pinned copy; None while it is not filled."""
        blocks = self._pinned(key).blocks
        return blocks[number] if number < len(blocks) else None

    def copy_source(self, key: str, name: str) -> Source:
        """The shared copy as a source."""
        block = self._shared(key).block
        return CopySource(name, block.fd, block.size_bytes)

    def _start(self, staging: Staging, fill: Callable[[], None], done: Callable[[Exception | None], None]) -> None:
        self.reader.start(staging, fill, lambda error: self._post(lambda: done(error)))

    # Slabs

    def create_slab(self, key: str, place: Place, extent_bytes: int) -> int:
        """A slab's descriptor. DeviceMemoryFull if the GPU has no room; DriverError."""
        fd = self.driver.create_slab(place.uuid, extent_bytes)
        self._memory[key, place] = Slab(self.driver, fd)
        return fd

    def slab_fd(self, key: str, place: Place) -> int:
        """The descriptor of a slab."""
        memory = self._memory[key, place]
        assert isinstance(memory, Slab)
        return memory.fd

    def free_bytes(self, uuid: str) -> int:
        """Free memory of a GPU."""
        return self.driver.free_bytes(uuid)

    def total_bytes(self, uuid: str) -> int:
        """Memory of a GPU, free or not."""
        return next(gpu.total_bytes for gpu in self.driver.gpus() if gpu.uuid == uuid)

    def settle(self) -> None:
        """Wait until what was freed is really free."""
        self._disposer.submit(lambda: None).result()

    def close(self) -> None:
        """Free everything."""
        self.reader.close()
        self._creator.shutdown(wait=True)
        for memory in self._memory.values():
            self._disposer.submit(memory.close)
        self._disposer.shutdown(wait=True)
        for fd in self._manifests.values():
            os.close(fd)
