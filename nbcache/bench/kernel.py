"""What runs in a fresh process in a kernel's place: getting ready, the one load that is timed, and what the GPU itself can do.

Nothing of nbcache's client is imported before torch is, as in a notebook; so it is imported in functions.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from nbcache.errors import BenchmarkFailed

if TYPE_CHECKING:
    import torch

    from nbcache.client.options import Share

DEVICE = "cuda:0"
ROUNDS = 5
PAUSE_S = 0.5
COPIES = 8
"""Copies on the device that are timed as one: a single one is too short."""


class Card(msgspec.Struct, frozen=True):
    """A GPU, and how fast it copies. Bytes per second, medians."""

    name: str
    uuid: str
    torch: str
    link_per_s: float
    """From pinned host memory to the device."""
    copy_per_s: float
    """On the device, counted one way."""
    probe_bytes: int


class Timed(msgspec.Struct, frozen=True):
    """One load, the first of its process."""

    seconds: float
    tensors: int
    nbytes: int
    private_bytes: int
    hit: bool


class Compared(msgspec.Struct, frozen=True):
    """Tensors held against what safetensors reads from the same files."""

    tensors: int
    differing: tuple[str, ...]
    """Names of the first few that differ, or are missing."""

    @property
    def equal(self) -> bool:
        """Whether all are the same, and there were any."""
        return bool(self.tensors) and not self.differing


def physical_device() -> str:
    """Where torch puts tensors: the GPU, or the CPU where the tests' emulated driver stands in for one."""
    return "cpu" if os.environ.get("NBCACHE_TEST_DRIVER") else DEVICE


def synchronize() -> None:
    """Wait for the GPU."""
    import torch

    if physical_device() != "cpu":
        torch.cuda.synchronize()


def start_context() -> None:
    """Import torch and make the GPU's context. InvalidOption if there is no GPU."""
    import torch

    from nbcache.client import tensors as edge

    edge.resolve_device(DEVICE)
    torch.zeros(1, device=physical_device())
    synchronize()


def _get_ready() -> Callable[..., Mapping[str, torch.Tensor]]:
    """Be a kernel that has torch, a context and ``nbcache.load``."""
    start_context()
    import nbcache
    from nbcache.client import api
    from nbcache.client.notices import NoSharedGpuMemory

    api.prepare()  # as importing it does where torch is there already
    warnings.simplefilter("error", NoSharedGpuMemory)  # an ordinary copy is not what is measured here
    return nbcache.load


def time_load(checkpoint: str, share: Share) -> Timed:
    """The first load of this process, until the GPU has everything."""
    from nbcache.client.weights import Weights

    load = _get_ready()
    start = time.perf_counter()
    weights = load(checkpoint, device=DEVICE, share=share)
    synchronize()
    seconds = time.perf_counter() - start
    assert isinstance(weights, Weights)
    return Timed(seconds, len(weights), weights.nbytes, weights.private_bytes, weights.hit)


def time_fills(checkpoint: str, share: Share, runs: int) -> list[Timed]:
    """Fills of a slab from the pinned copy, by a process that loaded the same before: as files are swapped in a notebook.

    There is a pause after each, as there is in a notebook: what the last one used is freed in the background.
    """
    from nbcache.client import api
    from nbcache.client.weights import Weights

    load, found = _get_ready(), []
    for _ in range(runs + 1):
        start = time.perf_counter()
        weights = load(checkpoint, device=DEVICE, share=share)
        synchronize()
        seconds = time.perf_counter() - start
        assert isinstance(weights, Weights)
        found.append(Timed(seconds, len(weights), weights.nbytes, weights.private_bytes, weights.hit))
        weights.release()
        if not api.free_gpu(checkpoint).names:
            raise BenchmarkFailed(f"{checkpoint}: its slab was still in use, or gone; is the GPU short of memory?")
        time.sleep(PAUSE_S)
    return found[1:]


def compare_load(checkpoint: str, files: tuple[str, ...], share: Share) -> Compared | None:
    """Load, and compare every tensor; None if safetensors is not installed."""
    load = _get_ready()
    try:
        import safetensors  # noqa: F401
    except ImportError:
        return None
    return compare(load(checkpoint, device=DEVICE, share=share), files)


def compare(found: Mapping[str, torch.Tensor], files: Iterable[str]) -> Compared:
    """Hold tensors, byte by byte, against safetensors' own reading of the files, where the tensors are."""
    from safetensors import safe_open

    count, differing = 0, []
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                count += 1
                if name not in found or not _same(found[name], file.get_tensor(name)):
                    differing.append(name)
    return Compared(count, tuple(differing[:5]))


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    import torch

    shaped = found.shape == expected.shape or found.numel() == expected.numel() == 1  # flashpack gives scalars a dimension
    if not shaped or found.dtype != expected.dtype:
        return False
    return torch.equal(_bytes_of(found), _bytes_of(expected.to(found.device)))


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def measure_card(probe_bytes: int) -> Card:
    """What the GPU copies, from pinned host memory and on the device."""
    start_context()
    import torch

    from nbcache.memory.driver import open_driver

    place = physical_device()
    host = torch.ones(probe_bytes, dtype=torch.uint8, pin_memory=place != "cpu")
    target, source = (torch.ones(probe_bytes, dtype=torch.uint8, device=place) for _ in range(2))

    def on_device() -> None:
        for _ in range(COPIES):
            target.copy_(source)

    gpu = open_driver().gpus()[0]
    return Card(
        name=gpu.name,
        uuid=gpu.uuid,
        torch=str(torch.__version__),
        link_per_s=probe_bytes / _median(lambda: target.copy_(host, non_blocking=True)),
        copy_per_s=COPIES * probe_bytes / _median(on_device),
        probe_bytes=probe_bytes,
    )


def _median(copy: Callable[[], object]) -> float:
    """Median seconds of a copy, after one that does not count."""
    times = []
    for _ in range(ROUNDS + 1):
        synchronize()
        start = time.perf_counter()
        copy()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
