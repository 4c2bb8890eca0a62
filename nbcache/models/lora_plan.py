"""The plan of an adapter: where each matrix of a LoRA goes, built once, so that a swap is one pass over a list.

Owns the writing of A, B and scaling into modules that peft has injected. Must not inject, nor know where a LoRA comes from. It
exists because finding the modules takes longer than writing them.

A LoRA of the shapes that are there is copied into them. Other shapes are bound anew: to the LoRA's own tensors where those are
this process's alone (the CPU's copy-on-write maps), else to an arena, memory of the adapter's own that grows to the largest
LoRA and no further. Padded buffers (``enable_lora_hotswap``) and compiled modules are written in place, always.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import nn

from nbcache.errors import LoraFused
from nbcache.models.lora_cache import Lora
from nbcache.models.lora_convert import Recipe
from nbcache.models.lora_slots import Arena, Target

READINGS_KEPT = 64
"""LoRAs that a plan remembers the fitting of."""


Setting = tuple[float, int, bool]
"""A module's alpha, its rank, and whether its scale goes by the rank's root."""


@dataclass(frozen=True)
class Reading:
    """A LoRA as one part sees it: what each slot is to be, and each module's alpha, rank and whether it is rooted."""

    shapes: list[tuple[int, ...]]
    exact: list[bool]
    """Whether the LoRA's tensor has just that shape: it has one, and of the model's sizes."""
    settings: list[Setting]
    narrow: bool
    """Whether a tensor has fewer inputs than the model's module: only a control LoRA's, for which inputs are widened."""

    @cached_property
    def is_whole(self) -> bool:
        """Whether the LoRA has a tensor for every slot, each of just its shape."""
        return all(self.exact)

    @property
    def rank(self) -> int:
        """The largest."""
        return max(rank for _, rank, _ in self.settings)


class Part:
    """One component's share of a plan. ``blocks`` are the parts of it that a compiler may compile.

    Attributes
    ----------
    padded : whether ``enable_lora_hotswap`` made its buffers as large as a target rank, and its scaling tensors
    compiled : whether torch has compiled the component as a whole; to be kept up to date
    """

    def __init__(self, component: str, adapter: str, targets: Sequence[Target], blocks: Sequence[nn.Module]) -> None:
        self.component = component
        self.targets = targets
        self.padded = any(isinstance(target.settings[0].get(adapter), torch.Tensor) for target in targets)
        self.compiled = False
        self.arena: Arena | None = None
        self.slots = [slot for target in targets for slot in target.slots()]
        self.least = {slot.name: slot.least for slot in self.slots}
        """The least shape that each parameter may have, by the name of the LoRA's tensor."""
        self._adapter = adapter
        self._blocks = blocks
        self._places = [target.place() for target in targets]
        self._scalings = [target.settings[0] for target in targets]
        self._settled: list[Setting] = []

    @property
    def fixed(self) -> bool:
        """Whether its parameters must stay the tensors that they are."""
        return self.padded or self.compiled or any([block._compiled_call_impl is not None for block in self._blocks])

    @property
    def stands(self) -> bool:
        """Whether every module still has the adapter where it was."""
        name = self._adapter
        return all(
            [
                siblings.get(place) is layer and all_a.get(name) is a and all_b.get(name) is b
                for siblings, place, layer, all_a, a, all_b, b in self._places
            ]
        )

    def present(self) -> list[torch.Tensor]:
        """The parameters, slot by slot."""
        return [slot.holder._parameters[slot.kind] for slot in self.slots]  # type: ignore[misc]

    @property
    def rank(self) -> int:
        """The largest rank that there is room for."""
        return max(tensor.shape[0] for slot, tensor in zip(self.slots, self.present(), strict=True) if slot.axis == 0)

    def read(self, lora: Lora) -> Reading | None:
        """The LoRA by this part; None if a tensor of it is larger than its module."""
        sources = [lora.tensors.get(slot.name) for slot in self.slots]
        shapes = [slot.shape(source) for slot, source in zip(self.slots, sources, strict=True)]
        exact = [source is not None and tuple(source.shape) == shape for source, shape in zip(sources, shapes, strict=True)]
        narrow = False
        for fits, source, shape in zip(exact, sources, shapes, strict=True):
            if source is not None and not fits:
                if source.ndim != len(shape) or any(size > room for size, room in zip(source.shape, shape, strict=True)):
                    return None
                narrow = True
        alphas, ranks, rooted = lora.recipe.alphas, lora.ranks, self.component in lora.recipe.rooted
        settings = [(alphas.get(target.name, 1.0), ranks.get(target.name, 1), rooted) for target in self.targets]
        return Reading(shapes, exact, settings, narrow)

    def read_back(self) -> tuple[dict[str, torch.Tensor], dict[str, Setting]]:
        """What is in the slots, by the names of the LoRA's tensors and each as large as its rank; and each module's setting."""
        settings = {target.name: setting for target, setting in zip(self.targets, self._settled, strict=True)}
        tensors = {}
        for slot, present in zip(self.slots, self.present(), strict=True):
            rank = settings[slot.name.rpartition(".lora_")[0]][1]
            tensors[slot.name] = present.data if slot.axis < 0 else present.data.narrow(slot.axis, 0, rank).contiguous()
        return tensors, settings

    def misfit(self, reading: Reading) -> str:
        """Why a LoRA cannot be written while the parameters stay the tensors that they are; empty if it can, or need not."""
        if not self.fixed:
            return ""
        if self.padded and reading.rank > self.rank:
            return f"its rank {reading.rank} is above the target rank {self.rank}"
        if not self.padded and _are_others(reading, self.present()):
            return f"its rank {reading.rank} is not {self.rank}, and nothing was padded before compiling"
        return ""

    def write(self, lora: Lora, reading: Reading) -> None:
        """The LoRA's matrices into their slots, and ranks and alphas where peft looks for them."""
        sources = [lora.tensors.get(slot.name) for slot in self.slots]
        present, fixed = self.present(), self.fixed
        if not (fixed or lora.shared or present[0].device.type != "cpu"):
            _bind(reading, sources, present)
        elif not self.padded and reading.is_whole and [tensor.shape for tensor in present] == reading.shapes:
            torch._foreach_copy_(present, cast("list[torch.Tensor]", sources))
        elif self.padded or not _are_others(reading, present):
            _copy(sources, present)
        else:
            self._cut_anew(reading, sources, present)
        if reading.settings != self._settled:
            self._settled = []  # until all are
            for target, (alpha, rank, rooted) in zip(self.targets, reading.settings, strict=True):
                target.settle(self._adapter, alpha, rank, rooted, sizes=not self.padded)
            self._settled = reading.settings

    def _cut_anew(self, reading: Reading, sources: Sequence[torch.Tensor | None], present: Sequence[torch.Tensor]) -> None:
        """Into the arena, and the parameters bound to it."""
        device = present[0].device
        if self.arena is None or self.arena.device != device:
            self.arena = Arena(device)
        cut = self.arena.cut([(shape, old.dtype) for shape, old in zip(reading.shapes, present, strict=True)])
        _copy(sources, cut)
        for old, tensor in zip(present, cut, strict=True):
            old.data = tensor

    def scale(self, scale: float) -> None:
        """See :meth:`Plan.scale`."""
        adapter = self._adapter
        values = [scale * alpha / (math.sqrt(rank) if rooted else rank) for alpha, rank, rooted in self._settled]
        held = [scaling[adapter] for scaling in self._scalings] if self.padded else []
        if held and all([isinstance(value, torch.Tensor) for value in held]):
            new = torch.tensor(values, dtype=held[0].dtype, device=held[0].device)
            torch._foreach_copy_(held, list(new.unbind()))
            return
        for scaling, value in zip(self._scalings, values, strict=True):  # padded ones too, where others have set numbers
            scaling[adapter] = value


class Plan:
    """Where an adapter's matrices go, component by component.

    Notes
    -----
    Holds peft's layers, but neither the models nor, once a model is gone, its part; :attr:`stands` tells whether the layers are
    still theirs. :meth:`write` either writes all or raises before the first. Under torch.no_grad alone.
    """

    def __init__(self, adapter: str, parts: Mapping[nn.Module, Part]) -> None:
        self.adapter = adapter
        self._parts = weakref.WeakKeyDictionary(parts)
        self._counted = len(parts)
        self._readings: dict[str, list[Reading] | None] = {}

    @property
    def parts(self) -> list[Part]:
        """Those of the models that are there still."""
        return list(self._parts.values())

    @property
    def parts_of_models(self) -> list[tuple[nn.Module, Part]]:
        """The same, with the models."""
        return list(self._parts.items())

    @property
    def targets(self) -> list[Target]:
        """The modules that have the adapter."""
        return [target for part in self.parts for target in part.targets]

    @property
    def least(self) -> dict[str, tuple[int, ...]]:
        """See :attr:`Part.least`; of all."""
        return {name: shape for part in self.parts for name, shape in part.least.items()}

    def keep_to(self, components: Mapping[str, nn.Module]) -> None:
        """Forget the parts of models that have others in their places here: somebody gave the pipeline others.

        A pipeline that shares some of the models may lack the rest.
        """
        for model, part in list(self._parts.items()):
            if components.get(part.component, model) is not model:
                del self._parts[model]

    @property
    def stands(self) -> bool:
        """Whether there is a module left, and every one still has the adapter where it was."""
        parts = self.parts
        return bool(parts) and all([part.stands for part in parts])

    @property
    def is_active(self) -> bool:
        """Whether the adapter takes part, by a layer of each part."""
        return all([self.adapter in part.targets[0].layer.active_adapters for part in self.parts])

    def check_unfused(self, by_others: bool = False) -> None:
        """LoraFused if the adapter is in the base weights; or, ``by_others``, any is, beside which it would add nothing."""
        for target in self.targets:
            if merged := target.layer.merged_adapters:
                fused = self.adapter if self.adapter in merged else ", ".join(merged)
                if by_others or self.adapter in merged:
                    raise LoraFused(
                        f"adapter {fused!r} is fused into the base weights (at {target.name}); unfuse it first "
                        "(pipe.unfuse_lora())"
                    )

    def _read(self, lora: Lora) -> list[Reading] | None:
        """The LoRA by each part; None if one cannot hold it. Remembered by its entry."""
        if len(self._parts) != self._counted:  # a model has gone
            self._counted = len(self._parts)
            self._readings.clear()
        if lora.entry not in self._readings:
            while len(self._readings) >= READINGS_KEPT:
                del self._readings[next(iter(self._readings))]
            covered = lora.tensors.keys() - lora.recipe.others <= self.least.keys()
            readings = [part.read(lora) for part in self.parts] if covered else [None]
            self._readings[lora.entry] = None if None in readings else [r for r in readings if r is not None]
        return self._readings[lora.entry]

    def misfit(self, lora: Lora) -> str:
        """Why a LoRA cannot be written by this plan, in words; empty if it can."""
        readings = self._read(lora)
        if readings is None or any(reading.narrow for reading in readings):
            surplus = {name.rpartition(".lora_")[0] for name in lora.tensors.keys() - self.least.keys()}
            first = min(surplus, default="")
            return f"it has {len(surplus)} modules that the adapter lacks, such as {first}" if surplus else "its sizes differ"
        return next(filter(None, (part.misfit(r) for part, r in zip(self.parts, readings, strict=True))), "")

    def read_back(self, source: str) -> Lora:
        """What was written, as a LoRA; its tensors are the adapter's own, to be used once the adapter is gone."""
        tensors: dict[str, torch.Tensor] = {}
        settings: dict[str, Setting] = {}
        for part in self.parts:
            mine, set_ = part.read_back()
            tensors |= mine
            settings |= set_
        rooted = dict.fromkeys(name.partition(".")[0] for name, (_, _, is_rooted) in settings.items() if is_rooted)
        recipe = Recipe({name: alpha for name, (alpha, _, _) in settings.items()}, tuple(rooted))
        ranks = {name: rank for name, (_, rank, _) in settings.items()}
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        return Lora(source, f"{source} as it was in {self.adapter}", tensors, recipe, ranks, nbytes, "hot")

    def write(self, lora: Lora, scale: float) -> None:
        """Put a LoRA into the adapter's place; modules that it lacks add nothing from now on. Nothing waits for the device."""
        readings = self._read(lora)
        assert readings is not None
        for part, reading in zip(self.parts, readings, strict=True):
            part.write(lora, reading)
        self.scale(scale)

    def scale(self, scale: float) -> None:
        """Multiply what the adapter adds, relative to the LoRA's own alpha."""
        for part in self.parts:
            part.scale(scale)


def _are_others(reading: Reading, present: Sequence[torch.Tensor]) -> bool:
    """Whether the LoRA's shapes are others than those that are there; modules that it lacks may be any."""
    shapes = [tensor.shape for tensor in present]
    return shapes != reading.shapes and any(
        fits and shape != new for fits, shape, new in zip(reading.exact, shapes, reading.shapes, strict=True)
    )


def _copy(sources: Sequence[torch.Tensor | None], present: Sequence[torch.Tensor]) -> None:
    """Into what is there, as large or larger, which is zero beyond."""
    pairs = list(zip(sources, present, strict=True))
    empty = [p for s, p in pairs if s is None or s.shape != p.shape]
    if empty:
        torch._foreach_zero_(empty)
    full = [(_corner(p, s), s) for s, p in pairs if s is not None]
    if full:  # a LoRA may have nothing for this component
        torch._foreach_copy_([p for p, _ in full], [s for _, s in full])


def _bind(reading: Reading, sources: Sequence[torch.Tensor | None], present: Sequence[torch.Tensor]) -> None:
    """The parameters to the LoRA's own tensors; to casts of those that have another dtype."""
    for source, old, shape in zip(sources, present, reading.shapes, strict=True):
        if source is not None and source.shape == shape and source.dtype == old.dtype and source.device == old.device:
            old.data = source
        else:
            old.data = torch.zeros(shape, dtype=old.dtype, device=old.device)
            if source is not None:
                _corner(old.data, source).copy_(source)


def _corner(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that is as large as the source; the tensor itself where all of it is."""
    if tensor.shape == source.shape:
        return tensor
    return tensor[tuple(slice(size) for size in source.shape)]


def plan_of(adapter: str, components: Mapping[str, nn.Module]) -> Plan:
    """The plan of an adapter that is injected into these components."""
    from peft.tuners.lora import LoraLayer

    parts: dict[nn.Module, Part] = {}
    for component, model in components.items():
        targets, blocks = [], []
        modules = dict(model.named_modules())
        for path, module in modules.items():
            if isinstance(module, LoraLayer):
                if adapter in module.lora_A:
                    above, _, place = path.rpartition(".")
                    targets.append(Target(f"{component}.{path}", module, adapter, modules[above], place))
            elif module._modules and path and ".lora_" not in path:  # not the root, whose life this must not prolong
                blocks.append(module)
        if targets:
            parts[model] = Part(component, adapter, targets, blocks)
    return Plan(adapter, parts)
