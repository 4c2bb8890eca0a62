"""Copy-on-write over a mapped slab: each tensor adopts its place, and its first write moves it alone to private memory.

``torch._lazy_clone`` gives copy-on-write tensors, but only of storages that torch's own allocator made, and it clones a whole
storage at the first write. So each tensor gets a storage of its own, from a memory pool whose allocator hands out the slab's
segments in order: the layout is planned so that torch, asked for the tensors in its order, puts each where its bytes are. The
clones are what the user gets; the base tensors must outlive them, because the last reference to a copy-on-write storage writes
in place, into read-only memory.

All of torch's private names that nbcache uses stand here (checked at import), and nowhere else.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from nbcache.client import tensors as edge
from nbcache.client.notices import CopyOnWriteUnavailable, notify
from nbcache.client.slabs import SlabMap, plain_tensors
from nbcache.layout import carving_order
from nbcache.manifest import Manifest, stored_shape

_MISSING = [
    name
    for name, holder in (
        ("_lazy_clone", torch),
        ("_cuda_customAllocator", torch._C),
        ("MemPool", torch.cuda),
        ("use_mem_pool", torch.cuda),
    )
    if torch.cuda.is_available() and not hasattr(holder, name)
]

_ALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)

_adoptions: list[Adoption] = []
"""Those whose clones still live."""


class Adoption:
    """The base tensors of one load, the pool they came from, and the map below.

    Notes
    -----
    Order of ending: base tensors, pool (which returns the segments), and only then the map. In a forked child and at the end of
    the interpreter it is left alone: a driver that is going away takes everything with it.
    """

    def __init__(self, slab: SlabMap, device: torch.device) -> None:
        self._slab: SlabMap | None = slab
        self._end = slab.address
        self._limit = slab.address + slab.size_bytes
        self._alloc, self._free = _ALLOC(self._hand_out), _FREE(lambda *_: None)
        allocator = torch._C._cuda_customAllocator(_address(self._alloc), _address(self._free))
        self.pool: Any = torch.cuda.MemPool(allocator)
        self.bases: list[torch.Tensor] = []
        self.clones: list[Any] = []
        """Weak references to the clones' storages, live ones last."""
        self._device = device

    def _hand_out(self, size: int, _device: int, _stream: int | None) -> int:
        address, self._end = self._end, self._end + size
        return address if self._end <= self._limit else 0

    def take(self, manifest: Manifest) -> tuple[dict[str, torch.Tensor], int]:
        """Adopt the tensors; the clones, and how many bytes did not lie where they were planned and are missing."""
        assert self._slab is not None
        start, private = self._slab.address, 0
        dtypes, shape_of = edge.dtypes_of(manifest), stored_shape
        empty, clone_of, device, keep = torch.empty, torch._lazy_clone, self._device, self.bases.append
        order = carving_order([extent.nbytes for extent in manifest.tensors])
        found: dict[str, torch.Tensor] = {}
        with torch.cuda.use_mem_pool(self.pool, device):
            for extent in map(manifest.tensors.__getitem__, order):
                base = empty(shape_of(extent.dtype, extent.shape), dtype=dtypes[extent.dtype], device=device)
                address = base.data_ptr()
                if address == start + extent.place:
                    keep(base)
                    found[extent.name] = clone_of(base)
                    continue
                private += extent.nbytes
                if start <= address < self._limit:  # elsewhere in the slab: what it took there stays taken
                    keep(base)
        self.clones = [StorageWeakRef(clone.untyped_storage()) for clone in found.values()]
        for extent in manifest.tensors:
            if not extent.nbytes:
                found[extent.name] = empty(shape_of(extent.dtype, extent.shape), dtype=dtypes[extent.dtype], device=device)
        return found, private

    @property
    def over(self) -> bool:
        """Whether no clone lives any more."""
        while self.clones and self.clones[-1].expired():
            self.clones.pop()
        return not self.clones

    def end(self) -> None:
        """Let go of everything, in order."""
        torch.cuda.synchronize(self._device)
        self.bases.clear()
        self.pool = None
        self._slab = None


def _address(function: Any) -> int:  # noqa: ANN401 - a ctypes function
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def adopt(slab: SlabMap, manifest: Manifest, device: torch.device) -> tuple[dict[str, torch.Tensor], int]:
    """Copy-on-write tensors over a slab, and how many bytes had to be copied at once: 0 where torch carves as planned."""
    sweep()
    if _MISSING:
        missing = ", ".join(_MISSING)
        notify(CopyOnWriteUnavailable, f"torch {torch.__version__} lacks {missing}: no copy-on-write, weights are copied")
        return _copied(slab, manifest, device)
    adoption = Adoption(slab, device)
    try:
        tensors, private = adoption.take(manifest)
    except torch.OutOfMemoryError:  # torch carved so differently that the slab did not suffice
        adoption.end()
        return _copied(slab, manifest, device)
    if private:
        copies, _ = _copied(slab, manifest, device)
        tensors = copies | tensors
    else:
        tensors = {extent.name: tensors[extent.name] for extent in manifest.tensors}  # in the manifest's order again
    _adoptions.append(adoption)
    return tensors, private


def _copied(slab: SlabMap, manifest: Manifest, device: torch.device) -> tuple[dict[str, torch.Tensor], int]:
    copies = edge.convert(plain_tensors(slab, manifest, device), device, None, copy=True)
    return copies, sum(tensor.nbytes for tensor in copies.values())


def sweep() -> None:
    """End the adoptions whose clones are all gone. Called after each cell, each load, each release and each collection."""
    for adoption in [adoption for adoption in _adoptions if adoption.over]:
        _adoptions.remove(adoption)
        adoption.end()


def _after_collection(phase: str, _: dict[str, int]) -> None:
    if phase == "stop" and _adoptions:
        sweep()


def _abandon() -> None:
    """Never end what is left: nothing of the driver may be called any more."""
    for adoption in _adoptions:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(adoption))
    _adoptions.clear()


gc.callbacks.append(_after_collection)
atexit.register(_abandon)
os.register_at_fork(after_in_child=_abandon)
