"""One model of transformers over cached tensors: its own ``from_pretrained``, given the tensors in place of files.

The library renames keys, ties weights, keeps modules in float32 and makes the buffers that no checkpoint has; here are only the
tensors, and what it would have read beside them. What it casts or fuses becomes private memory.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from nbcache.checkpoints.folders import CONFIG, read_json, weights_path
from nbcache.errors import ModelMismatch
from nbcache.models import lean
from nbcache.models.derived import Derived
from nbcache.models.packages import building, class_of, mismatch, require
from nbcache.models.supply import Supply, widest_dtype

WHAT = "loading a transformers model"
IN_LINE = "HF_DEACTIVATE_ASYNC_LOAD"
"""The library's variable for: no threads."""


def model_class(folder: str) -> type[Any]:
    """The class that a folder's config names first, else the base model of its type. ModelUnknown, PackageMissing."""
    library = require("transformers", WHAT)
    names = read_json(os.path.join(folder, CONFIG)).get("architectures")
    if isinstance(names, list) and names:
        return class_of(library, str(names[0]), folder)
    return class_of(library, "AutoModel", folder)


def prepare() -> None:
    """Have the library compile its table of renamed keys, which it does at the first load, for all models: 0.2 s once."""
    require("transformers", WHAT)
    if importlib.util.find_spec("transformers.conversion_mapping") is not None:
        conversion_mapping = importlib.import_module("transformers.conversion_mapping")
        conversion_mapping.get_checkpoint_conversion_mapping("bert")


def assemble(
    folder: str,
    cls: type[Any],
    supply: Supply,
    *,
    name: str = "",
    variant: str = "",
    source: Derived | None = None,
    lenient: bool = False,
    **options: Any,  # noqa: ANN401
) -> torch.nn.Module:
    """The model of a folder, on the supply's device, in eval mode.

    ``name`` is the component it is, for dtype and messages; ``source`` a derived entry to take the tensors from; ``lenient``
    lets the library initialise what the checkpoint lacks, as it does for a class with another head. ``options`` are those of
    the class's ``from_pretrained``. ModelMismatch; and what :func:`nbcache.load` raises.
    """
    library = require("transformers", WHAT)
    with supply.clock.imports():
        prepare()
        config = library.AutoConfig.from_pretrained(folder)
        if cls.__name__.startswith("Auto"):
            cls = cls._model_mapping[type(config)]
    dtype = supply.dtype_of(name)
    # A slab that is cast as a whole will do only where nothing stays in float32.
    whole = not _may_keep_fp32(cls, config)
    tensors = dict(supply.weights(source or weights_path(folder, variant), dtype if whole else None))
    with building, _no_warmup(library), _without_detours():
        model, report = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": supply.device} if supply.device.type != "cpu" else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with their names
            **{_dtype_word(library): _wanted(dtype, tensors if source else {})},
            **options,
        )
    _check(report, cls, name or folder, lenient)
    _remember(model, library, folder)
    return model  # type: ignore[no-any-return]


def _wanted(dtype: torch.dtype | None, converted: dict[str, torch.Tensor]) -> torch.dtype | str:
    """The dtype to ask the library for: that of a converted file's tensors, or else what the config says."""
    return dtype or widest_dtype(converted) or "auto"


def _dtype_word(library: Any) -> str:  # noqa: ANN401
    """What ``from_pretrained`` calls a dtype: the older word warns from 4.56 on."""
    major, minor = (int(part) for part in library.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _may_keep_fp32(cls: type[Any], config: Any) -> bool:  # noqa: ANN401
    if getattr(config, "sub_configs", None):
        return True  # its parts may
    return bool(getattr(cls, "_keep_in_fp32_modules", None) or getattr(cls, "_keep_in_fp32_modules_strict", None))


@contextlib.contextmanager
def _no_warmup(library: Any) -> Iterator[None]:  # noqa: ANN401
    """Without the library's allocation of as much GPU memory as the model has: the memory is there already."""
    module = library.modeling_utils
    stock = getattr(module, "caching_allocator_warmup", None)
    if stock is None:
        yield
        return
    module.caching_allocator_warmup = lambda *_, **__: None
    try:
        yield
    finally:
        module.caching_allocator_warmup = stock


@contextlib.contextmanager
def _without_detours() -> Iterator[None]:
    """Without what the library does from 5.0 on for each tensor, as if it came from a disk: a task of a thread, a pattern."""
    module = sys.modules.get("transformers.core_model_loading")
    if module is None:  # an older one, which may want its layers to have memory
        yield
        return
    before = os.environ.get(IN_LINE)
    os.environ[IN_LINE] = "1"
    try:
        with lean.layers_without_memory(), lean.late_patterns(module):
            yield
    finally:
        if before is None:
            del os.environ[IN_LINE]
        else:
            os.environ[IN_LINE] = before


def _check(report: dict[str, Any], cls: type[Any], what: str, lenient: bool) -> None:
    absent = sorted(report["missing_keys"])
    shapes = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    if shapes:
        raise ModelMismatch(f"{what}: {len(shapes)} tensors do not fit {cls.__name__}: {', '.join(shapes[:3])}")
    if absent and not lenient:
        raise mismatch(what, cls.__name__, absent, sorted(report["unexpected_keys"]))


def _remember(model: Any, library: Any, folder: str) -> None:  # noqa: ANN401
    """What the library would have known from the folder: where it is, and how to generate."""
    model.name_or_path = folder
    model.config.name_or_path = folder
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map  # all is on one device, as after .to(device)
    if model.can_generate() and os.path.exists(os.path.join(folder, "generation_config.json")):
        model.generation_config = library.GenerationConfig.from_pretrained(folder)
