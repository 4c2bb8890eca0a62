"""A GPU as a kernel uses it: filling a slab from pinned blocks, mapping one, and tensors over the map.

The kernel has the context; the daemon has the memory. Needs torch, for its streams and tensors.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Protocol

import msgspec
import torch

from nbcache.client import cow
from nbcache.client import tensors as edge
from nbcache.client.fill import Grant, Offer, Wish, committed, read_answer
from nbcache.client.options import Loaded, Share
from nbcache.client.session import ProgressCallback, Session, expect
from nbcache.errors import EntryNotFound, InvalidOption, ProtocolError
from nbcache.manifest import Extent, Manifest, nbytes_of, place_tensors
from nbcache.memory.driver import Access, Driver, Gpu, Mapped, open_driver
from nbcache.protocol import messages as m

AHEAD = 2
"""Blocks asked for before they are needed: one is mapped while another is copied."""


class SlabMap:
    """A read-only map of a slab, and the lease on it. Both end when the last reference goes, once queued work is done."""

    def __init__(
        self, mapped: Mapped, session: Session, synchronize: Callable[[], None], manifest: Manifest, device: int
    ) -> None:
        self.address = mapped.address
        self.size_bytes = mapped.size_bytes
        self.manifest = manifest
        self._device = device
        weakref.finalize(self, _let_go, mapped, session, synchronize, os.getpid()).atexit = False

    def cupy_arrays(self) -> dict[str, Any]:
        """See :meth:`Weights.cupy`."""
        import cupy

        memory = cupy.cuda.UnownedMemory(self.address, self.size_bytes, self, self._device)
        arrays = {}
        for extent in self.manifest.tensors:
            dtype = cupy.dtype(_CUPY_DTYPES.get(extent.dtype) or f"u{edge.torch_dtype(extent).itemsize}")
            shape = edge.torch_shape(extent.dtype, extent.shape)
            if extent.nbytes:
                arrays[extent.name] = cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, extent.place))
            else:
                arrays[extent.name] = cupy.empty(shape, dtype)
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


class Views(Protocol):
    """How tensors are made over a mapped slab, and what waits for a device. The tests' emulation makes CPU tensors."""

    def plain(self, slab: SlabMap, manifest: Manifest) -> dict[str, torch.Tensor]:
        """Tensors that keep the map alive; a write to one is a write to the map."""

    def cow(self, slab: SlabMap, manifest: Manifest) -> tuple[dict[str, torch.Tensor], int]:
        """Copy-on-write tensors, and how many bytes of them had to be copied at once."""

    def synchronize(self) -> None:
        """Wait for all queued work."""

    def stream(self) -> int:
        """The stream that copies are queued on."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Scratch bytes on the device."""

    def current(self) -> contextlib.AbstractContextManager[object]:
        """Makes the device current."""


class CudaViews:
    """CUDA tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.init()

    def plain(self, slab: SlabMap, manifest: Manifest) -> dict[str, torch.Tensor]:
        """See :class:`Views`. All are views of one array, the slab."""
        whole = torch.as_tensor(_CudaArray(slab), device=self._device)
        typed = {name: whole.view(dtype) for name, dtype in edge.dtypes_of(manifest).items()}
        found = {}
        for name, dtype_name, shape, _, _, nbytes, place in map(msgspec.structs.astuple, manifest.tensors):
            base = typed[dtype_name]
            shape = edge.torch_shape(dtype_name, shape)
            if nbytes:
                found[name] = base.as_strided(shape, _strides(shape), place // base.itemsize)
            else:
                found[name] = torch.empty(shape, dtype=base.dtype, device=self._device)
        return found

    def cow(self, slab: SlabMap, manifest: Manifest) -> tuple[dict[str, torch.Tensor], int]:
        """See :class:`Views`."""
        return cow.adopt(slab, manifest, self._device)

    def synchronize(self) -> None:
        """See :class:`Views`."""
        torch.cuda.synchronize(self._device)

    def stream(self) -> int:
        """See :class:`Views`."""
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def empty(self, nbytes: int) -> torch.Tensor:
        """See :class:`Views`."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def current(self) -> contextlib.AbstractContextManager[object]:
        """See :class:`Views`."""
        return torch.cuda.device(self._device)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()


class _CudaArray:
    """What torch needs to see a slab as one array; torch's storage keeps this, and this keeps the map."""

    def __init__(self, slab: SlabMap) -> None:
        self.slab = slab
        self.__cuda_array_interface__ = {
            "shape": (slab.size_bytes,), "typestr": "|u1", "data": (slab.address, False), "version": 3, "strides": None,
        }  # fmt: skip


class Device:
    """One GPU of this process. ``device`` is where its tensors are: itself, or the CPU that stands for an emulated one."""

    def __init__(self, driver: Driver, gpu: Gpu, device: torch.device, views: Views) -> None:
        self._driver = driver
        self._gpu = gpu
        self._name = torch.device("cuda", gpu.ordinal)
        self._device = device
        self._views = views

    def load(
        self,
        get: Callable[[Wish], Grant | Offer],
        dtype: torch.dtype | None,
        share: Share,
        on_progress: ProgressCallback | None,
    ) -> Loaded:
        """The entry's tensors on this GPU; its slab is filled first if nobody did, by whoever is first (I3)."""
        with self._views.current():
            wanted = edge.dtype_name(dtype) if dtype is not None else ""
            found = get(Wish(m.DeviceWish(self._gpu.uuid, wanted)))
            if wanted and cast_manifest(found.manifest, wanted) is found.manifest:  # the file's own dtype: one slab will do
                found.close()
                wanted = ""
                found = get(Wish(m.DeviceWish(self._gpu.uuid)))
            try:
                layout = cast_manifest(found.manifest, wanted)
                grant = found if isinstance(found, Grant) else self._fill(found, layout, wanted, on_progress)
            except BaseException:
                found.close()
                raise
            return self._over_slab(grant, layout, share)

    def _over_slab(self, grant: Grant, layout: Manifest, share: Share) -> Loaded:
        try:
            mapped = self._driver.map_slab(grant.fd, layout.extent_bytes, self._gpu, Access.READ)
            slab = SlabMap(mapped, grant.session, self._views.synchronize, layout, self._gpu.ordinal)
            os.close(grant.take_fd())
        except BaseException:
            grant.close()
            raise
        private_bytes = 0
        if share == "cow":
            tensors, private_bytes = self._views.cow(slab, layout)
        else:
            tensors = self._views.plain(slab, layout)
        if share == "private":
            tensors = edge.convert(tensors, self._device, None, copy=True)
            private_bytes = sum(tensor.nbytes for tensor in tensors.values())
        return Loaded(tensors, grant.key, grant.name, self._name, grant.manifest.metadata, private_bytes, grant.hit, slab)

    def _fill(self, offer: Offer, layout: Manifest, dtype: str, on_progress: ProgressCallback | None) -> Grant:
        """Fill the slab that was offered, commit it, and hold it. If another client was quicker, hold what it filled."""
        session = offer.session
        while True:
            message, descriptors = session.request(m.Fill(layout.extent_bytes), on_progress=on_progress)
            if isinstance(message, m.Filling):
                break
            found = read_answer(session, (message, descriptors))
            if isinstance(found, Grant):
                return found
            if found is None:
                raise EntryNotFound(f"{offer.key}: evicted while its slab was to be filled; load it again")
        (fd,) = descriptors
        mapped: list[Mapped] = []
        try:
            mapped.append(self._driver.map_slab(fd, layout.extent_bytes, self._gpu, Access.WRITE))
            blocks = self._blocks(session, offer.manifest.extent_bytes, message.block_bytes, mapped, on_progress)
            if layout is offer.manifest:
                self._copy(mapped[0].address, blocks)
            else:
                self._cast(offer.manifest, layout, mapped[0], blocks, message.block_bytes)
        finally:
            os.close(fd)
            self._views.synchronize()  # nothing may be unmapped under a queued copy, nor committed
            _unmap_later(mapped)
        return committed(session, on_progress)

    def _copy(self, target: int, blocks: Iterator[Mapped]) -> None:
        """One straight copy a block."""
        for block in blocks:
            self._driver.copy(target, block.address, block.size_bytes, self._views.stream())
            target += block.size_bytes

    def _blocks(
        self,
        session: Session,
        extent_bytes: int,
        block_bytes: int,
        mapped: list[Mapped],
        on_progress: ProgressCallback | None,
    ) -> Iterator[Mapped]:
        """The host copy's blocks as they become staged, each mapped for the GPU, and added to ``mapped``, while others copy."""
        count = -(-extent_bytes // block_bytes)
        for number in range(min(AHEAD, count)):
            session.send(m.Want(number))
        for number in range(count):
            block, (fd,) = expect(session.receive(on_progress), m.Block)
            try:
                if block.size_bytes != min(block_bytes, extent_bytes - number * block_bytes):
                    raise ProtocolError(f"block {number} has {block.size_bytes} bytes")
                if number + AHEAD < count:
                    session.send(m.Want(number + AHEAD))
                mapped.append(self._driver.map_block_on(fd, block.size_bytes, self._gpu))
            finally:
                os.close(fd)
            yield mapped[-1]

    def _cast(self, source: Manifest, target: Manifest, slab: Mapped, blocks: Iterator[Mapped], block_bytes: int) -> None:
        """Bring each tensor's bytes to scratch memory, in the order of their places, and cast it into its own."""
        views = self._views.plain(
            SlabMap(_Borrowed(slab), _NO_SESSION, self._views.synchronize, target, self._gpu.ordinal), target
        )
        scratch = self._views.empty(max((t.nbytes for t in source.tensors), default=0))
        at_hand: list[Mapped] = []
        for extent in sorted(source.tensors, key=lambda t: t.place):
            at = 0
            while at < extent.nbytes:
                number, offset = divmod(extent.place + at, block_bytes)
                while len(at_hand) <= number:
                    at_hand.append(next(blocks))
                size = min(extent.nbytes - at, block_bytes - offset)
                self._driver.copy(scratch.data_ptr() + at, at_hand[number].address + offset, size, self._views.stream())
                at += size
            if extent.nbytes:
                raw = scratch[: extent.nbytes].view(edge.torch_dtype(extent))
                views[extent.name].copy_(raw.view(edge.torch_shape(extent.dtype, extent.shape)))


def _unmap_later(mapped: list[Mapped]) -> None:
    """Unmap in the background: 24 GB of host blocks take a tenth of a second that nobody need wait for."""

    def unmap() -> None:
        for each in mapped:
            each.close()

    threading.Thread(target=unmap, name="nbcache-unmap", daemon=True).start()


class _Borrowed:
    """A map that somebody else closes."""

    def __init__(self, mapped: Mapped) -> None:
        self.address = mapped.address
        self.size_bytes = mapped.size_bytes

    def close(self) -> None:
        """Leave it."""


class _NoSession:
    def close(self) -> None:
        """There is none."""


_NO_SESSION: Any = _NoSession()


def cast_manifest(manifest: Manifest, dtype: str) -> Manifest:
    """The manifest of the entry, planned anew, with floating-point tensors as ``dtype``; the same object if none changes."""
    if not dtype:
        return manifest
    tensors = [_cast_extent(tensor, dtype) for tensor in manifest.tensors]
    if all(new is old for new, old in zip(tensors, manifest.tensors, strict=True)):
        return manifest
    return msgspec.structs.replace(place_tensors(tensors, (), manifest.metadata), members=manifest.members)


def _cast_extent(tensor: Extent, dtype: str) -> Extent:
    if tensor.dtype == dtype or not edge.torch_dtype(tensor).is_floating_point or tensor.dtype == "F4":
        return tensor
    nbytes = nbytes_of(dtype, tensor.shape)
    assert nbytes is not None
    return msgspec.structs.replace(tensor, dtype=dtype, nbytes=nbytes)


@cache
def _driver() -> Driver:
    return open_driver()


@cache
def find_device(device: torch.device) -> Device:
    """The GPU behind torch's name for it. DriverError if the driver cannot share its memory."""
    driver = _driver()
    gpus = driver.gpus()
    ordinal = device.index if device.index is not None else edge.current_ordinal()
    if ordinal >= len(gpus):
        raise InvalidOption(f"device {device}: there are {len(gpus)} GPUs")
    emulated: Mapping[str, Any] = getattr(driver, "emulation", {})
    resolved = torch.device("cuda", ordinal)
    views = emulated["views"]() if emulated else CudaViews(resolved)
    return Device(driver, gpus[ordinal], emulated.get("device", resolved), views)
