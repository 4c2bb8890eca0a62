"""A mapped slab, and plain tensors and arrays over it.

Owns the map and the lease below it: what is made over a slab keeps it, and the last to go ends both. Must not know how the slab
came to be filled, nor what copy-on-write is, which is made over it. It exists so that whoever hands out tensors of a slab need
not think of when it may be unmapped. Needs torch.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import msgspec
import torch

from nbcache.client import tensors as edge
from nbcache.client.session import Session
from nbcache.errors import PackageMissing
from nbcache.layout import ALIGNMENT, MIB, SMALL_LIMIT, round_up
from nbcache.manifest import Extent, Manifest, each_view, row_strides, stored_shape
from nbcache.memory.driver import Mapped

Queue = Callable[[int, int, int], None]
"""Queues a copy of so many bytes, from the second address to the first."""
Allocation = Callable[[int], tuple[int, int]]
"""Where the memory that an address lies in begins and ends; torch's segments may lie side by side."""
BEGIN_BYTES = 4096 * MIB
"""Memory that is asked for first: to copy so much takes longer than to ask for the rest."""
FIRST_RUN_BYTES, LAST_RUN_BYTES = 64 * MIB, 1024 * MIB
"""What is queued at once: little at first, so that the device begins soon, then twice as much each time."""


class SlabMap:
    """A map of a slab and the lease on it. Both end when the last reference goes, once queued work is done.

    The map is to be read only, but while this process fills the slab.
    """

    def __init__(
        self, mapped: Mapped, session: Session, synchronize: Callable[[], None], manifest: Manifest, device: int
    ) -> None:
        self.address = mapped.address
        self.size_bytes = mapped.size_bytes
        self.manifest = manifest
        self._device = device
        self._finalizer = weakref.finalize(self, _let_go, mapped, session, synchronize, os.getpid())
        self._finalizer.atexit = False

    def end(self, wait: Callable[[], None] | None = None) -> None:
        """End both now, whoever still refers to this: a traceback, when nobody was given the tensors.

        ``wait`` is for what must be done before; without it, for all that is queued.
        """
        if (alive := self._finalizer.detach()) is not None:
            mapped, session, synchronize, owner = alive[2]
            _let_go(mapped, session, wait or synchronize, owner)

    def cupy_arrays(self) -> dict[str, Any]:
        """See :meth:`Weights.cupy`."""
        try:
            import cupy
        except ImportError as error:
            raise PackageMissing(
                "CuPy arrays need CuPy, which is not installed: pip install 'nbcache[cuda13]' or 'nbcache[cuda12]'"
            ) from error

        memory = cupy.cuda.UnownedMemory(self.address, self.size_bytes, self, self._device)
        arrays = {}
        for view in each_view(self.manifest):
            extent = self.manifest.tensors[view.extent]
            dtype = cupy.dtype(_CUPY_DTYPES.get(extent.dtype) or f"u{edge.torch_dtype(extent).itemsize}")
            if extent.nbytes:
                pointer = cupy.cuda.MemoryPointer(memory, extent.place + view.offset * dtype.itemsize)
                strides = tuple(stride * dtype.itemsize for stride in view.strides)
                arrays[view.name] = cupy.ndarray(view.shape, dtype, pointer, strides)
            else:
                arrays[view.name] = cupy.empty(view.shape, dtype)
        return arrays


_CUPY_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "i2", "U16": "u2", "F16": "f2", "I32": "i4", "U32": "u4", "F32": "f4",
    "I64": "i8", "U64": "u8", "F64": "f8", "C64": "c8", "C128": "c16",
}  # fmt: skip


def _let_go(mapped: Mapped, session: Session, synchronize: Callable[[], None], owner: int) -> None:
    if os.getpid() == owner:  # a forked child has neither the context nor the lease
        synchronize()
        mapped.close()
    session.close()


def plain_tensors(slab: SlabMap, manifest: Manifest, device: torch.device) -> dict[str, torch.Tensor]:
    """CUDA tensors that keep the map alive; a write to one is a write to the map. All are views of one array, the slab."""
    return views_of(torch.as_tensor(_CudaArray(slab), device=device), manifest)


def views_of(whole: torch.Tensor, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The tensors of a manifest as views of all its bytes."""
    bases = {name: (whole.view(dtype), dtype.itemsize) for name, dtype in edge.dtypes_of(manifest).items()}
    found: dict[str, torch.Tensor] = {}
    for name, dtype_name, shape, _, _, nbytes, place in map(msgspec.structs.astuple, manifest.tensors):
        base, itemsize = bases[dtype_name]
        stored, strides = _stored(dtype_name, shape)
        if nbytes:
            found[name] = base.as_strided(stored, strides, place // itemsize)
        else:
            found[name] = torch.empty(stored, dtype=base.dtype, device=whole.device)
    return found


@lru_cache(1024)
def _stored(dtype: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape as memory has it, and its strides. A model has thousands of tensors, of few shapes."""
    stored = stored_shape(dtype, shape)
    return stored, row_strides(stored)


def private_tensors(
    slab: SlabMap, manifest: Manifest, device: torch.device, queue: Queue, allocation: Allocation
) -> dict[str, torch.Tensor]:
    """Copies in memory of torch's own.

    That memory is asked for at once, where torch has none at hand: the driver takes as long for 24 GB as for a tensor of 20 MB,
    and a model has hundreds. A little of it comes first, so that copies begin; if the rest is not there at once, it is asked
    for tensor by tensor. The large tensors come first: while they are copied, the small ones are made. In the slab's order, for
    torch then places them side by side as the slab does.
    """
    is_cuda = device.type == "cuda"
    waiting = _lacking(manifest, device) if is_cuda else 0
    begin = min(waiting, BEGIN_BYTES)
    _reserve(begin, device)
    waiting -= begin
    dtypes = edge.dtypes_of(manifest)
    copies = _Copies(queue, allocation, ALIGNMENT if is_cuda else 1)
    found: dict[str, torch.Tensor] = {}
    placed = 0
    for run, nbytes in _runs(_large_first(manifest)):
        placed += nbytes
        if waiting and placed > begin:
            _reserve(waiting, device)
            waiting = 0
        tensors = [torch.empty_strided(*_stored(e.dtype, e.shape), dtype=dtypes[e.dtype], device=device) for e in run]
        copies.add(run, [tensor.data_ptr() for tensor in tensors], slab.address)
        found.update(zip([extent.name for extent in run], tensors, strict=True))
    return {extent.name: found[extent.name] for extent in manifest.tensors}  # in file order again


def _lacking(manifest: Manifest, device: torch.device) -> int:
    """How much memory torch has to ask for, beside what it keeps."""
    need = sum(extent.nbytes for extent in manifest.tensors)
    counted = torch.cuda.memory_stats_as_nested_dict(device)  # which torch's own questions sort through, each time
    kept, used = (int(counted[f"{name}_bytes"]["all"]["current"]) if counted else 0 for name in ("reserved", "allocated"))
    return max(0, need - (kept - used))


def _reserve(size_bytes: int, device: torch.device) -> None:
    """Have torch ask for memory, which it keeps for what comes; if there is not so much at once, what comes asks for itself."""
    if size_bytes:
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(size_bytes, dtype=torch.uint8, device=device)


def _large_first(manifest: Manifest) -> list[Extent]:
    """The tensors in the slab's order, but those of its first class last."""
    extents = sorted(manifest.tensors, key=attrgetter("place"))
    small = [extent for extent in extents if extent.nbytes <= SMALL_LIMIT]
    return [extent for extent in extents if extent.nbytes > SMALL_LIMIT] + small


def _runs(extents: Sequence[Extent]) -> Iterator[tuple[list[Extent], int]]:
    """The tensors that are made and queued together, and how many bytes they are."""
    run: list[Extent] = []
    nbytes, limit = 0, FIRST_RUN_BYTES
    for extent in extents:
        run.append(extent)
        nbytes += extent.nbytes
        if nbytes >= limit:
            yield run, nbytes
            run, nbytes, limit = [], 0, min(2 * limit, LAST_RUN_BYTES)
    if run:
        yield run, nbytes


class _Copies:
    """Queues copies out of a slab; of tensors that lie side by side in both places, in one allocation, as one.

    ``rounding`` is what a tensor's memory is rounded up to: those bytes may be written.
    """

    def __init__(self, queue: Queue, allocation: Allocation, rounding: int) -> None:
        self._queue = queue
        self._allocation = allocation
        self._rounding = rounding
        self._start = self._end = 0  # the allocation last seen

    def add(self, extents: Sequence[Extent], targets: Sequence[int], source: int) -> None:
        """Copy these tensors of the slab that begins at ``source`` to their targets."""
        target = place = size = 0  # what is yet to be queued
        for extent, to in zip(extents, targets, strict=True):
            offset = to - target
            is_next = size and offset == round_up(size, self._rounding) and offset == extent.place - place
            if is_next and to < self._end:
                size = offset + extent.nbytes
            elif extent.nbytes:
                if size:
                    self._queue(target, source + place, size)
                target, place, size = to, extent.place, extent.nbytes
                if not self._start <= to < self._end:
                    self._start, self._end = self._allocation(to)
        if size:
            self._queue(target, source + place, size)


class _CudaArray:
    """What torch needs to see a slab as one array; torch's storage keeps this, and this keeps the map."""

    def __init__(self, slab: SlabMap) -> None:
        self.slab = slab
        self.__cuda_array_interface__ = {
            "shape": (slab.size_bytes,), "typestr": "|u1", "data": (slab.address, False), "version": 3, "strides": None,
        }  # fmt: skip
