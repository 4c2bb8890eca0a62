"""Reading files into memory, in parallel: which bytes go where, and the threads that bring them.

Knows extents, open descriptors and buffers; no format, no path, no policy.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

from nbcache.errors import CheckpointChanged, CheckpointUnreadable
from nbcache.manifest import Extent, Fingerprint, Manifest, Member

CHUNK_BYTES = 8 << 20
PIECES_PER_READ = 512
"""Pieces of memory that one ``preadv`` scatters to (the kernel's limit is 1024)."""


@dataclass(frozen=True)
class Read:
    """One ``preadv``: contiguous bytes of a file from ``offset`` on, scattered to ``pieces`` of (place, bytes)."""

    file: int
    offset: int
    pieces: tuple[tuple[int, int], ...]


def plan_reads(tensors: Iterable[Extent], start: int = 0, end: int = 1 << 62, chunk_bytes: int = CHUNK_BYTES) -> list[Read]:
    """The reads that fill places ``start`` to ``end`` of an entry, as places from ``start`` on.

    File by file in file order, no read over ``chunk_bytes``; gaps in a file are skipped.
    """
    reads: list[Read] = []
    pieces: list[tuple[int, int]] = []
    file = first = last = 0
    for tensor in sorted(tensors, key=lambda t: (t.file, t.offset)):
        done = max(0, start - tensor.place)
        stop = min(tensor.nbytes, end - tensor.place)
        while done < stop:
            at = tensor.offset + done
            full = last - first >= chunk_bytes or len(pieces) >= PIECES_PER_READ
            if pieces and (full or tensor.file != file or at != last):
                reads.append(Read(file, first, tuple(pieces)))
                pieces = []
            if not pieces:
                file, first, last = tensor.file, at, at
            size = min(stop - done, chunk_bytes - (last - first))
            pieces.append((tensor.place + done - start, size))
            last += size
            done += size
    if pieces:
        reads.append(Read(file, first, tuple(pieces)))
    return reads


class Source(Protocol):
    """Where an entry's bytes come from."""

    files: tuple[int, ...]
    total_bytes: int

    def label(self, file: int) -> str:
        """What to call a file in an error."""

    def check(self) -> None:
        """CheckpointChanged unless the files are what they were."""

    def reads(self, start: int, end: int) -> list[Read]:
        """The reads for places ``start`` to ``end``."""

    def close(self) -> None:
        """Close the files. May be called twice."""


class FileSource:
    """A checkpoint's files, as a client handed them over."""

    def __init__(self, manifest: Manifest, files: Sequence[int]) -> None:
        self._manifest = manifest
        self.files = tuple(files)
        self.total_bytes = manifest.nbytes

    def label(self, file: int) -> str:
        """See :class:`Source`."""
        return self._manifest.members[file].path

    def check(self) -> None:
        """See :class:`Source` (I6)."""
        for fd, member in zip(self.files, self._manifest.members, strict=True):
            check_unchanged(fd, member)

    def reads(self, start: int, end: int) -> list[Read]:
        """See :class:`Source`."""
        return plan_reads(self._manifest.tensors, start, end)

    def close(self) -> None:
        """See :class:`Source`."""
        files, self.files = self.files, ()
        for fd in files:
            os.close(fd)


class CopySource:
    """A sealed host copy of the same entry, read through its descriptor: every byte is at its place already."""

    def __init__(self, name: str, fd: int, extent_bytes: int) -> None:
        self._name = name
        self.files: tuple[int, ...] = (os.dup(fd),)
        self.total_bytes = extent_bytes

    def label(self, file: int) -> str:
        """See :class:`Source`."""
        return self._name

    def check(self) -> None:
        """See :class:`Source`. Sealed: nothing can have changed."""

    def reads(self, start: int, end: int) -> list[Read]:
        """See :class:`Source`."""
        return plan_reads([Extent("", "U8", (), 0, 0, self.total_bytes, 0)], start, end)

    def close(self) -> None:
        """See :class:`Source`."""
        files, self.files = self.files, ()
        for fd in files:
            os.close(fd)


class Staging:
    """One host copy being filled. ``staged_bytes`` grows while it runs; ``cancel`` makes :meth:`run` end early.

    Notes
    -----
    :meth:`run` blocks and belongs in a thread of its own. It closes the source whatever happens. The views it fills are the
    caller's; no reference to one is left when its turn is over.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.staged_bytes = 0
        self.total_bytes = source.total_bytes
        self._cancelled = threading.Event()
        self._count = threading.Lock()

    def cancel(self) -> None:
        """Let :meth:`run` end with CheckpointUnreadable at the next chunk."""
        self._cancelled.set()

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def run(self, areas: Iterable[tuple[int, memoryview]], threads: int) -> None:
        """Fill each area of (place it starts at, bytes), one after the other.

        CheckpointChanged if a file is not what the manifest says, before the reading or after it (I6); CheckpointUnreadable
        for a failing read.
        """
        try:
            self._source.check()
            with ThreadPoolExecutor(threads, thread_name_prefix="nbcache-read") as pool:
                for start, view in areas:
                    self._fill(start, view, pool, threads)
            self._source.check()
        finally:
            self._source.close()

    def _fill(self, start: int, view: memoryview, pool: ThreadPoolExecutor, threads: int) -> None:
        reads = iter(self._source.reads(start, start + len(view)))
        take = threading.Lock()
        failures: list[Exception] = []

        def work() -> None:
            try:
                while not failures and not self._cancelled.is_set():
                    with take:
                        read = next(reads, None)
                    if read is None:
                        return
                    self._read(read, view)
            except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
                failures.append(error.with_traceback(None))  # its frames hold slices of the view

        wait([pool.submit(work) for _ in range(threads)])
        if failures:
            raise failures[0]
        if self._cancelled.is_set():
            raise CheckpointUnreadable(f"{self._source.label(0)}: the daemon stopped while reading it")

    def _read(self, read: Read, view: memoryview) -> None:
        buffers = [view[place : place + size] for place, size in read.pieces]
        offset = read.offset
        try:
            while buffers:
                got = os.preadv(self._source.files[read.file], buffers, offset)
                if got == 0:
                    raise CheckpointChanged(
                        f"{self._source.label(read.file)}: ends at byte {offset}, sooner than when it was described; it was "
                        "truncated while it was read, load it again"
                    )
                offset += got
                with self._count:
                    self.staged_bytes += got
                buffers = _rest(buffers, got)
        except OSError as error:
            raise CheckpointUnreadable(
                f"{self._source.label(read.file)}: read failed at byte {offset}: {error.strerror}"
            ) from None
        finally:
            for buffer in buffers:
                buffer.release()


def _rest(buffers: list[memoryview], got: int) -> list[memoryview]:
    """What is left to fill after ``got`` bytes; filled buffers are released."""
    for index, buffer in enumerate(buffers):
        if got < len(buffer):
            rest = [buffer[got:], *buffers[index + 1 :]]
            buffer.release()
            return rest
        got -= len(buffer)
        buffer.release()
    return []


def check_unchanged(fd: int, member: Member) -> None:
    """CheckpointChanged unless the open file is, by its stat, the one that was described (I6)."""
    found = Fingerprint.of(os.fstat(fd))
    if found != member.fingerprint:
        raise CheckpointChanged(
            f"{member.path}: changed while it was read ({member.fingerprint.size_bytes} bytes when described, "
            f"{found.size_bytes} now); load it again"
        )


class Reader:
    """Runs stagings in the background, a few at a time, and calls back when one is done.

    The callback runs in the reader's thread: it must only hand the news over.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or min(16, max(2, os.cpu_count() or 2))
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="nbcache-stage")
        self._running: set[Staging] = set()

    def start(self, staging: Staging, fill: Callable[[], None], done: Callable[[Exception | None], None]) -> None:
        """Call ``fill`` in the background, then ``done`` with the error it raised, or None."""
        self._running.add(staging)

        def run() -> None:
            error: Exception | None = None
            try:
                fill()
            except Exception as raised:  # noqa: BLE001 - handed to the caller
                error = raised.with_traceback(None)
            finally:
                staging.close()
                self._running.discard(staging)
            done(error)

        self._pool.submit(run)

    def close(self) -> None:
        """Cancel what runs, and wait for its threads."""
        for staging in list(self._running):
            staging.cancel()
        self._pool.shutdown(wait=True)
