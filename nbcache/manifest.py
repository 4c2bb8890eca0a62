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
"""Bits of one element, by the dtype's name in safetensors (C32 and C128 are ours: only ``put`` entries have them)."""


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
    """One file of an entry. ``sha256`` is set where the file's own name carries it (a blob of the Hugging Face cache)."""

    path: str
    fingerprint: Fingerprint
    sha256: str = ""

    def identity(self) -> tuple[object, ...]:
        """What this file is, whatever it is called."""
        if self.sha256:
            return ("sha256", self.sha256, self.fingerprint.size_bytes)
        return ("stat", *msgspec.structs.astuple(self.fingerprint))


class Extent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor: ``nbytes`` bytes at ``offset`` of member file ``file``, to lie at ``place`` of the entry.

    ``dtype`` is a key of :data:`DTYPE_BITS`; ``shape`` counts elements (of F4: single 4-bit values, as safetensors does).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int
    place: int


class Manifest(msgspec.Struct, frozen=True):
    """An entry's description: tensors in file order. ``extent_bytes`` is the memory it takes, padding included."""

    tensors: tuple[Extent, ...]
    members: tuple[Member, ...]
    metadata: dict[str, str]
    extent_bytes: int
    layout_version: int = LAYOUT_VERSION

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, padding left out."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def check(self) -> None:
        """Hold the manifest against itself (I5).

        Raises ProtocolError: a dtype that does not exist, a size that is not the shape's, bytes outside the member file or
        outside the extent, places that overlap or are unaligned, two tensors of one name.
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


def nbytes_of(dtype: str, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor; None if the dtype does not exist, a dimension is negative, or F4 elements do not fill whole bytes."""
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        return None
    elements = 1
    for dimension in shape:
        if not 0 <= dimension < LIMIT:
            return None
        elements *= dimension
        if elements >= LIMIT:  # as in safetensors, whose sizes have 64 bits
            return None
    bits *= elements
    return bits // 8 if bits < LIMIT and bits % 8 == 0 else None


def place_tensors(tensors: Sequence[Extent], members: Sequence[Member], metadata: dict[str, str]) -> Manifest:
    """The manifest of these tensors, each given its place by the layout planner."""
    layout = plan_layout([tensor.nbytes for tensor in tensors])
    placed = tuple(msgspec.structs.replace(tensor, place=place) for tensor, place in zip(tensors, layout.places, strict=True))
    return Manifest(placed, tuple(members), metadata, layout.extent_bytes)


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
