"""What a model folder is, by the JSON files in it: a pipeline, a model of a library, or bare weights.

Reads ``model_index.json`` and ``config.json`` and looks at file names; opens no weights, and imports no library that the files
speak of. It exists so that a name can be understood, staged or downloaded without torch.

Sources: diffusers' ``DiffusionPipeline.save_pretrained`` (``model_index.json``: component name to ``[library, class]``),
``ModelMixin.save_config`` (``_class_name``), transformers' ``PretrainedConfig`` (``model_type``, ``architectures``), and the
file names of their ``variant=``.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from nbcache.errors import CheckpointIncomplete, CheckpointInvalid, CheckpointNotFound, CheckpointUnreadable, InvalidOption
from nbcache.typos import did_you_mean

PIPELINE_INDEX = "model_index.json"
CONFIG = "config.json"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""Under which names diffusers and transformers write weights."""


class FolderKind(enum.Enum):
    """What a folder holds. The value is what a message calls it."""

    PIPELINE = "a diffusers pipeline"
    DIFFUSERS = "a diffusers model"
    TRANSFORMERS = "a transformers model"
    BARE = "bare weights"


@dataclass(frozen=True)
class Component:
    """One component of a pipeline: its name, and which class of which library it is."""

    name: str
    library: str
    class_name: str


@dataclass(frozen=True)
class PipelineIndex:
    """A ``model_index.json``: the pipeline's class, and the components that it has (those that are null left out)."""

    folder: str
    class_name: str
    components: tuple[Component, ...]
    custom: bool = False
    """Whether the class is not diffusers' own, but in a file beside."""

    def home(self, component: str) -> str:
        """The folder of a component: its own, or the pipeline's where it has none."""
        own = os.path.join(self.folder, component)
        return own if os.path.isdir(own) else self.folder

    def model_homes(self) -> list[str]:
        """The folders of its components that have weights, those that are there, each once."""
        homes = dict.fromkeys(os.path.join(self.folder, component.name) for component in self.components)
        return [home for home in homes if kind_of(home) in (FolderKind.DIFFUSERS, FolderKind.TRANSFORMERS)]

    def check_names(self, names: Iterable[str]) -> None:
        """InvalidOption for a component that the pipeline does not have."""
        there = [component.name for component in self.components]
        for name in names:
            if name not in there:
                raise InvalidOption(f"component {name!r}: {self.folder} has {', '.join(there)}{did_you_mean(name, there)}")


def component_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Names of components, from a text with commas between them or as they are."""
    return tuple(part.strip() for part in given.split(",") if part.strip()) if isinstance(given, str) else tuple(given)


def kind_of(path: str) -> FolderKind:
    """What a path is, by the JSON in it; anything that is no folder is bare weights. CheckpointInvalid for broken JSON."""
    if not os.path.isdir(path):
        return FolderKind.BARE
    if os.path.exists(os.path.join(path, PIPELINE_INDEX)):
        return FolderKind.PIPELINE
    config = read_json(os.path.join(path, CONFIG)) if os.path.exists(os.path.join(path, CONFIG)) else {}
    if "_class_name" in config:
        return FolderKind.DIFFUSERS
    return FolderKind.TRANSFORMERS if "model_type" in config or "architectures" in config else FolderKind.BARE


def read_pipeline(folder: str) -> PipelineIndex:
    """Read a pipeline's index. CheckpointInvalid if it names no class; CheckpointUnreadable."""
    path = os.path.join(folder, PIPELINE_INDEX)
    index = read_json(path)
    class_name = index.get("_class_name")
    custom = False
    if isinstance(class_name, list):  # [module, class]
        class_name, custom = class_name[-1], True
    if not isinstance(class_name, str):
        raise CheckpointInvalid(f"{path}: names no pipeline class (_class_name)")
    found = []
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue  # a setting
        if len(value) != 2 or not all(part is None or isinstance(part, str) for part in value):
            raise CheckpointInvalid(f"{path}: component {name!r} is {value!r}, expected [library, class]")
        if value[0] is not None and value[1] is not None:
            found.append(Component(name, value[0], value[1]))
    return PipelineIndex(folder, class_name, tuple(found), custom)


def read_json(path: str) -> dict[str, Any]:
    """A JSON object in a file. CheckpointNotFound, CheckpointUnreadable, CheckpointInvalid."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=dict[str, Any])
    except FileNotFoundError as error:
        raise CheckpointNotFound(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointUnreadable(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointInvalid(f"{path}: not a JSON object: {error}") from error


def weights_path(folder: str, variant: str = "") -> str:
    """What a model folder's weights are loaded by: the folder itself, or for a variant its own file or shard index.

    As in diffusers, a folder without that variant is loaded without it. CheckpointIncomplete if there is a config and no
    weights at all.
    """
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise CheckpointUnreadable(f"{folder}: {error.strerror}") from error
    for name in variant_files(variant) if variant else ():
        if name in names:
            return os.path.join(folder, name)
    if not any(name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")) for name in names):
        raise CheckpointIncomplete(f"{folder}: has a {CONFIG} and no weights; download it again")
    return folder


def variant_files(variant: str) -> tuple[str, ...]:
    """The files that may stand for a variant: shard indices first, as a lone shard is no checkpoint."""
    found: list[str] = []
    for suffix in ("safetensors", "bin"):
        found += [f"{stem}.{suffix}.index.{variant}.json" for stem in STEMS]
        found += [f"{stem}.{variant}.{suffix}" for stem in STEMS]
    return tuple(found)


def class_name_of(config: Mapping[str, Any], path: str) -> str:
    """The class that a ``config.json`` names. CheckpointInvalid if it names none."""
    architectures = config.get("architectures")
    name = config.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else None)
    if not isinstance(name, str):
        raise CheckpointInvalid(f"{path}: names no class (_class_name, architectures)")
    return name


def variant_names(folder: str) -> list[str]:
    """The files in a folder that stand for some variant of its weights."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    found = re.compile(rf"({'|'.join(STEMS)})\.((safetensors|bin)\.index\.[\w-]+\.json|[\w-]+\.(safetensors|bin))")
    return sorted(name for name in names if found.fullmatch(name))
