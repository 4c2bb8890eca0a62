"""What LoRAs go into: a pipeline of diffusers, or a model, taken apart into what the other rooms ask of it.

Owns the question what a user's object is. Must not change it. It exists so that nobody else asks an object for attributes to
learn what kind it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nbcache.errors import InvalidOption
from nbcache.models.lora_convert import Family
from nbcache.models.packages import LEAST_FOR_LORAS, require


@dataclass(frozen=True)
class Host:
    """What LoRAs go into. ``components`` are its models by name, unwrapped of compilers; ``pipe`` is what the user holds."""

    pipe: Any
    components: Mapping[str, nn.Module]
    family: Family
    compiled: frozenset[str] = frozenset()
    """The components that torch has compiled as a whole."""

    @property
    def root(self) -> nn.Module:
        """The model that adapters are kept with: pipelines that share it share them."""
        for name in ("transformer", "unet"):
            if name in self.components:
                return self.components[name]
        return next(iter(self.components.values()))

    @property
    def device(self) -> torch.device:
        """Where its first weight is."""
        return next(self.root.parameters()).device


def host_of(pipe: object) -> Host:
    """What a pipeline or model has for LoRAs to go into. InvalidOption for anything else; PackageMissing without peft."""
    require("peft", "a LoRA")
    if isinstance(pipe, nn.Module):
        model, is_compiled = _unwrapped(pipe)
        if next(model.parameters(), None) is None:
            raise InvalidOption(f"a {type(model).__name__} takes no LoRAs: it has no parameters")
        base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        return Host(model, {"model": base}, Family(("model",)), frozenset({"model"} if is_compiled else ()))
    names = tuple(getattr(pipe, "_lora_loadable_modules", ()))
    if not names or not hasattr(pipe, "load_lora_weights") or isinstance(pipe, type):
        what = f"the class {pipe.__name__}" if isinstance(pipe, type) else f"a {type(pipe).__name__}"
        raise InvalidOption(f"{what} takes no LoRAs: give a pipeline of diffusers that does, or a model")
    require("diffusers", "a pipeline's LoRA", LEAST_FOR_LORAS)
    found = {name: getattr(pipe, name, None) for name in names}
    unwrapped = {name: _unwrapped(model) for name, model in found.items() if isinstance(model, nn.Module)}
    components = {name: model for name, (model, _) in unwrapped.items()}
    if not components:
        raise InvalidOption(f"this {type(pipe).__name__} has none of the models that take LoRAs: {', '.join(names)}")
    compiled = frozenset(name for name, (_, was) in unwrapped.items() if was)
    nested = tuple(name for name, model in components.items() if "text_encoder" in name and hasattr(model, "text_model"))
    family = Family(names, type(pipe), _unet_config(pipe, components), nested)
    return Host(pipe, components, family, compiled)


def _unwrapped(model: nn.Module) -> tuple[nn.Module, bool]:
    """A model, and whether it is compiled: wrapped by ``torch.compile``, or by its own ``compile``."""
    inner = model._modules.get("_orig_mod")
    return (inner, True) if inner is not None else (model, model._compiled_call_impl is not None)


def _unet_config(pipe: object, components: Mapping[str, nn.Module]) -> Any:  # noqa: ANN401 - diffusers' FrozenDict
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    return components["unet"].config if isinstance(pipe, StableDiffusionXLLoraLoaderMixin) and "unet" in components else None
