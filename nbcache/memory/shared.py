"""Shared host memory: memfds that are filled once, sealed, and then mapped by many.

A :class:`SharedBlock` is the host tier of an entry on any machine. Sealing makes immutability the kernel's business: after
it no process, the owner included, can write to, shrink or grow the block. Mappers get private, writable maps: a write copies
the page it touches, seen by the writer alone. It knows nothing of entries, sockets or torch.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nbcache.errors import ProtocolError

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedBlock:
    """One memfd. Created empty and writable; :meth:`seal` ends the writing for good.

    Notes
    -----
    Owns its descriptor until :meth:`close`. A block that was never sealed must not be handed to a second process (I2); that
    is the caller's duty. After a failed fill the block is still unsealed and is to be closed.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.fd = fd
        self.size_bytes = size_bytes

    @classmethod
    def create(cls, label: str, size_bytes: int) -> SharedBlock:
        """A new block of zeros. ``label`` is what ``/proc/PID/maps`` shows. OSError if the system has no room."""
        name = f"nbcache:{label}".replace("\0", "?").encode(errors="replace")[:240]
        fd = os.memfd_create(name.decode(errors="ignore"), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, size_bytes)

    @contextmanager
    def writable(self) -> Iterator[memoryview]:
        """The block's bytes, for filling; the map is dropped at the end. Release every slice you took before that."""
        with mmap.mmap(self.fd, self.size_bytes) as area, memoryview(area) as view:
            yield view

    def seal(self) -> None:
        """Forbid every write and resize, for good. OSError (EBUSY) while anyone still maps the block writable."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)

    def close(self) -> None:
        """Give the descriptor back. The memory goes when the last map of it, in any process, is gone."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


_mapping = threading.RLock()
"""Held while a map is made that no forked child is to have. One lock for all: it is a process that forks."""

os.register_at_fork(before=_mapping.acquire, after_in_parent=_mapping.release, after_in_child=_mapping.release)


def map_writable(fd: int, size_bytes: int) -> mmap.mmap:
    """A shared map of an unsealed block, for filling. No forked child has it: a copy would keep the block from being sealed."""
    with _mapping:
        area = mmap.mmap(fd, size_bytes)
        area.madvise(mmap.MADV_DONTFORK)
    return area


def map_private(fd: int, size_bytes: int) -> mmap.mmap:
    """A copy-on-write map of a sealed block. It holds a reference of its own: ``fd`` may be closed afterwards.

    ProtocolError if the block is smaller than ``size_bytes`` or is not sealed (its owner could pull it away: SIGBUS).
    """
    check_sealed(fd, size_bytes)
    return mmap.mmap(fd, size_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def seal_bytes(label: str, payload: bytes) -> int:
    """A sealed memfd that holds ``payload``. The caller owns the descriptor."""
    block = SharedBlock.create(label, len(payload))
    try:
        view = memoryview(payload)
        while view:
            view = view[os.write(block.fd, view) :]
        block.seal()
    except BaseException:
        block.close()
        raise
    return block.fd


def read_sealed(fd: int, limit_bytes: int) -> bytes:
    """The bytes of a sealed memfd. ProtocolError if it is not sealed (it could change while it is read) or over the limit."""
    size = check_sealed(fd, 0)
    if size > limit_bytes:
        raise ProtocolError(f"a document of {size} bytes, the limit is {limit_bytes}")
    return os.pread(fd, size, 0)


def check_sealed(fd: int, size_bytes: int) -> int:
    """The size of a sealed memfd. ProtocolError if it is smaller than ``size_bytes``, is none, or is not sealed."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError(f"a descriptor that is no memfd: {error}") from error
    wanted = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK
    if seals & wanted != wanted:
        raise ProtocolError("a memfd that is not sealed")
    size = os.fstat(fd).st_size
    if size < size_bytes:
        raise ProtocolError(f"a memfd of {size} bytes where {size_bytes} were promised")
    return size
