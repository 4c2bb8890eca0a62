"""One model of diffusers, assembled over cached tensors without copying them.

Does what ``ModelMixin.from_pretrained`` does after reading: the module is built without memory from its config, takes the
tensors as its parameters, and keeps the buffers that no checkpoint has.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nbcache.checkpoints.folders import CONFIG, class_name_of, read_json, weights_path
from nbcache.errors import ModelMismatch
from nbcache.models import lean, seating
from nbcache.models.packages import building, class_of, mismatch, require
from nbcache.models.supply import Supply, floating_dtype

WHAT = "loading a diffusers model"


def model_class(folder: str) -> type[Any]:
    """The class that a folder's config names. ModelUnknown, PackageMissing."""
    config = read_json(f"{folder}/{CONFIG}")
    return class_of(require("diffusers", WHAT), class_name_of(config, f"{folder}/{CONFIG}"), folder)


def assemble(
    folder: str, cls: type[Any], supply: Supply, *, name: str = "", variant: str = "", known_as: str = ""
) -> torch.nn.Module:
    """The model of a folder, on the supply's device, in eval mode. ``name`` is the component it is, for dtype and messages.

    ``known_as`` is what it was asked for as, such as a repository. ModelMismatch; and what :func:`nbcache.load` raises.
    """
    dtype = supply.dtype_of(name)
    tensors = supply.tensors(weights_path(folder, variant), dtype, keeps_fp32(cls))
    config = cls.load_config(folder)
    model = fill(cls, config, tensors, dtype or floating_dtype(tensors), supply, folder, name)
    if known_as:
        model.register_to_config(_name_or_path=known_as)  # type: ignore[operator]
    return model


def keeps_fp32(cls: type[Any]) -> Callable[[str], bool]:
    """Which tensors a class leaves in float32 whatever the rest is cast to."""
    kept = cls._keep_in_fp32_modules or []
    names = {kept} if isinstance(kept, str) else set(kept)
    return lambda key: not names.isdisjoint(key.split("."))


def fill(
    cls: type[Any],
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
    supply: Supply,
    folder: str,
    name: str,
) -> torch.nn.Module:
    """Build the class from its config and give it the tensors, which are the caller's no more. ModelMismatch."""
    with building:
        model: torch.nn.Module = _build_empty(_remapped(cls, config), config, dtype)
    model._fix_state_dict_keys_on_load(tensors)  # type: ignore[operator]
    if not seating.seat(model, tensors):
        _seat(model, tensors, name or folder)
    move_buffers(model, supply.device)
    model.register_to_config(_name_or_path=folder)  # type: ignore[operator]
    model.eval()
    return model


def _seat(model: torch.nn.Module, tensors: dict[str, torch.Tensor], what: str) -> None:
    """Give a model its tensors as the library does. ModelMismatch."""
    try:
        absent, surplus = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise ModelMismatch(
            f"{what}: {len(lines)} tensors do not fit {type(model).__name__}: {lines[0] if lines else error}"
        ) from error
    _check_keys(model, absent, surplus, what)


def _build_empty(cls: type[Any], config: dict[str, Any], dtype: torch.dtype | None) -> Any:  # noqa: ANN401
    """The module with parameters that have no memory, and real buffers, as if made under this default dtype."""
    accelerate = require("accelerate", WHAT)
    from diffusers.models.modeling_utils import no_init_weights

    with (
        default_dtype(dtype),
        no_init_weights(),
        lean.layers_without_memory(),
        accelerate.init_empty_weights(include_buffers=False),
    ):
        return cls.from_config(config)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Torch's default dtype, for the time of building. An 8-bit one cannot be it, and is not in stock loads either."""
    before = torch.get_default_dtype()
    if dtype is not None and dtype.itemsize > 1:
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _remapped(cls: type[Any], config: dict[str, Any]) -> type[Any]:
    """A class's successor for this config, where it has one: diffusers split ``Transformer2DModel`` by norm type."""
    if any(base.__name__ == "LegacyModelMixin" for base in cls.__mro__):
        from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config

        successor: type[Any] = _fetch_remapped_cls_from_config(config, cls)
        return successor
    return cls


def _check_keys(model: torch.nn.Module, absent: list[str], surplus: list[str], what: str) -> None:
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    surplus = [key for key in surplus if not any(re.search(pattern, key) for pattern in ignored)]
    if absent or surplus:
        raise mismatch(what, type(model).__name__, sorted(absent), sorted(surplus))


def move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Bring the buffers that no checkpoint had to where the parameters are."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)
