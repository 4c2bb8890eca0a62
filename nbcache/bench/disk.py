"""Files and the page cache: dropping pages, asking what stayed, and reading as plainly as can be. No torch."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

CHUNK_BYTES = 8 << 20
COLD_SHARE = 0.01
"""Files of which at most this share is in the page cache count as cold."""
HOT_SHARE = 0.99

_LOWEST_BIT = bytes(byte & 1 for byte in range(256))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def reading_threads() -> int:
    """How many threads read, here and in the daemon."""
    return min(16, max(2, os.cpu_count() or 2))


def size_of(files: Iterable[str]) -> int:
    """Bytes of all files."""
    return sum(os.stat(path).st_size for path in files)


def drop_pages(files: Iterable[str]) -> None:
    """Ask the system to forget the files' pages. It keeps those that are mapped; see :func:`cached_share` for what stayed."""
    for path in files:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)  # dirty pages are not dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached_share(files: Iterable[str]) -> float:
    """Which part of the files is in the page cache, 0 to 1, by ``mincore(2)``: 1 for files that this user may not write."""
    pages = resident = 0
    for path in files:
        found = _residency(path)
        pages += len(found)
        resident += found.translate(_LOWEST_BIT).count(1)
    return resident / pages if pages else 1.0


def _residency(path: str) -> bytes:
    """A byte a page of the file, its lowest bit set if the page is resident."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if not size:
            return b""
        found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        with mmap.mmap(fd, size, access=mmap.ACCESS_COPY) as area:  # ctypes gives no address of a read-only one
            first = ctypes.c_ubyte.from_buffer(area)
            failed = _libc.mincore(ctypes.addressof(first), size, found)
            del first
            if failed:
                raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}", path)
        return bytes(found)
    finally:
        os.close(fd)


def read_plainly(files: Sequence[str]) -> float:
    """Bytes per second of parallel ``preadv`` of whole files into memory that was touched before, and nothing else."""
    threads, size = reading_threads(), size_of(files)
    fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in files]
    try:
        chunks = [(fd, at) for fd in fds for at in range(0, os.fstat(fd).st_size, CHUNK_BYTES)]
        with ThreadPoolExecutor(threads) as pool:
            buffers = [bytearray(b"\1") * CHUNK_BYTES for _ in range(threads)]

            def read(number: int) -> None:
                for fd, at in chunks[number::threads]:
                    os.preadv(fd, [buffers[number]], at)

            start = time.perf_counter()
            list(pool.map(read, range(threads)))
            return size / (time.perf_counter() - start)
    finally:
        for fd in fds:
            os.close(fd)
