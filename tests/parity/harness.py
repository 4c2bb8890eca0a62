"""Stock against cached: everything of a loaded model that a user could notice, as one comparable value."""

from __future__ import annotations

import ctypes
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.support.models import SUBJECTS, Subject

Portrait = dict[str, Any]
"""What is compared: plain values, so that it can be printed, and sent between processes."""


COPIED = {"bert-tied": ["cls.predictions.bias"]}
"""What newer transformers copy, though nothing is cast: a tied bias of 64 numbers. All else lies in the cache's memory."""


def portrait(loaded: Any) -> Portrait:
    """Of a pipeline that of each of its models, and the settings of the rest; of a model all of :func:`portrait_of_model`."""
    if isinstance(loaded, torch.nn.Module):
        return portrait_of_model(loaded)
    parts = {name: part for name, part in sorted(loaded.components.items()) if part is not None}
    return {"class": type(loaded).__name__, "config": clean(loaded.config)} | {
        name: portrait_of_model(part) if isinstance(part, torch.nn.Module) else portrait_of_other(part)
        for name, part in parts.items()
    }


def portrait_of_model(model: torch.nn.Module) -> Portrait:
    """Class, config, mode, generation config; keys in order; each tensor, with device and gradient; buffers; tying."""
    return {
        "class": type(model).__name__,
        "config": clean(model.config if isinstance(model.config, dict) else model.config.to_dict()),
        "training": [name for name, module in model.named_modules() if module.training],
        "generation": clean(model.generation_config.to_dict()) if getattr(model, "generation_config", None) else None,
        "keys": list(model.state_dict()),
        "parameters": {name: describe(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: describe(b) for name, b in model.named_buffers(remove_duplicate=False)},
        "tied": tied(model),
        "hooked": [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")],
        "dtype": str(model.dtype),
        "device": str(model.device),
    }


def portrait_of_other(part: Any) -> Portrait:
    """A tokenizer, a scheduler: its class and what it says of itself."""
    settings = part.config if hasattr(part, "config") else {"vocabulary": sorted(part.get_vocab().items())}
    return {"class": type(part).__name__, "settings": clean(dict(settings))}


def clean(settings: Any) -> str:
    """Settings as text, without where they were loaded from."""
    return str(sorted((key, value) for key, value in settings.items() if key not in ("_name_or_path", "name_or_path")))


def describe(tensor: torch.Tensor) -> list[str]:
    """All of a tensor but its address."""
    return [
        type(tensor).__name__,
        str(tensor.dtype),
        str(tuple(tensor.shape)),
        str(tensor.stride()),
        str(tensor.device),
        str(tensor.requires_grad),
        str(tensor.is_contiguous()),
        digest(tensor),
    ]


def digest(tensor: torch.Tensor) -> str:
    """A checksum of a tensor's bytes, if it has any where it is."""
    if tensor.is_meta:
        return "meta"
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(ctypes.string_at(flat.data_ptr(), flat.nbytes) if flat.nbytes else b"").hexdigest()[:16]


def tied(model: torch.nn.Module) -> list[list[str]]:
    """Groups of names of one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)


def outside_the_cache(loaded: Any) -> list[str]:
    """The parameters that do not lie in memory which the cache shares."""
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if "memfd:nbcache" in line]
    areas = [(int(start, 16), int(end, 16)) for start, end in ranges]
    models = [loaded] if isinstance(loaded, torch.nn.Module) else loaded.components.values()
    return [
        name
        for model in models
        if isinstance(model, torch.nn.Module)
        for name, parameter in model.named_parameters()
        if not any(start <= parameter.data_ptr() < end for start, end in areas)
    ]


def differences(stock: Any, cached: Any, path: str = "") -> Iterator[str]:
    """What is not the same in two portraits, by path."""
    if isinstance(stock, dict) and isinstance(cached, dict):
        for key in {**stock, **cached}:
            if key in stock and key in cached:
                yield from differences(stock[key], cached[key], f"{path}/{key}")
            else:
                yield f"{path}/{key}: only in {'stock' if key in stock else 'cached'}"
    elif stock != cached:
        yield f"{path}: stock {stock}, cached {cached}"


@contextmanager
def library_noise() -> Iterator[None]:
    """Warnings of the libraries, which are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_stock(folder: Path, subject: Subject, dtype: torch.dtype | str) -> Any:
    """What the libraries load. A dtype is always given: diffusers makes everything float32 without.

    The parameters are moved to memory of torch's own: in a mapped file they lie at odd addresses, and what a CPU computes
    depends on that in the last bit (seen: the same stock model, before and after this, differs in its output).
    """
    loaded = _load_stock(folder, subject, dtype)
    models = [loaded] if isinstance(loaded, torch.nn.Module) else loaded.components.values()
    for parameter in {p for model in models if isinstance(model, torch.nn.Module) for p in model.parameters()}:
        parameter.data = parameter.data.clone()
    return loaded


def _load_stock(folder: Path, subject: Subject, dtype: torch.dtype | str) -> Any:
    import diffusers
    import transformers

    from nbcache.checkpoints.folders import CONFIG, class_name_of, read_json

    with library_noise():
        if subject.pipeline:
            return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
        name = class_name_of(read_json(str(folder / CONFIG)), "")
        if hasattr(diffusers, name):
            return getattr(diffusers, name).from_pretrained(folder, torch_dtype=dtype)
        return getattr(transformers, name).from_pretrained(folder, dtype=dtype)


def seen(name: str, folder: str) -> list[Any]:
    """The portrait of a subject out of the cache, what is computed with it, and whether it was cached; for another process."""
    from nbcache.models.api import assemble_name

    made = assemble_name(folder, device="cpu")
    return [portrait(made.value), run(SUBJECTS[name], made.value), made.tally.hit]


def run(subject: Subject, loaded: Any) -> list[str]:
    """What is computed with it, described."""
    with library_noise(), torch.inference_mode():
        return describe(subject.run(loaded).clone())
