"""From a folder to what it holds: the one place that knows which kind of folder is loaded how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nbcache.checkpoints.catalog import locate
from nbcache.checkpoints.folders import FolderKind, PipelineIndex, kind_of, read_pipeline, weights_path
from nbcache.collection import uncollected
from nbcache.errors import InvalidOption
from nbcache.models import diffusers, pipelines, single_file, transformers
from nbcache.models.packages import class_of, quiet, require
from nbcache.models.supply import Spent, Supply, Tally

QUANTIZED = "is quantized, or is to be"
CUSTOM = "has code of its own"


@dataclass(frozen=True)
class Assembled:
    """What a load came to: the object, what it is made of, and where the time went."""

    value: Any
    name: str
    what: str
    """The class's name, or what stands for it."""
    device: torch.device
    tally: Tally
    spent: Spent


@dataclass(frozen=True)
class Request:
    """What was asked for beside the name. ``components`` empty: all of it."""

    components: Sequence[str] = ()
    raw: bool = False
    variant: str = ""
    model_class: Any = None
    config: str = ""
    """For a single file: the folder that says how it is built."""
    options: Mapping[str, Any] | None = None
    known_as: str = ""
    """What it was asked for as: a repository, a path as it was typed."""


def assemble(folder: str, request: Request, supply: Supply) -> Assembled:
    """Load what a path holds: a pipeline, a model, or ``Weights`` where it is neither (or with ``raw``)."""
    # The modules of a model are another reason for the collector to look through all that was imported; and in inference mode
    # the libraries' own loads give parameters that can be trained all the same.
    with uncollected(), torch.inference_mode(False):
        value, what = _assemble(folder, request, supply)
    return Assembled(value, folder, what, supply.named_device, supply.tally, supply.clock.stop())


def _assemble(folder: str, request: Request, supply: Supply) -> tuple[Any, str]:
    if request.config:
        if request.raw:
            raise InvalidOption(f"{folder}: raw gives the file as it is, which no config describes; leave one of them out")
        parts = single_file.Parts(tuple(request.components), request.options or {})
        made = single_file.assemble(folder, request.config, request.model_class, supply, parts)
        return made, ", ".join(made) if isinstance(made, dict) else type(made).__name__
    kind = kind_of(folder)
    if request.model_class is not None and (request.raw or kind is FolderKind.BARE or request.components):
        raise InvalidOption(f"{folder}: model_class says what a model or a whole pipeline is to be; leave it out")
    if kind is FolderKind.PIPELINE:
        return _assemble_pipeline(read_pipeline(folder), request, supply)
    if request.components:
        raise InvalidOption(f"{folder}: holds {kind.value}, not a pipeline: it has no components to choose from")
    if request.raw or kind is FolderKind.BARE:
        path = weights_path(folder, request.variant) if request.variant else folder
        return supply.weights(path, supply.dtype_of("")), "Weights"
    model = _assemble_model(folder, kind, request, supply)
    return model, type(model).__name__


def _assemble_model(folder: str, kind: FolderKind, request: Request, supply: Supply) -> torch.nn.Module:
    options = dict(request.options or {})
    with supply.clock.imports():
        library = require(kind.name.lower(), f"{folder}, {kind.value},")
        room = diffusers if kind is FolderKind.DIFFUSERS else transformers
        chosen = request.model_class
        is_trusted = kind is FolderKind.TRANSFORMERS and options.get("trust_remote_code")
        custom = transformers.custom_class(folder, chosen) if is_trusted else None
        cls = class_of(library, chosen, folder) if isinstance(chosen, str) else chosen or custom or room.model_class(folder)
    with quiet(library):
        if options.get("quantization_config") or not pipelines.is_plain(folder):
            return pipelines.load_stock(folder, cls, supply, QUANTIZED, variant=request.variant, **options)  # type: ignore[no-any-return]
        if custom:
            return pipelines.load_stock(folder, custom, supply, CUSTOM, variant=request.variant, **options)  # type: ignore[no-any-return]
        if kind is FolderKind.TRANSFORMERS:
            return transformers.assemble(
                folder, cls, supply, variant=request.variant, lenient=chosen is not None, known_as=request.known_as, **options
            )
        if not options and locate(weights_path(folder, request.variant)).endswith(single_file.GGUF_SUFFIX):
            return single_file.assemble(folder, folder, cls, supply)  # type: ignore[no-any-return]
        if options:
            raise InvalidOption(f"{', '.join(options)}: a diffusers model is made from its config alone")
        return diffusers.assemble(folder, cls, supply, variant=request.variant, known_as=request.known_as)


def _assemble_pipeline(index: PipelineIndex, request: Request, supply: Supply) -> tuple[Any, str]:
    index.check_names(request.components)
    if not request.raw and not request.components:
        pipeline = pipelines.assemble(index, supply, request.variant, dict(request.options or {}), request.model_class)
        if request.known_as:
            pipeline.register_to_config(_name_or_path=request.known_as)
        return pipeline, type(pipeline).__name__
    with supply.clock.imports():
        classes = pipelines.model_components(index)
    wanted = request.components or tuple(classes)
    parts = {name: _part(index, name, classes, request, supply) for name in wanted}
    if len(request.components) == 1:
        (part,) = parts.values()
        return part, type(part).__name__
    return parts, ", ".join(parts)


def _part(index: PipelineIndex, name: str, classes: dict[str, type[Any]], request: Request, supply: Supply) -> Any:  # noqa: ANN401
    if request.raw:
        if name not in classes:
            raise InvalidOption(f"{index.folder}: component {name} has no weights to give raw")
        return supply.weights(weights_path(index.home(name), request.variant), supply.dtype_of(name))
    if name not in classes:
        return pipelines.load_other(index, name)
    if why := pipelines.why_not_served(index, name, classes[name], {}):
        return pipelines.load_stock(index.home(name), classes[name], supply, why, variant=request.variant, name=name)
    return pipelines.assemble_component(index, name, classes[name], supply, request.variant)
