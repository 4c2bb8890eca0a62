"""GGUF: the files of llama.cpp and ggml, with quantized tensors as the raw blocks that they are.

A quantized tensor keeps its quant type in the manifest and comes as bytes, as in ``gguf.GGUFReader``; plain ones (F32, F16,
BF16, integers) come as what they are. Metadata is kept as text, but for what is long (a tokenizer's vocabulary). Source: the
format's description in ggml (``docs/gguf.md``). Needs no gguf package.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

from nbcache.checkpoints.content import TEXT_LIMIT, Content, Notes, OpenFile
from nbcache.errors import UnsupportedFormat
from nbcache.manifest import BLOCKS, Extent, nbytes_of

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 100_000_000
"""As in safetensors; those with the largest vocabularies have some ten million."""
FIRST_READ_BYTES = 1 << 20
MAX_NAME_BYTES = 4096
MAX_DIMENSIONS = 64
MAX_NESTING = 2
MAX_LISTED = 256
"""Elements of an array that is kept as metadata."""
ALIGNMENT = 32

TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""A manifest's dtype by ggml's number (``GGMLQuantizationType`` of the gguf package)."""

_SCALARS = {
    number: struct.Struct(f"<{form}")
    for number, form in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}.items()
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_SKIPPED = object()
"""Stands for a value that was too long to keep."""


def read(file: OpenFile) -> Content:
    """Describe a GGUF file.

    CheckpointInvalid for content that breaks the format; UnsupportedFormat for another version or byte order, and for types
    that this reader does not know.
    """
    header = _Header(file)
    count, notes, alignment = header.start()
    infos = [header.tensor() for _ in header.counted(count, 24)]
    start = -(-header.at // alignment) * alignment
    tensors = [_extent(file, info, start, alignment) for info in infos]
    _check(file, tensors)
    return Content(tuple(tensors), notes.finish())


Info = tuple[str, tuple[int, ...], int, int]
"""A tensor's name, shape as torch orders it, ggml's number of its type, and its offset in the body."""


class _Header:
    """The header, read from its start to its end."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._limit = min(file.size_bytes, MAX_HEADER_BYTES)
        self._text = file.read(0, min(self._limit, FIRST_READ_BYTES))
        self.at = 0

    def take(self, size_bytes: int) -> bytes:
        start = self.at
        self.skip(size_bytes)
        return self._text[start : self.at]

    def skip(self, size_bytes: int) -> None:
        end = self.at + size_bytes
        self._reach(end)
        if end > len(self._text):
            more = min(self._limit, max(end, 2 * len(self._text))) - len(self._text)
            self._text += self._file.read(len(self._text), more)
        self.at = end

    def _reach(self, end: int) -> None:
        if end > self._limit:
            raise self._file.invalid(f"truncated, or not GGUF: its header needs {end} bytes, of {self._limit} that may be read")

    def number(self, form: struct.Struct) -> int:
        return int(form.unpack(self.take(form.size))[0])

    def counted(self, count: int, least_bytes: int) -> Iterator[int]:
        """A loop of ``count`` rounds that take at least so many bytes each."""
        self._reach(self.at + count * least_bytes)
        return iter(range(count))

    def start(self) -> tuple[int, Notes, int]:
        """Magic, version and metadata: the number of tensors, the metadata, and the alignment."""
        if not self._text.startswith(MAGIC):
            raise self._file.invalid(f"not GGUF: it starts with {self._text[:4]!r}")
        self.skip(len(MAGIC))
        version = self.number(_U32)
        if version not in VERSIONS:
            order = " (big-endian?)" if version > 0xFFFF else ""
            raise UnsupportedFormat(
                f"{self._file.path}: GGUF version {version}{order}; versions 2 and 3 are read, little-endian"
            )
        tensors, pairs = self.number(_U64), self.number(_U64)
        notes, alignment, seen = Notes(), ALIGNMENT, set()
        for _ in self.counted(pairs, 13):
            key, value = self.string(), self.value(self.number(_U32))
            if key in seen:
                raise self._file.invalid(f"metadata {key!r} is there twice")
            seen.add(key)
            if key == "general.alignment":
                alignment = self._alignment(value)
            if value is _SKIPPED:
                notes.leave_out(key)
            else:
                notes.add(key, value if isinstance(value, str) else json.dumps(value))
        return tensors, notes, alignment

    def _alignment(self, value: object) -> int:
        if type(value) is not int or value < 1 or value & (value - 1) or value > 1 << 30:
            raise self._file.invalid(f"an alignment of {str(value)[:100]}, which is no power of two")
        return value

    def string(self) -> str:
        length = self.number(_U64)
        if length > MAX_NAME_BYTES:
            raise self._file.invalid(f"a name of {length} bytes at {self.at}")
        return self._decode(self.take(length))

    def _decode(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self._file.invalid(f"a text before byte {self.at} that is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> object:
        """A value of this kind, or _SKIPPED if it is too long to keep."""
        if kind in _SCALARS:
            return _SCALARS[kind].unpack(self.take(_SCALARS[kind].size))[0]
        if kind == _STRING:
            length = self.number(_U64)
            if length <= TEXT_LIMIT:
                return self.take(length).decode(errors="replace")  # some vocabularies are not UTF-8
            self.skip(length)
            return _SKIPPED
        if kind == _ARRAY and depth < MAX_NESTING:
            return self._array(depth)
        raise self._file.invalid(f"a metadata value of the unknown kind {kind} before byte {self.at}")

    def _array(self, depth: int) -> object:
        kind, count = self.number(_U32), self.number(_U64)
        if kind in _SCALARS and count > MAX_LISTED:
            self.skip(count * _SCALARS[kind].size)
            return _SKIPPED
        least = _SCALARS[kind].size if kind in _SCALARS else 8
        kept: list[object] = []
        for _ in self.counted(count, least):
            value = self.value(kind, depth + 1)
            if len(kept) <= MAX_LISTED:
                kept.append(value)
        return kept if len(kept) <= MAX_LISTED and _SKIPPED not in kept else _SKIPPED

    def tensor(self) -> Info:
        """The next tensor's description."""
        name = self.string()
        dimensions = self.number(_U32)
        if dimensions > MAX_DIMENSIONS:
            raise self._file.invalid(f"tensor {name!r} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))
        return name, shape[::-1], self.number(_U32), self.number(_U64)


def _extent(file: OpenFile, info: Info, start: int, alignment: int) -> Extent:
    name, shape, kind, offset = info
    dtype = TYPES.get(kind)
    if dtype is None:
        raise UnsupportedFormat(f"{file.path}: tensor {name!r} has ggml's type {kind}, which nbcache does not know")
    nbytes = nbytes_of(dtype, shape)
    if nbytes is None:
        per_block = f", or its rows are no whole blocks of {BLOCKS[dtype][0]}" if dtype in BLOCKS else ""
        raise file.invalid(f"tensor {name!r}: {dtype}{list(shape)} is too large{per_block}")
    if offset % alignment or start + offset + nbytes > file.size_bytes:
        raise file.invalid(
            f"tensor {name!r}: {dtype}{list(shape)}, {nbytes} bytes at {start} + {offset}, is not aligned to {alignment} or "
            f"leaves the file of {file.size_bytes} bytes; truncated?"
        )
    return Extent(name, dtype, shape, 0, start + offset, nbytes, 0)


def _check(file: OpenFile, tensors: list[Extent]) -> None:
    """No two tensors of one name, and none that overlap."""
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise file.invalid("two tensors of one name")
    end, last = 0, ""
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.nbytes and tensor.offset < end:
            raise file.invalid(f"tensors {last!r} and {tensor.name!r} overlap at byte {tensor.offset}")
        if tensor.nbytes:
            end, last = tensor.offset + tensor.nbytes, tensor.name
