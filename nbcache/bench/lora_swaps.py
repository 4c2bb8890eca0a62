"""The process in which LoRAs go into a live pipeline: ours and the stock loader's, timed, and held against each other.

The clock is around the one call and a synchronisation of the device; a small LoRA goes every way once before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nbcache.bench import kernel
from nbcache.bench.isolation import Tell
from nbcache.bench.lora_files import Pair, Shape, flux_pipeline, write_pair
from nbcache.bench.lora_report import Churn, Row
from nbcache.errors import BenchmarkFailed

if TYPE_CHECKING:
    import torch

    from nbcache.models.lora import LoadedLora

WAIT_S = 5.0


class Failure(msgspec.Struct, frozen=True):
    """What could not be measured, and why."""

    name: str
    why: str


def measure_swaps(directory: str, sizes: tuple[int, ...], shape: Shape, runs: int, swaps: int, uuid: str, tell: Tell) -> None:
    """In a fresh process: the pipeline, the files, and everything that is measured of them."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # it tells of each stock load that the LoRA has nothing for a text encoder
    kernel.start_context()
    pipe = flux_pipeline(shape)
    tell("the pipeline is on the GPU")
    bench, folder = _Bench(pipe, runs), Path(directory)
    _Bench(pipe, runs=1).row(write_pair(pipe, shape, folder, "warming up", 1))  # imports, CuPy in the daemon, first kernels
    tell("a small LoRA went every way once")
    measured = []
    for name, nbytes in (*(("", size) for size in sizes), ("kohya", None)):
        pair = write_pair(pipe, shape, folder, name, nbytes)
        tell(f"{pair.name}: two files written")
        try:
            tell(bench.row(pair))
            measured.append(pair.one)
        except Exception as error:  # noqa: BLE001 - told, and the others are measured all the same
            tell(Failure(pair.name, f"{type(error).__name__}: {error}"))
            bench.start_over()
    if measured:
        tell(bench.churn(measured, swaps, uuid))


class _Bench:
    """One pipeline, and the clock."""

    def __init__(self, pipe: Any, runs: int) -> None:  # noqa: ANN401 - diffusers' pipeline
        self._pipe = pipe
        self._runs = runs

    def row(self, pair: Pair) -> Row:
        """Two LoRAs of one size: the stock loader's load and hotswaps, then ours, which must give the same."""
        import nbcache
        from nbcache.models.lora import load_lora, unload_lora

        one, other = pair.one, pair.other
        stock_load_s = self._time(partial(self._stock, one))
        hotswaps = [self._time(partial(self._stock, path, hotswap=True)) for path in self._turns(other, one)]
        self._pipe.unload_lora_weights()
        self._stock(other)
        expected = self._output()
        self._pipe.unload_lora_weights()

        first = self._timed(partial(load_lora, self._pipe, one), "injected", "converted")
        load_lora(self._pipe, other)
        equal = self._same(expected)
        hot = [self._timed(partial(load_lora, self._pipe, path), "swapped", "hot") for path in self._turns(one, other)]
        pinned = []
        for path in self._turns(one, other):
            self._cool()
            pinned.append(self._timed(partial(load_lora, self._pipe, path), "swapped", "cached"))
        unload_lora(self._pipe)
        self._cool()
        first_pinned = self._timed(partial(load_lora, self._pipe, other), "injected", "cached")
        equal = equal and self._same(expected)
        unload_lora(self._pipe)
        first_hot = self._timed(partial(load_lora, self._pipe, other), "injected", "hot")
        loaded = load_lora(self._pipe, other)
        unload_lora(self._pipe)
        tensors = next(e.tensors for e in nbcache.status().entries if e.name.startswith(Path(other).stem))
        return Row(
            pair.name, loaded.nbytes, tensors, loaded.rank, stock_load_s, tuple(hotswaps), first, first_pinned, first_hot,
            tuple(pinned), tuple(hot), equal,
        )  # fmt: skip

    def start_over(self) -> None:
        """After a failure: a pipeline without LoRAs, and none of ours on the GPU."""
        from nbcache.models.lora import unload_lora

        unload_lora(self._pipe)
        self._pipe.unload_lora_weights()
        self._cool()

    def churn(self, paths: list[str], swaps: int, uuid: str) -> Churn:
        """Random swaps, and what grew with them."""
        import random

        from nbcache.models.lora import load_lora, unload_lora

        order = random.Random(5)  # noqa: S311 - which LoRA comes next
        for path in [*paths, *(order.choice(paths) for _ in range(swaps // 4))]:
            load_lora(self._pipe, path)
        self._settle()
        before, hot = _memory(uuid), 0
        start = time.perf_counter()
        for _ in range(swaps):
            hot += load_lora(self._pipe, order.choice(paths)).found == "hot"
        kernel.synchronize()
        seconds = time.perf_counter() - start
        self._settle()
        after = _memory(uuid)
        load_lora(self._pipe, paths[0])
        found = self._output()
        unload_lora(self._pipe)
        self._stock(paths[0])
        equal = self._same(found)
        grown = [None if a is None or b is None else b - a for a, b in zip(before, after, strict=True)]
        return Churn(swaps, len(paths), hot, seconds, grown[0] or 0, grown[1], grown[2] or 0, grown[3] or 0, equal)

    def _turns(self, one: str, other: str) -> Iterator[str]:
        return ((one, other)[number % 2] for number in range(self._runs))

    def _stock(self, path: str, hotswap: bool = False) -> None:
        self._pipe.load_lora_weights(path, adapter_name="stock", hotswap=hotswap)

    def _timed(self, work: Callable[[], LoadedLora], how: str, found: str) -> float:
        """As :meth:`_time`, of a load that must have gone this way."""
        results: list[LoadedLora] = []
        seconds = self._time(lambda: results.append(work()))
        if (results[0].how, results[0].found) != (how, found):
            raise BenchmarkFailed(
                f"{results[0].name}: was {results[0].how} ({results[0].found}) where {how} ({found}) was to be measured; is "
                "the GPU short of memory?"
            )
        return seconds

    @staticmethod
    def _time(work: Callable[[], object]) -> float:
        kernel.synchronize()
        start = time.perf_counter()
        work()
        kernel.synchronize()
        return time.perf_counter() - start

    @staticmethod
    def _cool() -> None:
        """Nothing of ours on the GPU any more, all in pinned host memory."""
        import nbcache
        from nbcache.models.lora_cache import hot

        hot().clear()
        limit = time.monotonic() + WAIT_S
        while any(entry.devices for entry in nbcache.status().entries):
            if time.monotonic() > limit:
                raise BenchmarkFailed("a slab that nobody uses stays on the GPU")
            nbcache.free_gpu()
        _Bench._settle()

    @staticmethod
    def _settle() -> None:
        """Until nothing is left to be done: garbage is collected, and what the last load left to be unmapped is."""
        import gc

        from nbcache.client.blocks import LINGER_S

        kernel.synchronize()
        gc.collect()
        time.sleep(2 * LINGER_S)

    def _output(self) -> torch.Tensor:
        import torch

        transformer = self._pipe.transformer
        weight, config = transformer.proj_out.weight, transformer.config
        generator = torch.Generator(weight.device).manual_seed(3)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)

        with torch.no_grad():
            result: torch.Tensor = transformer(
                hidden_states=random(1, 64, config.in_channels),
                encoder_hidden_states=random(1, 32, config.joint_attention_dim),
                pooled_projections=random(1, config.pooled_projection_dim),
                timestep=torch.tensor([0.5], device=weight.device, dtype=weight.dtype),
                guidance=torch.tensor([3.5], device=weight.device, dtype=weight.dtype),
                img_ids=torch.zeros(64, 3, device=weight.device),
                txt_ids=torch.zeros(32, 3, device=weight.device),
            ).sample
        if not torch.isfinite(result).all():
            raise BenchmarkFailed("the transformer's output is not finite: nothing can be compared")
        return result

    def _same(self, expected: torch.Tensor) -> bool:
        import torch

        return torch.equal(self._output(), expected)


def _memory(uuid: str) -> tuple[int, int | None, int, int]:
    """What torch has reserved, what is used of the GPU (if that can be told), this process's memory, the cache's."""
    import psutil
    import torch

    import nbcache
    from nbcache.bench.footprint import free_gpu_bytes

    reserved = torch.cuda.memory_reserved() if kernel.physical_device() != "cpu" else 0
    slabs = sum(gpu.slab_bytes for gpu in nbcache.status().devices)  # hot ones come and go, within their limit
    free = free_gpu_bytes(uuid)
    used = None if free is None else -free - slabs
    return reserved, used, psutil.Process().memory_info().rss, nbcache.status().host.used_bytes
