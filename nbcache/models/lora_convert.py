"""From a LoRA file of any public layout to one form: what the stock loader would inject, said plainly.

Owns the one form (:class:`Recipe`) and the way to it, which is diffusers' and peft's own converters; so whatever layout they
read, this reads, and the numbers are theirs. Must not touch a pipeline: it only asks one what it is. It exists so that a file
is converted once, and what came of it can be kept and written into a pipeline without asking again.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgspec
import torch

from nbcache.errors import LoraMismatch, UnsupportedFormat

CONVERTER_VERSION = 1
"""Of this module's own form; part of what a converted entry is known by."""

A, B, BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
METADATA_KEY = "nbcache.lora"
DOWN_MARKS = (".lora_down.", ".lora_A.", ".lora.down.", "_lora.down.", ".lora_linear_layer.down.")
"""What the names of a LoRA's first matrices have, by layout."""
QUOTED = 200
"""Characters of a library's error that ours quotes."""
PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal")
"""Ways to begin a training, beside peft's own, that leave the base as it is: what is saved is all that there is to add."""
OF_NO_CONCERN = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "bias", "lora_dropout", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "megatron_config",
    "megatron_core", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
})  # fmt: skip
"""Of peft's settings, those that are read here, or seen in the tensors, or that say how it was trained."""

Tensors = dict[str, torch.Tensor]


class Recipe(msgspec.Struct, frozen=True):
    """A LoRA but for its numbers. ``alphas`` maps each module, ``component.path.in.it``, to its alpha.

    A module's tensors are named by it and ``.lora_A.weight``, ``.lora_B.weight`` and, rarely, ``.lora_B.bias``; it adds
    ``B(A(x)) * scale * alpha / rank``. ``rooted`` are the components that divide by the root of the rank instead (rsLoRA).
    ``others`` are tensors that replace parameters (the norms of BFL's control LoRAs).
    """

    alphas: dict[str, float]
    rooted: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """What a converter must know of a pipeline. ``identity`` is all of it, and the libraries' versions, as a string.

    ``loader`` is the pipeline's class, or None for a transformers model, whose one component is called ``model``.
    """

    components: tuple[str, ...]
    loader: Any = None
    unet_config: Any = field(default=None, compare=False)
    nested_text: tuple[str, ...] = ()
    """Text encoders whose modules lie below ``text_model``, as those of older transformers."""

    @property
    def identity(self) -> str:
        """Two conversions of one file under one identity give the same."""
        names = [cls.__name__ for cls in self.loader.__mro__ if "lora_state_dict" in vars(cls)] if self.loader else []
        blocks = getattr(self.unet_config, "layers_per_block", "")
        versions = [f"{package} {_version(package)}" for package in ("diffusers", "peft")]
        return "; ".join(
            [f"nbcache {CONVERTER_VERSION}", *versions, *names[:1], *self.components, *self.nested_text, f"{blocks}"]
        )


@cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def convert(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], config: str, family: Family
) -> tuple[Tensors, Recipe]:
    """The tensors and the recipe of a LoRA file. ``config`` is the text of the ``adapter_config.json`` beside it, or empty.

    UnsupportedFormat for what is no LoRA, and for kinds that are more than two matrices a module: DoRA, LoKr, LoHa.
    """
    for kind, mark in (("DoRA", "dora_scale"), ("DoRA", "lora_magnitude_vector"), ("LoKr", "lokr_"), ("LoHa", "hada_")):
        if any(mark in name for name in tensors):
            loader = "pipe.load_lora_weights" if family.loader else "peft"
            raise UnsupportedFormat(f"a {kind}, which has more than two matrices a module; load it with {loader}")
    _check_alphas(tensors)
    try:
        parts = list(_of_pipeline(tensors, metadata, family) if family.loader else _of_peft(tensors, config))
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, IndexError) as error:
        raise UnsupportedFormat(f"not a LoRA that the stock converters read: {brief(error)}") from error
    found: Tensors = {}
    alphas: dict[str, float] = {}
    for part in parts:
        found |= part.tensors
        alphas |= part.alphas
    if not alphas:
        raise UnsupportedFormat(f"not a LoRA: none of its {len(tensors)} tensors is a LoRA's")
    for module, alpha in alphas.items():
        if not math.isfinite(alpha):
            raise UnsupportedFormat(f"not a LoRA: {module} has alpha {alpha}")
    others = tuple(name for name in found if not name.endswith((A, B, BIAS)))
    if nameless := [name for name in found if ".lora_" in name and name.rpartition(".lora_")[0] not in alphas]:
        raise UnsupportedFormat(f"not a LoRA: {nameless[0]} is of no module")
    return found, Recipe(alphas, tuple(part.component for part in parts if part.rooted), others)


def brief(error: BaseException) -> str:
    """What an error of a library's says, in a line: some quote whole files."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:QUOTED]}{'...' if len(text) > QUOTED else ''}"


def _check_alphas(tensors: Mapping[str, torch.Tensor]) -> None:
    """UnsupportedFormat for an alpha below zero: diffusers' converters would never end."""
    for name, tensor in tensors.items():
        if name.endswith(".alpha") and tensor.numel() == 1 and not 0 <= float(tensor) < math.inf:
            raise UnsupportedFormat(f"not a LoRA: {name} is {float(tensor)}")


def _modules_of(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The modules that a LoRA of any layout names, a text encoder's last; none if it is no LoRA."""
    found = {name.partition(mark)[0]: None for name in tensors for mark in DOWN_MARKS if mark in name}
    return sorted(found, key=lambda name: name.startswith(("lora_te", "text_encoder")))


@dataclass(frozen=True)
class _Part:
    """What a file has for one component."""

    component: str
    tensors: Tensors
    alphas: dict[str, float]
    rooted: bool


def _of_pipeline(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], family: Family) -> Iterator[_Part]:
    """By the pipeline's own ``lora_state_dict``, then as its loader goes on for each component."""
    raw = metadata.get("lora_adapter_metadata")
    config = json.loads(raw) if raw else None
    wanted: dict[str, Any] = {"return_lora_metadata": True}
    if "return_alphas" in inspect.signature(family.loader.lora_state_dict).parameters:
        wanted["return_alphas"] = True
    if family.unet_config is not None:
        wanted["unet_config"] = family.unet_config
    try:
        answer = family.loader.lora_state_dict(dict(tensors), **wanted)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, IndexError) as error:
        if not (modules := _modules_of(tensors)):
            raise
        raise LoraMismatch(
            f"not a LoRA for a {family.loader.__name__} that the stock converters read: the first of its {len(modules)} "
            f"modules are {', '.join(modules[:3])} ({brief(error)}); the pipeline is as it was"
        ) from error
    state, alphas = answer[0], (answer[1] if len(answer) == 3 else None) or {}
    alphas = {name: float(alpha) for name, alpha in alphas.items()}
    _check_addressed(state, family.components)
    for component in family.components:
        prefix = f"{component}."
        mine = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if not mine:
            continue
        settings = {key.removeprefix(prefix): v for key, v in config.items() if key.startswith(prefix)} if config else None
        my_alphas = {name.removeprefix(prefix): alpha for name, alpha in alphas.items() if name.startswith(prefix)}
        is_text = component.startswith("text_encoder")
        mine = _text_names(mine, component in family.nested_text) if is_text else _denoiser_names(mine)
        yield _part(component, mine, my_alphas, settings or None, is_text)


def _check_addressed(state: Tensors, components: tuple[str, ...]) -> None:
    """LoraMismatch if most of a LoRA is for models that the pipeline does not have."""
    prefixes = tuple(f"{component}." for component in components)
    strange = [name for name in state if "lora" in name and not name.startswith(prefixes)]
    if 2 * len(strange) > len(state):
        raise LoraMismatch(
            f"made for another kind of pipeline: {len(strange)} of its {len(state)} tensors are for none of "
            f"{', '.join(components)}: {', '.join(strange[:3])}; the pipeline is as it was"
        )


def _denoiser_names(state: Tensors) -> Tensors:
    from diffusers.utils import convert_unet_state_dict_to_peft

    if "lora_controlnet" in state:
        raise UnsupportedFormat("a Control LoRA of Stability's, which is not one for a pipeline's denoiser")
    return state if "lora_A" in next(iter(state)) else dict(convert_unet_state_dict_to_peft(state))


def _text_names(state: Tensors, nested: bool) -> Tensors:
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    state = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    return state if nested else {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def _part(component: str, state: Tensors, alphas: dict[str, float], settings: dict[str, Any] | None, is_text: bool) -> _Part:
    """With the configuration that the stock loader would make of it, asked for each module's alpha as peft would."""
    from diffusers.utils.peft_utils import _create_lora_config

    _check_pairs(state)

    mark = "" if is_text else "^"
    ranks = {f"{mark}{name}": tensor.shape[1] for name, tensor in state.items() if "lora_B" in name and tensor.ndim > 1}
    lora = {name: tensor for name, tensor in state.items() if "lora" in name}
    config = _create_lora_config(lora, alphas or None, settings, ranks, is_unet=not is_text)
    return _configured(component, state, config)


def _configured(component: str, state: Tensors, config: Any) -> _Part:  # noqa: ANN401 - peft's LoraConfig
    from peft.utils.other import get_pattern_key

    _check_plain(config, "peft" if component == "model" else "pipe.load_lora_weights")
    patterns = config.alpha_pattern
    modules = [name.removesuffix(A) for name in state if name.endswith(A)]
    if patterns:
        alphas = {module: patterns.get(get_pattern_key(patterns.keys(), module), config.lora_alpha) for module in modules}
    else:
        alphas = dict.fromkeys(modules, config.lora_alpha)
    return _Part(
        component,
        {f"{component}.{name}": tensor for name, tensor in state.items()},
        {f"{component}.{module}": float(alpha) for module, alpha in alphas.items()},
        bool(config.use_rslora),
    )


def _check_plain(config: Any, loader: str) -> None:  # noqa: ANN401 - peft's LoraConfig
    """UnsupportedFormat for a LoRA that is more than two matrices a module: it changes the base, or computes otherwise."""
    from peft import LoraConfig

    if config.use_dora:
        raise UnsupportedFormat(f"a DoRA, which has more than two matrices a module; load it with {loader}")
    begun = config.init_lora_weights
    if isinstance(begun, str) and begun.lower() not in PLAIN_BEGINNINGS:
        raise UnsupportedFormat(
            f"a LoRA that was begun with init_lora_weights={begun!r}, which changes the base weights as well; load it with "
            f"{loader}, or save it converted (peft: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    usual = LoraConfig()
    for setting, value in vars(config).items():
        if setting not in OF_NO_CONCERN and value != getattr(usual, setting, None):
            raise UnsupportedFormat(f"a LoRA with {setting}={value!r}, which is more than its matrices; load it with {loader}")


def _of_peft(tensors: Mapping[str, torch.Tensor], config: str) -> Iterator[_Part]:
    """A file as peft saves it for a transformers model, with its ``adapter_config.json``."""
    from peft import LoraConfig

    settings = json.loads(config) if config else {}
    if settings.get("peft_type", "LORA") != "LORA":
        raise UnsupportedFormat(f"an adapter of type {settings['peft_type']}; only LoRAs can be swapped")
    if settings.get("modules_to_save"):
        raise UnsupportedFormat(f"a LoRA that also replaces whole modules: {', '.join(settings['modules_to_save'])}")
    prefix = "base_model.model."
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    strange = [name for name in state if not name.endswith((A, B, BIAS))]
    if strange:
        raise UnsupportedFormat(f"tensors that are no LoRA's matrices: {', '.join(strange[:3])} ({len(strange)} in all)")
    _check_pairs(state)
    if settings:
        known = inspect.signature(LoraConfig).parameters
        for setting, value in settings.items():
            if value and setting not in known and setting not in OF_NO_CONCERN:
                raise UnsupportedFormat(
                    f"a LoRA with {setting}={value!r}, which this peft does not know; load it with a newer one"
                )
        yield _configured("model", state, LoraConfig(**{key: value for key, value in settings.items() if key in known}))
        return
    alphas = {f"model.{name.removesuffix(A)}": float(t.shape[0]) for name, t in state.items() if name.endswith(A)}
    yield _Part("model", {f"model.{name}": tensor for name, tensor in state.items()}, alphas, rooted=False)


def _check_pairs(tensors: Tensors) -> None:
    for name in tensors:
        for mine, other in ((A, B), (B, A)):
            if name.endswith(mine) and name.removesuffix(mine) + other not in tensors:
                raise UnsupportedFormat(f"not a whole LoRA: {name} has no {other.removeprefix('.')} beside it")
        if not name.endswith(A):
            continue
        module = name.removesuffix(A)
        a, b = tensors[name], tensors[module + B]
        if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise UnsupportedFormat(f"not a LoRA: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}")
