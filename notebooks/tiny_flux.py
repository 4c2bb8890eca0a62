"""A FLUX of a few hundred kilobytes, for the notebook and the tests: the real classes, random weights, a toy vocabulary."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch


def write_tiny_flux(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write a pipeline folder as ``FluxPipeline.save_pretrained`` does, the same bytes for the same seed."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        transformer=transformer,
        text_encoder=clip_text_model(),
        text_encoder_2=t5_encoder(),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=t5_tokenizer(folder / "tokenizer_2"),
    )
    pipeline.to(dtype)
    pipeline.save_pretrained(folder)
    logging.enable_progress_bar()
    return folder


def clip_text_model(**changes: Any) -> torch.nn.Module:  # noqa: ANN401
    """A tiny CLIP text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**clip_config(**changes)))


def clip_config(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """The settings of a tiny CLIP text encoder."""
    return {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    } | changes


def t5_encoder() -> torch.nn.Module:
    """A tiny T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=128,
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )


def clip_tokenizer(folder: Path) -> Any:  # noqa: ANN401
    """A CLIP tokenizer that knows single letters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def t5_tokenizer(folder: Path) -> Any:  # noqa: ANN401
    """A T5 tokenizer that knows single letters."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import Unigram
    from transformers import T5TokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -9.0),
        ("▁", -2.0),
        *((letter, -3.0) for letter in string.ascii_lowercase),
    ]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=64)
