"""One model of transformers over cached tensors: its own ``from_pretrained``, given the tensors in place of files.

The library renames keys, ties weights, keeps modules in float32 and makes the buffers that no checkpoint has; here are only the
tensors, and what it would have read beside them. What it casts or fuses becomes private memory.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from nbcache.checkpoints.folders import CONFIG, read_json, weights_path
from nbcache.errors import InvalidOption, ModelMismatch, ModelUnknown
from nbcache.models import lean, seating
from nbcache.models.derived import Derived
from nbcache.models.packages import building, class_of, dtype_word, mismatch, require
from nbcache.models.supply import Supply, widest_dtype

WHAT = "loading a transformers model"
ADAPTER_CONFIG = "adapter_config.json"
IN_LINE = "HF_DEACTIVATE_ASYNC_LOAD"
"""The library's variable for: no threads."""
NAMELESS = "the model checkpoint at None"
"""How the library's messages name a model that it is given the tensors of."""


def model_class(folder: str) -> type[Any]:
    """The class that a folder's config names first, else the base model of its type. ModelUnknown, PackageMissing."""
    library = require("transformers", WHAT)
    names = read_json(os.path.join(folder, CONFIG)).get("architectures")
    if isinstance(names, list) and names:
        return class_of(library, str(names[0]), folder)
    return class_of(library, "AutoModel", folder)


def custom_class(folder: str, chosen: type[Any] | str | None) -> type[Any] | None:
    """The Auto class that makes a model with code of its own: the chosen one, or its architecture's; None without code."""
    library = require("transformers", WHAT)
    config = read_json(os.path.join(folder, CONFIG))
    known = config.get("auto_map")
    if not isinstance(known, dict):
        return None
    wanted = chosen if isinstance(chosen, str) else getattr(chosen, "__name__", "")
    first = next(iter(config.get("architectures") or ()), "")
    names = [name for name, value in known.items() if name.startswith("AutoModel") and str(value).endswith(f".{first}")]
    name = wanted if wanted in known else next(iter(names), "AutoModel" if "AutoModel" in known and not wanted else "")
    return class_of(library, name, folder) if name else None


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
    known_as: str = "",
    **options: Any,  # noqa: ANN401
) -> torch.nn.Module:
    """The model of a folder, on the supply's device, in eval mode.

    ``name`` is the component it is, for dtype and messages; ``source`` a derived entry to take the tensors from; ``lenient``
    lets the library initialise what the checkpoint lacks, as it does for a class with another head; ``known_as`` is what it was
    asked for as, such as a repository. ``options`` are those of the class's ``from_pretrained``. ModelMismatch; and what
    :func:`nbcache.load` raises.
    """
    library = require("transformers", WHAT)
    _check_options(options)
    resized = bool(options.pop("ignore_mismatched_sizes", False))
    with supply.clock.imports():
        prepare()
        config, options = _read_config(library, folder, cls, options)
        if cls.__name__.startswith("Auto"):
            cls = _model_for(cls, config, folder)
    dtype = supply.dtype_of(name)
    # A slab that is cast as a whole will do only where nothing stays in float32.
    whole = not _may_keep_fp32(cls, config)
    tensors = dict(supply.weights(source or weights_path(folder, variant), dtype if whole else None))
    with building, _no_warmup(library), _without_detours(library), _reported_as(library, known_as or folder):
        model, report = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": supply.device} if supply.device.type != "cpu" else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with their names
            **{dtype_word(library): _wanted(dtype, tensors if source else {})},
            **options,
        )
    _check(report, cls, name or folder, lenient, resized)
    model.name_or_path = model.config.name_or_path = known_as or folder
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map  # all is on one device, as after .to(device)
    if model.can_generate() and "generation_config" not in options:
        _remember_generation(model, library, folder)
    _add_adapter(model, folder)
    return model  # type: ignore[no-any-return]


NOT_TAKEN = {
    "device_map": "device= says where a model goes",
    "state_dict": "the tensors are the folder's",
    "output_loading_info": "what does not fit is an error here",
    "cache_dir": "set HF_HUB_CACHE, or give the path of the snapshot",
    "from_tf": "give a checkpoint of PyTorch's",
    "from_flax": "give a checkpoint of PyTorch's",
}
"""What the library's ``from_pretrained`` takes and ours does not, and what to do instead."""


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name in NOT_TAKEN:
            raise InvalidOption(f"{name}: {NOT_TAKEN[name]}; the library's own from_pretrained takes it")


def _read_config(library: Any, folder: str, cls: type[Any], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401
    """The config, with the options that are the config's, and the other options: as the class itself would read it."""
    reader = library.AutoConfig if cls.__name__.startswith("Auto") else getattr(cls, "config_class", None) or library.AutoConfig
    try:
        return reader.from_pretrained(folder, return_unused_kwargs=True, **options)  # type: ignore[no-any-return]
    except (ValueError, KeyError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelUnknown(f"{folder}: {CONFIG}: transformers {library.__version__} cannot read it: {line}") from error


def _model_for(cls: type[Any], config: Any, folder: str) -> type[Any]:  # noqa: ANN401
    """The class that an Auto class has for a config."""
    try:
        found = cls._model_mapping[type(config)]
    except KeyError as error:
        raise ModelUnknown(f"{folder}: {cls.__name__} has no model for a {type(config).__name__}") from error
    # Of several that one config may mean, the first, as in the library.
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def _wanted(dtype: torch.dtype | None, converted: dict[str, torch.Tensor]) -> torch.dtype | str:
    """The dtype to ask the library for: that of a converted file's tensors, or else what the config says."""
    return dtype or widest_dtype(converted) or "auto"


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
def _reported_as(library: Any, name: str) -> Iterator[None]:  # noqa: ANN401
    """What the library tells of keys that are missing or left over names what they are of."""
    module = library.modeling_utils
    stock = getattr(module, "log_state_dict_report", None)
    if stock is None:  # before 5.0

        def named(record: logging.LogRecord) -> bool:
            record.msg = str(record.msg).replace(NAMELESS, f"the model checkpoint at {name}")
            return True

        module.logger.addFilter(named)
        try:
            yield
        finally:
            module.logger.removeFilter(named)
        return

    def report(**details: Any) -> Any:  # noqa: ANN401
        return stock(**details | {"pretrained_model_name_or_path": name})

    module.log_state_dict_report = report
    try:
        yield
    finally:
        module.log_state_dict_report = stock


@contextlib.contextmanager
def _without_detours(library: Any) -> Iterator[None]:  # noqa: ANN401
    """Without what the library does from 5.0 on for each tensor, as if read from a disk: a task, a pattern, a search."""
    module = sys.modules.get("transformers.core_model_loading")
    if module is None:  # an older one, which may want its layers to have memory
        yield
        return
    before = os.environ.get(IN_LINE)
    os.environ[IN_LINE] = "1"
    try:
        with lean.layers_without_memory(), lean.late_patterns(module), seating.seating_first(module, library.modeling_utils):
            yield
    finally:
        if before is None:
            del os.environ[IN_LINE]
        else:
            os.environ[IN_LINE] = before


def _check(report: dict[str, Any], cls: type[Any], what: str, lenient: bool, resized: bool) -> None:
    absent = sorted(report["missing_keys"])
    shapes = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    if shapes and not resized:
        raise ModelMismatch(f"{what}: {len(shapes)} tensors do not fit {cls.__name__}: {', '.join(shapes[:3])}")
    if absent and not lenient:
        raise mismatch(what, cls.__name__, absent, sorted(report["unexpected_keys"]))


def _remember_generation(model: Any, library: Any, folder: str) -> None:  # noqa: ANN401
    """How to generate: from its own file, else, from transformers 5 on, from what old models have in their config."""
    try:
        model.generation_config = library.GenerationConfig.from_pretrained(folder)
    except OSError:
        if int(library.__version__.partition(".")[0]) >= 5:
            model.generation_config = library.GenerationConfig.from_pretrained(
                folder, config_file_name=CONFIG, _from_model_config=True
            )


def _add_adapter(model: Any, folder: str) -> None:  # noqa: ANN401
    """The adapter of peft's that lies beside a model, which the library adds if peft is there."""
    if os.path.exists(os.path.join(folder, ADAPTER_CONFIG)) and importlib.util.find_spec("peft") is not None:
        model.load_adapter(folder)
