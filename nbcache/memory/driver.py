"""The GPU driver, as far as nbcache needs it: a port, and its implementation for CUDA.

Physical memory is a descriptor: :meth:`Driver.create_slab` and :meth:`Driver.create_block` export what they create and keep
nothing else, so memory lives exactly as long as somebody holds its descriptor or maps it. Creating, exporting and mapping for
the CPU need no GPU context (measured: an H100 with driver 580; a process that did so holds 0 MiB of context); mapping for a GPU
is the business of a kernel, which has one. The only module that imports the CUDA bindings, when they are first needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from nbcache.errors import DeviceMemoryFull, DriverError

GRANULARITY_BYTES = 2 << 20
"""Sizes of physical memory are multiples of this (``cuMemGetAllocationGranularity``)."""


class Access(enum.Enum):
    """What a map of a slab allows its GPU."""

    READ = "read"
    WRITE = "write"


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process sees. ``ordinal`` is its number here, ``uuid`` its name everywhere."""

    ordinal: int
    uuid: str
    name: str
    total_bytes: int


class Mapped(Protocol):
    """Addresses that physical memory is mapped at, until :meth:`close`."""

    address: int
    size_bytes: int

    def protect(self) -> None:
        """Let the GPU read it, and write it no longer. What was queued to write it must be done."""

    def close(self) -> None:
        """Unmap. Queued work must not use the addresses any more."""


class Driver(Protocol):
    """What nbcache asks of a GPU driver. Every method raises DriverError where the driver refuses."""

    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that this process sees, by ordinal."""

    def free_bytes(self, uuid: str) -> int:
        """Free memory of a GPU, without making a context."""

    def create_slab(self, uuid: str, size_bytes: int) -> int:
        """Physical memory of a GPU, as a descriptor. DeviceMemoryFull if there is not so much."""

    def create_block(self, size_bytes: int) -> int:
        """Pinned host memory, as a descriptor."""

    def close(self, fd: int) -> None:
        """Give the descriptor of a slab or block back."""

    def map_block(self, fd: int, size_bytes: int) -> Mapped:
        """Map a block for the CPU. Needs no context."""

    def map_block_on(self, fd: int, size_bytes: int, gpu: Gpu) -> Mapped:
        """Map a block for a GPU alone, which is quicker."""

    def map_slab(self, fd: int, size_bytes: int, gpu: Gpu, access: Access) -> Mapped:
        """Map a slab for its GPU."""

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Queue a copy between mapped addresses on a stream of the current context."""

    def allocation(self, address: int) -> tuple[int, int]:
        """Where the memory that an address lies in begins and ends: what one allocation gave. No copy may cross that."""

    def check_import(self, fd: int) -> None:
        """Take a slab or block in by its descriptor, as another process would, and let it go again. Needs no context."""


def open_driver() -> Driver:
    """The GPU driver of this machine; DriverError if there is none.

    ``NBCACHE_TEST_DRIVER=module:factory`` puts another in its place: the tests' emulation, in daemon and kernel alike.
    """
    hook = os.environ.get("NBCACHE_TEST_DRIVER")
    if hook:
        module, _, factory = hook.partition(":")
        emulated: Driver = getattr(importlib.import_module(module), factory)()
        return emulated
    return CudaDriver()


def preload() -> None:
    """Import the CUDA bindings now, where they are installed, rather than in the first load: they take 20 ms. Starts no GPU."""
    with contextlib.suppress(ImportError):
        import cuda.bindings.driver  # noqa: F401


@contextlib.contextmanager
def without_math_libraries() -> Iterator[None]:
    """Keep CuPy's import from loading cuTENSOR and cuBLASLt, whose relocations take 84 MB: the daemon computes nothing."""
    try:
        from cuda import pathfinder
    except ImportError:  # an older CuPy, which does not ask it
        yield
        return
    load = pathfinder.load_nvidia_dynamic_lib

    def refuse(name: str) -> None:
        raise pathfinder.DynamicLibNotFoundError(f"{name}: not needed here")

    pathfinder.load_nvidia_dynamic_lib = refuse
    try:
        yield
    finally:
        pathfinder.load_nvidia_dynamic_lib = load


class CudaDriver:
    """The port over cuda-bindings (12 or 13). DriverError if they, or a driver, are not there.

    Notes
    -----
    Thread-safe as the CUDA driver is. Descriptors are close-on-exec. A failed call leaves nothing mapped or created.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise DriverError(
                "the CUDA bindings are not installed; pip install 'nbcache[cuda13]' or 'nbcache[cuda12]'"
            ) from error
        self._cuda: Any = driver
        self._fd_handle = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._call("cuInit", 0)
        self._gpus = tuple(self._describe(ordinal) for ordinal in range(self._call("cuDeviceGetCount")))

    def _call(self, function: str, *arguments: object) -> Any:  # noqa: ANN401 - the bindings carry no types
        try:
            status, *results = getattr(self._cuda, function)(*arguments)
        except RuntimeError as error:  # the bindings found no library to load
            raise DriverError(f"{function}: {error}") from error
        if int(status):
            raise self._error(function, status)
        return results[0] if len(results) == 1 else results

    def _error(self, function: str, status: Any) -> Exception:  # noqa: ANN401
        _, text = self._cuda.cuGetErrorString(status)
        message = f"{function}: {text.decode() if isinstance(text, bytes) else text} ({int(status)})"
        full = int(status) == int(self._cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        return DeviceMemoryFull(message) if full else DriverError(message)

    def _describe(self, ordinal: int) -> Gpu:
        device = self._call("cuDeviceGet", ordinal)
        name = self._call("cuDeviceGetName", 256, device)
        uuid = (self._cuda.cuDeviceGetUuid_v2 if hasattr(self._cuda, "cuDeviceGetUuid_v2") else self._cuda.cuDeviceGetUuid)(
            device
        )[1]
        return Gpu(
            ordinal,
            _format_uuid(bytes(uuid.bytes)),
            name.split(b"\0")[0].decode() if isinstance(name, bytes) else str(name),
            int(self._call("cuDeviceTotalMem", device)),
        )

    def gpus(self) -> tuple[Gpu, ...]:
        """See :class:`Driver`."""
        return self._gpus

    def _gpu(self, uuid: str) -> Gpu:
        for gpu in self._gpus:
            if gpu.uuid == uuid:
                return gpu
        raise DriverError(
            f"GPU {uuid} is not visible to process {os.getpid()}; visible: {', '.join(g.uuid for g in self._gpus)}"
        )

    def free_bytes(self, uuid: str) -> int:
        """See :class:`Driver`. Asks NVML."""
        nvml = self._nvml
        try:
            return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(uuid)).free)
        except nvml.NVMLError as error:
            raise DriverError(f"NVML, GPU {uuid}: {error}") from error

    @cached_property  # starting NVML takes milliseconds
    def _nvml(self) -> Any:  # noqa: ANN401
        try:
            import pynvml
        except ImportError as error:
            raise DriverError("nvidia-ml-py is not installed; pip install nvidia-ml-py") from error
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise DriverError(f"NVML: {error}") from error
        return pynvml

    def _location(self, kind: str, number: int) -> tuple[Any, int]:
        return getattr(self._cuda.CUmemLocationType, f"CU_MEM_LOCATION_TYPE_{kind}"), number

    def _create(self, kind: str, number: int, size_bytes: int) -> int:
        wanted = self._cuda.CUmemAllocationProp()
        wanted.type = self._cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        wanted.location.type, wanted.location.id = self._location(kind, number)
        wanted.requestedHandleTypes = self._fd_handle
        handle = self._call("cuMemCreate", size_bytes, wanted, 0)
        try:
            fd = int(self._call("cuMemExportToShareableHandle", handle, self._fd_handle, 0))
        finally:
            self._call("cuMemRelease", handle)
        os.set_inheritable(fd, False)
        return fd

    def create_slab(self, uuid: str, size_bytes: int) -> int:
        """See :class:`Driver`."""
        return self._create("DEVICE", self._gpu(uuid).ordinal, size_bytes)

    def create_block(self, size_bytes: int) -> int:
        """See :class:`Driver`. On the NUMA node of the first GPU."""
        return self._create("HOST_NUMA", self._numa_node(), size_bytes)

    def _numa_node(self) -> int:
        attribute = self._cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID
        return max(0, int(self._call("cuDeviceGetAttribute", attribute, self._call("cuDeviceGet", 0))))

    def close(self, fd: int) -> None:
        """See :class:`Driver`."""
        os.close(fd)

    def map_block(self, fd: int, size_bytes: int) -> Mapped:
        """See :class:`Driver`."""
        return self._map(fd, size_bytes, "HOST_NUMA", self._numa_node(), Access.WRITE)

    def map_block_on(self, fd: int, size_bytes: int, gpu: Gpu) -> Mapped:
        """See :class:`Driver`."""
        return self._map(fd, size_bytes, "DEVICE", gpu.ordinal, Access.READ)

    def map_slab(self, fd: int, size_bytes: int, gpu: Gpu, access: Access) -> Mapped:
        """See :class:`Driver`."""
        return self._map(fd, size_bytes, "DEVICE", gpu.ordinal, access)

    def _map(self, fd: int, size_bytes: int, kind: str, number: int, access: Access) -> Mapped:
        handle = self._call("cuMemImportFromShareableHandle", fd, self._fd_handle)
        try:
            address = int(self._call("cuMemAddressReserve", size_bytes, 0, 0, 0))
            try:
                self._call("cuMemMap", address, size_bytes, 0, handle, 0)
                try:
                    self._call("cuMemSetAccess", address, size_bytes, [self._access(kind, number, access)], 1)
                except BaseException:
                    self._call("cuMemUnmap", address, size_bytes)
                    raise
            except BaseException:
                self._call("cuMemAddressFree", address, size_bytes)
                raise
        finally:
            self._call("cuMemRelease", handle)
        return _CudaMap(self, address, size_bytes, (kind, number))

    def _access(self, kind: str, number: int, access: Access) -> Any:  # noqa: ANN401
        wanted = self._cuda.CUmemAccessDesc()
        wanted.location.type, wanted.location.id = self._location(kind, number)
        flags = self._cuda.CUmemAccess_flags
        read, write = flags.CU_MEM_ACCESS_FLAGS_PROT_READ, flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        wanted.flags = write if access is Access.WRITE else read
        return wanted

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """See :class:`Driver`."""
        self._call("cuMemcpyAsync", target, source, size_bytes, stream)

    def allocation(self, address: int) -> tuple[int, int]:
        """See :class:`Driver`."""
        start, size_bytes = self._call("cuMemGetAddressRange", address)
        return int(start), int(start) + size_bytes

    def check_import(self, fd: int) -> None:
        """See :class:`Driver`."""
        self._call("cuMemRelease", self._call("cuMemImportFromShareableHandle", fd, self._fd_handle))


class _CudaMap:
    """A reserved and mapped range of addresses."""

    def __init__(self, driver: CudaDriver, address: int, size_bytes: int, location: tuple[str, int]) -> None:
        self._driver = driver
        self.address = address
        self.size_bytes = size_bytes
        self._location = location
        self._mapped = True

    def protect(self) -> None:
        """See :class:`Mapped`."""
        read_only = self._driver._access(*self._location, Access.READ)
        self._driver._call("cuMemSetAccess", self.address, self.size_bytes, [read_only], 1)

    def close(self) -> None:
        """Unmap and free the addresses; a second call does nothing."""
        if self._mapped:
            self._mapped = False
            self._driver._call("cuMemUnmap", self.address, self.size_bytes)
            self._driver._call("cuMemAddressFree", self.address, self.size_bytes)


def _format_uuid(raw: bytes) -> str:
    digits = raw.hex()
    return "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def cpu_view(mapped: Mapped) -> memoryview:
    """The bytes of a map for the CPU."""
    return memoryview((ctypes.c_ubyte * mapped.size_bytes).from_address(mapped.address)).cast("B")
