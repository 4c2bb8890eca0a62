"""What a checkpoint's description says, as tensors: its extents read from the files, without a daemon."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from nbcache.checkpoints.catalog import describe, resolve
from nbcache.client import tensors as edge
from nbcache.manifest import Manifest, stored_shape


def describe_manifest(path: Path | str) -> Manifest:
    """The manifest of a checkpoint, which passes its own check."""
    description = describe(resolve(str(path)))
    description.close()
    description.manifest.check()
    return description.manifest


def read_tensors(path: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, each extent read from where its file has it."""
    description = describe(resolve(str(path)))
    try:
        manifest = description.manifest
        manifest.check()
        below = {}
        for extent in manifest.tensors:
            content = bytearray(os.pread(description.files[extent.file], extent.nbytes, extent.offset))
            assert len(content) == extent.nbytes
            dtype, shape = edge.torch_dtype(extent), stored_shape(extent.dtype, extent.shape)
            flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            below[extent.name] = flat.reshape(shape)
        return edge.arrange(below, manifest)
    finally:
        description.close()


def assert_alike(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """The same dtype, shape, strides and bits."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert found.stride() == expected.stride(), name
    assert bits(found) == bits(expected), name


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's values, row by row."""
    if not tensor.numel():
        return b""
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def shared(tensors: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    """Which tensors share memory: those of one storage whose bytes meet, in pairs."""

    def reach(tensor: torch.Tensor) -> range:
        start = tensor.data_ptr()
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return range(start, start + (steps + 1) * tensor.itemsize if tensor.numel() else start)

    reaches = {name: reach(tensor) for name, tensor in tensors.items()}
    return {
        frozenset((a, b))
        for a, first in reaches.items()
        for b, second in reaches.items()
        if a < b and max(first.start, second.start) < min(first.stop, second.stop)
    }
