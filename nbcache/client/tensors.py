"""Torch at the edge: tensors over mapped bytes, and bytes of tensors. The one module below ``models/`` that imports torch."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping

import msgspec
import torch

from nbcache.errors import InvalidOption, UnsupportedFormat
from nbcache.manifest import BLOCKS, TORCH_NAMES, Extent, Manifest, nbytes_of, place_tensors, stored_shape

_TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items() if hasattr(torch, torch_name)
}

TORCH_DTYPES: dict[str, torch.dtype] = _TORCH_DTYPES | dict.fromkeys(BLOCKS, torch.uint8)
"""Torch's dtype for each of a manifest's; an old torch lacks some. Quantized types are bytes to it."""

EMULATED = bool(os.environ.get("NBCACHE_TEST_DRIVER"))
"""Whether the tests' emulated GPU driver stands in for a real one."""

_MANIFEST_DTYPES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def attach(manifest: Manifest, area: mmap.mmap) -> dict[str, torch.Tensor]:
    """A tensor over each extent of a mapped entry, in the manifest's order; nothing is copied.

    Each has a storage of its own, exactly as long as the tensor, that keeps ``area`` alive: saving or sharing one of them
    saves that one only. UnsupportedFormat if this torch lacks a dtype.
    """
    frombuffer, dtypes, astuple = torch.frombuffer, TORCH_DTYPES, msgspec.structs.astuple
    tensors: dict[str, torch.Tensor] = {}
    try:
        for name, dtype_name, shape, _, _, nbytes, place in map(astuple, manifest.tensors):
            dtype = dtypes[dtype_name]
            if not nbytes:
                tensors[name] = torch.empty(stored_shape(dtype_name, shape), dtype=dtype, device="cpu")
                continue
            tensor = frombuffer(area, dtype=dtype, count=nbytes // dtype.itemsize, offset=place)
            if len(shape) != 1:  # in place: a view would tie the tensor to a base
                tensor.resize_(stored_shape(dtype_name, shape))
            tensors[name] = tensor
    except KeyError as error:
        raise UnsupportedFormat(f"tensor {name!r} has dtype {error.args[0]}, which torch {torch.__version__} lacks") from error
    return tensors


def arrange(below: dict[str, torch.Tensor], manifest: Manifest) -> dict[str, torch.Tensor]:
    """The tensors of a manifest over those of its extents: the same dict where each extent is a tensor.

    Tensors that share an extent share memory, as in a stock load; each is an object of its own.
    """
    if not manifest.views:
        return below
    hidden = manifest.below
    plain = [extent.name for number, extent in enumerate(manifest.tensors) if number not in hidden]
    found: dict[str, torch.Tensor] = {}
    taken = 0
    for view in manifest.views:
        skipped = view.number - len(found)
        found.update((name, below[name]) for name in plain[taken : taken + skipped])
        taken += skipped
        base = below[manifest.tensors[view.extent].name]
        over = torch.empty(0, dtype=base.dtype, device=base.device)
        found[view.name] = over.set_(base.untyped_storage(), base.storage_offset() + view.offset, view.shape, view.strides)
    found.update((name, below[name]) for name in plain[taken:])
    return found


def torch_dtype(extent: Extent) -> torch.dtype:
    """Torch's dtype of an extent. UnsupportedFormat if this torch lacks it."""
    try:
        return TORCH_DTYPES[extent.dtype]
    except KeyError:
        raise UnsupportedFormat(
            f"tensor {extent.name!r} has dtype {extent.dtype}, which torch {torch.__version__} lacks"
        ) from None


def dtypes_of(manifest: Manifest) -> dict[str, torch.dtype]:
    """Torch's dtype for each that a manifest has. UnsupportedFormat if this torch lacks one."""
    found = {tensor.dtype: tensor for tensor in manifest.tensors}
    return {name: torch_dtype(tensor) for name, tensor in found.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """A manifest's name for a dtype of torch's. InvalidOption if it has none."""
    if dtype not in _MANIFEST_DTYPES:
        raise InvalidOption(f"dtype {dtype}: nbcache has no such dtype")
    return _MANIFEST_DTYPES[dtype]


def resolve_device(device: object) -> torch.device:
    """The device that was asked for; for None, cuda where there is one, else cpu. InvalidOption if it does not exist here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved: torch.device = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise InvalidOption(f"device {device!r}: {str(error).splitlines()[0]}") from error
    if resolved.type == "cuda" and EMULATED:
        return resolved
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InvalidOption(f"device {resolved}: this torch ({torch.__version__}) sees no GPU; use device='cpu'")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InvalidOption(f"device {resolved}: there are {torch.cuda.device_count()} GPUs")
    if resolved.type not in ("cpu", "cuda"):
        raise InvalidOption(f"device {resolved}: nbcache serves cpu and cuda")
    return resolved


def real_device(device: torch.device) -> torch.device:
    """The device itself; for an emulated GPU, the CPU that stands for it."""
    return torch.device("cpu") if EMULATED else device


def current_ordinal() -> int:
    """The number of the GPU that torch uses when none is named."""
    return 0 if EMULATED else torch.cuda.current_device()


def resolve_dtype(dtype: object) -> torch.dtype | None:
    """The dtype that was asked for, by object or name (``"bfloat16"``, ``"torch.bfloat16"``, ``"bf16"``); None if none was."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    short = TORCH_DTYPES.get(name.upper().replace("FP", "F"))  # a file's word for it, such as BF16, or people's
    found = dtype if isinstance(dtype, torch.dtype) else short or getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidOption(f"dtype {dtype!r}: not a floating-point dtype of torch, such as 'bfloat16'")
    return found


def convert(
    tensors: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype | None, copy: bool
) -> dict[str, torch.Tensor]:
    """The tensors on a device, floating-point ones cast to ``dtype``, as stock loaders cast; each copied if ``copy``.

    UnsupportedFormat for a cast that torch does not do.
    """

    def one(name: str, tensor: torch.Tensor) -> torch.Tensor:
        to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        try:
            return tensor.to(device=device, dtype=to, copy=copy)
        except NotImplementedError as error:
            raise UnsupportedFormat(f"tensor {name!r}: torch does not cast {tensor.dtype} to {to}") from error

    return {name: one(name, tensor) for name, tensor in tensors.items()}


def flatten(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a tensor, a module or a (nested) mapping, named by their dotted paths; a lone tensor is named ``tensor``.

    UnsupportedFormat for anything else, and for tensors that have no plain bytes (sparse, quantized, meta).
    """
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, torch.Tensor):
        return {name or "tensor": _plain(value, name or "tensor")}
    if not isinstance(value, Mapping):
        raise UnsupportedFormat(
            f"{name or 'the value'} is a {type(value).__name__}; nbcache keeps a tensor, a dict of tensors or a module"
        )
    tensors: dict[str, torch.Tensor] = {}
    for key, inner in value.items():
        for path, tensor in flatten(inner, f"{name}.{key}" if name else str(key)).items():
            if path in tensors:
                raise UnsupportedFormat(f"two tensors would be called {path!r}")
            tensors[path] = tensor
    return tensors


def _plain(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if torch.nn.parameter.is_lazy(tensor):
        raise UnsupportedFormat(f"tensor {name!r} is not initialized yet; run the module once, then keep it")
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _MANIFEST_DTYPES:
        what = "no data (meta device)" if tensor.is_meta else f"layout {tensor.layout} and dtype {tensor.dtype}"
        raise UnsupportedFormat(f"tensor {name!r} has {what}; only plain tensors can be kept")
    return tensor.detach().resolve_conj().resolve_neg()


def plan_put(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Manifest:
    """The manifest of tensors that no file has."""
    extents = []
    for name, tensor in tensors.items():
        dtype = _MANIFEST_DTYPES[tensor.dtype]
        shape = tuple(tensor.shape)
        if dtype == "F4":
            if not shape:
                raise UnsupportedFormat(f"tensor {name!r}: a {tensor.dtype} without dimensions")
            shape = (*shape[:-1], shape[-1] * 2)
        nbytes = nbytes_of(dtype, shape)
        assert nbytes is not None
        extents.append(Extent(name, dtype, shape, 0, 0, nbytes, 0))
    return place_tensors(extents, (), dict(metadata))


def write_tensors(tensors: Mapping[str, torch.Tensor], manifest: Manifest, area: mmap.mmap) -> None:
    """Copy the tensors to their places in a writable map. No tensor over the map is left afterwards."""
    for name, target in attach(manifest, area).items():
        if target.numel():
            _bytes_of(target).copy_(_bytes_of(tensors[name]))


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().reshape(-1)
    return (flat if flat.numel() != 1 else flat.as_strided((1,), (1,))).view(torch.uint8)  # one element may have any stride
