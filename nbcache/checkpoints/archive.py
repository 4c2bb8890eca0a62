"""The directory of a zip file: which bytes of the file are which entry. Inflates nothing.

``zipfile`` reads the directory; where an entry's bytes start is said by its local header alone, which ``zipfile`` does not
tell. Bytes that are to be read straight into memory must be stored, so compressed entries are known as such and never opened.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

from nbcache.checkpoints.content import OpenFile

MAX_DIRECTORY_BYTES = 64 << 20
MAGIC = b"PK\x03\x04"

_LOCAL = struct.Struct("<4s2xH18xHH")
"""Of a local header: signature, flags, length of the name, length of the extra field."""
_ENCRYPTED = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: ``nbytes`` bytes at ``offset`` of the file, which are the content if ``stored``."""

    offset: int
    nbytes: int
    stored: bool


def read_directory(file: OpenFile) -> Mapping[str, Entry]:
    """The entries of a zip file by name, in the directory's order.

    CheckpointInvalid if it is none, or if entries overlap, share a name or leave the file.
    """
    try:
        with zipfile.ZipFile(_Window(file)) as found:
            members = found.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, struct.error, OSError) as error:
        raise file.invalid(f"not a zip file that can be read: {error}") from error
    entries: dict[str, Entry] = {}
    end = 0
    for member in sorted(members, key=lambda m: m.header_offset):
        if member.header_offset < end:
            raise file.invalid(f"zip entry {member.filename!r} at byte {member.header_offset} overlaps the one before it")
        entry = _entry(file, member)
        end = entry.offset + entry.nbytes
        if end > file.size_bytes:
            raise file.invalid(f"truncated: zip entry {member.filename!r} ends at byte {end} of {file.size_bytes}")
        if member.filename in entries:
            raise file.invalid(f"two zip entries of the name {member.filename!r}")
        entries[member.filename] = entry
    return {member.filename: entries[member.filename] for member in members}


def _entry(file: OpenFile, member: zipfile.ZipInfo) -> Entry:
    signature, flags, name_bytes, extra_bytes = _LOCAL.unpack(file.read(member.header_offset, _LOCAL.size))
    if signature != MAGIC:
        raise file.invalid(f"zip entry {member.filename!r}: no entry at byte {member.header_offset}")
    stored = member.compress_type == zipfile.ZIP_STORED and not (member.flag_bits | flags) & _ENCRYPTED
    if stored and member.compress_size != member.file_size:
        raise file.invalid(f"zip entry {member.filename!r}: stored in {member.compress_size} bytes, has {member.file_size}")
    return Entry(member.header_offset + _LOCAL.size + name_bytes + extra_bytes, member.compress_size, stored)


class _Window(io.RawIOBase):
    """The file as ``zipfile`` wants it, with a position of its own, and no read larger than a directory may be."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size_bytes}[whence]
        if start + offset < 0:
            raise OSError("before the start of the file")
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._file.size_bytes - self._at)
        size = left if size < 0 else min(size, left)
        if size > MAX_DIRECTORY_BYTES:
            raise OSError(f"a directory of {size} bytes, at most {MAX_DIRECTORY_BYTES} are read")
        found = self._file.read(self._at, size)
        self._at += size
        return found
