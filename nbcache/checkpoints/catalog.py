"""From a name to files, and from files to a manifest.

Resolving looks at directory entries and stats, and reads at most a shard index: enough for an entry's key, so that a second
name for cached files costs no header. Describing opens the files and reads their headers. Client side only: the daemon
knows no format.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from nbcache.checkpoints import safetensors
from nbcache.errors import (
    CheckpointChanged,
    CheckpointError,
    CheckpointIncomplete,
    CheckpointInvalid,
    CheckpointNotFound,
    CheckpointUnreadable,
    UnsupportedFormat,
)
from nbcache.manifest import Extent, Fingerprint, Manifest, Member, key_of, place_tensors

INDEX_SUFFIX = ".safetensors.index.json"
SUFFIX = ".safetensors"
MAX_INDEX_BYTES = 100 << 20
PREFERRED = ("model", "diffusion_pytorch_model", "pytorch_model")
"""Stems that a folder with several checkpoints is asked for first, as transformers and diffusers do."""

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_VARIANT_INDEX = re.compile(r"\.safetensors\.index\.[\w-]+\.json$")
"""Of a variant, such as fp16: named explicitly, never found by itself."""
_HUB_BLOB = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint, by what a stat says of them. ``expected`` maps tensor to shard where there is an index."""

    name: str
    members: tuple[Member, ...]
    index: Mapping[str, str] | None = None

    @property
    def key(self) -> str:
        """The key of the entry that these files make."""
        return key_of(self.members)


@dataclass(frozen=True)
class Description:
    """A manifest and its member files, open for reading. Close it."""

    manifest: Manifest
    files: tuple[int, ...]
    _closing: ExitStack

    def close(self) -> None:
        """Close the files."""
        self._closing.close()


def resolve(name: str) -> Checkpoint:
    """The checkpoint at a path: a ``.safetensors`` file, a shard index, or a folder that holds either.

    CheckpointNotFound, CheckpointUnreadable, CheckpointIncomplete, CheckpointInvalid (an index that is none) or
    UnsupportedFormat (another kind of file; a folder without weights, or with several kinds to choose from).
    """
    path = os.path.abspath(os.path.expanduser(name))
    return _resolve_file(path, locate(path))


def locate(path: str) -> str:
    """The file that a path names: itself, or what a folder is loaded by. Opens no file. Raises as :func:`resolve`."""
    return _choose_in(path) if os.path.isdir(path) else path


def is_unchanged(path: str, members: Sequence[Member]) -> bool:
    """Whether a path still leads to these files, by a stat of each: those it would be resolved to now, links followed."""
    try:
        first = locate(path)
        recorded = os.path.dirname(members[0].path)
        folder = os.path.dirname(first)
        now = [first, *(os.path.join(folder, os.path.relpath(member.path, recorded)) for member in members[1:])]
        return all(Fingerprint.of(os.stat(p)) == member.fingerprint for p, member in zip(now, members, strict=True))
    except (OSError, CheckpointError, UnsupportedFormat):
        return False


def _resolve_file(name: str, path: str) -> Checkpoint:
    if path.endswith(INDEX_SUFFIX) or _VARIANT_INDEX.search(path):
        return _resolve_index(name, path)
    member = _member(path)
    if not path.endswith(SUFFIX):
        raise UnsupportedFormat(f"{path}: not a {SUFFIX} file, a *{INDEX_SUFFIX} or a folder that holds one")
    return Checkpoint(name, (member,))


def _resolve_index(name: str, path: str) -> Checkpoint:
    index_member = _member(path)
    weight_map = _read_index(path)
    if not weight_map:
        raise CheckpointInvalid(f"{path}: an index that names no tensor")
    folder = os.path.dirname(path)
    members = [index_member]
    for shard in sorted(set(weight_map.values())):
        if os.path.isabs(shard) or ".." in Path(shard).parts:
            raise CheckpointInvalid(f"{path}: names a shard outside its folder: {shard!r}")
        try:
            members.append(_member(os.path.join(folder, shard)))
        except CheckpointNotFound as error:
            raise CheckpointIncomplete(f"{path}: shard {shard} is missing; download the checkpoint again") from error
    return Checkpoint(name, tuple(members), weight_map)


def _read_index(path: str) -> dict[str, str]:
    class Index(msgspec.Struct):
        weight_map: dict[str, str]

    try:
        if os.stat(path).st_size > MAX_INDEX_BYTES:
            raise CheckpointInvalid(f"{path}: an index over {MAX_INDEX_BYTES} bytes")
        return msgspec.json.decode(Path(path).read_bytes(), type=Index).weight_map
    except OSError as error:
        raise CheckpointUnreadable(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointInvalid(f"{path}: not a shard index: {error}") from error


def _member(path: str) -> Member:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFound(f"{path}: no such file or folder, and nothing is cached under that name") from error
    except (OSError, ValueError) as error:
        raise CheckpointUnreadable(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if os.path.isdir(path):
        raise CheckpointUnreadable(f"{path}: a folder where a file was expected")
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointUnreadable(f"{path}: not a regular file")
    return Member(path, Fingerprint.of(found), _hub_sha256(path))


def _hub_sha256(path: str) -> str:
    """The sha256 that a large file of the Hugging Face cache is named by (``snapshots/REV/x -> blobs/SHA256``), or nothing."""
    if not os.path.islink(path):
        return ""
    blob = Path(os.path.realpath(path))
    return blob.name if blob.parent.name == "blobs" and _HUB_BLOB.match(blob.name) else ""


def _choose_in(folder: str) -> str:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointUnreadable(f"{folder}: {error.strerror}") from error
    stems = {n.removesuffix(INDEX_SUFFIX): n for n in names if n.endswith(INDEX_SUFFIX)}
    stems |= {n.removesuffix(SUFFIX): n for n in names if n.endswith(SUFFIX) and not _SHARD.search(n.removesuffix(SUFFIX))}
    if len(stems) == 1:
        return os.path.join(folder, *stems.values())
    for stem in PREFERRED:
        if stem in stems:
            return os.path.join(folder, stems[stem])
    if stems:
        raise UnsupportedFormat(f"{folder}: holds several checkpoints ({', '.join(sorted(stems.values()))}); name one of them")
    shards = [n for n in names if n.endswith(SUFFIX)]
    if shards:
        raise CheckpointIncomplete(
            f"{folder}: holds {len(shards)} shards but no *{INDEX_SUFFIX}; download it, or name one shard"
        )
    raise CheckpointNotFound(f"{folder}: a folder without weights (no {SUFFIX} file, no *{INDEX_SUFFIX})")


def describe(checkpoint: Checkpoint) -> Description:
    """Open the files, read their headers, and plan the entry. The result holds the files open, the same ones that were read.

    Raises as :func:`resolve`, and CheckpointInvalid for content that breaks its format, CheckpointIncomplete for a shard that
    lacks a tensor the index promises, CheckpointChanged if a file is no longer the one that was resolved.
    """
    with ExitStack() as stack:
        files = tuple(_open(member, stack) for member in checkpoint.members)
        tensors: list[Extent] = []
        metadata: dict[str, str] = {}
        for number, (member, fd) in enumerate(zip(checkpoint.members, files, strict=True)):
            if checkpoint.index is not None and number == 0:
                continue  # the index itself
            header = safetensors.read_header(fd, member.path, member.fingerprint.size_bytes)
            metadata |= header.metadata
            tensors += [safetensors.extent(tensor, number, member.path) for tensor in header.tensors]
        if checkpoint.index is not None:
            _check_index(checkpoint, checkpoint.index, tensors)
        return Description(place_tensors(tensors, checkpoint.members, metadata), files, stack.pop_all())
    raise AssertionError("unreachable")


def _open(member: Member, stack: ExitStack) -> int:
    try:
        fd = os.open(member.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise CheckpointChanged(f"{member.path}: went away while it was being opened") from error
    except OSError as error:
        raise CheckpointUnreadable(f"{member.path}: {error.strerror}") from error
    stack.callback(os.close, fd)
    if Fingerprint.of(os.fstat(fd)) != member.fingerprint:
        raise CheckpointChanged(f"{member.path}: changed while it was being opened; load it again")
    return fd


def _check_index(checkpoint: Checkpoint, index: Mapping[str, str], tensors: list[Extent]) -> None:
    path = checkpoint.members[0].path
    shards = [os.path.relpath(member.path, os.path.dirname(path)) for member in checkpoint.members]
    found = {tensor.name: shards[tensor.file] for tensor in tensors}
    if len(found) != len(tensors):
        raise CheckpointInvalid(f"{path}: two shards hold a tensor of the same name")
    missing = [name for name, shard in index.items() if found.get(name) != os.path.normpath(shard)]
    if missing:
        first = missing[0]
        raise CheckpointIncomplete(
            f"{path}: promises {first!r} in {index[first]}, which does not hold it ({len(missing)} of {len(index)} tensors "
            "are missing)"
        )
