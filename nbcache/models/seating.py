"""Giving a model tensors that are there already, without the search that libraries make for each of them.

Owns :func:`seat`, for a model whose tensors are all there and fit, and :func:`seating_first`, for transformers, which is left
those that do not. What is seated is seated as the library would; what is out of the ordinary is the library's. Must not know
where tensors come from. Needs torch.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from nbcache.models.lean import LAYERS

LOADER = "convert_and_load_state_dict_in_model"
LOADER_TAKES = ("model", "state_dict", "load_config", "disk_offload_index")
RENAMER = "rename_source_key"
RENAMER_TAKES = ("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict")
FLAG = "_is_hf_initialized"
"""Says to transformers that a parameter, or a module, has its values."""


class Seat(NamedTuple):
    """Where a model has one of its tensors."""

    module: nn.Module
    holder: dict[str, Any]
    """The module's parameters, or its buffers."""
    name: str
    key: str
    """The name in the model's state dict."""
    tensor: torch.Tensor
    """What is there now."""

    def takes(self, tensor: object) -> bool:
        """Whether a tensor is of the kind and shape that is there now."""
        return type(tensor) is torch.Tensor and tensor.shape == self.tensor.shape


def seats_of(model: nn.Module, is_ordinary: Callable[[nn.Module], bool]) -> list[Seat] | None:
    """A seat for each name of the model's state dict; None if one of its modules is not ordinary."""
    seats: list[Seat] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if not is_ordinary(module):
            return None
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                seats.append(Seat(module, module._parameters, name, prefix + name, parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                seats.append(Seat(module, module._buffers, name, prefix + name, buffer))
    return seats


def seat(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Make the tensors a model's parameters and buffers, as ``load_state_dict(tensors, assign=True)`` does.

    False, with nothing done, unless there is exactly one for each, of its shape, and no module has its own way of loading:
    that method tells then what is wrong, or does it. It looks through all names at each of thousands of modules; this does not.
    """
    seats = seats_of(model, _loads_as_most_do)
    if seats is None or len(seats) != len(tensors) or not all(each.takes(tensors.get(each.key)) for each in seats):
        return False
    for each in seats:
        new, old = tensors[each.key], each.tensor
        each.holder[each.name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return True


def _loads_as_most_do(module: nn.Module) -> bool:
    kind, stock = type(module), nn.Module
    return (
        kind._load_from_state_dict is stock._load_from_state_dict
        and kind.load_state_dict is stock.load_state_dict
        and kind.set_extra_state is stock.set_extra_state
        and not module._load_state_dict_pre_hooks
        and not module._load_state_dict_post_hooks
    )


@contextlib.contextmanager
def seating_first(loading: ModuleType, user: ModuleType) -> Iterator[None]:
    """Have transformers' loader find those tensors seated that fit as they are.

    It makes an object for each of them, and a job, and looks for its module from the root. ``loading`` is the module that has
    the loader, ``user`` the one that calls it. One that takes other arguments than those from 5.16 on is left alone.
    """
    stock: Any = getattr(user, LOADER, None)
    rename: Any = getattr(loading, RENAMER, None)
    if _arguments(stock) != LOADER_TAKES or _arguments(rename)[: len(RENAMER_TAKES)] != RENAMER_TAKES:
        yield
        return

    def load(
        model: nn.Module,
        state_dict: dict[str, Any],
        load_config: Any,  # noqa: ANN401
        disk_offload_index: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        seated = _seat_what_fits(model, state_dict, load_config, loading) if disk_offload_index is None else {}
        rest = {key: tensor for key, tensor in state_dict.items() if key not in seated}
        info, index = stock(model, rest, load_config, disk_offload_index)
        info.missing_keys.difference_update(seated.values())
        return info, index

    setattr(user, LOADER, load)
    try:
        yield
    finally:
        setattr(user, LOADER, stock)


def _arguments(function: Any) -> tuple[str, ...]:  # noqa: ANN401
    """The names of a function's arguments; none of what is no function."""
    return tuple(inspect.signature(function).parameters) if callable(function) else ()


def _seat_what_fits(model: nn.Module, tensors: dict[str, Any], wanted: Any, loading: ModuleType) -> dict[str, str]:  # noqa: ANN401
    """Seat the tensors that the library would as they are. Which went where: their names, and the model's."""
    device = _one_device(wanted.device_map)
    if device is None or wanted.hf_quantizer is not None or wanted.dtype_plan:
        return {}
    seats = seats_of(model, _is_described_as_most_are)
    if seats is None:
        return {}
    places = {each.key: each for each in seats}
    chosen: dict[str, tuple[Seat, torch.Tensor]] = {}
    renamed = _renamer(model, places, wanted.weight_mapping or [], loading)
    single: set[str] = set()
    joined: set[str] = set()
    for key, tensor in tensors.items():
        goal, converter = renamed(key)
        if converter is not None:
            joined.add(goal)
            continue
        if goal in single:
            return {}  # which of the two it is, the library says
        single.add(goal)
        place = places.get(goal)
        if place is not None and _fits(place, tensor, device):
            chosen[key] = place, tensor
    filled = [(id(places[goal].holder), places[goal].name) for goal in single if goal in places]
    if len(set(filled)) < len(filled) or not single.isdisjoint(joined):
        return {}  # a module of two names: the last of the two is right, in the library's order
    for place, tensor in chosen.values():
        _give(place, tensor)
    return {key: place.key for key, (place, _) in chosen.items()}


def _one_device(device_map: dict[str, Any] | None) -> torch.device | None:
    """The device of all of a model; None if there are several, or it is none of torch's."""
    named = set((device_map or {"": "cpu"}).values())
    only = named.pop() if len(named) == 1 else None
    return torch.device(only) if isinstance(only, torch.device) or only == "cpu" else None


def _is_described_as_most_are(module: nn.Module) -> bool:
    """Whether a module's part of the state dict is its parameters and buffers."""
    kind, stock = type(module), nn.Module
    return (
        kind._save_to_state_dict is stock._save_to_state_dict
        and kind.state_dict is stock.state_dict
        and kind.get_extra_state is stock.get_extra_state
        and not module._state_dict_hooks
        and not module._state_dict_pre_hooks
    )


def _renamer(
    model: nn.Module, places: dict[str, Seat], mapping: list[Any], loading: ModuleType
) -> Callable[[str], tuple[str, Any]]:
    """What a name of the checkpoint is to the model, and the converter that is to make it, as the library says."""
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    rename, prefix = getattr(loading, RENAMER), getattr(model, "base_model_prefix", None)

    def renamed(key: str) -> tuple[str, Any]:
        goal, converter = rename(key, renamings, converters, prefix, places)
        if goal not in places and key in places:
            goal, converter = rename(key, [], [], prefix, places)
        return goal, converter

    return renamed


def _fits(place: Seat, tensor: object, device: torch.device) -> bool:
    return (
        place.takes(tensor)
        and tensor.dtype == place.tensor.dtype  # type: ignore[attr-defined]
        and tensor.device == device  # type: ignore[attr-defined]
        and type(place.tensor) in (nn.Parameter, torch.Tensor)
        and type(place.module).__setattr__ is nn.Module.__setattr__
    )


def _give(place: Seat, tensor: torch.Tensor) -> None:
    given = nn.Parameter(tensor, tensor.is_floating_point()) if place.holder is place.module._parameters else tensor
    setattr(given, FLAG, True)
    place.holder[place.name] = given
    module = place.module
    if type(module) in LAYERS and not module._buffers and all(hasattr(each, FLAG) for each in module.parameters(False)):
        setattr(module, FLAG, True)  # nothing is left to initialise
