"""LoRAs beside what the stock loader makes of the same file: what a pipeline holds, and what it computes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import FluxControlPipeline
from safetensors.torch import load_file

from tests.support.loras import Writer, flux, sd3, sd15, sdxl


def stock(pipe: Any, path: str, adapter: str = "default", **options: Any) -> Any:
    """The pipeline, after ``load_lora_weights`` of the file, of copies: odd addresses make for other arithmetic."""
    config = safetensors_metadata(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if config:
            pipe.load_lora_weights(path, adapter_name=adapter, **options)
        else:
            tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
            pipe.load_lora_weights(tensors, adapter_name=adapter, **options)
    return pipe


def safetensors_metadata(path: str) -> dict[str, str] | None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


def identical(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """To the bit: of one pipeline, whose weights stayed where they are."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Of two pipelines: on a CPU the addresses of weights decide how sums are taken, so the last bit may differ."""
    pairs = zip(one, other, strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def held(pipe: Any) -> dict[str, Any]:
    """All that a pipeline's models compute with: parameters by name, and what peft multiplies by."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, Any] = {}
    for component in ("transformer", "unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        if model is not None:
            found |= {f"{component}.{name}": parameter.detach() for name, parameter in model.named_parameters()}
            layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
            found |= {f"{component}.{name}": (dict(m.scaling), m.active_adapters, m.merged_adapters) for name, m in layers}
    return found


def held_alike(one: Any, other: Any) -> bool:
    """To the bit."""
    mine, theirs = held(one), held(other)
    return mine.keys() == theirs.keys() and all(
        torch.equal(each, theirs[name]) if isinstance(each, torch.Tensor) else each == theirs[name]
        for name, each in mine.items()
    )


LAYOUTS = {
    "flux": (flux, Writer.diffusers),
    "flux with alphas": (flux, lambda write, name, pipe: write.diffusers(name, pipe, alpha=3.0)),
    "flux of several ranks": (flux, lambda write, name, pipe: write.diffusers(name, pipe, to_q=2, proj=8)),
    "flux, kohya": (flux, Writer.kohya_flux),
    "flux, XLabs": (flux, Writer.xlabs_flux),
    "flux, control": (lambda: flux(kind=FluxControlPipeline), Writer.control),
    "sd3": (sd3, Writer.diffusers),
    "sd1.5": (sd15, Writer.diffusers),
    "sd1.5, kohya": (sd15, Writer.kohya_unet),
    "sdxl": (sdxl, Writer.diffusers),
    "sdxl, kohya": (sdxl, Writer.kohya_unet),
}
