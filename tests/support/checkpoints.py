"""Checkpoints made for tests: well-formed ones, and raw bytes for the other kind."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_checkpoint(path: Path, seed: int = 0, sizes: tuple[tuple[int, ...], ...] = ((64, 64), (7,), (), (3, 0))) -> Path:
    """A small ``.safetensors`` file of random bytes, one float32 tensor for each shape."""
    generator = torch.Generator().manual_seed(seed)
    save_file({f"layer.{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(sizes)}, path)
    return path


def raw_checkpoint(path: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, as JSON unless it is bytes already, and this body; ``length`` overrides the header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path
