"""Fusing that can be undone to the bit: the base weights are kept, not subtracted from.

Owns what stands in for ``merge`` and ``unmerge`` of the layers that carry an adapter of ours. Must not know adapters or
pipelines. It exists because peft adds into the base and subtracts again, which in floating point is not the base; and because
under copy-on-write the base is the cache's, which costs nothing to keep: only the sum is private memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import nn

KEPT = "_nbcache_base"
"""Attribute of a layer that something is fused into: its base's parameters as they were, by name."""


def keep_bases(layers: Iterable[Any]) -> None:
    """From now on fusing these layers makes new weights, and unfusing returns to the very tensors that were there before.

    For layers whose base has plain floating-point weights; quantized ones fuse as peft does.
    """
    for layer in layers:
        weight = getattr(layer.get_base_layer(), "weight", None)
        if type(weight) is nn.Parameter and weight.is_floating_point():
            layer.__dict__.update(merge=MethodType(merge, layer), unmerge=MethodType(unmerge, layer))


def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ANN401 - peft's layer
    """As the layer's own ``merge``, into copies of the base's parameters; those that were there are kept."""
    kept = self.__dict__.setdefault(KEPT, {})
    if not self.merged_adapters:
        for name, parameter in self.get_base_layer()._parameters.items():
            if parameter is not None:
                kept[name] = parameter.data
                parameter.data = parameter.data.clone()
    type(self).merge(self, safe_merge=safe_merge, adapter_names=adapter_names)


def unmerge(self: Any) -> None:  # noqa: ANN401 - peft's layer
    """Back to the base that was kept, whatever was fused into it since."""
    kept = self.__dict__.pop(KEPT, None)
    if not kept:
        type(self).unmerge(self)
        return
    parameters = self.get_base_layer()._parameters
    for name, tensor in kept.items():
        parameters[name].data = tensor.to(parameters[name].device)
    self.merged_adapters.clear()
