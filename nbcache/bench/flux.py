"""Checkpoints of FLUX.1's shape, of random numbers: the transformer in its three shards, and LoRA files.

Names, shapes and shards are those of diffusers' ``FluxTransformer2DModel(guidance_embeds=True)`` as black-forest-labs publishes
it; neither diffusers nor the weights are needed.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import msgspec

from nbcache.bench.isolation import run_fresh
from nbcache.bench.room import check_disk

Shapes = Mapping[str, tuple[int, ...]]

WIDTH = 3072
HEAD = 128
DOUBLE_BLOCKS = 19
SINGLE_BLOCKS = 38
ELEMENT_BYTES = 2
"""All is bfloat16."""
SHARD_BYTES = 10 * 10**9
"""What diffusers puts into one shard at most."""
STEM = "diffusion_pytorch_model"


def flux_shapes(divide_by: int = 1) -> dict[str, tuple[int, ...]]:
    """Shapes of the 1160 tensors, 11 901 408 320 elements, in the order of the published files.

    ``divide_by`` makes each dimension smaller by that factor, which must divide 64.
    """
    if 64 % divide_by:
        raise ValueError(f"divide_by={divide_by} does not divide 64")
    return {name: tuple(size // divide_by for size in shape) for name, shape in _tensors()}


def _tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    embed = "time_text_embed"
    for part, inputs in (("timestep_embedder", 256), ("guidance_embedder", 256), ("text_embedder", 768)):
        yield from _linear(f"{embed}.{part}.linear_1", WIDTH, inputs)
        yield from _linear(f"{embed}.{part}.linear_2", WIDTH, WIDTH)
    yield from _linear("context_embedder", WIDTH, 4096)
    yield from _linear("x_embedder", WIDTH, 64)
    for number in range(DOUBLE_BLOCKS):
        yield from _double_block(f"transformer_blocks.{number}")
    for number in range(SINGLE_BLOCKS):
        yield from _single_block(f"single_transformer_blocks.{number}")
    yield from _linear("norm_out.linear", 2 * WIDTH, WIDTH)
    yield from _linear("proj_out", 64, WIDTH)


def _double_block(block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _linear(f"{block}.norm1.linear", 6 * WIDTH, WIDTH)
    yield from _linear(f"{block}.norm1_context.linear", 6 * WIDTH, WIDTH)
    for norm in ("norm_q", "norm_k"):
        yield f"{block}.attn.{norm}.weight", (HEAD,)
    for projection in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj", "to_out.0", "to_add_out"):
        yield from _linear(f"{block}.attn.{projection}", WIDTH, WIDTH)
    for norm in ("norm_added_q", "norm_added_k"):
        yield f"{block}.attn.{norm}.weight", (HEAD,)
    for part in ("ff", "ff_context"):
        yield from _linear(f"{block}.{part}.net.0.proj", 4 * WIDTH, WIDTH)
        yield from _linear(f"{block}.{part}.net.2", WIDTH, 4 * WIDTH)


def _single_block(block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _linear(f"{block}.norm.linear", 3 * WIDTH, WIDTH)
    yield from _linear(f"{block}.proj_mlp", 4 * WIDTH, WIDTH)
    yield from _linear(f"{block}.proj_out", WIDTH, 5 * WIDTH)
    for norm in ("norm_q", "norm_k"):
        yield f"{block}.attn.{norm}.weight", (HEAD,)
    for projection in ("to_q", "to_k", "to_v"):
        yield from _linear(f"{block}.attn.{projection}", WIDTH, WIDTH)


def _linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def lora_shapes(nbytes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the 988 tensors of a LoRA over every linear layer of the blocks, of the rank whose size is nearest ``nbytes``.

    One rank is 10.7 MB.
    """
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in flux_shapes().items()
        if "transformer_blocks." in name and len(shape) == 2
    }
    rank = max(1, round(nbytes / (ELEMENT_BYTES * sum(map(sum, layers.values())))))
    found: dict[str, tuple[int, ...]] = {}
    for name, (outputs, inputs) in layers.items():
        found[f"transformer.{name}.lora_A.weight"] = (rank, inputs)
        found[f"transformer.{name}.lora_B.weight"] = (outputs, rank)
    return found


def nbytes_of_shapes(shapes: Shapes) -> int:
    """Bytes of all tensors."""
    return ELEMENT_BYTES * sum(map(math.prod, shapes.values()))


def shards() -> list[list[str]]:
    """The tensors' names by shard, as diffusers cuts the full-size model: three shards of at most 10 GB."""
    found: list[list[str]] = [[]]
    size = 0
    for name, shape in flux_shapes().items():
        nbytes = ELEMENT_BYTES * math.prod(shape)
        if size + nbytes > SHARD_BYTES:
            found.append([])
            size = 0
        found[-1].append(name)
        size += nbytes
    return found


def write_flux(folder: str, divide_by: int = 1) -> None:
    """Write the shards and their index into a folder. Random numbers, from the GPU if there is one: makes a context there."""
    shapes = flux_shapes(divide_by)
    parts = shards()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = f"{STEM}-{number:05d}-of-{len(parts):05d}.safetensors"
        write_random(Path(folder, file), {name: shapes[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": nbytes_of_shapes(shapes)}, "weight_map": weight_map}
    Path(folder, f"{STEM}.safetensors.index.json").write_bytes(msgspec.json.encode(index))


@contextlib.contextmanager
def temporary_flux(divide_by: int = 1) -> Iterator[str]:
    """A temporary folder with the shards of :func:`write_flux`. BenchmarkFailed if there is no room for them."""
    nbytes = nbytes_of_shapes(flux_shapes(divide_by))
    with tempfile.TemporaryDirectory(prefix="nbcache-flux-") as folder:
        check_disk(Path(folder), nbytes)
        run_fresh(partial(write_flux, folder, divide_by))  # a context on the GPU that is gone afterwards
        yield folder


def write_lora_sized(path: str, nbytes: int) -> None:
    """Write a LoRA file of about ``nbytes``. See :func:`lora_shapes` and :func:`write_flux`."""
    write_random(Path(path), lora_shapes(nbytes))


def write_random(path: Path, shapes: Shapes, spread: float = 1.0) -> None:
    """A safetensors file of random bfloat16 numbers, on the disk when this returns, so that its pages can be dropped."""
    import torch

    largest = max(map(math.prod, shapes.values()))
    buffer = bytearray(ELEMENT_BYTES * largest)
    numbers = torch.frombuffer(buffer, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with path.open("wb") as file, memoryview(buffer) as view:
        file.write(_header(shapes))
        for shape in shapes.values():
            count = math.prod(shape)
            numbers[:count].copy_(torch.randn(count, dtype=torch.bfloat16, device=device).mul_(spread))
            file.write(view[: ELEMENT_BYTES * count])
        file.flush()
        os.fsync(file.fileno())


def _header(shapes: Shapes) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + ELEMENT_BYTES * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
