"""Fusing that can be undone to the bit: the base weights are kept, not subtracted from.

Owns ``merge`` and ``unmerge`` of the layers that carry an adapter of ours. Must not know adapters or pipelines. It exists
because peft adds into the base and subtracts again, which in floating point is not the base; and because under copy-on-write
the base is the cache's, which costs nothing to keep: only the sum is private memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import nn

from nbcache.models.lora_offload import has_copies_of_groups

_models: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
"""The model that each layer is part of. Beside the layers, which are copied and pickled."""


class KeepsBase:
    """What a layer that keeps its base does otherwise than peft's. ``_base`` has the base's parameters as they were."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft's, into copies of the base's parameters; those that were there are kept.

        Where hooks hold those, these are written, and the copies kept.
        """
        layer: Any = self
        coming = [name for name in adapter_names or layer.active_adapters if name in layer.lora_A]
        if coming and not layer.merged_adapters:
            kept, in_place = _parameters(layer), _are_held(layer)
            for name, parameter in layer.get_base_layer()._parameters.items():
                if name in kept:
                    copy = kept[name].clone()
                    if in_place:
                        kept[name] = copy
                    else:
                        parameter.data = copy
            layer.__dict__["_base"] = kept
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]

    def unmerge(self) -> None:
        """Back to the base that was kept, whatever was fused into it since."""
        layer: Any = self
        kept: dict[str, torch.Tensor] | None = layer.__dict__.pop("_base", None)
        if kept is None or not layer.merged_adapters:
            super().unmerge()  # type: ignore[misc]
            return
        in_place = _are_held(layer)
        for name, parameter in layer.get_base_layer()._parameters.items():
            if name in kept and in_place:
                parameter.data.copy_(kept[name])
            elif name in kept:
                parameter.data = kept[name].to(parameter.device, parameter.dtype)
        layer.merged_adapters.clear()


class KeptLinear(KeepsBase, Linear):  # type: ignore[misc]
    """peft's layer of a linear module, its base kept."""


class KeptConv2d(KeepsBase, Conv2d):  # type: ignore[misc]
    """peft's layer of a convolution, its base kept."""


_KEPT: dict[type, type] = {Linear: KeptLinear, Conv2d: KeptConv2d}


def keep_bases(model: nn.Module, layers: Iterable[Any]) -> None:
    """From now on fusing these layers of a model makes new weights, and unfusing returns to what was there before.

    For layers whose base has plain floating-point weights; quantized ones fuse as peft does.
    """
    for layer in layers:
        weight = getattr(layer.get_base_layer(), "weight", None)
        if type(layer) in _KEPT and type(weight) is nn.Parameter and weight.is_floating_point():
            layer.__class__ = _KEPT[type(layer)]
            _models[layer] = weakref.ref(model)


def _are_held(layer: Any) -> bool:  # noqa: ANN401 - peft's layer
    """Whether hooks hold the base's parameters, so that others in their places would not be seen."""
    model = _models[layer]() if layer in _models else None
    return model is not None and has_copies_of_groups(model)


def _parameters(layer: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401 - peft's layer
    return {name: p.data for name, p in layer.get_base_layer()._parameters.items() if p is not None}
