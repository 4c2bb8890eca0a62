"""Tiny pipelines of diffusers, with random weights, and LoRA files for them in the layouts that people publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

WIDTH = 32

State = dict[str, torch.Tensor]


def text_encoder(kind: type = CLIPTextModel) -> Any:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    return kind(CLIPTextConfig(bos_token_id=0, eos_token_id=2, pad_token_id=1, vocab_size=100, projection_dim=WIDTH, **sizes))


def flux(seed: int = 0, blocks: int = 1, kind: type = FluxPipeline, channels: int = 4, heads: int = 2) -> Any:
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=channels, num_layers=blocks, num_single_layers=blocks, attention_head_dim=16,
        num_attention_heads=heads, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=text_encoder(), text_encoder_2=None,
        tokenizer=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


def sd3(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=WIDTH, joint_attention_dim=WIDTH, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None,
        text_encoder=text_encoder(CLIPTextModelWithProjection), tokenizer=None,
        text_encoder_2=text_encoder(CLIPTextModelWithProjection), tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(steps_offset=1, clip_sample=False)


def _unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=2, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **settings,
    )  # fmt: skip


def sd15(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return StableDiffusionPipeline(
        unet=_unet(cross_attention_dim=WIDTH), scheduler=scheduler(), vae=None, text_encoder=text_encoder(), tokenizer=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    unet = _unet(
        cross_attention_dim=64, attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        unet=unet, scheduler=scheduler(), vae=None, text_encoder=text_encoder(), tokenizer=None,
        text_encoder_2=text_encoder(CLIPTextModelWithProjection), tokenizer_2=None,
    )  # fmt: skip


def outputs(pipe: Any) -> list[torch.Tensor]:
    """What the models of a pipeline make of fixed inputs: the denoiser, then each text encoder that it has."""
    generator = torch.Generator().manual_seed(7)
    device = next((getattr(pipe, "unet", None) or pipe.transformer).parameters()).device

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    with torch.no_grad():
        if hasattr(pipe, "unet"):
            found = [_unet_output(pipe.unet, random)]
        elif isinstance(pipe, StableDiffusion3Pipeline):
            inputs = {"encoder_hidden_states": random(1, 5, WIDTH), "pooled_projections": random(1, 64)}
            found = [pipe.transformer(random(1, 4, 8, 8), timestep=random(1).abs(), **inputs).sample]
        else:
            found = [flux_output(pipe.transformer)]
        ids = torch.arange(6, device=device)[None]
        texts = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
        return found + [encoder(ids).last_hidden_state for encoder in texts if encoder is not None]


def _unet_output(unet: Any, random: Any) -> torch.Tensor:
    added = {"text_embeds": random(1, 32), "time_ids": random(1, 6)} if unet.config.addition_embed_type else None
    hidden = random(1, 5, unet.config.cross_attention_dim)
    return unet(random(1, 4, 8, 8), 3, encoder_hidden_states=hidden, added_cond_kwargs=added).sample


def flux_output(transformer: Any, like: torch.Tensor | None = None) -> torch.Tensor:
    """Of inputs where, and of which dtype, the weights are; or as ``like`` is, where hooks have the weights."""
    generator = torch.Generator().manual_seed(7)
    weight = next(transformer.parameters()) if like is None else like
    inner = getattr(transformer, "_orig_mod", transformer)
    shapes = {
        "hidden_states": (1, 6, inner.x_embedder.in_features),
        "encoder_hidden_states": (1, 5, inner.context_embedder.in_features),
        "pooled_projections": (1, inner.config.pooled_projection_dim),
    }
    made = {name: torch.randn(shape, generator=generator).to(weight) for name, shape in shapes.items()}
    ids = {"img_ids": torch.zeros(6, 3).to(weight), "txt_ids": torch.zeros(5, 3).to(weight)}
    with torch.no_grad():
        return transformer(**made, **ids, timestep=torch.tensor([0.5]).to(weight)).sample


class Writer:
    """Writes LoRA files of random numbers."""

    def __init__(self, folder: Path, seed: int = 1) -> None:
        self.folder = folder
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator) * 0.3

    def save(self, name: str, state: State, metadata: dict[str, str] | None = None) -> str:
        path = self.folder / f"{name}.safetensors"
        save_file(state, path, metadata=metadata)
        return str(path)

    def pair(self, layer: nn.Module, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B for a layer."""
        weight: Any = layer.weight
        if weight.ndim == 4:
            return self.random(rank, *weight.shape[1:]), self.random(weight.shape[0], rank, 1, 1)
        return self.random(rank, weight.shape[1]), self.random(weight.shape[0], rank)

    def diffusers(self, name: str, pipe: Any, rank: int = 4, only: str = "", alpha: float | None = None, **ranks: int) -> str:
        """As ``save_lora_weights`` writes it, over every linear and convolution of the blocks and every attention of the texts.

        ``ranks`` gives modules whose name has the word another rank; ``alpha`` adds diffusers' own metadata.
        """
        state: State = {}
        for component in ("transformer", "unet", "text_encoder", "text_encoder_2"):
            for path, layer in layers_of(getattr(pipe, component, None)):
                if only in f"{component}.{path}":
                    mine = next((r for word, r in ranks.items() if word in path), rank)
                    a, b = self.pair(layer, mine)
                    state |= {f"{component}.{path}.lora_A.weight": a, f"{component}.{path}.lora_B.weight": b}
        if alpha is None:
            return self.save(name, state)
        config: dict[str, Any] = {}
        for component in {key.partition(".")[0] for key in state}:
            targets = [
                k.removeprefix(f"{component}.").removesuffix(".lora_A.weight") for k in state if k.endswith("lora_A.weight")
            ]
            settings = {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": targets}
            config |= {f"{component}.{setting}": value for setting, value in settings.items()}
        return self.save(name, state, {"lora_adapter_metadata": json.dumps(config)})

    def kohya_flux(self, name: str, pipe: Any, rank: int = 4, alpha: float = 2.0) -> str:
        """As kohya's scripts write FLUX: q, k and v in one matrix, the names of BFL, an alpha a module."""
        state: State = {}

        def add(module: str, outputs: int, inputs: int) -> None:
            state[f"lora_unet_{module}.lora_down.weight"] = self.random(rank, inputs)
            state[f"lora_unet_{module}.lora_up.weight"] = self.random(outputs, rank)
            state[f"lora_unet_{module}.alpha"] = torch.tensor(alpha)

        wide = pipe.transformer.inner_dim
        for number in range(len(pipe.transformer.transformer_blocks)):
            for part in ("img", "txt"):
                add(f"double_blocks_{number}_{part}_attn_qkv", 3 * wide, wide)
                add(f"double_blocks_{number}_{part}_attn_proj", wide, wide)
                add(f"double_blocks_{number}_{part}_mlp_0", 4 * wide, wide)
                add(f"double_blocks_{number}_{part}_mlp_2", wide, 4 * wide)
        for number in range(len(pipe.transformer.single_transformer_blocks)):
            if wide == 3072:  # the stock converter knows the sizes of FLUX.1 alone
                add(f"single_blocks_{number}_linear1", 7 * wide, wide)
            add(f"single_blocks_{number}_linear2", wide, 5 * wide)
        for path, layer in layers_of(pipe.text_encoder):
            a, b = self.pair(layer, rank)
            module = f"lora_te1_text_model_{path.removeprefix('text_model.').replace('.', '_')}"
            state |= {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b, f"{module}.alpha": torch.tensor(alpha)}
        return self.save(name, state)

    def xlabs_flux(self, name: str, pipe: Any, rank: int = 4) -> str:
        """As XLabs writes FLUX: attention processors."""
        state: State = {}
        wide = pipe.transformer.inner_dim
        for number in range(len(pipe.transformer.transformer_blocks)):
            for part, outputs in (("qkv_lora1", 3), ("qkv_lora2", 3), ("proj_lora1", 1), ("proj_lora2", 1)):
                module = f"double_blocks.{number}.processor.{part}"
                state[f"{module}.down.weight"] = self.random(rank, wide)
                state[f"{module}.up.weight"] = self.random(outputs * wide, rank)
        for number in range(len(pipe.transformer.single_transformer_blocks)):
            module = f"single_blocks.{number}.processor.qkv_lora"
            state[f"{module}.down.weight"] = self.random(rank, wide)
            state[f"{module}.up.weight"] = self.random(3 * wide, rank)
        return self.save(name, state)

    def kohya_unet(self, name: str, pipe: Any, rank: int = 4, alpha: float = 2.0) -> str:
        """As kohya's scripts write Stable Diffusion: names with underscores, alphas that differ."""
        state: State = {}
        encoders = {"unet": "unet", "text_encoder": "te1" if hasattr(pipe, "text_encoder_2") else "te", "text_encoder_2": "te2"}
        for component, short in encoders.items():
            for number, (path, layer) in enumerate(layers_of(getattr(pipe, component, None))):
                if component == "unet" and "attentions" not in path:
                    continue
                a, b = self.pair(layer, rank)
                full = path if component == "unet" else f"text_model.{path.removeprefix('text_model.')}"
                module = f"lora_{short}_{full.replace('.', '_')}"
                state[f"{module}.lora_down.weight"], state[f"{module}.lora_up.weight"] = a, b
                state[f"{module}.alpha"] = torch.tensor(alpha if number % 3 else alpha / 2)
        return self.save(name, state)

    def bfl_control(self, name: str, rank: int = 2) -> str:
        """As BFL writes its control LoRAs, in the one size that the stock converter knows: biases, norms, a wide input."""
        state: State = {}

        def add(module: str, outputs: int, inputs: int) -> None:
            state[f"{module}.lora_A.weight"] = self.random(rank, inputs)
            state[f"{module}.lora_B.weight"] = self.random(outputs, rank)
            state[f"{module}.lora_B.bias"] = self.random(outputs)

        wide = 3072
        for part, inputs in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
            add(f"{part}.in_layer", wide, inputs)
            add(f"{part}.out_layer", wide, wide)
        add("txt_in", wide, 4096)
        add("img_in", wide, 128)
        add("final_layer.linear", 64, wide)
        add("final_layer.adaLN_modulation.1", 2 * wide, wide)
        for block in (f"double_blocks.{number}.{part}" for number in range(19) for part in ("img", "txt")):
            add(f"{block}_mod.lin", 6 * wide, wide)
            add(f"{block}_attn.qkv", 3 * wide, wide)
            add(f"{block}_attn.proj", wide, wide)
            add(f"{block}_mlp.0", 4 * wide, wide)
            add(f"{block}_mlp.2", wide, 4 * wide)
            state |= {f"{block}_attn.norm.{norm}.scale": self.random(128) for norm in ("query_norm", "key_norm")}
        for block in (f"single_blocks.{number}" for number in range(38)):
            add(f"{block}.modulation.lin", 3 * wide, wide)
            add(f"{block}.linear1", 7 * wide, wide)
            add(f"{block}.linear2", wide, 5 * wide)
            state |= {f"{block}.norm.{norm}.scale": self.random(128) for norm in ("query_norm", "key_norm")}
        return self.save(name, state)

    def control(self, name: str, pipe: Any, rank: int = 4) -> str:
        """What a control LoRA is after conversion, for a small FLUX: biases, norms, an input twice as wide."""
        state: State = {}
        for path, layer in [*layers_of(pipe.transformer), ("x_embedder", pipe.transformer.x_embedder)]:
            outputs, inputs = layer.weight.shape
            module = f"transformer.{path}"
            state[f"{module}.lora_A.weight"] = self.random(rank, 2 * inputs if path == "x_embedder" else inputs)
            state[f"{module}.lora_B.weight"] = self.random(outputs, rank)
            state[f"{module}.lora_B.bias"] = self.random(outputs)
        norms = [path for path, _ in pipe.transformer.named_parameters() if ".norm_q." in path or ".norm_k." in path]
        return self.save(name, state | {f"transformer.{path}": self.random(16) for path in norms})


def layers_of(model: Any) -> list[tuple[str, nn.Module]]:
    """The layers of a model that LoRAs are made for, by path: unwrapped, if LoRAs are in it already."""
    if model is None:
        return []
    wanted = (nn.Linear,) if hasattr(model, "get_input_embeddings") else (nn.Linear, nn.Conv2d)
    blocks = ("blocks", "self_attn", "mid_block")
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, wanted)
        and any(block in path for block in blocks)
        and "lora" not in path
        and "base_layer" not in path
    ]
