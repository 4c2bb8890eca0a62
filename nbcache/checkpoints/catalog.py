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

from nbcache.checkpoints.content import Content, OpenFile
from nbcache.checkpoints.formats import FORMATS, Format, format_of, served, stem_of
from nbcache.errors import (
    CheckpointChanged,
    CheckpointError,
    CheckpointIncomplete,
    CheckpointInvalid,
    CheckpointNotFound,
    CheckpointUnreadable,
    UnsupportedFormat,
)
from nbcache.manifest import Extent, Fingerprint, Manifest, Member, View, key_of, place_tensors

SUFFIX = ".safetensors"
MAX_INDEX_BYTES = 100 << 20
PREFERRED = ("model", "diffusion_pytorch_model", "pytorch_model")
"""Stems that a folder with several checkpoints is asked for first, as transformers and diffusers do."""

INDEX_FIRST = ("diffusion_pytorch_model",)
"""Stems of which diffusers takes the shards where there is a whole file too; of the others transformers takes the file."""

_VARIANT_INDEX = re.compile(r"\.(safetensors|bin)\.index\.[\w-]+\.json$")
"""Of a variant, such as fp16: named explicitly, never found by itself."""
_HUB_BLOB = re.compile(r"^([0-9a-f]{64}|[0-9a-f]{40})$")
"""A large file's sha256, or a small one's git hash: a shard index that two repositories share is one too."""


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
    """The checkpoint at a path: a file of a format of :mod:`~nbcache.checkpoints.formats`, a shard index, or a folder with one.

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
    kind = format_of(path)
    if _VARIANT_INDEX.search(path) or (kind is not None and path.endswith(kind.index_suffixes)):
        return _resolve_index(name, path)
    member = _member(path)
    if kind is None:
        raise UnsupportedFormat(f"{path}: not a file that nbcache reads: {served()}, or a folder that holds one")
    return Checkpoint(name, (member, *_split_members(path, kind)))


def _split_members(path: str, kind: Format) -> list[Member]:
    """The other parts of a checkpoint whose first part this is, in a format that is split without an index."""
    parts = kind.split_parts(os.path.basename(path))
    try:
        return [_member(os.path.join(os.path.dirname(path), part)) for part in parts[1:]]
    except CheckpointNotFound as error:
        raise CheckpointIncomplete(f"{path}: one of its {len(parts)} parts is missing: {error}") from error


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
    return Member(path, Fingerprint.of(found), _hub_blob(path))


def _hub_blob(path: str) -> str:
    """The hash that a file of the Hugging Face cache is named by (``snapshots/REV/x -> blobs/HASH``), or nothing."""
    if not os.path.islink(path):
        return ""
    blob = Path(os.path.realpath(path))
    return blob.name if blob.parent.name == "blobs" and _HUB_BLOB.match(blob.name) else ""


def _choose_in(folder: str) -> str:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointUnreadable(f"{folder}: {error.strerror}") from error
    for kind in FORMATS:
        chosen = _choose_among(folder, [name for name in names if kind.may_stand_for_a_folder(name)], kind)
        if chosen:
            return os.path.join(folder, chosen)
    raise CheckpointNotFound(f"{folder}: a folder without weights ({served()})")


def _choose_among(folder: str, names: Sequence[str], kind: Format) -> str:
    """The file of this format that a folder is loaded by, of those it holds; nothing if there is none."""
    indices = {stem_of(name): name for name in names if name.endswith(kind.index_suffixes)}
    stems = {stem_of(name): name for name in names if not name.endswith(kind.index_suffixes) and not kind.is_shard(name)}
    stems = indices | stems | {stem: name for stem, name in indices.items() if stem in INDEX_FIRST}
    if len(stems) == 1:
        return next(iter(stems.values()))
    for stem in PREFERRED:
        if stem in stems:
            return stems[stem]
    if stems:
        raise UnsupportedFormat(f"{folder}: holds several checkpoints ({', '.join(sorted(stems.values()))}); name one of them")
    if names:
        raise CheckpointIncomplete(f"{folder}: holds {len(names)} shards but no {kind.whole}; download it, or name one shard")
    return ""


def describe(checkpoint: Checkpoint) -> Description:
    """Open the files, read their headers, and plan the entry. The result holds the files open, the same ones that were read.

    Raises as :func:`resolve`, and CheckpointInvalid for content that breaks its format, CheckpointIncomplete for a shard that
    lacks a tensor the index promises, CheckpointChanged if a file is no longer the one that was resolved.
    """
    with ExitStack() as stack:
        files = tuple(_open(member, stack) for member in checkpoint.members)
        contents: list[tuple[int, Content]] = []
        for number, (member, fd) in enumerate(zip(checkpoint.members, files, strict=True)):
            if checkpoint.index is not None and number == 0:
                continue  # the index itself
            kind = format_of(member.path)
            if kind is None:
                raise UnsupportedFormat(f"{member.path}: not a file that nbcache reads: {served()}")
            contents.append((number, kind.read(OpenFile(fd, member.path, member.fingerprint.size_bytes))))
        manifest = _manifest(checkpoint, contents)
        return Description(manifest, files, stack.pop_all())
    raise AssertionError("unreachable")


def _manifest(checkpoint: Checkpoint, contents: Sequence[tuple[int, Content]]) -> Manifest:
    """The manifest of what the member files of these numbers hold."""
    tensors: list[Extent] = []
    views: list[View] = []
    metadata: dict[str, str] = {}
    count = 0
    for number, content in contents:
        first = len(tensors)
        metadata |= content.metadata
        tensors += [msgspec.structs.replace(tensor, file=number) if number else tensor for tensor in content.tensors]
        views += [
            msgspec.structs.replace(view, number=view.number + count, extent=view.extent + first) for view in content.views
        ]
        count += content.count
    below = {view.extent for view in views}
    names = [(tensor.name, tensor.file) for number, tensor in enumerate(tensors) if number not in below]
    names += [(view.name, tensors[view.extent].file) for view in views]
    _check_names(checkpoint, names)
    return place_tensors(tensors, checkpoint.members, metadata, views)


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


def _check_names(checkpoint: Checkpoint, names: Sequence[tuple[str, int]]) -> None:
    """Each name once, and where there is an index, each in the shard that it promises."""
    path, files = checkpoint.members[0].path, dict(names)
    if len(files) != len(names):
        raise CheckpointInvalid(f"{path}: two tensors of the same name")
    if checkpoint.index is None:
        return
    shards = [os.path.relpath(member.path, os.path.dirname(path)) for member in checkpoint.members]
    index = checkpoint.index
    missing = [name for name, shard in index.items() if name not in files or shards[files[name]] != os.path.normpath(shard)]
    if missing:
        first = missing[0]
        raise CheckpointIncomplete(
            f"{path}: promises {first!r} in {index[first]}, which does not hold it ({len(missing)} of {len(index)} tensors "
            "are missing)"
        )
