"""Entries that are made from files, and can be made again: what each is called, and how it is found or made.

Owns the name, which says from what and by what an entry was made (files by their fingerprints, converters by their versions),
so that a changed file or another library means another entry; and that nothing is kept which was made while its files changed.
Must not know what is made, nor how. It exists so that what takes a library seconds to convert is converted once, and gives way
to other loads like anything that can be had again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from nbcache.client import tensors as edge
from nbcache.client.fill import put_bytes
from nbcache.client.loading import load_entry
from nbcache.client.options import Loaded, Options
from nbcache.client.session import ProgressCallback
from nbcache.errors import CheckpointChanged, EntryNotFound
from nbcache.manifest import Fingerprint, Member
from nbcache.models.aside import aside

LONGEST_STEM = 120


@dataclass(frozen=True)
class Made:
    """What a conversion came to."""

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Derived:
    """An entry that is made from files. ``name`` is the entry's, ``path`` what the user called the first of the files.

    ``make`` gives what is to be kept, and is called only if the entry is not cached (any more).
    """

    name: str
    path: str
    members: tuple[Member, ...]
    make: Callable[[], Made]

    def obtain(self, options: Options, on_progress: ProgressCallback | None = None) -> tuple[Loaded, bool]:
        """The entry, made first if need be. The second says whether it was made.

        CheckpointChanged; what ``make`` raises; HostMemoryFull, DeviceMemoryFull, DaemonError.
        """
        try:
            return load_entry(self.name, options, on_progress), False
        except EntryNotFound:
            with self._kept():
                return load_entry(self.name, options, on_progress), True

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Make the entry and keep it. Inside nothing evicts it; somebody else's of the same name may take its place."""
        with aside():
            made = self.make()
        if not all(_is_unchanged(member) for member in self.members):  # I6: what was read may be neither old nor new
            raise CheckpointChanged(f"{self.path}: changed while it was converted; load it again")
        tensors = edge.flatten(made.tensors)
        manifest = edge.plan_put(tensors, made.metadata)
        grant = put_bytes(self.name, manifest, lambda area: edge.write_tensors(tensors, manifest, area), derived=True)
        try:
            yield
        finally:
            grant.close()


def _is_unchanged(member: Member) -> bool:
    try:
        return Fingerprint.of(os.stat(member.path)) == member.fingerprint
    except OSError:
        return False


def name_of(what: str, members: Sequence[Member], made_by: object) -> str:
    """``style [lora 0123456789abcdef]``: the first file's stem, what the entry is, and a hash of all it depends on.

    ``made_by`` is whatever else decides what comes of the files: plain values, the converter's version among them.
    """
    known_by = [made_by, [member.identity() for member in members]]
    digest = hashlib.blake2b(msgspec.json.encode(known_by), digest_size=8).hexdigest()
    stem = "".join(c if c.isprintable() else "?" for c in Path(members[0].path).stem)[:LONGEST_STEM].strip()
    return f"{stem or what} [{what} {digest}]"
