"""Reading a safetensors header: what is where in the file, held against the format's rules.

Source: the format's description in the safetensors README. 8 bytes little-endian header length, a JSON header of that length
that starts with ``{``, then the tensors' bytes without holes or overlaps. Never reads weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

import msgspec

from nbcache.errors import CheckpointInvalid, CheckpointUnreadable, UnsupportedFormat
from nbcache.manifest import DTYPE_BITS, Extent, nbytes_of

MAX_HEADER_BYTES = 100_000_000
FOREIGN_DTYPES = frozenset({"F6_E2M3", "F6_E3M2"})
"""In the format, but torch has no such types."""
OWN_DTYPES = frozenset({"C32", "C128"})
"""In our manifests, but not in the format."""

_Natural = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[_Natural, ...]
    data_offsets: tuple[_Natural, _Natural]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a header. ``offset`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file holds, in file order."""

    tensors: tuple[Tensor, ...]
    metadata: dict[str, str]


def extent(tensor: Tensor, file: int, path: str) -> Extent:
    """The tensor as a manifest's extent in this member file, not placed yet. UnsupportedFormat if torch could not hold it."""
    if tensor.dtype == "F4" and tensor.shape[-1] % 2:
        raise UnsupportedFormat(
            f"{path}: tensor {tensor.name!r}: F4{list(tensor.shape)}, but torch holds F4 in pairs along the last dimension"
        )
    return Extent(tensor.name, tensor.dtype, tensor.shape, file, tensor.offset, tensor.nbytes, 0)


def read_header(fd: int, path: str, size_bytes: int) -> Header:
    """Read the header of an open file of this size.

    CheckpointInvalid, with what is wrong where, if it breaks the format; UnsupportedFormat for a dtype that torch lacks;
    CheckpointUnreadable if the system does not read it.
    """
    try:
        prefix = os.pread(fd, 8, 0)
        if len(prefix) < 8:
            raise CheckpointInvalid(f"{path}: not safetensors: {size_bytes} bytes, too short for a header")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointInvalid(
                f"{path}: not safetensors: a header of {length} bytes, the format allows {MAX_HEADER_BYTES}"
            )
        if 8 + length > size_bytes:
            raise CheckpointInvalid(f"{path}: truncated: a header of {length} bytes in a file of {size_bytes}")
        text = os.pread(fd, length, 8)
    except OSError as error:
        raise CheckpointUnreadable(f"{path}: {error.strerror}") from error
    if len(text) < length:
        raise CheckpointInvalid(f"{path}: truncated: {len(text)} of {length} header bytes")
    return parse_header(text, path, size_bytes - 8 - length)


def parse_header(text: bytes, path: str, body_bytes: int) -> Header:
    """Read a header's JSON and hold it against a body of ``body_bytes``. Raises as :func:`read_header`."""
    if not text.startswith(b"{"):
        raise CheckpointInvalid(f"{path}: not safetensors: the header is not a JSON object")
    try:
        text.decode()
        entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(entries.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str] | None) or {}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointInvalid(f"{path}: the header is not valid: {error}") from error
    tensors = [_tensor(name, raw, path, 8 + len(text)) for name, raw in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_cover(tensors, path, 8 + len(text), body_bytes)
    return Header(tuple(tensors), metadata)


_entry_decoder = msgspec.json.Decoder(_Entry)


def _tensor(name: str, raw: msgspec.Raw, path: str, body_offset: int) -> Tensor:
    try:
        entry = _entry_decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointInvalid(f"{path}: tensor {name!r}: {error}") from error
    if entry.dtype in FOREIGN_DTYPES:
        raise UnsupportedFormat(f"{path}: tensor {name!r} has dtype {entry.dtype}, which torch does not have")
    if entry.dtype not in DTYPE_BITS or entry.dtype in OWN_DTYPES:
        raise CheckpointInvalid(f"{path}: tensor {name!r} has the unknown dtype {entry.dtype!r}")
    start, end = entry.data_offsets
    expected = nbytes_of(entry.dtype, entry.shape)
    if expected is None:
        raise CheckpointInvalid(
            f"{path}: tensor {name!r}: {entry.dtype}{list(entry.shape)} is too large, or does not fill whole bytes"
        )
    if end < start or end - start != expected:
        raise CheckpointInvalid(
            f"{path}: tensor {name!r}: {entry.dtype}{list(entry.shape)} takes {expected} bytes, but its offsets are {start} "
            f"to {end}"
        )
    return Tensor(name, entry.dtype, entry.shape, body_offset + start, expected)


def _check_cover(tensors: list[Tensor], path: str, body_offset: int, body_bytes: int) -> None:
    """No overlap, no hole, nothing beyond the end and nothing left over."""
    end = body_offset
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointInvalid(
                f"{path}: tensor {tensor.name!r} {kind}: starts at byte {tensor.offset - body_offset} of the body, expected "
                f"{end - body_offset}"
            )
        end += tensor.nbytes
    if end != body_offset + body_bytes:
        kind = "truncated" if end > body_offset + body_bytes else "bytes that belong to no tensor"
        raise CheckpointInvalid(f"{path}: {kind}: the header describes {end - body_offset} bytes, the file has {body_bytes}")
