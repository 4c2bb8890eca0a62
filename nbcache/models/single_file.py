"""Single-file checkpoints in their authors' own layout: converted once, and kept converted.

The libraries' ``from_single_file`` renames, cuts and joins tensors each time. Here it runs once, on the CPU, in the file's own
dtype; each model that it gives is kept as an entry derived from the file, and is assembled from there like a component of a
folder from then on. A file that changed, or another version of the libraries, is converted anew. The blocks of a GGUF file are
not converted at all: a model of diffusers computes with them as they are in the cache.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nbcache.checkpoints.catalog import Checkpoint, describe, resolve
from nbcache.checkpoints.folders import CONFIG, FolderKind, PipelineIndex, kind_of, read_json, read_pipeline
from nbcache.client import tensors as edge
from nbcache.errors import CheckpointError, InvalidOption, ModelMismatch, UnsupportedFormat
from nbcache.manifest import Member
from nbcache.models import diffusers, pipelines, transformers
from nbcache.models.derived import Derived, Made, name_of
from nbcache.models.gguf import gguf_parameters
from nbcache.models.packages import building, class_of, quiet, require
from nbcache.models.supply import Supply, widest, widest_dtype

WHAT = "loading a single-file checkpoint"
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that no single file has; a pipeline does without, as ``from_single_file`` lets it."""

GGUF_SUFFIX = ".gguf"

CONVERTER_VERSION = 1
"""Of what this module keeps; part of what a converted entry is known by."""

REMEDY = " Give what the file lacks: nbcache.load_model(..., NAME=nbcache.load_model(ITS_FOLDER))"

Convert = Callable[[], torch.nn.Module]


@dataclass(frozen=True)
class Parts:
    """What of a pipeline is wanted, all of it if ``components`` is empty, and what of it the caller gives."""

    components: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)


def assemble(path: str, config: str, chosen: Any, supply: Supply, parts: Parts = Parts()) -> Any:  # noqa: ANN401
    """The model or pipeline in a file, or parts of it: one, or several by name.

    ``config`` is the folder of a pipeline or model that says how it is built; ``chosen`` a class, or its name, in place of the
    one that the config names.
    """
    with supply.clock.imports():
        library = require("diffusers", WHAT)
        require("transformers", WHAT)
        kind = kind_of(config)
        chosen = class_of(library, chosen, path) if isinstance(chosen, str) else chosen
        pipelines.import_the_rest()
    if kind is FolderKind.PIPELINE and (chosen is None or issubclass(chosen, library.DiffusionPipeline)):
        return _assemble_pipeline(Original(path), read_pipeline(config), chosen, parts, supply)
    if parts.given:
        raise InvalidOption(f"{', '.join(parts.given)}: a single model is made from its config alone")
    if parts.components:
        raise InvalidOption(f"{config}: {kind.value}, not a pipeline: it has no components to choose from")
    if kind not in (FolderKind.DIFFUSERS, FolderKind.PIPELINE) or (kind is FolderKind.PIPELINE and chosen is None):
        raise UnsupportedFormat(
            f"{config}: {kind.value}; the config of a single file is the folder of a diffusers pipeline or model"
        )
    return _assemble_model(Original(path), config, chosen or diffusers.model_class(config), supply)


class Original:
    """A file to be converted, as it is now. Its tensors are read by the libraries alone, and not cached.

    UnsupportedFormat for what is not one file; and what :func:`~nbcache.checkpoints.catalog.resolve` raises.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._checkpoint: Checkpoint = resolve(path)
        if len(self._checkpoint.members) != 1:
            raise UnsupportedFormat(f"{path}: {len(self._checkpoint.members)} files; what is converted is a single one")

    @property
    def is_gguf(self) -> bool:
        """Whether it may hold quantized blocks."""
        return self.file.path.endswith(GGUF_SUFFIX)

    @property
    def file(self) -> Member:
        """The file itself, where the path may be that of its folder."""
        return self._checkpoint.members[0]

    def dtype(self) -> torch.dtype | None:
        """The widest floating-point dtype in it, by its header. Raises as :func:`~nbcache.checkpoints.catalog.describe`."""
        description = describe(self._checkpoint)
        description.close()
        return widest(edge.dtypes_of(description.manifest).values())

    def entry(self, part: str, cls: type[Any], folder: str, beside: tuple[Member, ...], convert: Convert) -> Derived:
        """The entry of one model out of it, built as the config in ``folder`` says; ``beside`` are files read with it."""
        libraries = [f"{name} {require(name, WHAT).__version__}" for name in ("diffusers", "transformers")]
        made_by = [CONVERTER_VERSION, *libraries, cls.__name__, read_json(os.path.join(folder, CONFIG))]
        members = (self.file, *beside)
        return Derived(name_of(part, members, made_by), self.path, members, lambda: Made(_tensors_of(self.converted(convert))))

    def converted(self, convert: Convert) -> torch.nn.Module:
        """Have the libraries convert it. ModelMismatch, with what they say, if it is not what the config describes."""
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        try:
            with building, quiet(require("diffusers", WHAT), require("transformers", WHAT)):
                return convert()
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError, SingleFileComponentError) as error:
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            remedy = REMEDY if isinstance(error, SingleFileComponentError) else ""
            raise ModelMismatch(f"{self.path}: the libraries cannot convert it: {said}{remedy}") from error


def _tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's tensors; of those that transformers ties, one, as in what it saves."""
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    if not isinstance(model, require("transformers", WHAT).PreTrainedModel):
        return state
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


def _assemble_model(original: Original, config: str, cls: type[Any], supply: Supply) -> torch.nn.Module:
    if not hasattr(cls, "from_single_file"):
        raise UnsupportedFormat(f"{original.path}: {cls.__name__} cannot be made from a single file")
    if original.is_gguf:
        return _assemble_gguf(original, config, cls, supply, "")

    def convert() -> torch.nn.Module:
        model: torch.nn.Module = cls.from_single_file(original.file.path, config=config, torch_dtype=original.dtype())
        return model

    return _build(cls, config, original.entry(cls.__name__, cls, config, (), convert), supply, "")


def _assemble_gguf(original: Original, config: str, cls: type[Any], supply: Supply, name: str) -> torch.nn.Module:
    """A model over the tensors of a GGUF file, quantized ones as blocks; computing in the dtype asked for, else the others'."""
    library = require("diffusers", WHAT)
    require("gguf", WHAT)
    weights = supply.weights(original.path)
    plain = {key: tensor for key, tensor in weights.items() if key not in weights.quant_types}
    dtype = supply.dtype_of(name) or widest_dtype(plain) or torch.float32
    how = {"config": config, "torch_dtype": dtype, "device": supply.device}
    settings = library.GGUFQuantizationConfig(compute_dtype=dtype)
    return original.converted(lambda: cls.from_single_file(gguf_parameters(weights), quantization_config=settings, **how))


def _assemble_pipeline(
    original: Original, index: PipelineIndex, chosen: type[Any] | None, wanted: Parts, supply: Supply
) -> Any:  # noqa: ANN401
    library = require("diffusers", WHAT)
    index.check_names(wanted.components)
    with supply.clock.imports():
        pipeline_class = chosen or class_of(library, index.class_name, index.folder)
        classes = pipelines.model_components(index)
    if original.is_gguf:
        return _assemble_around_gguf(original, index, classes, wanted, supply)
    absent = {name: None for name in OPTIONAL if name in classes and name not in wanted.given}
    given = absent | dict(wanted.given)
    conversion = Conversion(original, index, classes, pipeline_class, given, alone=bool(wanted.components))
    if wanted.components:
        parts = {name: conversion.part(name, supply) for name in wanted.components}
        return parts if len(parts) > 1 else parts[wanted.components[0]]
    models = {name: conversion.part(name, supply) for name in classes if name not in given}
    with quiet(library, require("transformers", WHAT)):
        return pipeline_class.from_pretrained(index.folder, **models, **given)


def _assemble_around_gguf(
    original: Original, index: PipelineIndex, classes: Mapping[str, type[Any]], wanted: Parts, supply: Supply
) -> Any:  # noqa: ANN401
    """The pipeline of a folder, with the model that computes on a GGUF file's blocks in the place of its own."""
    name = "transformer" if "transformer" in classes else "unet"
    if wanted.components not in ((), (name,)):
        raise InvalidOption(f"{original.path}: a GGUF file holds one model; of a pipeline it is component {name}")
    model = _assemble_gguf(original, index.home(name), classes[name], supply, name)
    return model if wanted.components else pipelines.assemble(index, supply, given={**wanted.given, name: model})


@dataclass(frozen=True)
class Conversion:
    """The models of a pipeline out of one file. ``given`` is what is not to be made; ``alone``: not all of them are wanted."""

    original: Original
    index: PipelineIndex
    classes: Mapping[str, type[Any]]
    pipeline_class: type[Any]
    given: Mapping[str, Any]
    alone: bool

    def part(self, name: str, supply: Supply) -> Any:  # noqa: ANN401
        """A component: a model from its entry, converted if need be; a tokenizer or a scheduler from the config's folder."""
        if name not in self.classes:
            return pipelines.load_other(self.index, name)
        cls, home = self.classes[name], self.index.home(name)
        entry = self.original.entry(name, cls, home, _weights_beside(cls, home), lambda: self._convert(name))
        return _build(cls, home, entry, supply, name)

    def _convert(self, name: str) -> torch.nn.Module:
        """What the library makes of one component: with all the others, where most are wanted or only the pipeline can."""
        cls = self.classes[name]
        if self.alone and hasattr(cls, "from_single_file"):
            model: torch.nn.Module = cls.from_single_file(self.original.file.path, subfolder=name, **self._how)
            return model
        return getattr(self._pipeline, name)  # type: ignore[no-any-return]

    @functools.cached_property
    def _pipeline(self) -> Any:  # noqa: ANN401
        return self.pipeline_class.from_single_file(self.original.file.path, **self._how, **self.given)

    @property
    def _how(self) -> dict[str, Any]:
        return {"config": self.index.folder, "torch_dtype": self.original.dtype(), "local_files_only": True}


def _weights_beside(cls: type[Any], home: str) -> tuple[Member, ...]:
    """The weights in a component's folder: the library reads them if the single file has none for it."""
    if hasattr(cls, "from_single_file"):
        return ()
    try:
        return resolve(home).members
    except (CheckpointError, UnsupportedFormat):
        return ()


def _build(cls: type[Any], folder: str, entry: Derived, supply: Supply, name: str) -> torch.nn.Module:
    if not issubclass(cls, require("diffusers", WHAT).ModelMixin):
        with quiet(require("transformers", WHAT)):
            return transformers.assemble(folder, cls, supply, name=name, source=entry)
    dtype = supply.dtype_of(name)
    tensors = supply.tensors(entry, dtype, diffusers.keeps_fp32(cls))
    config = cls.load_config(folder)
    return diffusers.fill(cls, config, tensors, dtype or widest_dtype(tensors), supply, folder, name)
