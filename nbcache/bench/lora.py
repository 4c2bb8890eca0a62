"""LoRAs into a live FLUX pipeline: the first of an adapter and each swap, hot and from pinned memory, beside the stock loader.

The pipeline has FLUX.1's shape and random weights; of it only the transformer, which is what LoRAs go into. All is measured in
one fresh process with a daemon of its own, the clock around the one call and a synchronisation of the device. Needs a GPU (or
the tests' emulated driver), diffusers and peft.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nbcache.bench import kernel
from nbcache.bench.isolation import own_daemon, run_fresh
from nbcache.errors import BenchmarkFailed
from nbcache.units import format_size

if TYPE_CHECKING:
    import torch

    from nbcache.models.lora import LoadedLora

LORA_BYTES = (328_000_000, 642_000_000, 1_200_000_000, 2_000_000_000)
KOHYA_RANK = 16
RUNS = 7
CHURN = 200
WAIT_S = 5.0


class Shape(msgspec.Struct, frozen=True):
    """A FLUX transformer's. The defaults are FLUX.1's."""

    heads: int = 24
    head: int = 128
    double_blocks: int = 19
    single_blocks: int = 38
    channels: int = 64
    text: int = 4096
    pooled: int = 768
    axes: tuple[int, int, int] = (16, 56, 56)

    @property
    def width(self) -> int:
        """Of a block."""
        return self.heads * self.head


FLUX = Shape()


class Row(msgspec.Struct, frozen=True):
    """One LoRA. Seconds; where there are several runs, all of them. ``found`` is what each is measured from."""

    name: str
    nbytes: int
    tensors: int
    rank: int
    stock_load_s: float
    stock_hotswap_s: tuple[float, ...]
    first_converted_s: float
    first_pinned_s: float
    first_hot_s: float
    swap_pinned_s: tuple[float, ...]
    swap_hot_s: tuple[float, ...]
    equal: bool
    """Whether the transformer's output is that after the stock loader, bit for bit."""

    @property
    def ratio(self) -> float:
        """The stock hotswap over ours from pinned memory, medians."""
        return statistics.median(self.stock_hotswap_s) / statistics.median(self.swap_pinned_s)


class Churn(msgspec.Struct, frozen=True):
    """Random swaps among several LoRAs. Bytes are growth over them, after as many as make every LoRA known."""

    swaps: int
    loras: int
    hot: int
    """Swaps that found their LoRA on the GPU."""
    seconds: float
    torch_bytes: int
    gpu_bytes: int | None
    rss_bytes: int
    cache_bytes: int
    equal: bool
    """Whether the last output is that of a fresh load."""


class LoraReport(msgspec.Struct, frozen=True):
    """What ``nbcache bench lora`` measured in one run on one machine."""

    card: kernel.Card
    versions: dict[str, str]
    rows: tuple[Row, ...]
    churn: Churn


def measure_lora(
    sizes: tuple[int, ...] = LORA_BYTES,
    shape: Shape = FLUX,
    runs: int = RUNS,
    swaps: int = CHURN,
    probe_bytes: int = 1 << 30,
    on_step: Callable[[str], None] = lambda _: None,
) -> LoraReport:
    """Measure LoRAs of these sizes, and one of kohya's layout, on the first GPU.

    Raises BenchmarkFailed, and as :func:`load_lora`. Writes two files of each to TMPDIR. ``on_step`` is told at the end.
    """
    for package in ("diffusers", "peft"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise BenchmarkFailed(f"needs {package}: pip install {package}") from error
    with own_daemon() as directory:
        card = run_fresh(partial(kernel.measure_card, probe_bytes))
        on_step(f"{card.name}: link {card.link_per_s / 1e9:.1f} GB/s")
        rows, churn = run_fresh(partial(_measure, str(directory), sizes, shape, runs, swaps, card.uuid))
    for row in rows:
        swap = ", ".join(f"{statistics.median(each) * 1000:.1f}" for each in (row.swap_pinned_s, row.swap_hot_s))
        on_step(f"{row.name}, {format_size(row.nbytes)}: swap {swap} ms (pinned, hot)")
    versions = {package: importlib.metadata.version(package) for package in ("torch", "diffusers", "peft")}
    return LoraReport(card, versions, tuple(rows), churn)


def _measure(directory: str, sizes: tuple[int, ...], shape: Shape, runs: int, swaps: int, uuid: str) -> tuple[list[Row], Churn]:
    """In a fresh process: the pipeline, the files, and everything that is measured of them."""
    kernel.start_context()
    pipe = flux_pipeline(shape)
    pairs = []
    for nbytes in sizes:
        rank = max(1, round(nbytes / _bytes_of_rank(pipe)))
        paths = [str(Path(directory, f"lora-{nbytes}-{which}.safetensors")) for which in "ab"]
        pairs.append((f"rank {rank}", [_write_lora(path, _diffusers_shapes(pipe, rank)) for path in paths]))
    paths = [str(Path(directory, f"kohya-{which}.safetensors")) for which in "ab"]
    pairs.append(("kohya", [_write_lora(path, _kohya_shapes(shape, KOHYA_RANK)) for path in paths]))
    bench = _Bench(pipe, runs)
    rows = [bench.row(name, one, other) for name, (one, other) in pairs]
    return rows, bench.churn([files[0] for _, files in pairs], swaps, uuid)


class _Bench:
    """One pipeline, and the clock."""

    def __init__(self, pipe: Any, runs: int) -> None:  # noqa: ANN401 - diffusers' pipeline
        self._pipe = pipe
        self._runs = runs

    def row(self, name: str, one: str, other: str) -> Row:
        """Two LoRAs of one size: the stock loader's load and hotswaps, then ours, which must give the same."""
        import nbcache
        from nbcache.models.lora import load_lora, unload_lora

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
            name, loaded.nbytes, tensors, loaded.rank, stock_load_s, tuple(hotswaps), first, first_pinned, first_hot,
            tuple(pinned), tuple(hot), equal,
        )  # fmt: skip

    def churn(self, paths: list[str], swaps: int, uuid: str) -> Churn:
        """Random swaps, and what grew with them."""
        import gc
        import random

        from nbcache.models.lora import load_lora, unload_lora

        order = random.Random(5)  # noqa: S311 - which LoRA comes next
        for path in [*paths, *(order.choice(paths) for _ in range(swaps // 4))]:
            load_lora(self._pipe, path)
        kernel.synchronize()
        gc.collect()
        before, hot = _memory(uuid), 0
        start = time.perf_counter()
        for _ in range(swaps):
            hot += load_lora(self._pipe, order.choice(paths)).found == "hot"
        kernel.synchronize()
        seconds = time.perf_counter() - start
        gc.collect()
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
        """Nothing of ours on the GPU any more; all in pinned host memory."""
        import nbcache
        from nbcache.models.lora_cache import hot

        hot().clear()
        limit = time.monotonic() + WAIT_S
        while any(entry.devices for entry in nbcache.status().entries):
            if time.monotonic() > limit:
                raise BenchmarkFailed("a slab that nobody uses stays on the GPU")
            nbcache.free_gpu()

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


def flux_pipeline(shape: Shape) -> Any:  # noqa: ANN401 - diffusers' pipeline
    """A FLUX pipeline of a transformer alone, its weights random and small, in bfloat16, on the GPU."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            in_channels=shape.channels, num_layers=shape.double_blocks, num_single_layers=shape.single_blocks,
            attention_head_dim=shape.head, num_attention_heads=shape.heads, joint_attention_dim=shape.text,
            pooled_projection_dim=shape.pooled, guidance_embeds=True, axes_dims_rope=shape.axes,
        )  # fmt: skip
    transformer = transformer.to(torch.bfloat16).to_empty(device=kernel.physical_device())
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(0.0, 0.02)
    transformer.requires_grad_(False)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


def _layers(pipe: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401
    """The linear layers of the blocks, and their shapes."""
    parameters = pipe.transformer.named_parameters()
    return {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in parameters
        if "transformer_blocks." in name and name.endswith(".weight") and parameter.ndim == 2
    }


def _bytes_of_rank(pipe: Any) -> int:  # noqa: ANN401
    return 2 * sum(map(sum, _layers(pipe).values()))


def _diffusers_shapes(pipe: Any, rank: int) -> dict[str, tuple[int, ...]]:  # noqa: ANN401
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (outputs, inputs) in _layers(pipe).items():
        shapes[f"transformer.{name}.lora_A.weight"] = (rank, inputs)
        shapes[f"transformer.{name}.lora_B.weight"] = (outputs, rank)
    return shapes


def _kohya_shapes(shape: Shape, rank: int) -> dict[str, tuple[int, ...]]:
    """As kohya's scripts name FLUX; the stock converter knows the single blocks' first layer in FLUX.1's size alone."""
    wide = shape.width
    layers: dict[str, tuple[int, int]] = {}
    for number in range(shape.double_blocks):
        for part in ("img", "txt"):
            block = f"double_blocks_{number}_{part}"
            layers |= {f"{block}_attn_qkv": (3 * wide, wide), f"{block}_attn_proj": (wide, wide)}
            layers |= {f"{block}_mlp_0": (4 * wide, wide), f"{block}_mlp_2": (wide, 4 * wide)}
    for number in range(shape.single_blocks):
        if wide == FLUX.width:
            layers[f"single_blocks_{number}_linear1"] = (7 * wide, wide)
        layers[f"single_blocks_{number}_linear2"] = (wide, 5 * wide)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (outputs, inputs) in layers.items():
        shapes[f"lora_unet_{layer}.lora_down.weight"] = (rank, inputs)
        shapes[f"lora_unet_{layer}.lora_up.weight"] = (outputs, rank)
        shapes[f"lora_unet_{layer}.alpha"] = ()
    return shapes


def _write_lora(path: str, shapes: dict[str, tuple[int, ...]]) -> str:
    """A LoRA file of small random numbers in bfloat16; alphas are half of the rank."""
    import torch
    from safetensors.torch import save_file

    device = kernel.physical_device()

    def made(shape: tuple[int, ...]) -> torch.Tensor:
        if not shape:
            return torch.tensor(KOHYA_RANK / 2)
        return (torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02).cpu()

    save_file({name: made(shape) for name, shape in shapes.items()}, path, metadata={"format": "pt"})
    return path


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
