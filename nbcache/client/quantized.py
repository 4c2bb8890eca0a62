"""Quantized tensors computed back to ordinary ones, with the tables of the gguf package, which it imports when it is asked to.

Owns what such a computation needs beside the package. Knows no file: the manifest says what a tensor's bytes mean. Needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nbcache.client import tensors as edge
from nbcache.errors import PackageMissing, UnsupportedFormat
from nbcache.manifest import BLOCKS, Extent, Manifest


def dequantize(tensors: Mapping[str, torch.Tensor], manifest: Manifest, dtype: object) -> dict[str, torch.Tensor]:
    """See :meth:`Weights.dequantize`."""
    wanted = edge.resolve_dtype(dtype)
    quantized = {extent.name: extent for extent in manifest.tensors if extent.dtype in BLOCKS}
    found = {}
    for name, tensor in tensors.items():
        plain = _compute(tensor, quantized[name]) if name in quantized else tensor
        to = wanted if wanted is not None and plain.is_floating_point() else plain.dtype
        found[name] = plain.to(device=tensor.device, dtype=to)
    return found


def _compute(tensor: torch.Tensor, extent: Extent) -> torch.Tensor:
    """The values of a quantized tensor, float32 on the CPU."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise PackageMissing(
            f"tensor {extent.name!r} is quantized ({extent.dtype}); computing it needs gguf: pip install 'nbcache[gguf]'"
        ) from error
    try:
        kind = GGMLQuantizationType[extent.dtype]
        values = quants.dequantize(tensor.cpu().numpy(), kind)
    except (KeyError, NotImplementedError) as error:
        raise UnsupportedFormat(f"tensor {extent.name!r}: this gguf package does not compute {extent.dtype}") from error
    return torch.from_numpy(values).reshape(extent.shape)
