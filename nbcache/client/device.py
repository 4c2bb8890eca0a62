"""A GPU as a kernel uses it: having its slab filled from pinned blocks, cast if need be, and mapped.

The kernel has the context; the daemon has the memory. Owns the filling, and the order in which what is mapped is copied,
awaited and unmapped. Must not know what the tensors over a slab are made of. Needs torch, for its dtypes and devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import msgspec
import torch

from nbcache.client import ends
from nbcache.client import tensors as edge
from nbcache.client.blocks import Copy, mapped_blocks
from nbcache.client.fill import Grant, Offer, Wish, committed, read_answer
from nbcache.client.options import Loaded, Share
from nbcache.client.session import ProgressCallback, Session, expect
from nbcache.client.slabs import SlabMap
from nbcache.client.views import CudaViews, Views
from nbcache.collection import uncollected
from nbcache.errors import EntryNotFound, InvalidOption, ProtocolError, UnsupportedFormat
from nbcache.manifest import Extent, Manifest, nbytes_of, place_tensors, stored_shape
from nbcache.memory.driver import Access, Driver, Gpu, Mapped, open_driver
from nbcache.protocol import messages as m
from nbcache.protocol.wire import close_all

AHEAD = 2
"""Blocks asked for before they are needed: one is mapped while another is copied."""


@dataclass(frozen=True)
class _Made:
    """Tensors of a slab, and how many bytes of them are this process's own."""

    tensors: dict[str, torch.Tensor]
    private_bytes: int
    slab: SlabMap


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
            for _ in range(2):  # what was offered may be evicted before its Fill comes
                found, layout = self._find(get, wanted)
                if isinstance(found, Grant):
                    return self._attach(found, layout, share, True)
                try:
                    loaded = self._fill(found, layout, share, on_progress)
                except BaseException:
                    found.close()
                    raise
                if loaded is not None:
                    return loaded
            raise EntryNotFound(f"{found.key}: evicted twice while its slab was to be filled; load it again")

    def _find(self, get: Callable[[Wish], Grant | Offer], wanted: str) -> tuple[Grant | Offer, Manifest]:
        """The entry with its tensors of the wanted dtype, or of the file's own, and where they lie in its slab."""
        found = get(Wish(m.DeviceWish(self._gpu.uuid, wanted, 0 if wanted else AHEAD)))
        try:
            layout = cast_manifest(found.manifest, wanted)
        except BaseException:
            found.close()
            raise
        if wanted and layout is found.manifest:  # the file's own dtype: one slab will do
            found.close()
            return self._find(get, "")
        return found, layout

    def _attach(self, grant: Grant, layout: Manifest, share: Share, read: bool) -> Loaded:
        """What the slab of this grant holds, mapped. Takes the grant over. ``read``: files were, where it was no hit."""
        try:
            slab = self._map(grant.fd, grant.session, layout)
            try:
                made = self._make(slab, layout, share)
            except BaseException:
                slab.end()
                raise
            os.close(grant.take_fd())
        except BaseException:
            grant.close()
            raise
        return self._loaded(grant, made, layout, share, read)

    def _map(self, fd: int, session: Session, layout: Manifest) -> SlabMap:
        """Map a slab read-only, for as long as its tensors live."""
        mapped = self._driver.map_slab(fd, layout.extent_bytes, self._gpu, Access.READ)
        return SlabMap(mapped, session, self._views.synchronize, layout, self._gpu.ordinal)

    def _make(self, slab: SlabMap, layout: Manifest, share: Share) -> _Made:
        """The tensors of a mapped slab. What they copy is queued after what is queued already; waits for nothing."""
        with uncollected():
            if share == "cow":
                return _Made(*self._views.cow(slab, layout), slab)
            if share == "readonly":
                return _Made(self._views.plain(slab, layout), 0, slab)
            copies = self._views.private(slab, layout, self._queue, self._driver.allocation)
            return _Made(copies, layout.nbytes, slab)

    def _queue(self, target: int, source: int, size_bytes: int) -> None:
        """Queue a copy on the stream."""
        self._driver.copy(target, source, size_bytes, self._views.stream())

    def _loaded(self, grant: Grant, made: _Made, layout: Manifest, share: Share, read: bool) -> Loaded:
        kept: SlabMap | None = made.slab
        if share == "private":  # such tensors need no lease
            kept = None
            ends.behind(partial(self._end, made.slab, self._views.queued()))
        tensors = edge.arrange(made.tensors, layout)
        return Loaded(tensors, grant.key, grant.name, self._name, layout, made.private_bytes, grant.hit, kept, read)

    def _end(self, slab: SlabMap, wait: Callable[[], None]) -> None:
        with self._views.current():
            slab.end(wait)

    def _fill(self, offer: Offer, layout: Manifest, share: Share, on_progress: ProgressCallback | None) -> Loaded | None:
        """Have the slab that was offered filled by this process. If another client was quicker, hold what it filled.

        None, and the session closed, if the entry was evicted meanwhile.
        """
        session = offer.session
        while True:
            fill = m.Fill(layout.extent_bytes)
            answer = session.receive(on_progress) if offer.filled else session.request(fill, on_progress=on_progress)
            message, descriptors = answer
            if isinstance(message, m.Filling):
                break
            found = read_answer(session, answer)
            if isinstance(found, Grant):
                return self._attach(found, layout, share, offer.read)
            if found is None:
                return None
            offer = replace(found, read=offer.read)
        copy = Copy(offer.key, message.copy, self._gpu.uuid)
        hosts: list[Mapped] = []
        try:
            hosts += mapped_blocks().take(copy)
            blocks = self._blocks(offer, message.block_sizes, hosts, on_progress)
            made, grant = self._fill_from(blocks, descriptors[0], offer, layout, share, on_progress)
        finally:
            os.close(descriptors[0])
            is_whole = message.copy and sum(host.size_bytes for host in hosts) == offer.manifest.extent_bytes
            mapped_blocks().put(hosts, copy if is_whole else None)
        os.close(grant.take_fd())
        return self._loaded(grant, made, layout, share, offer.read)

    def _fill_from(
        self,
        blocks: Iterator[Mapped],
        fd: int,
        offer: Offer,
        layout: Manifest,
        share: Share,
        on_progress: ProgressCallback | None,
    ) -> tuple[_Made, Grant]:
        """Copy host blocks into a slab, make its tensors meanwhile, wait for all, and let nobody here write to it any more."""
        mapped = self._driver.map_slab(fd, layout.extent_bytes, self._gpu, Access.WRITE)
        slab = SlabMap(mapped, offer.session, self._views.synchronize, layout, self._gpu.ordinal)
        try:
            if layout is offer.manifest:
                self._copy(slab.address, blocks)
            else:
                self._cast(offer.manifest, layout, slab, blocks)
            made = self._make(slab, layout, share)
            self._views.synchronize()  # nothing may be unmapped under a queued copy, nor committed
            offer.session.send(m.Commit())
            mapped.protect()  # while the daemon answers: here nobody has the tensors yet
            return made, committed(offer.session, offer.manifest, on_progress)
        except BaseException:
            slab.end()
            raise

    def _copy(self, target: int, blocks: Iterator[Mapped]) -> None:
        """One straight copy a block."""
        for block in blocks:
            self._queue(target, block.address, block.size_bytes)
            target += block.size_bytes

    def _blocks(
        self, offer: Offer, sizes: Sequence[int], mapped: list[Mapped], on_progress: ProgressCallback | None
    ) -> Iterator[Mapped]:
        """The host copy's blocks as they become staged, each mapped for the GPU, and added to ``mapped``, while others copy.

        The first are asked for at once, not when the first is looked at. If all are mapped already, none is asked for.
        """
        session = offer.session
        if sum(sizes) != offer.manifest.extent_bytes:
            raise ProtocolError(f"blocks of {sum(sizes)} bytes for an extent of {offer.manifest.extent_bytes}")
        ahead = min(AHEAD, len(sizes))
        if mapped:
            return self._again(mapped, session, ahead if offer.filled else 0, on_progress)
        for number in range(0 if offer.filled else ahead):
            session.send(m.Want(number))

        def map_each() -> Iterator[Mapped]:
            for number, size_bytes in enumerate(sizes):
                block, (fd,) = expect(session.receive(on_progress), m.Block)
                try:
                    if (block.number, block.size_bytes) != (number, size_bytes):
                        raise ProtocolError(
                            f"block {block.number} of {block.size_bytes} bytes came as {number} of {size_bytes}"
                        )
                    if number + AHEAD < len(sizes):
                        session.send(m.Want(number + AHEAD))
                    mapped.append(self._driver.map_block_on(fd, size_bytes, self._gpu))
                finally:
                    os.close(fd)
                yield mapped[-1]

        return map_each()

    def _again(
        self, mapped: Sequence[Mapped], session: Session, asked: int, on_progress: ProgressCallback | None
    ) -> Iterator[Mapped]:
        """Blocks that are mapped; then those that were asked for ahead are received, and let go."""
        yield from mapped
        for _ in range(asked):
            _, descriptors = expect(session.receive(on_progress), m.Block)
            close_all(descriptors)

    def _cast(self, source: Manifest, target: Manifest, slab: SlabMap, blocks: Iterator[Mapped]) -> None:
        """Bring each tensor's bytes to scratch memory, in the order of their places, and cast it into its own."""
        views = self._views.plain(slab, target)
        scratch = self._views.empty(max((t.nbytes for t in source.tensors), default=0))
        block, start = next(blocks), 0
        end = block.size_bytes
        for extent in sorted(source.tensors, key=lambda t: t.place):
            at = extent.place
            while at < extent.place + extent.nbytes:
                while at >= end:
                    block = next(blocks)
                    start, end = end, end + block.size_bytes
                size = min(extent.place + extent.nbytes, end) - at
                self._queue(scratch.data_ptr() + at - extent.place, block.address + at - start, size)
                at += size
            if extent.nbytes:
                raw = scratch[: extent.nbytes].view(edge.torch_dtype(extent))
                views[extent.name].copy_(raw.view(stored_shape(extent.dtype, extent.shape)))
        for _ in blocks:  # of padding alone: the daemon sends them all the same
            pass


def cast_manifest(manifest: Manifest, dtype: str) -> Manifest:
    """The manifest of the entry, planned anew, with floating-point tensors as ``dtype``; the same object if none changes."""
    if not dtype:
        return manifest
    tensors = [_cast_extent(tensor, dtype) for tensor in manifest.tensors]
    if all(new is old for new, old in zip(tensors, manifest.tensors, strict=True)):
        return manifest
    return msgspec.structs.replace(place_tensors(tensors, (), manifest.metadata, manifest.views), members=manifest.members)


def _cast_extent(tensor: Extent, dtype: str) -> Extent:
    own = edge.torch_dtype(tensor)
    if tensor.dtype == dtype or not own.is_floating_point:
        return tensor
    if "F4" in (tensor.dtype, dtype):
        raise UnsupportedFormat(f"tensor {tensor.name!r}: torch does not cast {own} to {edge.TORCH_DTYPES[dtype]}")
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
