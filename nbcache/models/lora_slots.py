"""Where single matrices of an adapter go, and the memory they may take.

Owns what a module with an adapter is (:class:`Target`), each of its parameters (:class:`Slot`) and the block they are cut from
(:class:`Arena`). Must not know a LoRA, nor decide what is written. It exists apart from the plan so that the plan can speak of
slots and not of peft's layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nbcache.layout import ALIGNMENT, round_up
from nbcache.models.lora_convert import BIAS, A, B

Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""

Place = tuple[dict[str, Any], str, object, dict[str, Any], object, dict[str, Any], object]
"""A dict, the key in it, and what it has; then the dicts of A and of B by adapter, each with what it has."""

LAYOUTS_KEPT = 8
"""Layouts of an arena whose views are kept, so that swaps among a few LoRAs make no new ones."""


class Arena:
    """One block of memory, cut into tensors anew for each layout that is asked for. Grows, and never shrinks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._block = torch.empty(0, dtype=torch.uint8, device=device)
        self._cuts: dict[tuple[Spec, ...], list[torch.Tensor]] = {}

    @property
    def size_bytes(self) -> int:
        """What it takes."""
        return self._block.numel()

    def cut(self, specs: Sequence[Spec]) -> list[torch.Tensor]:
        """Tensors of these shapes and dtypes, which overlie those of every earlier cut; their content is undefined."""
        key = tuple(specs)
        if key not in self._cuts:
            sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in specs]
            places, end = [], 0
            for size in sizes:
                places.append(end)
                end += round_up(size, ALIGNMENT)
            if end > self.size_bytes:
                self._cuts.clear()
                self._block = torch.empty(end, dtype=torch.uint8, device=self.device)
            while len(self._cuts) >= LAYOUTS_KEPT:
                del self._cuts[next(iter(self._cuts))]
            self._cuts[key] = [
                self._block[place : place + size].view(dtype).view(shape)
                for place, size, (shape, dtype) in zip(places, sizes, specs, strict=True)
            ]
        return self._cuts[key]


@dataclass(frozen=True)
class Slot:
    """One parameter of an adapter: the LoRA's tensor of this name goes into ``holder``'s parameter ``kind``.

    ``least`` is its shape if the rank were one, ``axis`` the rank's, -1 for a bias.
    """

    name: str
    holder: nn.Module
    kind: str
    least: tuple[int, ...]
    axis: int

    def shape(self, source: torch.Tensor | None) -> tuple[int, ...]:
        """That of the parameter for this source: its rank, and otherwise the model's sizes."""
        if source is None or self.axis < 0:
            return self.least
        return (*self.least[: self.axis], source.shape[self.axis], *self.least[self.axis + 1 :])


class Target:
    """One module of an adapter. ``layer`` is peft's, at ``place`` in ``parent``; its settings are plain dicts by adapter."""

    def __init__(self, name: str, layer: Any, adapter: str, parent: nn.Module, place: str) -> None:  # noqa: ANN401
        self.name = name
        self.layer = layer
        self.a, self.b = layer.lora_A[adapter], layer.lora_B[adapter]
        self.settings = layer.scaling, layer.lora_alpha, layer.r, layer.use_rslora
        linear = isinstance(self.a, nn.Linear)
        self._sizes = (
            (self.a.__dict__, "out_features" if linear else "out_channels"),
            (self.b.__dict__, "in_features" if linear else "in_channels"),
        )
        self._home = parent._modules, place
        self._matrices = layer.lora_A._modules, layer.lora_B._modules

    def place(self) -> Place:
        """Where the layer and its matrices are to be found, each with what is there."""
        siblings, place = self._home
        all_a, all_b = self._matrices
        return siblings, place, self.layer, all_a, self.a, all_b, self.b

    def settle(self, adapter: str, alpha: float, rank: int, rooted: bool, sizes: bool) -> None:
        """Note the adapter's alpha and rank where peft looks for them; with ``sizes``, the matrices' own too."""
        _, alphas, ranks, roots = self.settings
        alphas[adapter], ranks[adapter], roots[adapter] = alpha, rank, rooted
        if sizes:
            for attributes, name in self._sizes:
                attributes[name] = rank

    def slots(self) -> Iterator[Slot]:
        """Where its tensors go."""
        for name, holder, kind, axis in ((A, self.a, "weight", 0), (B, self.b, "weight", 1), (BIAS, self.b, "bias", -1)):
            parameter = holder._parameters.get(kind)
            if parameter is not None:
                least = tuple(1 if number == axis else size for number, size in enumerate(parameter.shape))
                yield Slot(self.name + name, holder, kind, least, axis)
