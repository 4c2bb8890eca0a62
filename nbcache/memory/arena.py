"""The pinned host tier: CuPy-pinned arrays in memory that other processes can map.

An :class:`Arena` is CuPy's pinned allocator over exportable blocks of the driver's: ``cupyx.empty_pinned`` gives the arrays,
and each array's memory is also a descriptor that a kernel maps for its GPU. An entry's pinned copy is a row of such blocks,
created as they are filled, because creating pinned memory is slower than reading a hot file. The only module that imports CuPy,
when the first block is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from nbcache.errors import DeviceMemoryFull, DriverError, HostMemoryFull
from nbcache.layout import round_up
from nbcache.memory.driver import GRANULARITY_BYTES, Driver, Mapped, cpu_view, without_math_libraries

BLOCK_BYTES = 512 << 20
"""The largest block: each is a descriptor that the daemon keeps."""

FIRST_BLOCK_BYTES = 64 << 20
"""An entry's first block. A kernel maps it for its GPU before anything can be copied, so it must be quick."""

GROWTH = 1.4
"""How much larger a block is than the one before: it takes about as long to map as that one to copy."""

PinnedArray = Any
"""What the array maker gives: an array of bytes over a mapped block, keeping nothing but the address."""


class ArrayMaker(Protocol):
    """Makes an array over a mapped block. :class:`CupyArrays` in earnest; the tests' emulation has a plain one."""

    def __call__(self, mapped: Mapped) -> PinnedArray:
        """The array."""


class CupyArrays:
    """``cupyx.empty_pinned`` over our blocks: CuPy asks its allocator for memory, and is handed the block."""

    def __init__(self) -> None:
        try:
            with without_math_libraries():
                import cupy
                import cupyx
        except ImportError as error:
            raise DriverError("CuPy is not installed; pip install 'nbcache[cuda13]' or 'nbcache[cuda12]'") from error
        self._cupy: Any = cupy
        self._cupyx: Any = cupyx
        self._next: Mapped | None = None
        cupy.cuda.set_pinned_memory_allocator(self._allocate)

    def _allocate(self, size_bytes: int) -> Any:  # noqa: ANN401 - cupy.cuda.PinnedMemoryPointer
        mapped, self._next = self._next, None
        if mapped is None or size_bytes > mapped.size_bytes:
            raise DriverError(f"a pinned array of {size_bytes} bytes outside the arena")
        return self._cupy.cuda.PinnedMemoryPointer(_Block(mapped), 0)

    def __call__(self, mapped: Mapped) -> PinnedArray:
        """An array of bytes over the whole block."""
        self._next = mapped
        return self._cupyx.empty_pinned(mapped.size_bytes, dtype="u1")


class _Block:
    """What CuPy wants of memory: ``ptr``, ``size``, ``device_id``."""

    def __init__(self, mapped: Mapped) -> None:
        self.ptr = mapped.address
        self.size = mapped.size_bytes
        self.device_id = 0


class PinnedBlock:
    """One block: its descriptor, its array and its bytes. Close it."""

    def __init__(self, driver: Driver, arrays: ArrayMaker, size_bytes: int) -> None:
        self._driver = driver
        self.size_bytes = size_bytes
        self.fd = driver.create_block(size_bytes)
        try:
            self._mapped = driver.map_block(self.fd, size_bytes)
            try:
                self.array: PinnedArray = arrays(self._mapped)
            except BaseException:
                self._mapped.close()
                raise
        except BaseException:
            driver.close(self.fd)
            raise

    def view(self) -> memoryview:
        """The block's bytes, writable. No copy."""
        return cpu_view(self._mapped)

    def close(self) -> None:
        """Unmap, and give the descriptor back. No view or array of it may be used any more."""
        self.array = None
        self._mapped.close()
        self._driver.close(self.fd)


class Arena:
    """Makes pinned blocks. ``open_arrays`` is called once, when the first is made: importing CuPy takes seconds."""

    def __init__(self, driver: Driver, open_arrays: Callable[[], ArrayMaker] | None = None) -> None:
        self._driver = driver
        self._open_arrays = open_arrays or CupyArrays
        self._arrays: ArrayMaker | None = None

    def acquire(self, size_bytes: int) -> PinnedBlock:
        """A new block. HostMemoryFull if the system has no more memory to pin; DriverError."""
        if self._arrays is None:
            self._arrays = self._open_arrays()
        try:
            return PinnedBlock(self._driver, self._arrays, size_bytes)
        except DeviceMemoryFull as error:  # what the driver calls any memory that runs out
            raise HostMemoryFull(
                f"the system gives no {size_bytes} bytes of pinned memory ({error}); evict entries that nobody uses "
                "(%weights evict, nbcache evict), or end what else takes host memory"
            ) from error


def block_sizes(extent_bytes: int, largest_bytes: int = BLOCK_BYTES) -> tuple[int, ...]:
    """How an extent is cut into blocks: the first are small, the later ones large, the last takes the rest."""
    sizes, size = [], min(FIRST_BLOCK_BYTES, largest_bytes)
    while extent_bytes > 0:
        sizes.append(min(size, extent_bytes))
        extent_bytes -= size
        size = min(round_up(int(size * GROWTH), GRANULARITY_BYTES), largest_bytes)
    return tuple(sizes)
