"""Single-file checkpoints made for tests, in the layout of their authors: a tiny Stable Diffusion without its UNet."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.parity.harness import library_noise
from tests.support.models import SUBJECTS

RENAMED = (
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d)\.upsamplers\.0", r"up.\1.upsample"),
)
"""From diffusers' names in a VAE to those of the latent diffusion papers' code."""


def authors_layout(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    name = re.sub(r"decoder\.up\.(\d)", lambda match: f"decoder.up.{1 - int(match[1])}", name)  # there they count downwards
    if ".attn_1." in name and name.endswith("weight") and tensor.dim() == 2:
        tensor = tensor[:, :, None, None]  # and their projections are convolutions
    return f"first_stage_model.{name}", tensor.contiguous()


def authors_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The VAE and the text encoder of a pipeline's folder, in float16, by the names that the authors of the model gave them."""
    from diffusers import StableDiffusionPipeline

    with library_noise():
        pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    vae = dict(authors_layout(name, tensor) for name, tensor in pipe.vae.state_dict().items())
    prefix = "" if any(name.startswith("text_model.") for name in pipe.text_encoder.state_dict()) else "text_model."
    clip = {f"cond_stage_model.transformer.{prefix}{name}": t for name, t in pipe.text_encoder.state_dict().items()}
    return {name: tensor.half() for name, tensor in (vae | clip).items()}


def write_single_file(root: Path) -> None:
    """The folder of a pipeline, ``sd``, and a file that holds its VAE and text encoder, ``model.safetensors``."""
    with library_noise():
        SUBJECTS["sd"].write(root / "sd")
    save_file(authors_tensors(root / "sd"), root / "model.safetensors")
