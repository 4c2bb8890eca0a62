"""``load_model``: the public function over all of this room. Imports nothing slow by itself."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nbcache.client.options import Share
from nbcache.client.session import ProgressCallback
from nbcache.errors import InvalidOption

if TYPE_CHECKING:
    import torch

    from nbcache.models.assembly import Assembled


def load_model(
    name: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | Mapping[str, Any] | None = None,
    share: Share = "cow",
    *,
    torch_dtype: str | torch.dtype | Mapping[str, Any] | None = None,
    components: str | Sequence[str] = (),
    raw: bool = False,
    revision: str = "",
    variant: str = "",
    subfolder: str = "",
    config: str | os.PathLike[str] = "",
    model_class: Any = None,  # noqa: ANN401 - a class of a library that need not be installed, or its name
    on_progress: ProgressCallback | None = None,
    **options: Any,  # noqa: ANN401 - those of the library's own from_pretrained
) -> Any:  # noqa: ANN401 - a pipeline, a model, weights
    """What a folder holds, ready to run, its tensors shared with the cache: a pipeline, a model, or weights.

    Parameters
    ----------
    name : an alias, the path of a folder, or a repository of the hub, which is downloaded if it is not in the hub's cache. A
        folder with a ``model_index.json`` gives that pipeline, with a ``config.json`` of diffusers or transformers that model;
        what has neither gives :class:`nbcache.Weights`, as :func:`nbcache.load` does
    device : where to; None means cuda where there is one, else cpu
    dtype, torch_dtype : the same by two names: what floating-point tensors are cast to, the modules left in float32 that the
        library leaves so; a mapping gives one for each component, and ``default``. None: as in the files (for transformers:
        as in the config)
    share : ``cow``, ``readonly`` or ``private``, as in :func:`nbcache.load`
    components : load these of a pipeline alone: one gives that object, several a dict
    raw : give ``Weights`` in place of models; for a pipeline a dict of them, by component
    revision, variant, subfolder : of a repository, which branch, tag or commit; such as ``fp16``: files of that variant,
        where there are any; which folder in it
    config : for a single-file checkpoint in its authors' own layout: the folder or hub id of a diffusers pipeline or model that
        is built the same; the file is converted once, and kept converted. Of a GGUF file nothing is converted: what is
        quantized stays so, and is computed with in ``dtype``
    model_class : in place of the class that the config names, or of the pipeline's; what the checkpoint lacks for a model of it
        is then initialised by the library, which says so
    on_progress : called with staged and total bytes while files are read
    options : handed to the library's ``from_pretrained`` (``safety_checker=None``, ``attn_implementation="sdpa"``,
        ``num_labels=5``). What is quantized, or is to be (``quantization_config``), and models with code of their own
        (``trust_remote_code=True``) are loaded the ordinary way, and a warning says so

    Raises
    ------
    PackageMissing, ModelUnknown, ModelMismatch, InvalidOption, and what :func:`nbcache.load` raises.
    """
    return assemble_name(
        name,
        device,
        dtype,
        share,
        torch_dtype=torch_dtype,
        components=components,
        raw=raw,
        revision=revision,
        variant=variant,
        subfolder=subfolder,
        config=config,
        model_class=model_class,
        on_progress=on_progress,
        **options,
    ).value


def prepare() -> None:
    """Import now what the first model would, where torch is there already: 14 ms. None of the libraries of models."""
    if "torch" in sys.modules:
        import nbcache.models.assembly  # noqa: F401


prepare()


def is_model(name: str) -> bool:
    """Whether a name means a folder that gives a model, or may once it is downloaded. A saved entry is none."""
    from nbcache.checkpoints.folders import FolderKind, kind_of
    from nbcache.client.fill import is_saved, meaning_of

    meaning = meaning_of(name)[1]
    if meaning.repo_id and "/" not in name and not meaning.aliased and is_saved(name):
        return False
    return kind_of(meaning.path) is not FolderKind.BARE or bool(meaning.repo_id and not os.path.isdir(meaning.path))


def assemble_name(
    name: str | os.PathLike[str],
    device: object = None,
    dtype: object = None,
    share: Share = "cow",
    *,
    torch_dtype: object = None,
    components: str | Sequence[str] = (),
    raw: bool = False,
    revision: str = "",
    variant: str = "",
    subfolder: str = "",
    config: str | os.PathLike[str] = "",
    model_class: Any = None,  # noqa: ANN401
    on_progress: ProgressCallback | None = None,
    **options: Any,  # noqa: ANN401
) -> Assembled:
    """As :func:`load_model`, with what it is made of and where the time went."""
    from nbcache.checkpoints.folders import component_names
    from nbcache.checkpoints.names import find, find_config
    from nbcache.client.fill import meaning_of

    if not isinstance(config, str | os.PathLike):
        raise InvalidOption(
            f"config: a {type(config).__name__}; here it is the folder or repository that a single-file checkpoint is like. "
            "What differs from a folder's own configuration goes in as options, such as num_hidden_layers=1"
        )
    text, meaning = meaning_of(name)
    folder = find(text, revision, subfolder, variant)
    config_folder = find_config(meaning_of(config)[0]) if config else ""
    known_as = meaning.repo_id or (meaning.path if meaning.aliased else text)
    start = time.perf_counter()
    from nbcache.models.assembly import Request, assemble  # brings torch
    from nbcache.models.supply import Supply, one_dtype

    imports_s = time.perf_counter() - start
    supply = Supply(device, one_dtype(dtype, torch_dtype), share, on_progress)
    supply.clock.spent.imports_s = imports_s
    return assemble(
        folder, Request(component_names(components), raw, variant, model_class, config_folder, options, known_as), supply
    )
