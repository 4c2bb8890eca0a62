"""Which GPU driver a test runs over: the emulated one everywhere, CUDA where there is a GPU.

With ``NBCACHE_REQUIRE_GPU=1`` a missing GPU fails the tests marked ``gpu`` rather than skipping them.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import pytest
import torch

from nbcache.memory.arena import Arena
from nbcache.memory.driver import GRANULARITY_BYTES, CudaDriver, Driver, Gpu, Mapped
from tests.support.emulated import EmulatedDriver


class Bench:
    """A driver, a GPU of it, and a way to look at device memory from outside the driver."""

    def __init__(self, driver: Driver, cuda: bool) -> None:
        self.driver = driver
        self.gpu: Gpu = driver.gpus()[0]
        self._cuda = cuda

    @property
    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self._cuda else 0

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def read(self, mapped: Mapped, size_bytes: int) -> bytes:
        self.synchronize()
        if not self._cuda:
            return ctypes.string_at(mapped.address, size_bytes)
        return torch.as_tensor(_Array(mapped.address, size_bytes), device="cuda").cpu().numpy().tobytes()


class _Array:
    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}


@cache
def cuda_bench() -> Bench:
    """The bench over CUDA. Skips, or fails where a GPU is required."""
    require_gpu()
    torch.zeros(1, device="cuda")
    return Bench(CudaDriver(), cuda=True)


@cache
def warm_gpu() -> None:
    """Use all that opens descriptors for good: torch, the driver, CuPy, NVML."""
    bench = cuda_bench()
    bench.driver.free_bytes(bench.gpu.uuid)
    Arena(bench.driver).acquire(GRANULARITY_BYTES).close()

    import cupy
    import pynvml

    cupy.zeros(1)
    pynvml.nvmlInit()


def emulated_bench(limit_bytes: int = 64 << 20) -> Bench:
    """The bench over the emulation."""
    return Bench(EmulatedDriver(limit_bytes), cuda=False)


def require_gpu() -> None:
    """Skip without a GPU, or fail where one is required."""
    if torch.cuda.is_available():
        return
    if os.environ.get("NBCACHE_REQUIRE_GPU"):
        pytest.fail("NBCACHE_REQUIRE_GPU is set, and torch sees no GPU")
    pytest.skip("needs a GPU")
