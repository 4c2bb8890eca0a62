"""Single-file checkpoints in their authors' own layout: converted once, and kept converted.

The libraries' ``from_single_file`` renames, cuts and joins tensors each time. Here it runs once, on the CPU, in the file's own
dtype; each model that it gives is kept as a saved entry that says what it was made from, and is assembled from there like a
component of a folder from then on. A file that changed, or another version of the library, is converted again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch

from nbcache.checkpoints.catalog import resolve
from nbcache.checkpoints.folders import FolderKind, PipelineIndex, kind_of, read_pipeline
from nbcache.client import api
from nbcache.client.fill import is_saved
from nbcache.client.weights import Weights
from nbcache.errors import InvalidOption, UnsupportedFormat
from nbcache.models import diffusers, pipelines, transformers
from nbcache.models.packages import building, class_of, quiet, require
from nbcache.models.supply import Supply, widest_dtype

WHAT = "loading a single-file checkpoint"
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that no single file has; a pipeline does without, as ``from_single_file`` lets it."""


def assemble(path: str, config: str, chosen: Any, supply: Supply, options: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The model or pipeline in a file. ``config`` is the folder of a pipeline or model that says how it is built.

    ``chosen`` is a class, or its name, in place of the one that the config names; ``options`` are components of a pipeline.
    """
    with supply.clock.imports():
        library = require("diffusers", WHAT)
        require("transformers", WHAT)
        kind = kind_of(config)
        chosen = class_of(library, chosen, path) if isinstance(chosen, str) else chosen
        pipelines.import_the_rest()
    if kind is FolderKind.PIPELINE and (chosen is None or issubclass(chosen, library.DiffusionPipeline)):
        return _assemble_pipeline(path, read_pipeline(config), chosen, supply, options)
    if options:
        raise InvalidOption(f"{', '.join(options)}: a single model is made from its config alone")
    if kind not in (FolderKind.DIFFUSERS, FolderKind.PIPELINE) or (kind is FolderKind.PIPELINE and chosen is None):
        raise UnsupportedFormat(
            f"{config}: {kind.value}; the config of a single file is the folder of a diffusers pipeline or model"
        )
    cls = chosen or diffusers.model_class(config)
    return _assemble_model(path, config, cls, supply)


def _assemble_model(path: str, config: str, cls: type[Any], supply: Supply) -> torch.nn.Module:
    if not hasattr(cls, "from_single_file"):
        raise UnsupportedFormat(f"{path}: {cls.__name__} cannot be made from a single file")
    entry = Converted(path, cls.__name__, config)
    if not entry.is_kept():
        with building, quiet(require("diffusers", WHAT)):
            checkpoint = dict(api.load(path, "cpu"))
            model = cls.from_single_file(checkpoint, config=config, torch_dtype=widest_dtype(checkpoint))
        entry.keep(model)
        supply.tally.hits.append(False)
    return _build(cls, config, entry, supply, "")


def _assemble_pipeline(
    path: str, index: PipelineIndex, chosen: type[Any] | None, supply: Supply, options: Mapping[str, Any]
) -> Any:  # noqa: ANN401
    library = require("diffusers", WHAT)
    with supply.clock.imports():
        pipeline_class = chosen or class_of(library, index.class_name, index.folder)
        classes = pipelines.model_components(index)
    absent = {name: None for name in OPTIONAL if name in classes and name not in options}
    given = absent | dict(options)
    entries = {name: Converted(path, name, index.folder) for name in classes if name not in given}
    if not all(entry.is_kept() for entry in entries.values()):
        _convert_pipeline(path, pipeline_class, index, entries, given)
        supply.tally.hits.append(False)
    with quiet(library, require("transformers", WHAT)):
        models = {name: _build(classes[name], index.home(name), entry, supply, name) for name, entry in entries.items()}
        return pipeline_class.from_pretrained(index.folder, **models, **given)


def _convert_pipeline(
    path: str, cls: type[Any], index: PipelineIndex, entries: Mapping[str, Converted], given: Mapping[str, Any]
) -> None:
    """Have the library make the whole pipeline once, and keep its models."""
    dtype = widest_dtype(api.load(path, "cpu"))
    with building, quiet(require("diffusers", WHAT), require("transformers", WHAT)):
        stock = cls.from_single_file(path, config=index.folder, torch_dtype=dtype, local_files_only=True, **given)
    for name, entry in entries.items():
        entry.keep(getattr(stock, name))


def _build(cls: type[Any], folder: str, entry: Converted, supply: Supply, name: str) -> torch.nn.Module:
    if not issubclass(cls, require("diffusers", WHAT).ModelMixin):
        return transformers.assemble(folder, cls, supply, name=name, source=entry.label)
    dtype = supply.dtype_of(name)
    tensors = supply.tensors(entry.label, dtype, diffusers.keeps_fp32(cls))
    config = cls.load_config(folder)
    return diffusers.fill(cls, config, tensors, dtype or widest_dtype(tensors), supply, folder, name)


class Converted:
    """The saved entry of one model out of a file: under which name, and made from what."""

    def __init__(self, path: str, part: str, config: str) -> None:
        import diffusers as library

        where = hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()
        self.label = f"{os.path.basename(path)}:{part}@{where}"
        self._source = f"{resolve(path).key} {part} {config} diffusers-{library.__version__}"

    def is_kept(self) -> bool:
        """Whether it is there, made from what the file and the library are now."""
        return is_saved(self.label) and self._weights().metadata.get("source") == self._source

    def keep(self, model: torch.nn.Module) -> None:
        """Save the model's tensors, in place of those that were made from something else."""
        api.put(self.label, model.state_dict(), {"source": self._source})

    def _weights(self) -> Weights:
        return api.load(self.label, "cpu")
