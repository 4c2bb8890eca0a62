"""Adapters put into models and taken out, by those who do that best.

Owns everything that only the stock loaders can do: the first injection, the norms and widened inputs of control LoRAs, taking
out. Must not know the cache. It exists so that the first use of an adapter is diffusers' and peft's own, and costs what that
costs; what comes after is the plan's.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import re
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from nbcache.errors import LoraError, LoraFused, LoraMismatch
from nbcache.models import lean
from nbcache.models.lora_cache import Lora
from nbcache.models.lora_convert import A, B, brief
from nbcache.models.lora_host import Host
from nbcache.models.packages import building

V = TypeVar("V", int, float)

NAMED_IN_ERRORS = 3
"""Modules that a message names."""


def check_fits(lora: Lora, host: Host) -> list[str]:
    """Hold a LoRA against the models. The modules that these lack, if they are the smaller part.

    LoraMismatch, naming the first, if a module has another size, or if most of the LoRA's are lacking.
    """
    missing, wrong = [], []
    for name in lora.recipe.alphas:
        component, _, path = name.partition(".")
        sizes = _sizes(host, component, path)
        if sizes is None:
            missing.append(name)
            continue
        inputs, outputs = lora.tensors[name + A].shape[1], lora.tensors[name + B].shape[0]
        if sizes != (inputs, outputs) and not (sizes[1] == outputs and _widens(host, path)):
            wrong.append(f"{name} is {sizes[0]}→{sizes[1]}, the LoRA's {inputs}→{outputs}")
        elif (dimensions := _dimensions(host, component, path)) != lora.tensors[name + A].ndim:
            wrong.append(f"{name} has weights of {dimensions} dimensions, the LoRA's lora_A {lora.tensors[name + A].ndim}")
    for name in lora.recipe.others:
        component, _, path = name.partition(".")
        module, _, parameter = path.rpartition(".")
        present = getattr(_base_of(host, component, module), parameter, None)
        if isinstance(present, torch.Tensor) and present.shape != lora.tensors[name].shape:
            wrong.append(f"{name} is {list(present.shape)}, the LoRA's {list(lora.tensors[name].shape)}")
    if not wrong and 2 * len(missing) < len(lora.recipe.alphas):
        return missing
    total, kind = len(lora.recipe.alphas), type(host.root).__name__
    first = (wrong or [f"{name} is not there" for name in missing])[:NAMED_IN_ERRORS]
    raise LoraMismatch(
        f"{lora.source}: made for another model than this {kind}: {len(wrong)} of its {total} modules have another size, "
        f"{len(missing)} are not there: {'; '.join(first)}; the pipeline is as it was"
    )


def _base_of(host: Host, component: str, path: str) -> Any:  # noqa: ANN401 - a module of any kind
    """A module, without the layer of peft's around it; None if there is none of that name."""
    model: nn.Module | None = host.components.get(component)
    for part in path.split(".") if model is not None else ():
        model = model._modules.get(part) if model is not None else None
    return model.get_base_layer() if model is not None and hasattr(model, "get_base_layer") else model  # type: ignore[operator]


def _dimensions(host: Host, component: str, path: str) -> int:
    """How many dimensions the matrices of a module's LoRA have: as its weight, if that is no packed one."""
    layer = _base_of(host, component, path)
    return 2 + len(layer.kernel_size) if hasattr(layer, "kernel_size") else 2


def _sizes(host: Host, component: str, path: str) -> tuple[int, int] | None:
    """Inputs and outputs of a module; None if there is none of that name that takes a LoRA."""
    layer = _base_of(host, component, path)
    if layer is None:
        return None
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    if hasattr(layer, "in_channels"):
        return layer.in_channels // layer.groups, layer.out_channels
    shape = tuple(getattr(getattr(layer, "weight", None), "shape", ()))
    return (shape[0], shape[1]) if type(layer).__name__ == "Conv1D" and len(shape) == 2 else None


def _widens(host: Host, path: str) -> bool:
    """Whether the stock loader makes the module's input as wide as the LoRA's, or the LoRA's as the module's."""
    return path == "x_embedder" and hasattr(host.pipe, "_maybe_expand_transformer_param_shape_or_error_")


def replaces_parameters(lora: Lora, host: Host) -> bool:
    """Whether a LoRA does more than add to modules: it brings parameters, or widens an input."""
    name = f"{next(iter(host.components), '')}.x_embedder"
    widened = name + A in lora.tensors and _sizes(host, *name.split(".")) != (
        lora.tensors[name + A].shape[1],
        lora.tensors[name + B].shape[0],
    )
    return bool(lora.recipe.others) or widened


def inject(host: Host, adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Have the stock loader put an adapter in, with these tensors, which become the pipeline's own.

    If it raises, the adapter is taken out again. LoraError, chained, for whatever the loader raises.
    """
    state = dict(tensors)
    try:
        with _quiet(), building, lean.no_values_on_meta():
            if host.family.loader is not None:
                with _unwrapped_in(host):
                    host.pipe.load_lora_weights(state, adapter_name=adapter)
            else:
                _inject_into_model(host, adapter, {name.removeprefix("model."): t for name, t in state.items()})
    except Exception as error:
        with contextlib.suppress(Exception), _quiet():
            take_out(host, [adapter])
        raise LoraError(f"adapter {adapter!r} could not be injected: {brief(error)}") from error


def _inject_into_model(host: Host, adapter: str, state: Mapping[str, torch.Tensor]) -> None:
    from peft import LoraConfig, set_peft_model_state_dict

    ranks = {name.removesuffix(A): tensor.shape[0] for name, tensor in state.items() if name.endswith(A)}
    bias = any(name.endswith(".bias") for name in state)
    rank = next(iter(ranks.values()))
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(ranks), rank_pattern={f"^{n}": r for n, r in ranks.items() if r != rank},
        lora_bias=bias, inference_mode=True,
    )  # fmt: skip
    if hasattr(host.pipe, "base_model") and hasattr(host.pipe, "add_adapter") and hasattr(host.pipe, "get_base_model"):
        host.pipe.add_adapter(adapter, config, low_cpu_mem_usage=True)
        prefixed = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
        set_peft_model_state_dict(host.pipe, prefixed, adapter, low_cpu_mem_usage=True)
        return
    from peft import inject_adapter_in_model

    model: Any = host.components["model"]
    inject_adapter_in_model(config, model, adapter, low_cpu_mem_usage=True, state_dict=dict(state))
    set_peft_model_state_dict(model, dict(state), adapter, low_cpu_mem_usage=True)
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True


def note_config(host: Host, adapter: str, lora: Lora) -> None:
    """Let peft's configuration of an adapter say what the LoRA is, for whoever saves it."""
    for component, model in host.components.items():
        prefix = f"{component}."
        ranks = {name.removeprefix(prefix): rank for name, rank in lora.ranks.items() if name.startswith(prefix)}
        alphas = {name.removeprefix(prefix): alpha for name, alpha in lora.recipe.alphas.items() if name.startswith(prefix)}
        config = getattr(model, "peft_config", {}).get(adapter)
        if config is None or not ranks:
            continue
        config.r, config.rank_pattern = _pattern(ranks)
        config.lora_alpha, config.alpha_pattern = _pattern(alphas)
        config.use_rslora = component in lora.recipe.rooted


def _pattern(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """The most common, and those that differ, as peft's patterns by module."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(name)}": value for name, value in values.items() if value != common}


def adapters_in(host: Host) -> set[str]:
    """The adapters that its models have, ours and others."""
    return {adapter for model in host.components.values() for adapter in getattr(model, "peft_config", {})}


def active_in(host: Host) -> list[str]:
    """The adapters that take part, in the order of the first layer that says so."""
    present = adapters_in(host)
    return list(dict.fromkeys(name for layer in _layers(host) for name in layer.active_adapters if name in present))


def check_unfused(host: Host) -> None:
    """LoraFused if any adapter is in the base weights: what is injected then would not take part."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for model in host.components.values():
        for path, module in model.named_modules():
            if isinstance(module, BaseTunerLayer) and module.merged_adapters:
                names = ", ".join(module.merged_adapters)
                raise LoraFused(
                    f"adapter {names} is fused into the base weights (at {path}); unfuse it first (pipe.unfuse_lora())"
                )


def base_weight(host: Host, module: str) -> torch.Tensor:
    """The weight of a module that takes a LoRA, or a stand-in for it where it is no plain floating-point one."""
    component, _, path = module.partition(".")
    found: Any = host.components[component].get_submodule(path)
    weight: torch.Tensor = (found.get_base_layer() if hasattr(found, "get_base_layer") else found).weight
    if weight.is_floating_point():
        return weight
    return torch.empty(0, dtype=getattr(host.components[component], "dtype", torch.float32), device=weight.device)


def pad_again(host: Host, component: str, rank: int) -> None:
    """Have the next injection pad a component to this rank, as ``enable_lora_hotswap`` did before."""
    model = host.components[component]
    if hasattr(model, "_prepare_lora_hotswap_kwargs"):
        model._prepare_lora_hotswap_kwargs = {"target_rank": rank, "check_compiled": "ignore"}  # type: ignore[assignment]


def pad_as_needed(host: Host, lora: Lora) -> Iterator[str]:
    """Have components that are to be padded (``enable_lora_hotswap``) padded to the LoRA's rank at least; why, in words."""
    for component, model in host.components.items():
        asked = getattr(model, "_prepare_lora_hotswap_kwargs", None)
        rank = max((rank for name, rank in lora.ranks.items() if name.startswith(f"{component}.")), default=0)
        if asked and rank > asked["target_rank"]:
            yield f"its rank {rank} is above the target rank {asked['target_rank']}; the adapter is padded to {rank}"
            pad_again(host, component, rank)


def activate(host: Host, adapters: Sequence[str], ours: Container[str]) -> None:
    """Let these adapters, and no others, take part; ``ours`` frozen, others trained or not as they were."""
    with training_kept(host, ours):
        for layer in _layers(host):
            layer.set_adapter(list(adapters), inference_mode=True)
    if hasattr(host.pipe, "get_base_model") and hasattr(host.pipe, "base_model"):
        host.pipe.base_model.active_adapter = list(adapters)


@contextlib.contextmanager
def training_kept(host: Host, ours: Container[str]) -> Iterator[None]:
    """Adapters of others than us that are trained are so afterwards, too: to put one in or switch it on freezes the others."""
    trained = [parameter for layer in _layers(host) for parameter in _trained(layer, ours)]
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _layers(host: Host) -> list[Any]:
    """Peft's layers in all components."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for model in host.components.values() for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _trained(layer: Any, ours: Container[str]) -> list[torch.Tensor]:  # noqa: ANN401 - peft's
    """The parameters that others than us have adapters for in this layer, and train."""
    return [
        parameter
        for holder in layer.adapter_layer_names
        for name, part in getattr(layer, holder).items()
        if name not in ours
        for parameter in (part.parameters() if isinstance(part, nn.Module) else [part])
        if parameter.requires_grad
    ]


def take_out(host: Host, adapters: Sequence[str]) -> None:
    """Take adapters out. With the last, the models are as they were before the first: no layer of peft's is left in them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    left = adapters_in(host) - set(adapters)
    with _quiet():
        if not left and host.family.loader is not None:
            reset = "reset_to_overwritten_params" in inspect.signature(host.pipe.unload_lora_weights).parameters
            with _unwrapped_in(host):
                host.pipe.unload_lora_weights(**({"reset_to_overwritten_params": True} if reset else {}))
            return
        for model in host.components.values():
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    for adapter in adapters:
                        module.delete_adapter(adapter)
            for adapter in adapters:
                getattr(model, "peft_config", {}).pop(adapter, None)
        if not left:
            for model in host.components.values():
                _unwrap_layers(model)


@contextlib.contextmanager
def _unwrapped_in(host: Host) -> Iterator[None]:
    """The pipeline with its models themselves in the place of those that ``torch.compile`` wrapped, which diffusers skips."""
    attributes = vars(host.pipe)
    wrapped = {name: attributes[name] for name, model in host.components.items() if attributes.get(name) is not model}
    attributes.update({name: host.components[name] for name in wrapped})
    try:
        yield
    finally:
        attributes.update(wrapped)


def _unwrap_layers(model: nn.Module) -> None:
    """The base layers in the place of peft's, as ``unload_lora`` of diffusers does."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)
    if hasattr(model, "peft_config"):
        del model.peft_config
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = None  # type: ignore[assignment]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the stock loaders' remarks and progress bars, which are of their steps and not of ours."""
    loggers = [logging.getLogger(name) for name in ("diffusers.loaders", "diffusers.utils", "transformers", "peft")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars = _progress_bars(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        _progress_bars(bars)


def _progress_bars(wanted: bool) -> bool:
    """Turn those of transformers on or off; whether they were on."""
    try:
        bars: Any = importlib.import_module("transformers.utils.logging")
    except ImportError:
        return False
    were = bars.is_progress_bar_enabled()
    (bars.enable_progress_bar if wanted else bars.disable_progress_bar)()
    return bool(were)
