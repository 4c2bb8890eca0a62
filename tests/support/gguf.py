"""GGUF files made for tests: of every type, by the gguf package; and by hand, for the other kind."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

_PLAIN = {
    Kind.F32: np.float32, Kind.F16: np.float16, Kind.F64: np.float64, Kind.I8: np.int8, Kind.I16: np.int16,
    Kind.I32: np.int32, Kind.I64: np.int64,
}  # fmt: skip


def write_gguf(path: Path, kinds: tuple[Kind, ...] = tuple(Kind), seed: int = 0) -> Path:
    """One tensor of 3 x 512 elements of each type, called by its name. Quantized ones hold random blocks of sane scale."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    for kind in kinds:
        if kind in _PLAIN:
            writer.add_tensor(kind.name, random.integers(-99, 99, (3, 512)).astype(_PLAIN[kind]))
            continue
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        values = random.standard_normal((3, 512)).astype(np.float32)
        try:
            blocks = gguf.quants.quantize(values, kind)
        except NotImplementedError:  # no quantizer in Python: half floats below 2 in every pair of bytes
            blocks = random.integers(0, 64, (3, 512 // per_block * block_bytes), np.uint8)
        writer.add_tensor(kind.name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_quantized_state(path: Path, model: torch.nn.Module) -> Path:
    """The tensors of a model by their own names: in Q8_0 what has whole blocks in its rows, else in float32."""
    writer = gguf.GGUFWriter(path, "tiny")
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, Kind.Q8_0), raw_dtype=Kind.Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def string(text: str) -> bytes:
    """A text as GGUF writes it."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def raw_gguf(
    path: Path,
    tensors: list[bytes] = [],  # noqa: B006
    metadata: list[bytes] = [],  # noqa: B006
    body: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
    count: int | None = None,
    pairs: int | None = None,
) -> Path:
    """A file of these encoded parts; ``count`` and ``pairs`` override the numbers of tensors and of metadata."""
    counts = (len(tensors) if count is None else count, len(metadata) if pairs is None else pairs)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(metadata) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path
