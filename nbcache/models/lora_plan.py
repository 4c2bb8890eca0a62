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
    """One parameter of an adapter: the LoRA's tensor of this name goes into ``holder``'s parameter ``kind``."""

    name: str
    holder: nn.Module
    kind: str

    @property
    def tensor(self) -> torch.Tensor:
        """What is there now."""
        found = self.holder._parameters[self.kind]
        assert found is not None
        return found


@dataclass(frozen=True)
class Target:
    """One module of an adapter. ``layer`` is peft's, at ``place`` in ``parent``; its settings are plain dicts by adapter."""

    name: str
    layer: Any
    component: str
    parent: nn.Module
    place: str
    a: nn.Module
    b: nn.Module

    def stands(self, adapter: str) -> bool:
        """Whether the layer is still the model's, and the matrices the layer's."""
        modules = self.layer._modules
        return (
            self.parent._modules.get(self.place) is self.layer
            and modules["lora_A"]._modules.get(adapter) is self.a
            and modules["lora_B"]._modules.get(adapter) is self.b
        )


class Plan:
    """Where an adapter's matrices go. ``blocks`` are modules that a compiler may have compiled.

    Notes
    -----
    Holds peft's layers, not the model; :attr:`stands` tells whether they are still its. :meth:`write` either writes all or
    raises before the first. Under torch.no_grad alone.
    """

    def __init__(self, adapter: str, targets: Sequence[Target], blocks: Sequence[nn.Module], compiled: bool) -> None:
        self.adapter = adapter
        self.targets = {target.name: target for target in targets}
        self._blocks = blocks
        self._compiled = compiled
        self._slots = [slot for target in targets for slot in _slots(target)]
        self.names = frozenset(slot.name for slot in self._slots)
        self.padded = any(isinstance(target.layer.scaling.get(adapter), torch.Tensor) for target in targets)
        self.arena: Arena | None = None
        self._at_rank_one = {slot.name: _one_rank(slot) for slot in self._slots}

    @property
    def device(self) -> torch.device:
        """Where the adapter is."""
        return self._slots[0].tensor.device

    @property
    def stands(self) -> bool:
        """Whether every module still has the adapter where it was."""
        return all(target.stands(self.adapter) for target in self.targets.values())

    @property
    def compiled(self) -> bool:
        """Whether torch has compiled the model or a part of it."""
        return self._compiled or any(block._compiled_call_impl is not None for block in self._blocks)

    @property
    def rank(self) -> int:
        """The largest rank that there is room for."""
        return max(slot.tensor.shape[0] for slot in self._slots if slot.name.endswith(A))

    def check_unfused(self) -> None:
        """LoraFused if the adapter is in the base weights."""
        for target in self.targets.values():
            if self.adapter in target.layer.merged_adapters:
                raise LoraFused(
                    f"adapter {self.adapter!r} is fused into the base weights (at {target.name}); unfuse it first "
                    "(pipe.unfuse_lora())"
                )

    @property
    def shapes_at_rank_one(self) -> dict[str, tuple[int, ...]]:
        """The least that each parameter may be, by name."""
        return self._at_rank_one

    def covers(self, lora: Lora) -> bool:
        """Whether the adapter has each of the LoRA's modules, in the same sizes but for the rank."""
        return lora.tensors.keys() <= self.names and not any(
            _differs(tensor.shape, self._at_rank_one[name], 0 if name.endswith(A) else 1)
            for name, tensor in lora.tensors.items()
        )

    def misfit(self, lora: Lora) -> str:
        """Why a LoRA whose sizes are the model's cannot be written by this plan, in words; empty if it can."""
        surplus = {name.rpartition(".lora_")[0] for name in lora.tensors.keys() - self.names}
        if surplus:
            return f"it has {len(surplus)} modules that the adapter lacks, such as {min(surplus)}"
        if not (self.padded or self.compiled):
            return ""
        room, rank = self.rank, max(lora.ranks.values())
        for slot in self._slots:
            source = lora.tensors.get(slot.name)
            if source is None:
                continue
            if any(new > old for new, old in zip(source.shape, slot.tensor.shape, strict=True)):
                return f"its rank {rank} is above the target rank {room}"
            if not self.padded and source.shape != slot.tensor.shape:
                return f"its rank {rank} is not {room}, and nothing was padded before compiling"
        return ""

    def write(self, lora: Lora, scale: float) -> None:
        """Put a LoRA into the adapter's place; modules that it lacks add nothing from now on. Nothing waits for the device."""
        sources = [lora.tensors.get(slot.name) for slot in self._slots]
        present = [slot.tensor for slot in self._slots]
        if self.padded or all(s is None or s.shape == p.shape for s, p in zip(sources, present, strict=True)):
            bindable = not (self.padded or self.compiled or lora.shared)
            self._bind(sources, present) if bindable else self._copy(sources, present)
        elif lora.shared or self.device.type != "cpu":
            self._cut_anew(sources, present)
        else:
            self._bind(sources, present)
        self._settle(lora, scale)

    def _copy(self, sources: Sequence[torch.Tensor | None], present: Sequence[torch.Tensor]) -> None:
        """Into what is there, as large or larger, which is zero beyond."""
        pairs = list(zip(sources, present, strict=True))
        empty = [p for s, p in pairs if s is None or s.shape != p.shape]
        if empty:
            torch._foreach_zero_(empty)
        there = [s for s in sources if s is not None]
        torch._foreach_copy_([_corner(p, s) for s, p in pairs if s is not None], there)

    def _cut_anew(self, sources: Sequence[torch.Tensor | None], present: Sequence[torch.Tensor]) -> None:
        """Into the arena, and the parameters bound to it."""
        specs = [self._spec(slot, s, p) for slot, s, p in zip(self._slots, sources, present, strict=True)]
        if self.arena is None or self.arena.device != self.device:
            self.arena = Arena(self.device)
        cut = self.arena.cut(specs)
        self._copy(sources, cut)
        for slot, tensor in zip(self._slots, cut, strict=True):
            slot.tensor.data = tensor

    def _bind(self, sources: Sequence[torch.Tensor | None], present: Sequence[torch.Tensor]) -> None:
        """The parameters to the LoRA's own tensors; to copies of those that have another dtype or fewer inputs."""
        for slot, source, old in zip(self._slots, sources, present, strict=True):
            shape, dtype = self._spec(slot, source, old)
            if source is not None and source.shape == shape and source.dtype == dtype:
                old.data = source
            else:
                made = torch.zeros(shape, dtype=dtype, device=old.device)
                if source is not None:
                    _corner(made, source).copy_(source)
                old.data = made

    def _spec(self, slot: Slot, source: torch.Tensor | None, present: torch.Tensor) -> Spec:
        """Shape and dtype of a parameter for this source: its rank, and of the model what is the model's."""
        one = self._at_rank_one[slot.name]
        if source is None or slot.kind == "bias":
            return one, present.dtype
        axis = 0 if slot.name.endswith(A) else 1
        return (*one[:axis], source.shape[axis], *one[axis + 1 :]), present.dtype

    def _settle(self, lora: Lora, scale: float) -> None:
        """Ranks, alphas and scaling, where peft looks for them."""
        adapter, rooted = self.adapter, lora.recipe.rooted
        for name, target in self.targets.items():
            rank, alpha = lora.ranks.get(name, 1), lora.recipe.alphas.get(name, 1.0)
            layer = target.layer
            layer.lora_alpha[adapter] = alpha
            layer.use_rslora[adapter] = target.component in rooted
            layer.r[adapter] = rank
            if not self.padded:
                target.a.__dict__["out_features" if isinstance(target.a, nn.Linear) else "out_channels"] = rank
                target.b.__dict__["in_features" if isinstance(target.b, nn.Linear) else "in_channels"] = rank
        self.scale(scale)

    def scale(self, scale: float) -> None:
        """Multiply what the adapter adds, relative to the LoRA's own alpha."""
        adapter = self.adapter
        values = [
            scale * layer.lora_alpha[adapter] / (math.sqrt(layer.r[adapter]) if layer.use_rslora[adapter] else layer.r[adapter])
            for layer in (target.layer for target in self.targets.values())
        ]
        if self.padded:
            held = [target.layer.scaling[adapter] for target in self.targets.values()]
            new = torch.tensor(values, dtype=held[0].dtype, device=held[0].device)
            torch._foreach_copy_(held, list(new.unbind()))
            return
        for target, value in zip(self.targets.values(), values, strict=True):
            target.layer.scaling[adapter] = value


def _slots(target: Target) -> Iterator[Slot]:
    yield Slot(target.name + A, target.a, "weight")
    yield Slot(target.name + B, target.b, "weight")
    if target.b._parameters.get("bias") is not None:
        yield Slot(target.name + BIAS, target.b, "bias")


def _one_rank(slot: Slot) -> tuple[int, ...]:
    """The parameter's shape if the rank were one."""
    shape = tuple(slot.tensor.shape)
    if slot.kind == "bias":
        return shape
    axis = 0 if slot.name.endswith(A) else 1
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _differs(shape: Sequence[int], at_rank_one: Sequence[int], axis: int) -> bool:
    """Whether a tensor is another size than the module wants, its rank aside."""
    if len(at_rank_one) == 1 or len(shape) != len(at_rank_one):
        return tuple(shape) != tuple(at_rank_one)
    return any(new != old for number, (new, old) in enumerate(zip(shape, at_rank_one, strict=True)) if number != axis)


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
                    a, b = module.lora_A[adapter], module.lora_B[adapter]
                    targets.append(Target(f"{component}.{path}", module, component, modules[above], place, a, b))
            elif module._modules and ".lora_" not in path:
                blocks.append(module)
    return Plan(adapter, targets, blocks, compiled)
