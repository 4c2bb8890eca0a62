"""Reading files into memory, in parallel: which bytes go where, and the threads that bring them.

Knows extents, open descriptors and a buffer; no format, no path, no policy.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from nbcache.errors import CheckpointChanged, CheckpointUnreadable
from nbcache.manifest import Fingerprint, Manifest, Member

CHUNK_BYTES = 8 << 20
PIECES_PER_READ = 512
"""Pieces of memory that one ``preadv`` scatters to (the kernel's limit is 1024)."""


@dataclass(frozen=True)
class Read:
    """One ``preadv``: contiguous bytes of a file from ``offset`` on, scattered to ``pieces`` of (place, bytes)."""

    file: int
    offset: int
    pieces: tuple[tuple[int, int], ...]


def plan_reads(manifest: Manifest, chunk_bytes: int = CHUNK_BYTES) -> list[Read]:
    """The reads that fill an entry: file by file in file order, no read over ``chunk_bytes``, gaps in the file skipped."""
    reads: list[Read] = []
    pieces: list[tuple[int, int]] = []
    file = start = end = 0

    def flush() -> None:
        nonlocal pieces
        if pieces:
            reads.append(Read(file, start, tuple(pieces)))
        pieces = []

    for tensor in sorted(manifest.tensors, key=lambda t: (t.file, t.offset)):
        done = 0
        while done < tensor.nbytes:
            at = tensor.offset + done
            if not pieces or tensor.file != file or at != end or end - start >= chunk_bytes or len(pieces) >= PIECES_PER_READ:
                flush()
                file, start, end = tensor.file, at, at
            size = min(tensor.nbytes - done, chunk_bytes - (end - start))
            pieces.append((tensor.place + done, size))
            end += size
            done += size
    flush()
    return reads


class Staging:
    """One entry being read. ``staged_bytes`` grows while it runs; ``cancel`` makes :meth:`run` end early.

    Notes
    -----
    :meth:`run` blocks and belongs in a thread of its own. It owns the files and closes them whatever happens. The view it
    fills is the caller's; no reference to it is left when it returns or raises.
    """

    def __init__(self, manifest: Manifest, files: Sequence[int]) -> None:
        self.manifest = manifest
        self.files = tuple(files)
        self.staged_bytes = 0
        self.total_bytes = manifest.nbytes
        self._cancelled = threading.Event()
        self._count = threading.Lock()

    def cancel(self) -> None:
        """Let :meth:`run` end with CheckpointUnreadable at the next chunk."""
        self._cancelled.set()

    def close_files(self) -> None:
        """Close the files (once)."""
        files, self.files = self.files, ()
        for fd in files:
            os.close(fd)

    def run(self, view: memoryview, threads: int) -> None:
        """Read everything into ``view``.

        CheckpointChanged if a file is not what the manifest says, before the reading or after it (I6); CheckpointUnreadable
        for a failing read.
        """
        try:
            self._check_files()
            self._read_all(view, threads)
            self._check_files()
        finally:
            self.close_files()

    def _check_files(self) -> None:
        for fd, member in zip(self.files, self.manifest.members, strict=True):
            check_unchanged(fd, member)

    def _read_all(self, view: memoryview, threads: int) -> None:
        reads = iter(plan_reads(self.manifest))
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

        with ThreadPoolExecutor(threads, thread_name_prefix="nbcache-read") as pool:
            wait([pool.submit(work) for _ in range(threads)])
        if failures:
            raise failures[0]
        if self._cancelled.is_set():
            raise CheckpointUnreadable(f"{self.manifest.members[0].path}: the daemon stopped while reading it")

    def _read(self, read: Read, view: memoryview) -> None:
        member = self.manifest.members[read.file]
        buffers = [view[place : place + size] for place, size in read.pieces]
        offset = read.offset
        try:
            while buffers:
                got = os.preadv(self.files[read.file], buffers, offset)
                if got == 0:
                    raise CheckpointChanged(
                        f"{member.path}: ends at byte {offset}, but had {member.fingerprint.size_bytes} bytes when it was "
                        "described; it was truncated while it was read, load it again"
                    )
                offset += got
                with self._count:
                    self.staged_bytes += got
                buffers = _rest(buffers, got)
        except OSError as error:
            raise CheckpointUnreadable(f"{member.path}: read failed at byte {offset}: {error.strerror}") from None
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
                staging.close_files()
                self._running.discard(staging)
            done(error)

        self._pool.submit(run)

    def close(self) -> None:
        """Cancel what runs, and wait for its threads."""
        for staging in list(self._running):
            staging.cancel()
        self._pool.shutdown(wait=True)
