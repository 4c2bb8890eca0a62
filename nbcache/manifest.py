"""What an entry consists of: its files, its tensors, and where each tensor lies in the file and in memory.

A manifest is written by the client, which knows formats, and believed by nobody: :meth:`Manifest.check` holds it against
itself, and the daemon holds it against the files it was handed. It knows no format, no socket and no memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence

import msgspec

from nbcache.errors import ProtocolError
from nbcache.layout import ALIGNMENT, LAYOUT_VERSION, plan_layout

MAX_MANIFEST_BYTES = 256 << 20
MAX_EXTENT_BYTES = 1 << 46
LIMIT = 1 << 64

DTYPE_BITS: Mapping[str, int] = {
    "F4": 4, "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "C128": 128,
}  # fmt: skip
"""Bits of one element, by the dtype's name in safetensors (C32 and C128 are ours: the format does not have them)."""

TORCH_NAMES: Mapping[str, str] = {
    "F4": "float4_e2m1fn_x2", "BOOL": "bool", "U8": "uint8", "I8": "int8",
    "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "C32": "complex32",
    "I64": "int64", "U64": "uint64", "F64": "float64", "C64": "complex64", "C128": "complex128",
}  # fmt: skip
"""What torch calls each of :data:`DTYPE_BITS`."""

BLOCKS: Mapping[str, tuple[int, int]] = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q8_1": (32, 40),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "Q8_K": (256, 292),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18),
}  # fmt: skip
"""Elements and bytes of one block, by the quant type's name in GGUF. Blocks lie along the last dimension.

Source: ``GGML_QUANT_SIZES`` of the gguf package, against which a test holds it.
"""


class Fingerprint(msgspec.Struct, frozen=True, array_like=True):
    """What the system says of a file. Equal fingerprints: the same bytes, as far as a stat can tell."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Fingerprint:
        """The fingerprint in the answer of ``os.stat`` or ``os.fstat``."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One file of an entry. ``blob`` is the hash of its content, where its name is that (a blob of the Hugging Face cache)."""

    path: str
    fingerprint: Fingerprint
    blob: str = ""

    def identity(self) -> tuple[object, ...]:
        """What this file is, whatever it is called."""
        if self.blob:
            return ("blob", self.blob, self.fingerprint.size_bytes)
        return ("stat", *msgspec.structs.astuple(self.fingerprint))


class Extent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor: ``nbytes`` bytes at ``offset`` of member file ``file``, to lie at ``place`` of the entry.

    ``dtype`` is a key of :data:`DTYPE_BITS` or :data:`BLOCKS`; ``shape`` counts elements (of F4: single 4-bit values, as
    safetensors does; of quantized types: the values that the blocks stand for).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int
    place: int


class View(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor over the extent of number ``extent``, which others share or where it does not lie row by row.

    It is tensor ``number`` of the checkpoint. ``shape``, ``strides`` and ``offset`` count elements as memory has them
    (:func:`stored_shape`), from the extent's start.
    """

    name: str
    number: int
    extent: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Manifest(msgspec.Struct, frozen=True):
    """An entry's description: extents in the checkpoint's order. ``extent_bytes`` is the memory it takes, padding included.

    Each extent is a tensor, unless ``views`` lie over it: then these are, and it is only what lies below. Views are in the
    order of their numbers; the other tensors fill the numbers that are left.
    """

    tensors: tuple[Extent, ...]
    members: tuple[Member, ...]
    metadata: dict[str, str]
    extent_bytes: int
    layout_version: int = LAYOUT_VERSION
    views: tuple[View, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, padding left out; those that tensors share count once."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def float_dtypes(self) -> frozenset[str]:
        """The floating-point dtypes among its tensors: what a cast would change."""
        dtypes = {tensor.dtype for tensor in self.tensors}
        return frozenset(dtype for dtype in dtypes if TORCH_NAMES.get(dtype, "").startswith(("float", "bfloat")))

    @property
    def count(self) -> int:
        """How many tensors there are."""
        return len(self.tensors) - len(self.below) + len(self.views)

    @property
    def below(self) -> frozenset[int]:
        """The numbers of the extents that are no tensors, but lie below views."""
        return frozenset(view.extent for view in self.views)

    def check(self) -> None:
        """Hold the manifest against itself (I5).

        Raises ProtocolError: a dtype that does not exist, a size that is not the shape's, bytes outside the member file or
        outside the extent, places that overlap or are unaligned, a view that leaves its extent, two tensors of one name.
        """
        if self.layout_version != LAYOUT_VERSION:
            raise ProtocolError(f"manifest: layout version {self.layout_version}, expected {LAYOUT_VERSION}")
        if not 0 < self.extent_bytes <= MAX_EXTENT_BYTES:
            raise ProtocolError(f"manifest: an extent of {self.extent_bytes} bytes")
        if len({tensor.name for tensor in self.tensors}) != len(self.tensors):
            raise ProtocolError("manifest: two tensors of one name")
        for tensor in self.tensors:
            self._check_tensor(tensor)
        end, last = 0, ""
        for place, nbytes, name in sorted((t.place, t.nbytes, t.name) for t in self.tensors if t.nbytes):
            if place < end:
                raise ProtocolError(f"manifest: {last!r} and {name!r} overlap at byte {place}")
            end, last = place + nbytes, name
        if end > self.extent_bytes:
            raise ProtocolError(f"manifest: {last!r} ends at byte {end} of {self.extent_bytes}")
        self._check_views()

    def _check_tensor(self, tensor: Extent) -> None:
        expected = nbytes_of(tensor.dtype, tensor.shape)
        if expected is None or expected != tensor.nbytes:
            raise ProtocolError(f"manifest: {tensor.name!r} {tensor.dtype}{list(tensor.shape)} in {tensor.nbytes} bytes")
        if tensor.place < 0 or tensor.place % ALIGNMENT:
            raise ProtocolError(f"manifest: {tensor.name!r} at place {tensor.place}, not a multiple of {ALIGNMENT}")
        if self.members:
            if not 0 <= tensor.file < len(self.members):
                raise ProtocolError(f"manifest: {tensor.name!r} in file {tensor.file} of {len(self.members)}")
            size = self.members[tensor.file].fingerprint.size_bytes
            if tensor.offset < 0 or tensor.offset + tensor.nbytes > size:
                raise ProtocolError(f"manifest: {tensor.name!r} leaves its file of {size} bytes")

    def _check_views(self) -> None:
        below = self.below
        names = {extent.name for number, extent in enumerate(self.tensors) if number not in below} if below else set()
        last, count = -1, self.count
        for view in self.views:
            self._check_view(view)
            if view.name in names:
                raise ProtocolError(f"manifest: view {view.name!r} has the name of another tensor")
            if not last < view.number < count:
                raise ProtocolError(f"manifest: view {view.name!r} is number {view.number} of {count}, after {last}")
            names.add(view.name)
            last = view.number

    def _check_view(self, view: View) -> None:
        if not 0 <= view.extent < len(self.tensors):
            raise ProtocolError(f"manifest: view {view.name!r} of extent {view.extent} of {len(self.tensors)}")
        extent = self.tensors[view.extent]
        reach = reach_of(view.shape, view.strides, view.offset)
        if reach is None or reach > extent.nbytes // item_bytes(extent.dtype):
            raise ProtocolError(
                f"manifest: view {view.name!r}, {list(view.shape)} by {list(view.strides)} from {view.offset}, leaves its "
                f"{extent.nbytes} bytes"
            )


def nbytes_of(dtype: str, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor; None if the dtype does not exist, a dimension is negative, or elements do not fill whole bytes.

    Rows of a quantized type consist of whole blocks.
    """
    elements = elements_of(shape)
    if elements is None:
        return None
    if dtype in BLOCKS:
        per_block, block_bytes = BLOCKS[dtype]
        whole = bool(shape) and shape[-1] % per_block == 0
        return elements // per_block * block_bytes if whole else None
    bits = DTYPE_BITS.get(dtype, LIMIT) * elements
    return bits // 8 if dtype in DTYPE_BITS and bits < LIMIT and bits % 8 == 0 else None


def elements_of(shape: Sequence[int]) -> int | None:
    """How many elements a shape has; None if a dimension is negative, or the product needs more than 64 bits on the way."""
    elements = 1
    for dimension in shape:
        if not 0 <= dimension < LIMIT:
            return None
        elements *= dimension
        if elements >= LIMIT:  # as in safetensors, whose sizes have 64 bits
            return None
    return elements


def item_bytes(dtype: str) -> int:
    """Bytes of one element as memory has them: a pair of F4, a byte of a quantized type."""
    return max(1, DTYPE_BITS.get(dtype, 8) // 8)


def stored_shape(dtype: str, shape: Sequence[int]) -> tuple[int, ...]:
    """A shape as memory has it: pairs of F4, bytes of quantized types, along the last dimension."""
    if dtype == "F4":
        return (*shape[:-1], shape[-1] // 2)
    if dtype in BLOCKS:
        per_block, block_bytes = BLOCKS[dtype]
        return (*shape[:-1], shape[-1] // per_block * block_bytes)
    return tuple(shape)


def row_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor that lies row by row; empty dimensions count as one, as in torch."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


def reach_of(shape: Sequence[int], strides: Sequence[int], offset: int) -> int | None:
    """How many elements from the start a view needs; None if it is none: negative numbers, or not a stride a dimension."""
    elements = elements_of(shape)
    if elements is None or len(strides) != len(shape) or not all(0 <= number < LIMIT for number in (*strides, offset)):
        return None
    if not elements:
        return offset
    return offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def each_view(manifest: Manifest) -> list[View]:
    """Every tensor as a view, in order; where an extent is a tensor, the view that is all of it."""
    below = manifest.below
    found = [_whole_view(extent, number) for number, extent in enumerate(manifest.tensors) if number not in below]
    for view in manifest.views:
        found.insert(view.number, view)
    return [msgspec.structs.replace(view, number=number) for number, view in enumerate(found)]


def _whole_view(extent: Extent, number: int) -> View:
    shape = stored_shape(extent.dtype, extent.shape)
    return View(extent.name, 0, number, shape, row_strides(shape), 0)


def place_tensors(
    tensors: Sequence[Extent], members: Sequence[Member], metadata: dict[str, str], views: Sequence[View] = ()
) -> Manifest:
    """The manifest of these extents, each given its place by the layout planner."""
    layout = plan_layout([tensor.nbytes for tensor in tensors])
    placed = tuple(msgspec.structs.replace(tensor, place=place) for tensor, place in zip(tensors, layout.places, strict=True))
    return Manifest(placed, tuple(members), metadata, layout.extent_bytes, views=tuple(views))


def key_of(members: Sequence[Member]) -> str:
    """The key of the entry that these files make, in this order: what they *are*, never what they are called."""
    identity = (LAYOUT_VERSION, [member.identity() for member in members])
    return "file-" + hashlib.blake2b(msgspec.json.encode(identity), digest_size=16).hexdigest()


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Manifest)


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as the JSON that travels in a sealed memfd."""
    return _encoder.encode(manifest)


def decode_manifest(payload: bytes) -> Manifest:
    """Read a manifest; ProtocolError if it is not one. It is *not* checked: see :meth:`Manifest.check`."""
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a manifest: {error}") from error
