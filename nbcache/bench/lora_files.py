"""What LoRAs are measured with: a pipeline of FLUX.1's shape and random weights, and LoRA files of random numbers.

Of the pipeline only the transformer, which is what LoRAs go into. The files have diffusers' layout and kohya's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nbcache.bench import kernel

if TYPE_CHECKING:
    import torch

KOHYA_RANK = 16


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


class Pair(msgspec.Struct, frozen=True):
    """Two LoRA files of one layout and rank."""

    name: str
    one: str
    other: str


def write_pair(pipe: Any, shape: Shape, folder: Path, name: str, nbytes: int | None) -> Pair:  # noqa: ANN401
    """Two files of diffusers' layout, of the rank whose size is nearest ``nbytes``; of kohya's if it is None."""
    if nbytes is None:
        shapes = _kohya_shapes(shape, KOHYA_RANK)
    else:
        rank = max(1, round(nbytes / _bytes_of_rank(pipe)))
        name = name or f"rank {rank}"
        shapes = _diffusers_shapes(pipe, rank)
    stem = name.replace(" ", "-")
    return Pair(name, *(_write_lora(str(folder / f"{stem}-{which}.safetensors"), shapes) for which in "ab"))


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
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())  # or it is written while others are measured
    return path
