"""From a name to a lease on its bytes: find it, or have it staged; and putting bytes that no file has.

A hit is one question: the daemon answers with the entry, this side stats the files it was made from, and that is all. No
torch here, so that the command line can stage without it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from nbcache.checkpoints import aliases
from nbcache.checkpoints import names as catalogue
from nbcache.checkpoints.catalog import Checkpoint, describe, is_unchanged, resolve
from nbcache.checkpoints.folders import FolderKind, kind_of
from nbcache.client.notices import SourceGone, notify
from nbcache.client.session import ProgressCallback, Session, expect, told
from nbcache.collection import uncollected
from nbcache.errors import (
    CheckpointNotFound,
    DaemonLost,
    DaemonUnavailable,
    EntryNotFound,
    InvalidName,
    ProtocolError,
    UnsupportedFormat,
)
from nbcache.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest, encode_manifest
from nbcache.memory.shared import SharedBlock, map_writable, read_sealed, seal_bytes
from nbcache.protocol import messages as m
from nbcache.protocol.wire import close_all

REMEMBERED_BYTES = 1 << 20
"""Manifests that are not longer are remembered, a few of them."""


@dataclass(frozen=True)
class Grant:
    """A lease on an entry's bytes. Owns the session and ``fd``; :meth:`close` it, or hand both on.

    ``fd`` is the sealed block or the slab, -1 for a pinned host copy, which a client only holds. ``hit`` is False if files were
    read or a slab was filled for it.
    """

    session: Session
    key: str
    name: str
    provenance: str
    hit: bool
    manifest: Manifest
    fd: int

    def take_fd(self) -> int:
        """The descriptor, from now on the caller's to close."""
        fd = self.fd
        object.__setattr__(self, "fd", -1)
        return fd

    def close(self) -> None:
        """End the lease. What was mapped of it stays valid."""
        if self.fd >= 0:
            os.close(self.take_fd())
        self.session.close()


@dataclass(frozen=True)
class Offer:
    """An entry whose slab is yet to be filled, by whoever holds this. Owns the session.

    ``filled``: Fill was said ahead, with the wish; its answer comes next. ``read``: files are read for it.
    """

    session: Session
    key: str
    manifest: Manifest
    filled: bool = False
    read: bool = False

    def close(self) -> None:
        """Decline."""
        self.session.close()


@dataclass(frozen=True)
class Wish:
    """Where an entry is wanted: in a slab, in shared host memory, or (``warm``) in whichever host memory loads will want."""

    device: m.DeviceWish | None = None
    warm: bool = False

    def find(self, names: tuple[str, ...] = (), key: str = "") -> m.Find:
        """The question for an entry so wished."""
        return m.Find(names, key, self.device, self.warm)


def acquire(
    name: str | os.PathLike[str],
    wish: Wish = Wish(),
    on_progress: ProgressCallback | None = None,
    start: bool = True,
) -> Grant | Offer:
    """A lease on the entry of this name, staged first if it is not cached or if its files changed.

    ``name`` is the name of a put entry, an alias, a path or a hub id. An Offer is given only for a wished slab. Raises what
    :func:`nbcache.load` documents.
    """
    text, meaning = meaning_of(name)
    found = _ask(wish.find(_spoken(name, meaning)), start, on_progress)
    if found is not None:
        if _is_fresh(found, meaning.path):
            return found
        found.close()
    path = catalogue.find(text) if meaning.repo_id else meaning.path
    return _acquire_files(text, path, wish, start, on_progress)


def reacquire(key: str, wish: Wish, on_progress: ProgressCallback | None = None) -> Grant | Offer:
    """A lease on the entry with this key, whatever its name now means; EntryNotFound if it is gone."""
    found = _ask(wish.find(key=key), False, on_progress)
    if found is None:
        raise EntryNotFound(f"{key}: this generation is not cached any more; load it again by name")
    return found


def reacquire_by_name(name: str, wish: Wish, on_progress: ProgressCallback | None = None) -> Grant | Offer:
    """A lease on the entry of exactly this name, which means no file; EntryNotFound if there is none (any more)."""
    found = _ask(wish.find((name,)), True, on_progress)
    if found is None:
        raise EntryNotFound(f"{name}: not cached")
    return found


def spellings(name: str | os.PathLike[str]) -> tuple[str, ...]:
    """What ``name`` may mean to the daemon, in order: itself, unless it is a path or an alias of the user's; the path.

    InvalidName if neither can be.
    """
    return _spoken(name, meaning_of(name)[1])


def meaning_of(name: str | os.PathLike[str]) -> tuple[str, catalogue.Meaning]:
    """A name as text, and what it means. InvalidName for what cannot be a name."""
    text = os.fspath(name) if isinstance(name, os.PathLike) else name
    _check_speakable(text)
    if text is not name or text.startswith(("/", ".", "~")):
        return text, catalogue.Meaning(os.path.abspath(os.path.expanduser(text)))
    return text, catalogue.look_up(text)


def is_saved(name: str) -> bool:
    """Whether the daemon, if one runs, keeps an entry of exactly this name."""
    try:
        found = _ask(m.Find((name,)), False, None)
    except DaemonUnavailable:
        return False
    if found is not None:
        found.close()
    return found is not None


def _spoken(name: str | os.PathLike[str], meaning: catalogue.Meaning) -> tuple[str, ...]:
    if not isinstance(name, str) or "/" in name or meaning.aliased:
        return (meaning.path,)
    return (name, meaning.path)


def _check_speakable(name: object) -> None:
    if not isinstance(name, str):
        raise InvalidName(f"{name!r} cannot be a name: it is a {type(name).__name__}, not a string or a path")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidName(f"{name!r} is not valid Unicode; give the file a name that is, or a symbolic link") from error
    if not name or "\0" in name:
        raise InvalidName(f"{name!r} cannot be a name")


def _ask(find: m.Find, start: bool, on_progress: ProgressCallback | None) -> Grant | Offer | None:
    for last in (False, True):
        session = Session.open(start)
        try:
            return read_answer(session, session.request(find, on_progress=on_progress))
        except DaemonLost:
            session.close()
            if last or not start or session.daemon_pid:  # without a greeting it was dying as we connected: the next is another
                raise
        except BaseException:
            session.close()
            raise
    raise AssertionError("unreachable")


def _decoded(payload: bytes) -> Manifest:
    """The manifest. What is loaded again and again, as LoRAs are, is described by the same bytes, and decoded once."""
    with uncollected():
        return _decode_again(payload) if len(payload) <= REMEMBERED_BYTES else decode_manifest(payload)


_decode_again = lru_cache(8)(decode_manifest)


def read_answer(
    session: Session, answer: tuple[m.DaemonMessage, list[int]], known: Manifest | None = None
) -> Grant | Offer | None:
    """The grant or offer in an answer; None, and the session closed, for Absent. A ``known`` manifest is not read again."""
    message, descriptors = answer
    if isinstance(message, m.Absent):
        session.close()
        return None
    try:
        if not isinstance(message, m.Granted | m.Vacant):
            raise ProtocolError(f"the daemon answered {type(message).__name__}, expected Granted or Vacant")
        manifest = known or _decoded(read_sealed(descriptors[0], MAX_MANIFEST_BYTES))
    except BaseException:
        close_all(descriptors)
        raise
    os.close(descriptors[0])
    if isinstance(message, m.Vacant):
        return Offer(session, message.key, manifest, message.filled)
    fd = descriptors[1] if len(descriptors) > 1 else -1
    return Grant(session, message.key, message.name, message.provenance, not message.staged, manifest, fd)


def _is_fresh(found: Grant | Offer, path: str) -> bool:
    """Whether a found entry is still what its name means: what the path leads to now is, by its stats, what was read.

    If the path leads nowhere any more, the entry serves on, with a warning.
    """
    members = found.manifest.members
    if not members or is_unchanged(path, members):
        return True
    if os.path.lexists(path):
        return False
    notify(SourceGone, f"{path} is gone; serving the cached copy")
    return True


def _acquire_files(name: str, path: str, wish: Wish, start: bool, on_progress: ProgressCallback | None) -> Grant | Offer:
    try:
        checkpoint = resolve(path)
    except CheckpointNotFound as error:
        if kind_of(path) is FolderKind.PIPELINE:
            raise UnsupportedFormat(
                f"{path}: a pipeline, of several checkpoints; nbcache.load_model loads it, subfolder='transformer' one of them"
            ) from error
        if "/" in name or os.path.exists(path):
            raise
        raise CheckpointNotFound(f"{name}: nothing is cached under that name, and there is no such file or folder") from error
    session = Session.open(start)
    try:
        answer = session.request(wish.find((path,), checkpoint.key), on_progress=on_progress)
        read = False
        for _ in range(2):  # the first may have joined a copy for a GPU that came to nothing
            if isinstance(answer[0], m.Absent):
                answer, read = _stage(session, checkpoint, on_progress), True
        found = read_answer(session, answer)
        if found is None:
            raise ProtocolError("the daemon staged an entry and then had none")
        return replace(found, read=read) if isinstance(found, Offer) else found
    except BaseException:
        session.close()
        raise


def _stage(session: Session, checkpoint: Checkpoint, on_progress: ProgressCallback | None) -> tuple[m.DaemonMessage, list[int]]:
    """Describe the files and have the daemon read them."""
    description = describe(checkpoint)
    try:
        manifest_fd = _seal(description.manifest)
        try:
            files, size = description.files, m.FILES_PER_MESSAGE
            batches = [files[at : at + size] for at in range(0, len(files), size)]
            packets: list[tuple[m.Message, tuple[int, ...]]] = [
                (m.Stage(checkpoint.name, len(files)), (manifest_fd, *batches[0])),
                *((m.Files(), batch) for batch in batches[1:]),
            ]
            for message, descriptors in packets[:-1]:
                session.send(message, descriptors)
            return session.request(*packets[-1], on_progress=on_progress)
        finally:
            os.close(manifest_fd)
    finally:
        description.close()


def _seal(manifest: Manifest) -> int:
    """A manifest as it is sent. DaemonUnavailable if the system gives no memory or descriptor for it."""
    try:
        return seal_bytes("manifest", encode_manifest(manifest))
    except OSError as error:
        raise DaemonUnavailable(f"cannot ask the daemon: {told(error)}") from error


def put_bytes(name: str, manifest: Manifest, write: Callable[[mmap.mmap], None], derived: bool = False) -> Grant:
    """Keep an entry that no file has: ``write`` fills a shared map of it with the tensors at their places.

    ``derived`` says that it can be made again, so policy may evict it. The map must not outlive ``write``.

    InvalidName, HostMemoryFull; if ``write`` raises, nothing is kept.
    """
    _check_speakable(name)
    if target := None if derived else aliases.listing().get(name):
        raise InvalidName(
            f"{name!r} is an alias of yours, for {target}, and would be loaded as that; save under another name, or remove the "
            f"alias: nbcache alias remove {name}"
        )
    session = Session.open()
    try:
        manifest_fd = _seal(manifest)
        try:
            _, (block_fd,) = expect(session.request(m.Reserve(name, derived), (manifest_fd,)), m.Reserved)
        finally:
            os.close(manifest_fd)
        block = SharedBlock(block_fd, manifest.extent_bytes)
        try:
            with map_writable(block.fd, block.size_bytes) as area:
                write(area)
        finally:
            block.close()
        session.send(m.Commit())
        return committed(session, manifest)
    except BaseException:
        session.close()
        raise


def committed(session: Session, manifest: Manifest, on_progress: ProgressCallback | None = None) -> Grant:
    """The grant of what this session filled and has said Commit of."""
    found = read_answer(session, session.receive(on_progress), manifest)
    if not isinstance(found, Grant):
        raise ProtocolError("the daemon lost what was just committed")
    return found
