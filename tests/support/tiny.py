"""Models of a few kilobytes, of the shapes that matter, saved as their libraries save them; and what makes two of them equal.

Imported by processes that a test starts, for it imports diffusers, transformers and peft, which takes its time.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Digest = dict[str, Any]


def clip() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2, "projection_dim": 32}
    return CLIPTextModel(CLIPTextConfig(vocab_size=100, max_position_embeddings=77, bos_token_id=0, eos_token_id=2, **sizes))


def vae(channels: int) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=32,
        shift_factor=0.1,
    )


def make_flux(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    t5 = T5EncoderModel(T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4))
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(1),
        text_encoder=clip(),
        tokenizer=None,
        text_encoder_2=t5,
        tokenizer_2=None,
        transformer=transformer,
    ).save_pretrained(folder)


def make_sd(folder: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=clip(),
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    BertModel(BertConfig(vocab_size=100, **sizes)).save_pretrained(folder)


def make_llama(folder: Path) -> None:
    """In two shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).save_pretrained(folder, max_shard_size="60KB")


def make_gpt2(folder: Path) -> None:
    """Its output layer is tied to its embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=4)).save_pretrained(folder)


def make_adapter(folder: Path) -> None:
    """LoRA for the Llama next to it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder.parent / "llama"), config).save_pretrained(folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "flux": make_flux,
    "sd": make_sd,
    "bert": make_bert,
    "llama": make_llama,
    "gpt2": make_gpt2,
    "adapter": make_adapter,
}


def make_all(root: Path) -> None:
    """Each model in a folder of its name."""
    for seed, (name, make) in enumerate(MAKERS.items()):
        torch.manual_seed(seed)
        make(root / name)


@dataclass(frozen=True)
class Loader:
    """Loads models by their libraries' own functions, and says what came of it.

    ``own_memory`` moves the weights to memory that torch allocated before anything is computed: a stock loader leaves them
    where the file's header happens to end, and there some CPU kernels compute differently, in the last bit.
    """

    root: Path
    minilm: Path
    own_memory: bool = False

    def all(self) -> dict[str, Digest]:
        torch.manual_seed(0)
        return {
            "flux": self.flux(),
            "flux in bfloat16": self.flux(torch_dtype=torch.bfloat16),
            "flux by way of load_state_dict": self.flux(low_cpu_mem_usage=False),
            "sd": self.sd(),
            "bert": self.encoder(self.root / "bert"),
            "llama": self.causal("llama"),
            "llama in bfloat16": self.causal("llama", dtype=torch.bfloat16),
            "gpt2": self.causal("gpt2"),
            "adapter": self.adapter(),
            "minilm": self.encoder(self.minilm),
        }

    def flux(self, **options: Any) -> Digest:
        from diffusers import FluxPipeline

        pipe = FluxPipeline.from_pretrained(self.root / "flux", tokenizer=None, tokenizer_2=None, **options)
        inputs = {"prompt_embeds": embeds(8, 32), "pooled_prompt_embeds": embeds(32)}
        return self.pipeline(pipe, {name: tensor.to(pipe.transformer.dtype) for name, tensor in inputs.items()})

    def sd(self) -> Digest:
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(self.root / "sd", tokenizer=None)
        return self.pipeline(pipe, {"prompt_embeds": embeds(77, 32), "negative_prompt_embeds": -embeds(77, 32)})

    def pipeline(self, pipe: Any, inputs: dict[str, torch.Tensor]) -> Digest:
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        self.settle(parts)
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        images = pipe(**inputs, height=32, width=32, num_inference_steps=2, generator=noise, output_type="np").images
        with torch.no_grad():
            encoded = [parts[name](torch.arange(8).view(1, 8))[0] for name in parts if name.startswith("text_encoder")]
        return digest(parts, [images, *(tensor.float().numpy() for tensor in encoded)])

    def encoder(self, folder: Path) -> Digest:
        from transformers import AutoModel

        return self.model(AutoModel.from_pretrained(folder))

    def causal(self, name: str, **options: Any) -> Digest:
        from transformers import AutoModelForCausalLM

        return self.model(AutoModelForCausalLM.from_pretrained(self.root / name, **options))

    def adapter(self) -> Digest:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(self.root / "llama")
        return self.model(PeftModel.from_pretrained(base, self.root / "adapter"))

    def model(self, model: nn.Module) -> Digest:
        self.settle({"": model})
        with torch.no_grad():
            output = model(torch.arange(12).view(1, 12))
        return digest({"": model}, [(output.logits if "logits" in output else output.last_hidden_state).float().numpy()])

    def settle(self, parts: dict[str, nn.Module]) -> None:
        if self.own_memory:
            for part in parts.values():
                for tensor in part.parameters():
                    tensor.data = tensor.data.clone()


def embeds(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(1, *shape)


def digest(parts: dict[str, nn.Module], outputs: list[np.ndarray]) -> Digest:
    """All that tells one loaded model from another: parameters, buffers, what is tied, modes, and what it computes."""
    found: dict[str, list[Any]] = {}
    tied = defaultdict(list)
    for part, module in parts.items():
        for kind, tensors in (
            ("parameter", module.named_parameters(remove_duplicate=False)),
            ("buffer", module.named_buffers(remove_duplicate=False)),
        ):
            for name, tensor in tensors:
                found[f"{part}:{name}"] = [kind, *describe(tensor)]
                tied[tensor.data_ptr()].append(f"{part}:{name}")
    return {
        "tensors": found,
        "tied": sorted(names for names in tied.values() if len(names) > 1),
        "training": {part: module.training for part, module in parts.items()},
        "outputs": [hashlib.sha256(np.ascontiguousarray(output).tobytes()).hexdigest() for output in outputs],
    }


def describe(tensor: torch.Tensor) -> list[Any]:
    """What is to be the same in a stock and in a served tensor."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return [
        str(tensor.dtype),
        list(tensor.shape),
        list(tensor.stride()),
        str(tensor.device),
        tensor.requires_grad,
        type(tensor).__name__,
        hashlib.sha256(data).hexdigest(),
    ]
