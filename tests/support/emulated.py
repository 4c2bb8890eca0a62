"""A GPU driver without a GPU: device memory is memfds, maps are real maps, read-only ones fault in other processes too.

Stands in for :class:`nbcache.memory.driver.CudaDriver` under the same contract suite, so that CI runs the whole path. What it
cannot stand for, asynchronous copies and torch's caching allocator (copy-on-write through a memory pool), is tested on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
from pathlib import Path

from nbcache.errors import DeviceMemoryFull, DriverError
from nbcache.memory.driver import Access, Gpu, Mapped, cpu_view

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class EmulatedMap:
    """A map of a memfd."""

    def __init__(self, fd: int, size_bytes: int, access: Access) -> None:
        if os.fstat(fd).st_size < size_bytes:
            raise DriverError(f"emulated: mapping {size_bytes} bytes of {os.fstat(fd).st_size}")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if access is Access.WRITE else 0)
        address = _libc.mmap(None, size_bytes, protection, mmap.MAP_SHARED, fd, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise DriverError(f"emulated: {os.strerror(ctypes.get_errno())}")
        self.address = int(address)
        self.size_bytes = size_bytes

    def protect(self) -> None:
        if _libc.mprotect(self.address, self.size_bytes, mmap.PROT_READ):
            raise DriverError(f"emulated: {os.strerror(ctypes.get_errno())}")

    def close(self) -> None:
        if self.address:
            _libc.munmap(self.address, self.size_bytes)
            self.address = 0


class EmulatedViews:
    """CPU tensors over mapped memfds. Copy-on-write is left to torch on a GPU; here each tensor is a copy."""

    def plain(self, slab, manifest):
        import torch

        from nbcache.client.slabs import views_of

        area = (ctypes.c_ubyte * slab.size_bytes).from_address(slab.address)
        area.slab = slab
        return views_of(torch.frombuffer(area, dtype=torch.uint8), manifest)

    def cow(self, slab, manifest):
        return {name: tensor.clone() for name, tensor in self.plain(slab, manifest).items()}, 0

    def private(self, slab, manifest, queue, allocation):
        import torch

        from nbcache.client.slabs import private_tensors

        return private_tensors(slab, manifest, torch.device("cpu"), queue, allocation)

    def synchronize(self) -> None:
        pass

    def queued(self):
        return lambda: None

    def stream(self) -> int:
        return 0

    def empty(self, nbytes: int):
        import torch

        return torch.empty(nbytes, dtype=torch.uint8)

    def current(self):
        return contextlib.nullcontext()


def plain_array(mapped: Mapped) -> memoryview:
    """What stands for ``cupyx.empty_pinned``."""
    return cpu_view(mapped)


def make() -> EmulatedDriver:
    """What ``NBCACHE_TEST_DRIVER=tests.support.emulated:make`` calls, in daemon and kernel."""
    failures = os.environ.get("NBCACHE_TEST_FAILURES")
    limit = int(os.environ.get("NBCACHE_TEST_GPU_BYTES", 1 << 30))
    return EmulatedDriver(limit, Path(failures) if failures else None)


class EmulatedDriver:
    """Two GPUs of ``limit_bytes`` each. ``failures`` names what is to fail, read anew at each call from ``failures_file``.

    Failures: ``memory`` (no slab fits), ``export`` (nothing can be created), ``import`` (nothing can be mapped), ``copy:N`` (a
    process's Nth copy).
    """

    open_arrays = staticmethod(lambda: plain_array)

    @property
    def emulation(self):
        import torch

        return {"views": EmulatedViews, "device": torch.device("cpu")}

    def __init__(self, limit_bytes: int = 1 << 30, failures_file: Path | None = None) -> None:
        self._gpus = tuple(Gpu(i, f"GPU-emulated-{i}", f"Emulated GPU {i}", limit_bytes) for i in range(2))
        self._used: dict[int, tuple[str, int]] = {}
        self._failures_file = failures_file
        self._copies = 0

    @property
    def failures(self) -> frozenset[str]:
        if self._failures_file is None or not self._failures_file.exists():
            return frozenset()
        return frozenset(json.loads(self._failures_file.read_text()))

    def gpus(self) -> tuple[Gpu, ...]:
        return self._gpus

    def free_bytes(self, uuid: str) -> int:
        total = {gpu.uuid: gpu.total_bytes for gpu in self._gpus}.get(uuid)
        if total is None:
            raise DriverError(f"GPU {uuid} is not there")
        return total - sum(size for owner, size in self._used.values() if owner == uuid)

    def create_slab(self, uuid: str, size_bytes: int) -> int:
        if "memory" in self.failures or size_bytes > self.free_bytes(uuid):
            raise DeviceMemoryFull(f"emulated: no {size_bytes} bytes on {uuid}")
        return self._create(uuid, size_bytes)

    def create_block(self, size_bytes: int) -> int:
        return self._create("host", size_bytes)

    def _create(self, owner: str, size_bytes: int) -> int:
        if "export" in self.failures:
            raise DriverError("emulated: export refused")
        fd = os.memfd_create("nbcache-emulated", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        self._used[fd] = (owner, size_bytes)
        return fd

    def close(self, fd: int) -> None:
        self._used.pop(fd, None)
        os.close(fd)

    def map_block(self, fd: int, size_bytes: int) -> Mapped:
        return self._map(fd, size_bytes, Access.WRITE)

    def map_block_on(self, fd: int, size_bytes: int, gpu: Gpu) -> Mapped:
        return self._map(fd, size_bytes, Access.READ)

    def map_slab(self, fd: int, size_bytes: int, gpu: Gpu, access: Access) -> Mapped:
        return self._map(fd, size_bytes, access)

    def _map(self, fd: int, size_bytes: int, access: Access) -> Mapped:
        if "import" in self.failures:
            raise DriverError("emulated: import refused")
        return EmulatedMap(fd, size_bytes, access)

    def check_import(self, fd: int) -> None:
        self._map(fd, os.fstat(fd).st_size, Access.READ).close()

    def allocation(self, address: int) -> tuple[int, int]:
        return address, address + 1  # of the heap nothing is known: no two tensors are taken for one

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        self._copies += 1
        if f"copy:{self._copies}" in self.failures:
            raise DriverError("emulated: a copy failed")
        ctypes.memmove(target, source, size_bytes)
