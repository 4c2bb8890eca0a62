"""A pipeline of diffusers: its models from the cache, the rest (tokenizers, schedulers) by ``Pipeline.from_pretrained``."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from nbcache.checkpoints.folders import CONFIG, Component, PipelineIndex, read_json
from nbcache.client.notices import notify
from nbcache.errors import CheckpointError, CheckpointIncomplete, InvalidOption
from nbcache.models import diffusers, transformers
from nbcache.models.packages import class_of, quiet, require
from nbcache.models.supply import Supply
from nbcache.typos import did_you_mean

WHAT = "loading a diffusers pipeline"


class NotServed(UserWarning):
    """A part of a model was loaded the ordinary way, not from the cache."""


def model_components(index: PipelineIndex) -> dict[str, type[Any]]:
    """The components that are models of classes the cache serves, by name. ModelUnknown, PackageMissing."""
    found = {}
    for component in index.components:
        cls = component_class(index, component)
        if cls is not None and issubclass(cls, torch.nn.Module):
            found[component.name] = cls
    return found


def import_the_rest() -> None:
    """Import what ``from_pretrained`` imports on the way: every class that a component may be of."""
    transformers.prepare()
    loading = require("diffusers.pipelines.pipeline_loading_utils", WHAT)
    for package, names in loading.LOADABLE_CLASSES.items():
        with contextlib.suppress(ImportError):
            for name in names:
                getattr(importlib.import_module(package), name, None)


def component_class(index: PipelineIndex, component: Component) -> type[Any] | None:
    """The class of a component; None where it comes from elsewhere than the libraries that the cache serves."""
    library = require("diffusers", WHAT)
    where = f"{index.folder}: component {component.name}"
    if component.library in ("diffusers", "transformers"):
        return class_of(require(component.library, where), component.class_name, where)
    module = getattr(library.pipelines, component.library, None)  # a class that stands beside its pipeline
    return class_of(module, component.class_name, where) if module is not None else None


def assemble(
    index: PipelineIndex,
    supply: Supply,
    variant: str = "",
    given: dict[str, Any] | None = None,
) -> Any:  # noqa: ANN401
    """The pipeline of a folder. ``given`` are components and settings of the caller's, as ``from_pretrained`` takes them."""
    given = given or {}
    with supply.clock.imports():
        library = require("diffusers", WHAT)
        require("transformers", WHAT)
        pipeline_class = class_of(library, index.class_name, index.folder)
        classes = model_components(index)
        import_the_rest()
    models = {
        name: assemble_component(index, name, cls, supply, variant)
        for name, cls in classes.items()
        if name not in given and _is_served(index, name)
    }
    with _quiet_libraries():
        pipeline = pipeline_class.from_pretrained(
            index.folder, **models, **given, **_for_the_rest(supply, classes, models, given)
        )
    for name in classes.keys() - models.keys() - given.keys():
        notify(NotServed, f"{index.folder}: component {name} is quantized; it was loaded the ordinary way, not from the cache")
        getattr(pipeline, name).to(supply.device)
    return pipeline


def assemble_component(index: PipelineIndex, name: str, cls: type[Any], supply: Supply, variant: str = "") -> torch.nn.Module:
    """One model of a pipeline. Raises as :func:`nbcache.load`, and ModelMismatch; the message names the component."""
    folder = index.home(name)
    if not os.path.exists(os.path.join(folder, CONFIG)):
        raise CheckpointIncomplete(f"{name}: {index.folder}/{name}/{CONFIG} is missing; download it again")
    room = diffusers if issubclass(cls, require("diffusers", WHAT).ModelMixin) else transformers
    try:
        with _quiet_libraries():
            model: torch.nn.Module = room.assemble(folder, cls, supply, name=name, variant=variant)
    except CheckpointError as error:
        if str(error).startswith(f"{name}:"):
            raise
        raise type(error)(f"{name}: {error}") from error
    return model


def load_other(index: PipelineIndex, name: str) -> Any:  # noqa: ANN401
    """A component that is no model: a tokenizer, a scheduler."""
    component = next(component for component in index.components if component.name == name)
    cls = component_class(index, component)
    if cls is None:
        raise InvalidOption(f"{index.folder}: component {name} is of {component.library}, which nbcache does not load")
    return cls.from_pretrained(index.home(name))


def check_names(index: PipelineIndex, names: Iterable[str]) -> None:
    """InvalidOption for a component that the pipeline does not have."""
    there = [component.name for component in index.components]
    for name in names:
        if name not in there:
            raise InvalidOption(f"component {name!r}: {index.folder} has {', '.join(there)}{did_you_mean(name, there)}")


def _is_served(index: PipelineIndex, name: str) -> bool:
    """Whether the plain tensors of a component are its weights: those of a quantized one are not."""
    path = os.path.join(index.home(name), CONFIG)
    return not (os.path.exists(path) and read_json(path).get("quantization_config"))


def _for_the_rest(supply: Supply, classes: dict[str, Any], models: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The dtype, where a model is left to the library. Tokenizers and schedulers want none."""
    dtype = supply.dtype_of("default")
    return {"torch_dtype": dtype} if dtype is not None and classes.keys() - models.keys() - given.keys() else {}


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    with quiet(require("diffusers", WHAT), require("transformers", WHAT)):
        yield
