"""Optional packages: imported when they are needed, named with the command that installs them when they are not there."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from nbcache.errors import ModelMismatch, ModelUnknown, PackageMissing

EXTRAS = {
    "diffusers": "diffusers",
    "accelerate": "transformers",
    "transformers": "transformers",
    "peft": "lora",
    "gguf": "gguf",
    "huggingface_hub": "hub",
    "sentencepiece": "diffusers",
    "google.protobuf": "diffusers",
    "PIL": "diffusers",
}
"""Which extra of nbcache brings a package."""

LEAST = {"diffusers": "0.35", "transformers": "4.56", "accelerate": "1.0", "peft": "0.18"}
"""The lowest versions that work, as nbcache's extras ask for them."""
LEAST_FOR_LORAS = "0.36"
"""Of diffusers, whose converters are newer than the rest."""

building = threading.RLock()
"""Held while a model is built: libraries set torch's default dtype and patch its modules for the time of it."""


def require(package: str, for_what: str, least: str = "") -> ModuleType:
    """Import an optional package. PackageMissing if it, or one that it needs, is not installed, or it is too old.

    ``least`` is the version that is wanted, where it is another than that of ``LEAST``.
    """
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise missing(error.name or package, for_what) from error
    least = least or LEAST.get(package, "")
    if least and release(module.__version__) < release(least):
        raise PackageMissing(
            f"{for_what} needs {package} {least} or newer; {module.__version__} is installed: pip install -U {package}"
        )
    return module


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def missing(package: str, for_what: str) -> PackageMissing:
    """The error for a package that is not installed."""
    extra = EXTRAS.get(package, "")
    command = f"pip install 'nbcache[{extra}]'" if extra else f"pip install {package.partition('.')[0]}"
    return PackageMissing(f"{for_what} needs the package {package}, which is not installed: {command}")


def dtype_word(library: ModuleType) -> str:
    """What ``from_pretrained`` calls a dtype: the older word warns in transformers from 4.56 on, in diffusers from 0.40."""
    since = {"transformers": "4.56", "diffusers": "0.40"}[library.__name__]
    return "dtype" if release(library.__version__) >= release(since) else "torch_dtype"


def class_of(module: ModuleType, name: str, where: str) -> type[Any]:
    """A class of a library, by name. ModelUnknown if it has none of that name; PackageMissing if it lacks a package for it."""
    try:
        found = getattr(module, name, None)
    except (ImportError, RuntimeError) as error:  # their lazy modules wrap one in the other
        cause = error if isinstance(error, ImportError) else error.__cause__
        if isinstance(cause, ImportError) and cause.name and not cause.name.startswith(module.__name__):
            raise missing(cause.name, f"{where}: {name}") from error
        raise ModelUnknown(f"{where}: {module.__name__} could not import {name}: {error}") from error
    if not isinstance(found, type):
        version = getattr(module, "__version__", "")
        raise ModelUnknown(
            f"{where}: {module.__name__} {version} has no class {name!r}; a newer one may: pip install -U {module.__name__}"
        )
    if backends := getattr(found, "_backends", None):  # a stand-in that raises when it is used
        absent = [backend for backend in backends if importlib.util.find_spec(backend) is None]
        if absent:
            raise missing(absent[0], f"{where}: {name}")
    return found


def mismatch(what: str, class_name: str, absent: list[str], surplus: list[str]) -> ModelMismatch:
    """The error for keys that a class needs and a checkpoint lacks, or the other way round."""
    parts = [
        f"{len(keys)} {how} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for how, keys in (("missing", absent), ("unexpected", surplus))
        if keys
    ]
    return ModelMismatch(f"{what}: the tensors are not those of {class_name}: {', '.join(parts)}")


@contextlib.contextmanager
def quiet(*libraries: ModuleType) -> Iterator[None]:
    """Without the libraries' progress bars, which would show milliseconds."""
    bars = [library.utils.logging for library in libraries]
    shown = [bar for bar in bars if bar.is_progress_bar_enabled()]
    for bar in shown:
        bar.disable_progress_bar()
    try:
        yield
    finally:
        for bar in shown:
            bar.enable_progress_bar()
