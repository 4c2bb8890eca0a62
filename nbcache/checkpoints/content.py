"""What a file turned out to hold, and the open file that its format's reader reads.

The port between the catalog, which knows names and folders, and the formats, which know bytes. Client side only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from nbcache.errors import CheckpointInvalid, CheckpointUnreadable
from nbcache.manifest import Extent, View

TEXT_LIMIT = 16 << 10
"""Characters of one metadata value. Every hit decodes the manifest, so a tokenizer's vocabulary must not be in it."""

TOTAL_LIMIT = 1 << 20
"""Characters of all metadata of a file."""

LEFT_OUT = "nbcache.left_out"
"""The metadata key that names what was too long to keep."""


@dataclass(frozen=True)
class Content:
    """What one file holds: extents of file 0 that have no place yet, metadata, and views as a manifest has them."""

    tensors: tuple[Extent, ...]
    metadata: Mapping[str, str]
    views: tuple[View, ...] = ()

    @property
    def count(self) -> int:
        """How many tensors there are."""
        return len(self.tensors) - len({view.extent for view in self.views}) + len(self.views)


@dataclass(frozen=True)
class OpenFile:
    """A member file, open for reading, whose size is known. Somebody else closes ``fd``, and its position is never used."""

    fd: int
    path: str
    size_bytes: int

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Exactly these bytes. CheckpointInvalid if the file ends before them, CheckpointUnreadable if the system fails."""
        if not 0 <= offset <= self.size_bytes - size_bytes:
            raise self.invalid(f"truncated: {size_bytes} bytes at {offset} in a file of {self.size_bytes}")
        try:
            found = os.pread(self.fd, size_bytes, offset)
        except OSError as error:
            raise CheckpointUnreadable(f"{self.path}: {error.strerror}") from error
        if len(found) != size_bytes:
            raise self.invalid(f"truncated: {len(found)} of {size_bytes} bytes at {offset}")
        return found

    def invalid(self, what: str) -> CheckpointInvalid:
        """The error for content that breaks its format."""
        return CheckpointInvalid(f"{self.path}: {what}")


@dataclass
class Notes:
    """Metadata being collected: what is too long is left out, and named under :data:`LEFT_OUT`."""

    _texts: dict[str, str] = field(default_factory=dict)
    _left_out: list[str] = field(default_factory=list)
    _characters: int = 0
    _unnamed: int = 0

    def add(self, name: str, text: str) -> None:
        """Keep a text."""
        if len(text) > TEXT_LIMIT or not self._spend(len(name) + len(text)):
            self.leave_out(name)
        else:
            self._texts[name] = text

    def leave_out(self, name: str) -> None:
        """Keep at most the name."""
        if self._spend(len(name)):
            self._left_out.append(name)
        else:
            self._unnamed += 1

    def _spend(self, characters: int) -> bool:
        if self._characters + characters > TOTAL_LIMIT:
            return False
        self._characters += characters
        return True

    def finish(self) -> dict[str, str]:
        """The metadata."""
        names = [*self._left_out, *([f"{self._unnamed} more"] if self._unnamed else [])]
        return self._texts | ({LEFT_OUT: ", ".join(names)} if names else {})
