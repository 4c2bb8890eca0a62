"""A FLUX pipeline too small to paint anything, with random weights, and LoRA files for it, for the notebooks."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "IProgress not found")  # tqdm would like widgets; there is no progress to show
    from transformers.utils import logging

    logging.set_verbosity_error()  # of image processors, which nobody uses here
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
diffusers.utils.logging.set_verbosity_error()  # of text encoders, which this pipeline does without

FOLDER = Path(tempfile.mkdtemp(prefix="nbcache-loras-"))


def make_pipeline() -> FluxPipeline:
    """The pipeline, the same each time: of it only the transformer, which is what most LoRAs go into."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts)


def write_lora(name: str, rank: int) -> Path:
    """A LoRA file of random numbers in the layout of diffusers, over every linear layer of the blocks."""
    torch.manual_seed(rank)
    state = {}
    for path, layer in make_pipeline().transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and "transformer_blocks." in path:
            state[f"transformer.{path}.lora_A.weight"] = torch.randn(rank, layer.in_features) / 4
            state[f"transformer.{path}.lora_B.weight"] = torch.randn(layer.out_features, rank) / 4
    file = FOLDER / f"{name}.safetensors"
    save_file(state, file)
    return file


def paint(pipe: FluxPipeline) -> torch.Tensor:
    """What one step of the transformer makes of a fixed input, shape (4, 4)."""
    generator = torch.Generator().manual_seed(1)
    size = {"generator": generator, "dtype": torch.float32}
    with torch.inference_mode():
        return pipe.transformer(
            hidden_states=torch.randn(1, 4, 4, **size),
            encoder_hidden_states=torch.randn(1, 3, 32, **size),
            pooled_projections=torch.randn(1, 32, **size),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample[0]
