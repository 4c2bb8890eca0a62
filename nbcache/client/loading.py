"""A load, from a name or a key to tensors: which device, which tier, and what to do where there is no usable GPU."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable

import torch

from nbcache.client import spare
from nbcache.client import tensors as edge
from nbcache.client.device import find_device
from nbcache.client.fill import Grant, Offer, Wish, acquire, reacquire, reacquire_by_name
from nbcache.client.notices import NoSharedGpuMemory, notify
from nbcache.client.options import Loaded, Options, Share
from nbcache.client.session import ProgressCallback, Session, expect
from nbcache.collection import uncollected
from nbcache.errors import DaemonError, DeviceMemoryFull, DriverError, ProtocolError
from nbcache.memory.shared import map_private
from nbcache.protocol import messages as m

Acquire = Callable[[Wish], Grant | Offer]
"""Finds or stages the entry of a load, as wished."""


def load_name(name: str | os.PathLike[str], options: Options, on_progress: ProgressCallback | None) -> Loaded:
    """Load by name or path. Raises what :func:`nbcache.load` documents."""
    return _load(name, lambda wish: acquire(name, wish, on_progress), options, on_progress)


def load_key(key: str, options: Options) -> Loaded:
    """Load a generation by its key; EntryNotFound if it is gone."""
    return _load(key, lambda wish: reacquire(key, wish), options, None)


def load_entry(name: str, options: Options, on_progress: ProgressCallback | None) -> Loaded:
    """Load the entry of exactly this name; EntryNotFound if it is not cached. Nothing is looked for on disk."""
    return _load(name, lambda wish: reacquire_by_name(name, wish, on_progress), options, on_progress)


def _load(name: str | os.PathLike[str], get: Acquire, options: Options, on_progress: ProgressCallback | None) -> Loaded:
    device = edge.resolve_device(options.device)
    dtype = edge.resolve_dtype(options.dtype)
    if device.type == "cpu":
        return over_host(_granted(get(Wish())), device, dtype, private=options.share == "private")
    while True:
        try:
            return _load_gpu(get, device, dtype, options.share, on_progress)
        except DeviceMemoryFull:
            if not spare.let_go_oldest():
                raise
        except torch.OutOfMemoryError as error:
            error.__traceback__ = error.__context__ = None  # they keep the tensors that were made before memory ran out
            if not spare.let_go_oldest():
                said = str(error).partition("\n")[0]
                raise DeviceMemoryFull(
                    f"{name}: torch has no room for it on {device} ({said}); free the slabs that nobody uses (%weights "
                    "free-gpu, nbcache free-gpu), or tensors of this process, and load it again"
                ) from error
            _free_idle_slabs()


def _free_idle_slabs() -> None:
    """Have the daemon drop the slabs that nobody uses any more: torch cannot take their memory while it keeps them."""
    with contextlib.suppress(DaemonError), Session.open(start=False) as session:
        expect(session.request(m.FreeGpu()), m.Evicted)


def _load_gpu(
    get: Acquire, device: torch.device, dtype: torch.dtype | None, share: Share, on_progress: ProgressCallback | None
) -> Loaded:
    """Load to a GPU: from its slab, or copied there the ordinary way where its memory cannot be shared."""
    try:
        return find_device(device).load(get, dtype, share, on_progress)
    except DriverError as error:
        notify(NoSharedGpuMemory, f"no shared GPU memory: {error}; copying to {device}")
        return over_host(_granted(get(Wish())), edge.real_device(device), dtype, private=True)


def _granted(found: Grant | Offer) -> Grant:
    if isinstance(found, Offer):
        found.close()
        raise ProtocolError("the daemon offered a slab that nobody asked for")
    return found


def over_host(grant: Grant, device: torch.device, dtype: torch.dtype | None, private: bool) -> Loaded:
    """The tensors of a shared host copy, on the CPU or copied to a GPU. Takes the grant over, and ends it if this raises."""
    try:
        fd = grant.take_fd()
        try:
            area = map_private(fd, grant.manifest.extent_bytes)
        finally:
            os.close(fd)
        weakref.finalize(area, grant.session.close).atexit = False
        with uncollected():
            mapped = edge.attach(grant.manifest, area)
        given = mapped
        if private or dtype is not None or device.type != "cpu":
            given = edge.convert(mapped, device, dtype, copy=private)
        private_bytes = sum(tensor.nbytes for name, tensor in given.items() if tensor is not mapped[name])
        tensors = edge.arrange(given, grant.manifest)
        return Loaded(tensors, grant.key, grant.name, device, grant.manifest, private_bytes, grant.hit)
    except BaseException:
        grant.close()
        raise
