"""What a peer claims, held against what is so (I5, I6): its manifest, the files that came with it, the names it gives.

Owns the limits of what a request may bring. Looks at descriptors, and keeps and closes none; knows no connection and no entry.
It exists so that the rooms behind it may take what they are given for true.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from nbcache.daemon.reader import check_unchanged
from nbcache.errors import InvalidName, ProtocolError
from nbcache.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest
from nbcache.memory.shared import read_sealed

MAX_FILES = 10_000


def read_manifest(fd: int) -> Manifest:
    """The manifest in a sealed memfd, held against itself. Raises what :meth:`Manifest.check` raises."""
    manifest = decode_manifest(read_sealed(fd, MAX_MANIFEST_BYTES))
    manifest.check()
    return manifest


def check_files(manifest: Manifest, files: Sequence[int]) -> None:
    """Hold the manifest against the files that came with it (I5, I6)."""
    if not files or len(files) != len(manifest.members):
        raise ProtocolError(f"{len(files)} files for a manifest of {len(manifest.members)}")
    for fd, member in zip(files, manifest.members, strict=True):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ProtocolError(f"{member.path}: not a regular file")
        check_unchanged(fd, member)


def check_name(name: str, path: bool) -> None:
    """A file entry is named by its absolute path; a put entry by a plain word, so that the two never meet."""
    if path:
        if not name.startswith("/") or len(name) > 4096 or "\0" in name:
            raise InvalidName(f"{name!r} cannot name a file entry: it is named by its absolute path")
    elif not name or len(name) > 200 or "/" in name or not name.isprintable() or name != name.strip():
        raise InvalidName(f"{name!r} cannot name a saved entry: use a printable word without a slash, up to 200 characters")
