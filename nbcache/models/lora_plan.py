"""The plan of an adapter: where each matrix of a LoRA goes, built once, so that a swap is one pass over a list.

Owns the writing of A, B and scaling into modules that peft has injected, and the private memory that this may take. Must not
inject, nor know where a LoRA comes from. It exists because finding the modules takes longer than writing them.

A LoRA of the shapes that are there is copied into them. Other shapes are bound anew: to the LoRA's own tensors where those are
this process's alone (the CPU's copy-on-write maps), else to an arena, memory of the adapter's own that grows to the largest
LoRA and no further. Padded buffers (``enable_lora_hotswap``) and compiled modules are written in place, always.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nbcache.errors import LoraFused
from nbcache.layout import ALIGNMENT
from nbcache.models.lora_cache import Lora
from nbcache.models.lora_convert import BIAS, A, B

Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""

READINGS_KEPT = 64
"""LoRAs that a plan remembers the fitting of."""

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
                end += -(-size // ALIGNMENT) * ALIGNMENT
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
        self.component = name.partition(".")[0]
        self.layer = layer
        self.a, self.b = layer.lora_A[adapter], layer.lora_B[adapter]
        self.settings = layer.scaling, layer.lora_alpha, layer.r, layer.use_rslora
        linear = isinstance(self.a, nn.Linear)
        self.sizes = (
            (self.a.__dict__, "out_features" if linear else "out_channels"),
            (self.b.__dict__, "in_features" if linear else "in_channels"),
        )
        self._home = parent._modules, place
        self._matrices = layer.lora_A._modules, layer.lora_B._modules

    def stands(self, adapter: str) -> bool:
        """Whether the layer is still the model's, and the matrices the layer's."""
        siblings, place = self._home
        all_a, all_b = self._matrices
        return siblings.get(place) is self.layer and all_a.get(adapter) is self.a and all_b.get(adapter) is self.b

    def slots(self) -> Iterator[Slot]:
        """Where its tensors go."""
        for name, holder, kind, axis in ((A, self.a, "weight", 0), (B, self.b, "weight", 1), (BIAS, self.b, "bias", -1)):
            parameter = holder._parameters.get(kind)
            if parameter is not None:
                least = tuple(1 if number == axis else size for number, size in enumerate(parameter.shape))
                yield Slot(self.name + name, holder, kind, least, axis)


@dataclass(frozen=True)
class Reading:
    """A LoRA as one plan sees it: what each slot is to be, and each module's alpha, rank and whether it is rooted."""

    shapes: list[tuple[int, ...]]
    exact: list[bool]
    """Whether the LoRA's tensor has just that shape: it has one, and of the model's sizes."""
    settings: list[tuple[float, int, bool]]
    narrow: bool
    """Whether a tensor has fewer inputs than the model's module: only a control LoRA's, for which inputs are widened."""


class Plan:
    """Where an adapter's matrices go. ``blocks`` are the parts that a compiler may compile, ``compiled`` says it has the whole.

    Notes
    -----
    Holds peft's layers, not the model; :attr:`stands` tells whether they are still its. :meth:`write` either writes all or
    raises before the first. Under torch.no_grad alone.
    """

    def __init__(self, adapter: str, targets: Sequence[Target], blocks: Sequence[nn.Module], compiled: bool) -> None:
        self.adapter = adapter
        self.targets = targets
        self._blocks = blocks
        self._compiled = compiled
        self._slots = [slot for target in targets for slot in target.slots()]
        self.least = {slot.name: slot.least for slot in self._slots}
        """The least shape that each parameter may have, by the name of the LoRA's tensor."""
        self.padded = any(isinstance(target.settings[0].get(adapter), torch.Tensor) for target in targets)
        self.arena: Arena | None = None
        self._readings: dict[str, Reading | None] = {}

    def _present(self) -> list[torch.Tensor]:
        return [slot.holder._parameters[slot.kind] for slot in self._slots]  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        """Where the adapter is."""
        return self._present()[0].device

    @property
    def stands(self) -> bool:
        """Whether every module still has the adapter where it was."""
        return all([target.stands(self.adapter) for target in self.targets])

    @property
    def compiled(self) -> bool:
        """Whether torch has compiled the model or a part of it."""
        return self._compiled or any([block._compiled_call_impl is not None for block in self._blocks])

    @property
    def rank(self) -> int:
        """The largest rank that there is room for."""
        return max(tensor.shape[0] for slot, tensor in zip(self._slots, self._present(), strict=True) if slot.axis == 0)

    def check_unfused(self) -> None:
        """LoraFused if the adapter is in the base weights."""
        for target in self.targets:
            if self.adapter in target.layer.merged_adapters:
                raise LoraFused(
                    f"adapter {self.adapter!r} is fused into the base weights (at {target.name}); unfuse it first "
                    "(pipe.unfuse_lora())"
                )

    def read(self, lora: Lora) -> Reading | None:
        """The LoRA by this plan; None if it has modules that the adapter lacks, or larger ones. Remembered by its entry."""
        if lora.entry not in self._readings:
            while len(self._readings) >= READINGS_KEPT:
                del self._readings[next(iter(self._readings))]
            self._readings[lora.entry] = self._read(lora)
        return self._readings[lora.entry]

    def _read(self, lora: Lora) -> Reading | None:
        if not lora.tensors.keys() - lora.recipe.others <= self.least.keys():
            return None
        sources = [lora.tensors.get(slot.name) for slot in self._slots]
        shapes = [slot.shape(source) for slot, source in zip(self._slots, sources, strict=True)]
        exact = [source is not None and tuple(source.shape) == shape for source, shape in zip(sources, shapes, strict=True)]
        narrow = False
        for fits, source, shape in zip(exact, sources, shapes, strict=True):
            if source is not None and not fits:
                if source.ndim != len(shape) or any(size > room for size, room in zip(source.shape, shape, strict=True)):
                    return None
                narrow = True
        recipe, ranks = lora.recipe, lora.ranks
        settings = [
            (recipe.alphas.get(target.name, 1.0), ranks.get(target.name, 1), target.component in recipe.rooted)
            for target in self.targets
        ]
        return Reading(shapes, exact, settings, narrow)

    def misfit(self, lora: Lora) -> str:
        """Why a LoRA cannot be written by this plan, in words; empty if it can."""
        reading = self.read(lora)
        if reading is None or reading.narrow:
            surplus = {name.rpartition(".lora_")[0] for name in lora.tensors.keys() - self.least.keys()}
            first = min(surplus, default="")
            return f"it has {len(surplus)} modules that the adapter lacks, such as {first}" if surplus else "its sizes differ"
        if not (self.padded or self.compiled):
            return ""
        room, rank = self.rank, max(lora.ranks.values())
        if rank > room:
            return f"its rank {rank} is above the target rank {room}"
        if not self.padded and self._others(reading, self._present()):
            return f"its rank {rank} is not {room}, and nothing was padded before compiling"
        return ""

    @staticmethod
    def _others(reading: Reading, present: Sequence[torch.Tensor]) -> bool:
        """Whether the LoRA's shapes are others than those that are there; modules that it lacks may be any."""
        shapes = [tensor.shape for tensor in present]
        return shapes != reading.shapes and any(
            fits and shape != new for fits, shape, new in zip(reading.exact, shapes, reading.shapes, strict=True)
        )

    def write(self, lora: Lora, scale: float) -> None:
        """Put a LoRA into the adapter's place; modules that it lacks add nothing from now on. Nothing waits for the device."""
        reading = self.read(lora)
        assert reading is not None
        sources = [lora.tensors.get(slot.name) for slot in self._slots]
        present = self._present()
        if not (self.padded or lora.shared or present[0].device.type != "cpu" or self.compiled):
            self._bind(reading, sources, present)
        elif self.padded or not self._others(reading, present):
            _copy(sources, present)
        else:
            self._cut_anew(reading, sources, present)
        self._settle(reading)
        self.scale(scale)

    def _cut_anew(self, reading: Reading, sources: Sequence[torch.Tensor | None], present: Sequence[torch.Tensor]) -> None:
        """Into the arena, and the parameters bound to it."""
        device = present[0].device
        if self.arena is None or self.arena.device != device:
            self.arena = Arena(device)
        cut = self.arena.cut([(shape, old.dtype) for shape, old in zip(reading.shapes, present, strict=True)])
        _copy(sources, cut)
        for old, tensor in zip(present, cut, strict=True):
            old.data = tensor

    def _bind(self, reading: Reading, sources: Sequence[torch.Tensor | None], present: Sequence[torch.Tensor]) -> None:
        """The parameters to the LoRA's own tensors; to casts of those that have another dtype."""
        for source, old, shape in zip(sources, present, reading.shapes, strict=True):
            if source is not None and source.shape == shape and source.dtype == old.dtype:
                old.data = source
            else:
                old.data = torch.zeros(shape, dtype=old.dtype)
                if source is not None:
                    _corner(old.data, source).copy_(source)

    def _settle(self, reading: Reading) -> None:
        """Ranks and alphas, where peft looks for them."""
        adapter, padded = self.adapter, self.padded
        for target, (alpha, rank, rooted) in zip(self.targets, reading.settings, strict=True):
            _, alphas, ranks, roots = target.settings
            alphas[adapter], ranks[adapter], roots[adapter] = alpha, rank, rooted
            if not padded:
                for sizes, name in target.sizes:
                    sizes[name] = rank

    def scale(self, scale: float) -> None:
        """Multiply what the adapter adds, relative to the LoRA's own alpha."""
        adapter, values = self.adapter, []
        for target in self.targets:
            _, alphas, ranks, roots = target.settings
            rank = ranks[adapter]
            values.append(scale * alphas[adapter] / (math.sqrt(rank) if roots.get(adapter) else rank))
        if self.padded:
            held = [target.settings[0][adapter] for target in self.targets]
            new = torch.tensor(values, dtype=held[0].dtype, device=held[0].device)
            torch._foreach_copy_(held, list(new.unbind()))
            return
        for target, value in zip(self.targets, values, strict=True):
            target.settings[0][adapter] = value


def _copy(sources: Sequence[torch.Tensor | None], present: Sequence[torch.Tensor]) -> None:
    """Into what is there, as large or larger, which is zero beyond."""
    pairs = list(zip(sources, present, strict=True))
    empty = [p for s, p in pairs if s is None or s.shape != p.shape]
    if empty:
        torch._foreach_zero_(empty)
    torch._foreach_copy_([_corner(p, s) for s, p in pairs if s is not None], [s for s in sources if s is not None])


def _corner(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that is as large as the source; the tensor itself where all of it is."""
    if tensor.shape == source.shape:
        return tensor
    return tensor[tuple(slice(size) for size in source.shape)]


def plan_of(adapter: str, components: Mapping[str, nn.Module], compiled: bool) -> Plan:
    """The plan of an adapter that is injected into these components."""
    from peft.tuners.lora import LoraLayer

    targets, blocks = [], []
    for component, model in components.items():
        modules = dict(model.named_modules())
        for path, module in modules.items():
            if isinstance(module, LoraLayer):
                if adapter in module.lora_A:
                    above, _, place = path.rpartition(".")
                    targets.append(Target(f"{component}.{path}", module, adapter, modules[above], place))
            elif module._modules and path and ".lora_" not in path:  # not the root, whose life this must not prolong
                blocks.append(module)
    return Plan(adapter, targets, blocks, compiled)
