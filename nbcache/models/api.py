"""``load_model``: the public function over all of this room. Imports nothing slow by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nbcache.client.options import Share
from nbcache.client.session import ProgressCallback

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
    variant: str = "",
    model_class: Any = None,  # noqa: ANN401 - a class of a library that need not be installed, or its name
    on_progress: ProgressCallback | None = None,
    **options: Any,  # noqa: ANN401 - those of the library's own from_pretrained
) -> Any:  # noqa: ANN401 - a pipeline, a model, weights
    """What a folder holds, ready to run, its tensors shared with the cache: a pipeline, a model, or weights.

    Parameters
    ----------
    name : the path of a folder: with a ``model_index.json`` it gives that pipeline, with a ``config.json`` of diffusers or
        transformers that model; what has neither gives :class:`nbcache.Weights`, as :func:`nbcache.load` does
    device : where to; None means cuda where there is one, else cpu
    dtype, torch_dtype : the same by two names: what floating-point tensors are cast to, the modules left in float32 that the
        library leaves so; a mapping gives one for each component, and ``default``. None: as in the files (for transformers:
        as in the config)
    share : ``cow``, ``readonly`` or ``private``, as in :func:`nbcache.load`
    components : load these of a pipeline alone: one gives that object, several a dict
    raw : give ``Weights`` in place of models; for a pipeline a dict of them, by component
    variant : such as ``fp16``: files of that variant, where there are any
    model_class : in place of the class that the config names; what the checkpoint lacks for it is then initialised by the
        library, which says so
    on_progress : called with staged and total bytes while files are read
    options : handed to the library's ``from_pretrained`` (``safety_checker=None``, ``attn_implementation="sdpa"``)

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
        variant=variant,
        model_class=model_class,
        on_progress=on_progress,
        **options,
    ).value


def assemble_name(
    name: str | os.PathLike[str],
    device: object = None,
    dtype: object = None,
    share: Share = "cow",
    *,
    torch_dtype: object = None,
    components: str | Sequence[str] = (),
    raw: bool = False,
    variant: str = "",
    model_class: Any = None,  # noqa: ANN401
    on_progress: ProgressCallback | None = None,
    **options: Any,  # noqa: ANN401
) -> Assembled:
    """As :func:`load_model`, with what it is made of and where the time went."""
    from nbcache.models.assembly import Request, assemble
    from nbcache.models.supply import Supply, one_dtype

    if isinstance(components, str):
        components = tuple(part.strip() for part in components.split(",") if part.strip())
    supply = Supply(device, one_dtype(dtype, torch_dtype), share, on_progress)
    folder = os.path.abspath(os.path.expanduser(os.fspath(name)))
    return assemble(folder, Request(tuple(components), raw, variant, model_class, options), supply)
