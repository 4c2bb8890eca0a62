"""How tensors come to lie over a mapped slab, and what waits for the GPU: a port, and its real side.

Owns the choice between plain and copy-on-write tensors, the stream and the waiting. Knows no daemon and no file. It exists so
that the path of a load can be run without a GPU. Needs torch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from nbcache.client import cow
from nbcache.client.slabs import Allocation, Queue, SlabMap, plain_tensors, private_tensors
from nbcache.manifest import Manifest


class Views(Protocol):
    """How tensors are made over a mapped slab, and what waits for a device. The tests' emulation makes CPU tensors."""

    def plain(self, slab: SlabMap, manifest: Manifest) -> dict[str, torch.Tensor]:
        """Tensors that keep the map alive; a write to one is a write to the map."""

    def cow(self, slab: SlabMap, manifest: Manifest) -> tuple[dict[str, torch.Tensor], int]:
        """Copy-on-write tensors, and how many bytes of them had to be copied at once."""

    def private(self, slab: SlabMap, manifest: Manifest, queue: Queue, allocation: Allocation) -> dict[str, torch.Tensor]:
        """Copies, by ``queue``, that need the map no longer than it takes to copy."""

    def synchronize(self) -> None:
        """Wait for all queued work."""

    def queued(self) -> Callable[[], None]:
        """What waits for the work that is queued by now, and for none that comes later."""

    def stream(self) -> int:
        """The stream that copies are queued on."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Scratch bytes on the device."""

    def current(self) -> contextlib.AbstractContextManager[object]:
        """Makes the device current in this thread, whichever it is."""


class CudaViews:
    """CUDA tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bound = threading.local()
        torch.cuda.init()

    def plain(self, slab: SlabMap, manifest: Manifest) -> dict[str, torch.Tensor]:
        """See :class:`Views`."""
        return plain_tensors(slab, manifest, self._device)

    def cow(self, slab: SlabMap, manifest: Manifest) -> tuple[dict[str, torch.Tensor], int]:
        """See :class:`Views`."""
        return cow.adopt(slab, manifest, self._device)

    def private(self, slab: SlabMap, manifest: Manifest, queue: Queue, allocation: Allocation) -> dict[str, torch.Tensor]:
        """See :class:`Views`."""
        return private_tensors(slab, manifest, self._device, queue, allocation)

    def synchronize(self) -> None:
        """See :class:`Views`."""
        torch.cuda.synchronize(self._device)

    def queued(self) -> Callable[[], None]:
        """See :class:`Views`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize

    def stream(self) -> int:
        """See :class:`Views`."""
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def empty(self, nbytes: int) -> torch.Tensor:
        """See :class:`Views`."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """See :class:`Views`."""
        with torch.cuda.device(self._device):
            if not hasattr(self._bound, "yes"):
                # torch notes the number of a device; a thread has its context from the first call on that needs one, and the
                # driver's own calls need one that is there
                torch.cuda.mem_get_info(self._device)
                self._bound.yes = True
            yield
