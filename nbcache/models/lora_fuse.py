"""Fusing that can be undone to the bit: the base weights are kept, not subtracted from.

Owns ``merge`` and ``unmerge`` of the layers that carry an adapter of ours. Must not know adapters or pipelines. It exists
because peft adds into the base and subtracts again, which in floating point is not the base; and because under copy-on-write
the base is the cache's, which costs nothing to keep: only the sum is private memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import nn


class KeepsBase:
    """What a layer that keeps its base does otherwise than peft's. ``_base`` has the base's parameters as they were."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft's, into copies of the base's parameters; those that were there are kept."""
        layer: Any = self
        coming = [name for name in adapter_names or layer.active_adapters if name in layer.lora_A]
        if coming and not layer.merged_adapters:
            layer.__dict__["_base"] = kept = _parameters(layer)
            for name, parameter in layer.get_base_layer()._parameters.items():
                if name in kept:
                    parameter.data = kept[name].clone()
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]

    def unmerge(self) -> None:
        """Back to the base that was kept, whatever was fused into it since."""
        layer: Any = self
        kept: dict[str, torch.Tensor] | None = layer.__dict__.pop("_base", None)
        if kept is None or not layer.merged_adapters:
            super().unmerge()  # type: ignore[misc]
            return
        for name, parameter in layer.get_base_layer()._parameters.items():
            if name in kept:
                parameter.data = kept[name].to(parameter.device, parameter.dtype)
        layer.merged_adapters.clear()


class KeptLinear(KeepsBase, Linear):  # type: ignore[misc]
    """peft's layer of a linear module, its base kept."""


class KeptConv2d(KeepsBase, Conv2d):  # type: ignore[misc]
    """peft's layer of a convolution, its base kept."""


_KEPT: dict[type, type] = {Linear: KeptLinear, Conv2d: KeptConv2d}


def keep_bases(layers: Iterable[Any]) -> None:
    """From now on fusing these layers makes new weights, and unfusing returns to the very tensors that were there before.

    For layers whose base has plain floating-point weights; quantized ones fuse as peft does.
    """
    for layer in layers:
        weight = getattr(layer.get_base_layer(), "weight", None)
        if type(layer) in _KEPT and type(weight) is nn.Parameter and weight.is_floating_point():
            layer.__class__ = _KEPT[type(layer)]


def _parameters(layer: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401 - peft's layer
    return {name: p.data for name, p in layer.get_base_layer()._parameters.items() if p is not None}
