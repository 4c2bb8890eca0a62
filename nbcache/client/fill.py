"""From a name to a lease on its bytes: find it, or have it staged; and putting bytes that no file has.

A hit is one question: the daemon answers with the entry, this side stats the files it was made from, and that is all. No
torch here, so that the command line can stage without it.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from nbcache.checkpoints.catalog import Checkpoint, describe, resolve
from nbcache.client.session import ProgressCallback, Session, expect
from nbcache.errors import CheckpointNotFound, EntryNotFound, InvalidName, ProtocolError
from nbcache.manifest import MAX_MANIFEST_BYTES, Fingerprint, Manifest, decode_manifest, encode_manifest
from nbcache.memory.shared import SharedBlock, map_private, read_sealed, seal_bytes
from nbcache.protocol import messages as m
from nbcache.protocol.wire import close_all


class SourceGone(UserWarning):
    """The file of an entry is gone; the cached copy serves on."""


@dataclass(frozen=True)
class Grant:
    """A lease on an entry's bytes. Owns the session; :meth:`close` it, or let the map's owner do so.

    ``area`` maps the bytes privately: writes are this process's own. ``hit`` is False if files were read for it.
    """

    session: Session
    key: str
    name: str
    provenance: str
    hit: bool
    manifest: Manifest
    area: mmap.mmap

    def close(self) -> None:
        """End the lease. Tensors over ``area`` stay valid: the map goes with the last of them."""
        self.session.close()


def acquire(name: str, start: bool = True, on_progress: ProgressCallback | None = None) -> Grant:
    """A lease on the entry of this name, staged first if it is not cached or if its files changed.

    ``name`` is the name of a put entry or a path. Raises what :func:`nbcache.load` documents.
    """
    names = spellings(name)
    path = names[-1]
    grant = _find(m.Find(names=names), start, on_progress)
    if grant is None or _is_fresh(grant, path):
        return grant or _acquire_files(name, path, start, on_progress)
    grant.close()
    return _acquire_files(name, path, start, on_progress)


def reacquire(key: str, on_progress: ProgressCallback | None = None) -> Grant:
    """A lease on the entry with this key, whatever its name now means; EntryNotFound if it is gone."""
    grant = _find(m.Find(key=key), start=False, on_progress=on_progress)
    if grant is None:
        raise EntryNotFound(f"{key}: this generation is not cached any more; load it again by name")
    return grant


def spellings(name: str) -> tuple[str, ...]:
    """What ``name`` may mean to the daemon, in order: itself, unless it is a path; the path. InvalidName if neither can be."""
    _check_speakable(name)
    path = os.path.abspath(os.path.expanduser(name))
    return (path,) if "/" in name else (name, path)


def _check_speakable(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidName(f"{name!r} is not valid Unicode; give the file a name that is, or a symbolic link") from error
    if not name or "\0" in name:
        raise InvalidName(f"{name!r} cannot be a name")


def _find(find: m.Find, start: bool, on_progress: ProgressCallback | None) -> Grant | None:
    session = Session.open(start)
    try:
        return _granted(session, session.request(find, on_progress=on_progress))
    except BaseException:
        session.close()
        raise


def _granted(session: Session, answer: tuple[m.DaemonMessage, list[int]]) -> Grant | None:
    """The grant in an answer; None, and the session closed, for Absent."""
    if isinstance(answer[0], m.Absent):
        session.close()
        return None
    granted, descriptors = expect(answer, m.Granted)
    manifest_fd, block_fd = descriptors
    try:
        manifest = decode_manifest(read_sealed(manifest_fd, MAX_MANIFEST_BYTES))
        area = map_private(block_fd, manifest.extent_bytes)
    finally:
        close_all(descriptors)
    return Grant(session, granted.key, granted.name, granted.provenance, not granted.staged, manifest, area)


def _is_fresh(grant: Grant, path: str) -> bool:
    """Whether a granted entry is still what its name means: every file is, by its stat, the one that was read.

    If a file is gone and the name leads nowhere else, the entry serves on, with a warning.
    """
    for member in grant.manifest.members:
        try:
            if Fingerprint.of(os.stat(member.path)) != member.fingerprint:
                return False
        except OSError:
            if os.path.exists(path):
                return False
            warnings.warn(f"{grant.name}: {member.path} is gone; serving the cached copy", SourceGone, stacklevel=4)
            return True
    return True


def _acquire_files(name: str, path: str, start: bool, on_progress: ProgressCallback | None) -> Grant:
    try:
        checkpoint = resolve(path)
    except CheckpointNotFound as error:
        if "/" in name or os.path.exists(path):
            raise
        raise CheckpointNotFound(f"{name}: nothing is cached under that name, and there is no such file or folder") from error
    session = Session.open(start)
    try:
        answer = session.request(m.Find(names=(path,), key=checkpoint.key), on_progress=on_progress)
        if isinstance(answer[0], m.Absent):
            answer = _stage(session, checkpoint, on_progress)
        grant = _granted(session, answer)
        assert grant is not None
        return grant
    except BaseException:
        session.close()
        raise


def _stage(session: Session, checkpoint: Checkpoint, on_progress: ProgressCallback | None) -> tuple[m.DaemonMessage, list[int]]:
    """Describe the files and have the daemon read them."""
    description = describe(checkpoint)
    try:
        manifest_fd = seal_bytes("manifest", encode_manifest(description.manifest))
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


def put_bytes(name: str, manifest: Manifest, write: Callable[[mmap.mmap], None]) -> Grant:
    """Keep an entry that no file has: ``write`` fills a shared map of it with the tensors at their places.

    The map must not outlive ``write``. InvalidName, HostMemoryFull; if ``write`` raises, nothing is kept.
    """
    _check_speakable(name)
    session = Session.open()
    try:
        manifest_fd = seal_bytes("manifest", encode_manifest(manifest))
        try:
            _, (block_fd,) = expect(session.request(m.Reserve(name), (manifest_fd,)), m.Reserved)
        finally:
            os.close(manifest_fd)
        block = SharedBlock(block_fd, manifest.extent_bytes)
        try:
            with mmap.mmap(block.fd, block.size_bytes) as area:
                write(area)
        finally:
            block.close()
        grant = _granted(session, session.request(m.Commit()))
        if grant is None:
            raise ProtocolError("the daemon lost what was just committed")
        return grant
    except BaseException:
        session.close()
        raise
