"""LoRAs of a pipeline: put in, swapped, scaled, taken out.

The functions of the API, and the rack: which adapters of ours a model has, and how far each is turned up. What is cached is the
cache's to know, where matrices go the plan's, what peft does the injection's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import nn

from nbcache.client.notices import LoraIncomplete, LoraReinjected, notify
from nbcache.collection import uncollected
from nbcache.errors import AdapterNotFound, InvalidOption, LoraError
from nbcache.models import lora_inject
from nbcache.models.lora_cache import Lora, find_lora
from nbcache.models.lora_convert import BIAS, B, Recipe, brief
from nbcache.models.lora_host import Host, host_of
from nbcache.models.lora_offload import at_hand
from nbcache.models.lora_plan import Plan, plan_of
from nbcache.models.lora_slots import Arena

ADAPTER = "default"
"""The adapter where none is named."""


@dataclass(frozen=True)
class LoadedLora:
    """What a :func:`load_lora` came to. ``how``: ``injected`` or ``swapped``; ``found``: ``converted``, ``cached`` or ``hot``.

    ``seconds`` is until the call returned; a GPU may still be copying then, in its stream's order.
    """

    name: str
    adapter: str
    scale: float
    modules: int
    rank: int
    nbytes: int
    how: str
    found: str
    seconds: float


@dataclass
class _Adapter:
    """An adapter of ours."""

    plan: Plan
    source: str
    """The LoRA's path, whole, wherever this process goes."""
    entry: str
    """What the cache calls what was made of it, of this content of the file."""
    scale: float
    replaces: bool
    noted: tuple[Mapping[str, int], Recipe] | None = None
    """What peft's configuration says of it."""


@dataclass
class Rack:
    """The adapters of ours that one model has, in the order they came."""

    adapters: dict[str, _Adapter] = field(default_factory=dict)
    of_pipeline: bool = False
    """Whether they were put in through a pipeline, and not into the model for itself."""

    def forget(self, name: str) -> None:
        """An adapter is no more."""
        self.adapters.pop(name, None)


_racks: weakref.WeakKeyDictionary[nn.Module, Rack] = weakref.WeakKeyDictionary()


_injected: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
"""The adapters of ours that each single model may have, also where the rack's model is another by now."""


def rack_of(host: Host) -> Rack:
    """The rack of a pipeline's denoiser, or of a model. Adapters that others took out or replaced are forgotten.

    LoraError where a pipeline's adapters are asked for by the model alone, or the other way round.
    """
    rack = _racks.setdefault(host.root, Rack())
    for name, adapter in list(rack.adapters.items()):
        adapter.plan.keep_to(host.components)
        if not adapter.plan.stands:
            rack.forget(name)
            _mark(host, name, False)
    is_pipeline = host.family.loader is not None
    if not rack.adapters:
        rack.of_pipeline = is_pipeline
    elif rack.of_pipeline is not is_pipeline:
        had, asked = ("the pipeline that it is part of", "the model") if rack.of_pipeline else ("the model", "the pipeline")
        raise LoraError(
            f"adapter {', '.join(rack.adapters)} of this {type(host.root).__name__} was loaded into {had}; give {had}, and not "
            f"{asked}, or unload it there first"
        )
    return rack


def _mark(host: Host, adapter: str, ours: bool) -> None:
    """Note that the models may have an adapter of ours of this name, or that they have none."""
    for model in host.components.values():
        names = _injected.setdefault(model, set())
        (names.add if ours else names.discard)(adapter)


def _left_over(host: Host, rack: Rack) -> list[str]:
    """Adapters of ours that are in some of the models and in no rack: the pipeline was given others in their places."""
    return [
        name
        for name in sorted(lora_inject.adapters_in(host) - rack.adapters.keys())
        if all(
            name in _injected.get(model, ()) for model in host.components.values() if name in getattr(model, "peft_config", {})
        )
    ]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """What Ctrl-C interrupts is what comes after this: a pipeline is never left with half of a LoRA."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    said: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: said.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if said:
            handler(*said[-1])


@torch.inference_mode(False)
@torch.no_grad()
@uncollected()
def load_lora(pipe: object, name: str | os.PathLike[str], scale: float = 1.0, adapter: str = ADAPTER) -> LoadedLora:
    """Put a LoRA into a pipeline, in the place of the one that the adapter had.

    The first LoRA of an adapter is injected by diffusers or peft; each later one is written in its place. Other adapters keep
    what they have, and take part as before.

    Parameters
    ----------
    pipe : a pipeline of diffusers (FLUX, SD3, SDXL, SD1.5 and others), or a model of transformers or peft
    name : a ``.safetensors`` file (or one of ``torch.save``), a folder with one, or an alias; in any layout that diffusers
        converts
    scale : what to multiply its effect by
    adapter : which adapter it is to be, for :func:`set_lora` and for several at once

    Raises
    ------
    LoraMismatch, naming the first modules that differ: it was made for another model. LoraFused, LoraError. CheckpointError
    and its kinds, UnsupportedFormat, HostMemoryFull, DeviceMemoryFull, DaemonError. After any of them the pipeline
    is as it was.
    """
    start = time.perf_counter()
    _check_names(adapter, scale)
    scale = float(scale)
    host = host_of(pipe)
    with at_hand(host):
        found, how = _load(host, name, scale, adapter)
    return LoadedLora(
        found.source, adapter, scale, len(found.ranks), max(found.ranks.values()), found.nbytes, how, found.how,
        time.perf_counter() - start,
    )  # fmt: skip


def _load(host: Host, name: str | os.PathLike[str], scale: float, adapter: str) -> tuple[Lora, str]:
    """See :func:`load_lora`. The LoRA, without what the models lack, and how it came to be there."""
    rack = rack_of(host)
    held = rack.adapters.get(adapter)
    is_left = held is None and adapter in _left_over(host, rack)
    if held is None and not is_left and adapter in lora_inject.adapters_in(host):
        raise LoraError(f"adapter {adapter!r} was loaded by other means; choose another name, or delete it first")
    if held is not None:
        held.plan.check_unfused(by_others=True)
        for part in held.plan.parts:
            part.compiled = part.component in host.compiled
    lora = find_lora(name, host.family, host.device)
    entry = lora.entry
    if held is None or held.plan.misfit(lora):
        lora = _without_missing(lora, host)
    swaps = held is not None and _fits(held, lora, host)
    if swaps and held is not None:
        with _undisturbed():
            held.plan.write(lora, scale)
            held.source, held.entry, held.scale = os.path.abspath(lora.source), entry, scale
            if not held.plan.is_active:
                lora_inject.activate(host, [*lora_inject.active_in(host), adapter], rack.adapters)
    else:
        if is_left:
            lora_inject.check_unfused(host)
            lora_inject.take_out(host, [adapter])
        _inject(host, rack, adapter, lora, scale, entry)
    held = rack.adapters[adapter]
    if held.noted != (lora.ranks, lora.recipe) and not any(part.padded for part in held.plan.parts):
        lora_inject.note_config(host, adapter, lora)  # of padded ones the configuration has the target rank
        held.noted = lora.ranks, lora.recipe
    return lora, "swapped" if swaps else "injected"


@torch.inference_mode(False)
@torch.no_grad()
def set_lora(pipe: object, scales: Mapping[str, float]) -> None:
    """Let exactly these adapters take part, each with its scale; others stay loaded and add nothing.

    AdapterNotFound for one that :func:`load_lora` did not load; LoraFused; InvalidOption.
    """
    if not isinstance(scales, Mapping):
        raise InvalidOption(f"scales {scales!r}: not a dict of adapters and numbers, such as {{'{ADAPTER}': 0.8}}")
    host = host_of(pipe)
    rack = rack_of(host)
    for name, scale in scales.items():
        _check_names(name, scale)
        _held(rack, name).plan.check_unfused(by_others=True)
    with _undisturbed():
        for name, scale in scales.items():
            held = rack.adapters[name]
            held.scale = float(scale)
            held.plan.scale(held.scale)
        if lora_inject.active_in(host) != list(scales):
            lora_inject.activate(host, list(scales), rack.adapters)


@torch.inference_mode(False)
@torch.no_grad()
def unload_lora(pipe: object, adapter: str | None = None) -> None:
    """Take an adapter out of a pipeline, or all that :func:`load_lora` put there. With the last, the models are as before.

    AdapterNotFound; LoraFused if it is fused into the base weights.
    """
    host = host_of(pipe)
    rack = rack_of(host)
    left = _left_over(host, rack)
    names = [*rack.adapters, *left] if adapter is None else [adapter]
    for name in names:
        if name not in left:
            _held(rack, name).plan.check_unfused()
    if names:
        with at_hand(host), _undisturbed():
            active = [name for name in lora_inject.active_in(host) if name not in names]
            _take_out(host, rack, names)
            lora_inject.activate(host, active, rack.adapters)


def _take_out(host: Host, rack: Rack, names: Sequence[str]) -> None:
    """Take adapters of ours out. What they replaced comes back with the last adapter alone: others are put in again after it.

    LoraError, and nothing is done, where those others are not ours.
    """
    staying = lora_inject.adapters_in(host) - set(names)
    replacing = [name for name in names if name in rack.adapters and rack.adapters[name].replaces]
    again: dict[str, _Adapter] = {}
    if replacing and staying:
        if foreign := staying - rack.adapters.keys():
            raise LoraError(
                f"adapter {replacing[0]!r} has replaced parameters, which come back with the last adapter alone; "
                f"{', '.join(sorted(foreign))} was loaded by other means: delete it first"
            )
        again = {name: held for name, held in rack.adapters.items() if name in staying}
    loras = {
        name: _again(host, name, held) if held.replaces else held.plan.read_back(held.source) for name, held in again.items()
    }
    lora_inject.take_out(host, [*names, *again])
    for name in (*names, *again):
        rack.forget(name)
        _mark(host, name, False)
    for name, held in again.items():
        _inject(host, rack, name, _without_missing(loras[name], host), held.scale, held.entry)


def _again(host: Host, name: str, held: _Adapter) -> Lora:
    """The LoRA of an adapter, from the cache or its file. LoraError if that has other content by now."""
    lora = find_lora(held.source, host.family, host.device)
    if lora.entry != held.entry:
        raise LoraError(f"{held.source} was changed since it was loaded as adapter {name!r}; load it again")
    return lora


def _held(rack: Rack, name: str) -> _Adapter:
    try:
        return rack.adapters[name]
    except KeyError:
        known = ", ".join(rack.adapters) or "none"
        raise AdapterNotFound(f"no adapter {name!r} was loaded with load_lora here; loaded: {known}") from None


def _check_names(adapter: str, scale: float) -> None:
    if not isinstance(adapter, str) or not adapter or "." in adapter:
        raise InvalidOption(f"adapter {adapter!r}: a name without a dot")
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise InvalidOption(f"scale {scale!r} of adapter {adapter!r}: not a finite number")


def _fits(held: _Adapter, lora: Lora, host: Host) -> bool:
    """Whether a LoRA can be written in the adapter's place; says so if that was prepared for and it cannot."""
    if held.replaces or lora_inject.replaces_parameters(lora, host):
        return False
    reason = held.plan.misfit(lora)
    if reason and any(part.fixed for part in held.plan.parts):
        notify(LoraReinjected, f"{lora.source}: {reason}; the adapter is injected anew, and compiled again where it was")
    return not reason


def _without_missing(lora: Lora, host: Host) -> Lora:
    """The LoRA without the modules that the models lack, as the stock loaders ignore them; with a warning."""
    missing = lora_inject.check_fits(lora, host)
    if not missing:
        return lora
    first, total = missing[0], len(lora.ranks)
    notify(LoraIncomplete, f"{lora.source}: the pipeline lacks {len(missing)} of its {total} modules, such as {first}")
    gone = set(missing)
    alphas = {name: alpha for name, alpha in lora.recipe.alphas.items() if name not in gone}
    return dataclasses.replace(
        lora,
        entry=f"{lora.entry} without {len(gone)}",
        tensors={name: tensor for name, tensor in lora.tensors.items() if name.rpartition(".lora_")[0] not in gone},
        ranks={name: lora.ranks[name] for name in alphas},
        recipe=Recipe(alphas, lora.recipe.rooted, lora.recipe.others),
    )


def _inject(host: Host, rack: Rack, adapter: str, lora: Lora, scale: float, entry: str) -> None:
    """Inject an adapter that is large enough for the LoRA, and for every module that it had before; then write the LoRA.

    ``entry`` is what the cache calls the LoRA, of which modules may have been left out here. If that fails, what the adapter
    had before is put back.
    """
    from nbcache.models.lora_fuse import keep_bases  # needs peft, of whose absence host_of speaks

    held = rack.adapters.get(adapter)
    lora_inject.check_unfused(host)
    active = [name for name in lora_inject.active_in(host) if name != adapter]
    state, arenas = _room(host, lora, held.plan if held and not held.replaces else None)
    for why in lora_inject.pad_as_needed(host, lora):
        notify(LoraReinjected, f"{lora.source}: {why}")  # before anything is changed: a warning may be an error
    with _undisturbed(), lora_inject.training_kept(host, rack.adapters):
        if held is not None:
            _take_out(host, rack, [adapter])
            for part in held.plan.parts:
                if part.padded:
                    lora_inject.pad_again(host, part.component, max(part.rank, *lora.ranks.values()))
        _mark(host, adapter, True)
        try:
            lora_inject.inject(host, adapter, state)
            del state
            plan = plan_of(adapter, host.components)
            for part in plan.parts:
                part.arena = arenas.get(part.component)
            plan.write(lora, scale)
        except BaseException as error:
            with contextlib.suppress(Exception):
                lora_inject.take_out(host, [adapter])
            if held is not None:
                _put_back(host, rack, adapter, held, error)
            raise
        for model, part in plan.parts_of_models:
            keep_bases(model, (target.layer for target in part.targets))
        replaces = lora_inject.replaces_parameters(lora, host)
        rack.adapters[adapter] = _Adapter(plan, os.path.abspath(lora.source), entry, scale, replaces)
        lora_inject.activate(host, [*active, adapter], rack.adapters)


def _put_back(host: Host, rack: Rack, adapter: str, held: _Adapter, error: BaseException) -> None:
    """What the adapter had. LoraError if that cannot be had any more either."""
    try:
        lora = _without_missing(_again(host, adapter, held), host)
        _inject(host, rack, adapter, lora, held.scale, held.entry)
    except Exception as second:
        raise LoraError(
            f"{brief(error)}; what adapter {adapter!r} had, {held.source}, could not be put back: {brief(second)}"
        ) from second


def _room(host: Host, lora: Lora, former: Plan | None) -> tuple[dict[str, torch.Tensor], dict[str, Arena]]:
    """Zeros of the LoRA's shapes, and of rank one for modules that only the former had, of the models' dtypes and devices.

    On a GPU in arenas, one a component, which the adapter then keeps. What replaces parameters comes as a copy of its own.
    """
    state = {name: lora.tensors[name].clone() for name in lora.recipe.others}
    shapes = {name: tuple(tensor.shape) for name, tensor in lora.tensors.items() if name not in state}
    shapes = (former.least if former is not None else {}) | shapes
    shapes |= _biases(shapes)
    arenas = {part.component: part.arena for part in former.parts if part.arena is not None} if former is not None else {}
    for component in host.components:
        mine = {name: shape for name, shape in shapes.items() if name.startswith(f"{component}.")}
        bases = {name: lora_inject.base_weight(host, name.rpartition(".lora_")[0]) for name in mine}
        device = next((base.device for base in bases.values()), torch.device("cpu"))
        if device.type == "cpu":
            state |= {name: torch.zeros(shape, dtype=bases[name].dtype) for name, shape in mine.items()}
            continue
        arena = arenas.setdefault(component, Arena(device))
        cut = arena.cut([(shape, bases[name].dtype) for name, shape in mine.items()])
        torch._foreach_zero_(cut)
        state |= dict(zip(mine, cut, strict=True))
    return state, arenas


def _biases(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A bias for every module of a component where one has a bias: peft makes all or none."""
    components = {name.partition(".")[0] for name in shapes if name.endswith(BIAS)}
    modules = {name.removesuffix(B): shape for name, shape in shapes.items() if name.endswith(B)}
    return {f"{module}{BIAS}": shape[:1] for module, shape in modules.items() if module.partition(".")[0] in components}
