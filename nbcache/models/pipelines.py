"""A pipeline of diffusers: its models from the cache, the rest (tokenizers, schedulers) by ``Pipeline.from_pretrained``."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Collection, Iterator
from typing import Any

import torch

from nbcache.checkpoints.folders import CONFIG, Component, PipelineIndex, read_json
from nbcache.client.notices import notify
from nbcache.errors import CheckpointError, CheckpointIncomplete, InvalidOption, PackageMissing
from nbcache.models import diffusers, transformers
from nbcache.models.packages import class_of, dtype_word, quiet, require
from nbcache.models.supply import Supply

WHAT = "loading a diffusers pipeline"
FOREIGN = "is of a class of its own"


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
    chosen: type[Any] | str | None = None,
) -> Any:  # noqa: ANN401
    """The pipeline of a folder. ``given`` are components and settings of the caller's, as ``from_pretrained`` takes them.

    ``chosen`` is a class to make in place of the one that the folder names.
    """
    given = given or {}
    with supply.clock.imports():
        library = require("diffusers", WHAT)
        require("transformers", WHAT)
        pipeline_class = _pipeline_class(library, index, chosen)
        classes = model_components(index)
        import_the_rest()
    left = {name: reason for name, cls in classes.items() if (reason := why_not_served(index, name, cls, given))}
    left |= {each.name: FOREIGN for each in index.components if component_class(index, each) is None}
    left = {name: reason for name, reason in left.items() if name not in given}
    models = {
        name: assemble_component(index, name, cls, supply, variant)
        for name, cls in classes.items()
        if name not in given and name not in left
    }
    dtype = supply.dtype_of("default") if left else None  # tokenizers and schedulers want none
    with _quiet_libraries(), _unremarked(models.values()):
        pipeline = pipeline_class.from_pretrained(
            index.folder, **models, **given, **({dtype_word(library): dtype} if dtype is not None else {})
        )
    for name, reason in left.items():
        part = getattr(pipeline, name, None)
        if isinstance(part, torch.nn.Module):
            notify(NotServed, f"{index.folder}: component {name} {reason}; it was loaded the ordinary way, not from the cache")
            _move(part, supply.device)
    return pipeline


@contextlib.contextmanager
def _unremarked(models: Collection[torch.nn.Module]) -> Iterator[None]:
    """Without the library's remark on each of these, that it cannot tell whether what was passed is of the right class."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_loading_utils")
    beginnings = tuple(f"You have passed a non-standard module {type(model).__name__}(" for model in models)

    def is_to_be_said(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginnings)

    logger.addFilter(is_to_be_said)
    try:
        yield
    finally:
        logger.removeFilter(is_to_be_said)


def _pipeline_class(library: Any, index: PipelineIndex, chosen: type[Any] | str | None) -> type[Any]:  # noqa: ANN401
    """The class to make; for a pipeline with code of its own the one that finds it."""
    if chosen is not None and not isinstance(chosen, str):
        return chosen
    if chosen is None and index.custom:
        return library.DiffusionPipeline  # type: ignore[no-any-return]
    return class_of(library, chosen or index.class_name, index.folder)


def why_not_served(index: PipelineIndex, name: str, cls: type[Any], given: dict[str, Any]) -> str:
    """Why a component is left to the library; nothing if it is not."""
    if not hasattr(cls, "load_config" if issubclass(cls, require("diffusers", WHAT).ModelMixin) else "config_class"):
        return "holds several models" if cls.__name__.startswith("Multi") else FOREIGN
    wanted = given.get("quantization_config")
    if wanted is not None:
        names = [*(getattr(wanted, "components_to_quantize", None) or ()), *(getattr(wanted, "quant_mapping", None) or ())]
        if not names or name in names:
            return "is to be quantized"
    return "" if is_plain(index.home(name)) else "is quantized"


def _move(model: torch.nn.Module, device: torch.device) -> None:
    """Bring a model of the library's own to the device; a quantized one may be there, and refuse."""
    with contextlib.suppress(ValueError, NotImplementedError):
        model.to(device)


def load_stock(
    folder: str,
    cls: type[Any],
    supply: Supply,
    why: str,
    *,
    variant: str = "",
    name: str = "",
    **options: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """A model that is not served, the ordinary way, and a word about why. PackageMissing."""
    notify(NotServed, f"{folder}: {why}; it is loaded the ordinary way, not from the cache")
    dtype = supply.dtype_of(name)
    if variant:
        options["variant"] = variant
    if dtype is not None:
        options[dtype_word(require(cls.__module__.partition(".")[0], WHAT))] = dtype
    try:
        model = cls.from_pretrained(folder, **options)
    except ImportError as error:
        line = str(error).splitlines()[0] if str(error) else "an import failed"
        raise PackageMissing(f"{folder}: needs a package that is not there: {line}") from error
    _move(model, supply.device)
    return model.eval()


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


def is_plain(folder: str) -> bool:
    """Whether the plain tensors of a model's folder are its weights: those of a quantized one are not."""
    path = os.path.join(folder, CONFIG)
    return not (os.path.exists(path) and read_json(path).get("quantization_config"))


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    with quiet(require("diffusers", WHAT), require("transformers", WHAT)):
        yield
