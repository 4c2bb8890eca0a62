"""Models whose weights hooks keep elsewhere: sequential and group offloading, while a LoRA is written.

Owns what those hooks must be told when parameters change under them: both keep copies of their own, from which a GPU is given
the weights. Must not know what is written. It exists because stock loaders take such hooks off and put them on again, and what
writes without them must do so too. Offloading of whole models needs nothing: its weights are where they seem to be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from nbcache.errors import LoraError
from nbcache.models.lora_host import Host

GROUPS = "group_offloading"
"""What diffusers calls the hook."""


@contextlib.contextmanager
def at_hand(host: Host) -> Iterator[None]:
    """The weights where they seem to be, and whatever was written to them known to the hooks afterwards.

    LoraError for a model alone whose weights are on no device, as accelerate's hooks keep them.
    """
    sequential = _is_sequential(host)
    if sequential and host.family.loader is None:
        raise LoraError(
            f"the weights of this {type(host.root).__name__} are offloaded by accelerate's hooks, under which LoRAs cannot be "
            "written; load it to one device, or remove the hooks first (accelerate.hooks.remove_hook_from_submodules)"
        )
    if sequential:
        host.pipe._optionally_disable_offloading(host.pipe)
    try:
        yield
    finally:
        if sequential:
            device = getattr(host.pipe, "_offload_device", None)
            host.pipe.enable_sequential_cpu_offload(device=device and device.type)  # of the number that the pipeline remembers
        for model in host.components.values():
            if has_copies_of_groups(model):
                _group_anew(model)


def _is_sequential(host: Host) -> bool:
    """Whether there are weights that only hooks of accelerate's have. Where there are, the whole model has one too."""
    hooked = [model for model in host.components.values() if "_hf_hook" in vars(model)]
    return any(parameter.is_meta for model in hooked for parameter in model.parameters())


def has_copies_of_groups(model: nn.Module) -> bool:
    """Whether a model's weights may go to the GPU from copies, in groups: the whole model has a hook then, or every layer."""
    layer = next((module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)), model)
    registries: list[Any] = [vars(module).get("_diffusers_hook") for module in (model, layer)]
    return any(registry is not None and GROUPS in registry.hooks for registry in registries)


def _group_anew(model: nn.Module) -> None:
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(model)
