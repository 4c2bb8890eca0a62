"""What the GPU driver of this machine can do, found by doing it: the steps of a load onto a GPU, one by one and small.

Takes 2 MiB at a time and gives it back; makes no GPU context and stays below tensors. Must not know what a refusal means to a
user, which ``nbcache doctor`` judges. It exists because "no shared GPU memory" has a dozen causes, each with its own remedy.
Run it in a process of its own: a broken driver may hang, or take the process with it.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable

import msgspec

from nbcache.errors import DriverError, NBCacheError
from nbcache.memory.arena import Arena
from nbcache.memory.driver import GRANULARITY_BYTES, CudaDriver, Driver, open_driver

BINDINGS, START, DEVICES = "CUDA bindings", "cuInit", "GPUs"
MANAGEMENT, EXPORT, IMPORT, FREE = "virtual memory management", "fd export of GPU memory", "fd import", "NVML"
PINNED, CUPY = "fd export of pinned memory", "CuPy"


class Feature(msgspec.Struct, frozen=True):
    """One step: its name, whether it worked, and what was found or what the driver said. ``gpu`` is a UUID, or empty."""

    name: str
    works: bool
    detail: str
    gpu: str = ""


class Seen(msgspec.Struct, frozen=True):
    """A GPU that the driver shows this process."""

    uuid: str
    name: str
    total_bytes: int


class DriverProbe(msgspec.Struct, frozen=True):
    """The steps that were taken, in order, and the GPUs that were met. A step that failed ends those that build on it."""

    features: tuple[Feature, ...]
    gpus: tuple[Seen, ...] = ()


def probe_driver() -> DriverProbe:
    """Take the steps. Nothing is raised for a driver that is missing, old or refuses: that is what the answer says."""
    steps: list[Feature] = []
    driver = _start(steps)
    if driver is None:
        return DriverProbe(tuple(steps))
    gpus = tuple(Seen(gpu.uuid, gpu.name, gpu.total_bytes) for gpu in driver.gpus())
    steps.append(Feature(DEVICES, bool(gpus), f"{len(gpus)} visible"))
    for gpu in gpus:
        steps += _gpu_steps(driver, gpu.uuid)
    if gpus and _try(steps, PINNED, lambda: _make_block(driver)):
        _try(steps, CUPY, lambda: _make_array(driver))
    return DriverProbe(tuple(steps), gpus)


def _start(steps: list[Feature]) -> Driver | None:
    if not os.environ.get("NBCACHE_TEST_DRIVER") and not _try(steps, BINDINGS, _bindings_version):
        return None
    opened: list[Driver] = []

    def open_and_tell() -> str:
        opened.append(open_driver())
        return _driver_version(opened[0])

    _try(steps, START, open_and_tell)
    return opened[0] if opened else None


def _try(steps: list[Feature], name: str, step: Callable[[], str], gpu: str = "") -> bool:
    try:
        steps.append(Feature(name, True, step(), gpu))
    except (NBCacheError, ImportError, OSError, AttributeError, RuntimeError) as error:  # CuPy and bindings raise all of these
        steps.append(Feature(name, False, " ".join(str(error).split()) or type(error).__name__, gpu))
    return steps[-1].works


def _bindings_version() -> str:
    import cuda.bindings.driver  # noqa: F401

    return importlib.metadata.version("cuda-bindings")


def _driver_version(driver: Driver) -> str:
    if not isinstance(driver, CudaDriver):
        return type(driver).__name__
    version = int(driver._call("cuDriverGetVersion"))
    return f"for CUDA {version // 1000}.{version % 1000 // 10}"


def _gpu_steps(driver: Driver, uuid: str) -> list[Feature]:
    steps: list[Feature] = []
    _try(steps, FREE, lambda: f"{driver.free_bytes(uuid)} bytes free", uuid)
    if isinstance(driver, CudaDriver) and not _try(steps, MANAGEMENT, lambda: _attribute(driver, uuid), uuid):
        return steps
    made: list[int] = []

    def export() -> str:
        made.append(driver.create_slab(uuid, GRANULARITY_BYTES))
        return "2 MiB"

    def import_again() -> str:
        driver.check_import(made[0])
        return "2 MiB"

    try:
        _ = _try(steps, EXPORT, export, uuid) and _try(steps, IMPORT, import_again, uuid)
    finally:
        for fd in made:
            driver.close(fd)
    return steps


def _attribute(driver: CudaDriver, uuid: str) -> str:
    """The driver's own words on virtual memory management and its handles; DriverError if it lacks one."""
    ordinal = next(gpu.ordinal for gpu in driver.gpus() if gpu.uuid == uuid)
    device = driver._call("cuDeviceGet", ordinal)
    for name in ("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED"):
        attribute = getattr(driver._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        if not int(driver._call("cuDeviceGetAttribute", attribute, device)):
            raise DriverError(f"CU_DEVICE_ATTRIBUTE_{name} is 0")
    return "with file descriptors"


def _make_block(driver: Driver) -> str:
    fd = driver.create_block(GRANULARITY_BYTES)
    try:
        driver.map_block(fd, GRANULARITY_BYTES).close()
    finally:
        driver.close(fd)
    return "2 MiB, mapped for the CPU"


def _make_array(driver: Driver) -> str:
    Arena(driver, getattr(driver, "open_arrays", None)).acquire(GRANULARITY_BYTES).close()
    versions = [
        f"{package} {importlib.metadata.version(package)}"
        for package in ("cupy-cuda13x", "cupy-cuda12x", "cupy")
        if _is_installed(package)
    ]
    return ", ".join([*versions, "a pinned array of 2 MiB"])


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
