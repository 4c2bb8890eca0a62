"""The daemon's loop: connections in, decisions from the store, memory held and freed.

One thread owns everything here; reading runs elsewhere and reports through a queue. A connection is a lease: what it was
granted ends when it, or the process behind it, ends (I1). A peer that breaks the protocol costs itself its connection (I5).
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import queue
import secrets
import selectors
import socket
import stat
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import msgspec

from nbcache import __version__
from nbcache.daemon.reader import Reader, Staging, check_unchanged
from nbcache.daemon.store import Entry, Host, IllegalTransition, Store
from nbcache.errors import HostMemoryFull, InvalidName, NBCacheError, ProtocolError
from nbcache.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest, key_of
from nbcache.memory.shared import SharedBlock, read_sealed, seal_bytes
from nbcache.protocol import messages as m
from nbcache.protocol.wire import Channel, Closed, client_messages, close_all

log = logging.getLogger("nbcache.daemon")

SO_PEERPIDFD = 77
PROGRESS_PERIOD_S = 0.1
HEARTBEAT_S = 1.0
PATIENCE_S = 10.0
"""How long a peer may leave a greeting, or a request in several messages, half said."""


class State(enum.Enum):
    """What a connection is in the middle of."""

    GREETING = "greeting"
    IDLE = "idle"
    COLLECTING = "collecting"
    WAITING = "waiting"
    FILLING = "filling"
    HOLDING = "holding"
    CLOSING = "closing"


@dataclass(eq=False)
class Connection:
    """One peer. ``number`` names its lease; ``key`` is the entry it waits for, fills or holds."""

    number: int
    channel: Channel[m.ClientMessage]
    pid: int
    pidfd: int
    since_s: float
    state: State = State.GREETING
    label: str = ""
    key: str = ""
    stage: m.Stage | None = None
    collected: list[int] = field(default_factory=list)
    """The manifest and files of a Stage that is not complete yet."""


@dataclass(eq=False)
class Held:
    """The memory of an entry: its block, and its manifest as the sealed memfd that clients are given."""

    block: SharedBlock
    manifest_fd: int

    def close(self) -> None:
        """Give the memory back."""
        self.block.close()
        os.close(self.manifest_fd)


@dataclass(eq=False)
class Job:
    """A staging under way, and the connections that wait for it."""

    staging: Staging
    waiters: set[Connection] = field(default_factory=set)
    told_bytes: int = -1
    told_s: float = 0.0


class Server:
    """Serves one listening socket until :meth:`stop`.

    Notes
    -----
    Everything but :meth:`stop` runs in the thread of :meth:`run`. :meth:`stop` may be called from a signal's callback or
    another thread. An :class:`IllegalTransition` ends :meth:`run` with that error: a daemon that does not know what it holds
    must not hand it out.
    """

    def __init__(
        self,
        listener: socket.socket,
        limit_bytes: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        on_tick: Callable[[Server], None] | None = None,
        tick_s: float = 5.0,
    ) -> None:
        self.store = Store(limit_bytes, clock)
        self.connections: dict[int, Connection] = {}
        self._clock = clock
        self._started_s = clock()
        self._listener = listener
        self._on_tick, self._tick_s = on_tick, tick_s
        self._next_tick_s = clock() + tick_s
        self._reader = Reader()
        self._disposer = ThreadPoolExecutor(1, thread_name_prefix="nbcache-free")
        self._held: dict[str, Held] = {}
        self._jobs: dict[str, Job] = {}
        self._numbers = iter(range(1, 1 << 62))
        self._selector = selectors.DefaultSelector()
        self._reports: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._handlers: dict[tuple[State, type[m.Message]], Callable[..., None]] = {
            (State.GREETING, m.Hello): self._hello,
            (State.IDLE, m.Find): self._find,
            (State.IDLE, m.Stage): self._stage,
            (State.COLLECTING, m.Files): self._files,
            (State.IDLE, m.Reserve): self._reserve,
            (State.FILLING, m.Commit): self._commit,
            (State.IDLE, m.Evict): self._evict,
            (State.IDLE, m.Pin): self._pin,
            (State.HOLDING, m.Pin): self._pin,
            (State.IDLE, m.Query): self._query,
        }

    # The loop

    def run(self) -> None:
        """Serve until stopped; then cancel what is being read, end every connection and free everything."""
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._woken)
        self.listen(self._listener)
        try:
            while not self._stopping:
                for key, _ in self._selector.select(self._timeout_s()):
                    key.data()
                self._tick()
        finally:
            self._shut_down()

    def stop(self) -> None:
        """Make :meth:`run` return soon."""
        self._stopping = True
        self._wake()

    def listen(self, listener: socket.socket) -> None:
        """Accept from this socket, in place of the one so far."""
        if self._listener is not listener:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = listener
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _woken(self) -> None:
        os.eventfd_read(self._wake_fd)
        while not self._reports.empty():
            self._reports.get()()

    def _timeout_s(self) -> float:
        timeout = self._next_tick_s - self._clock()
        if any(job.waiters for job in self._jobs.values()):
            timeout = min(timeout, PROGRESS_PERIOD_S)
        if any(self._is_limited(connection) for connection in self.connections.values()):
            timeout = min(timeout, HEARTBEAT_S)
        return max(0.0, timeout)

    @staticmethod
    def _is_limited(connection: Connection) -> bool:
        return connection.state in (State.GREETING, State.COLLECTING, State.CLOSING)

    def _tick(self) -> None:
        now = self._clock()
        for connection in list(self.connections.values()):
            if self._is_limited(connection) and now - connection.since_s > PATIENCE_S:
                self._drop(connection, f"left {connection.state.value} for {PATIENCE_S:.0f} s")
        for job in list(self._jobs.values()):
            self._tell_progress(job, now)
        if now >= self._next_tick_s:
            self._next_tick_s = now + self._tick_s
            if self._on_tick:
                self._on_tick(self)

    def _shut_down(self) -> None:
        self._reader.close()
        for connection in list(self.connections.values()):
            self._drop(connection, "the daemon stops")
        self._disposer.shutdown(wait=True)
        for held in self._held.values():
            held.close()
        self._selector.close()
        self._listener.close()
        os.close(self._wake_fd)

    # Connections

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            log.error("cannot accept: %s; waiting for connections to end", error.strerror)
            time.sleep(PROGRESS_PERIOD_S)
            return
        sock.setblocking(False)
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        pidfd = _pidfd_of(sock, pid) if uid == os.getuid() else None
        if pidfd is None:
            log.warning("refused process %d of user %d", pid, uid)
            sock.close()
            return
        connection = Connection(next(self._numbers), Channel(sock, client_messages), pid, pidfd, self._clock())
        self.connections[connection.number] = connection
        self._selector.register(sock, selectors.EVENT_READ, partial(self._readable, connection))
        if pidfd >= 0:
            self._selector.register(pidfd, selectors.EVENT_READ, partial(self._drop, connection, "its process ended"))

    def _readable(self, connection: Connection) -> None:
        if connection.number not in self.connections:
            return  # ended earlier in this round
        descriptors: list[int] = []
        try:
            message, descriptors = connection.channel.receive()
            if connection.state is not State.CLOSING:
                self._handle(connection, message, descriptors)
        except BlockingIOError:
            pass
        except Closed:
            self._drop(connection, "it closed")
        except ProtocolError as error:
            self._refuse(connection, error)
        except NBCacheError as error:
            self._reply(connection, m.Failed(type(error).__name__, str(error)))
        except (IllegalTransition, AssertionError):
            raise
        except OSError as error:
            self._drop(connection, f"{error}")
        except Exception:
            log.exception("a bug met by process %d", connection.pid)
            self._drop(connection, "a bug, see above")
        finally:
            close_all(descriptors)  # those that no handler took

    def _handle(self, connection: Connection, message: m.ClientMessage, descriptors: list[int]) -> None:
        """A handler takes the descriptors it keeps out of the list."""
        handler = self._handlers.get((connection.state, type(message)))
        if handler is None:
            raise ProtocolError(f"{type(message).__name__} while {connection.state.value}")
        handler(connection, message, descriptors)

    def _reply(self, connection: Connection, message: m.Message, descriptors: Sequence[int] = ()) -> None:
        try:
            connection.channel.send(message, descriptors)
        except OSError as error:  # gone, or so many replies unread that the socket is full
            self._drop(connection, f"cannot reply: {error}")

    def _refuse(self, connection: Connection, error: ProtocolError) -> None:
        """Say why, and let the connection run dry: an immediate close could overtake the words."""
        if connection.state is State.CLOSING:
            return
        log.warning("refused process %d: %s", connection.pid, error)
        self._reply(connection, m.Failed(type(error).__name__, str(error)))
        self._let_go(connection)
        self._run_dry(connection)

    def _run_dry(self, connection: Connection) -> None:
        connection.state, connection.since_s = State.CLOSING, self._clock()
        try:
            connection.channel.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._drop(connection, f"{error}")

    def _drop(self, connection: Connection, why: str) -> None:
        if self.connections.pop(connection.number, None) is None:
            return
        log.debug("connection %d of process %d ends: %s", connection.number, connection.pid, why)
        self._selector.unregister(connection.channel.socket)
        connection.channel.close()
        if connection.pidfd >= 0:
            self._selector.unregister(connection.pidfd)
            os.close(connection.pidfd)
        self._let_go(connection)

    def _let_go(self, connection: Connection) -> None:
        """Undo what the connection was in the middle of (I1, I2)."""
        state, connection.state = connection.state, State.CLOSING
        collected, connection.collected = connection.collected, []
        close_all(collected)
        if state is State.WAITING:
            self._jobs[connection.key].waiters.discard(connection)
        elif state is State.FILLING:
            self.store.fail(connection.key)
            self._free_memory(connection.key)
        elif state is State.HOLDING:
            self._free(self.store.release(connection.key, connection.number))

    # Requests

    def _hello(self, connection: Connection, hello: m.Hello, _: list[int]) -> None:
        connection.label = hello.label[:200]
        self._reply(connection, m.Welcome(m.PROTOCOL_VERSION, __version__, os.getpid()))
        if hello.protocol == m.PROTOCOL_VERSION:
            connection.state = State.IDLE
        else:
            log.warning("process %d speaks protocol %d (nbcache %s)", connection.pid, hello.protocol, hello.version)
            self._run_dry(connection)

    def _find(self, connection: Connection, find: m.Find, _: list[int]) -> None:
        entry = self.store.find(find.names, find.key)
        if entry is None:
            self._reply(connection, m.Absent())
            return
        if find.key:
            for name in find.names:
                self._free(self.store.give_name(entry.key, name))
        self._attend(connection, entry)

    def _attend(self, connection: Connection, entry: Entry) -> None:
        if entry.host is Host.STAGED:
            self._grant(connection, entry, staged=False)
        else:
            connection.state, connection.key = State.WAITING, entry.key
            self._jobs[entry.key].waiters.add(connection)

    def _grant(self, connection: Connection, entry: Entry, staged: bool) -> None:
        held = self._held[entry.key]
        self.store.grant(entry.key, connection.number, connection.pid)
        connection.state, connection.key = State.HOLDING, entry.key
        granted = m.Granted(entry.key, entry.name, entry.provenance, staged)
        self._reply(connection, granted, [held.manifest_fd, held.block.fd])

    def _stage(self, connection: Connection, stage: m.Stage, descriptors: list[int]) -> None:
        connection.stage, connection.state, connection.since_s = stage, State.COLLECTING, self._clock()
        self._files(connection, stage, descriptors)

    def _files(self, connection: Connection, _: m.Stage | m.Files, descriptors: list[int]) -> None:
        assert connection.stage is not None
        connection.collected += descriptors
        descriptors.clear()
        connection.since_s = self._clock()
        missing = 1 + connection.stage.file_count - len(connection.collected)
        if missing < 0:
            raise ProtocolError(f"{-missing} more files than the {connection.stage.file_count} announced")
        if missing == 0:
            (manifest_fd, *files), connection.collected = connection.collected, []
            connection.state = State.IDLE
            self._start_staging(connection, connection.stage.name, manifest_fd, files)

    def _start_staging(self, connection: Connection, name: str, manifest_fd: int, files: list[int]) -> None:
        taken = [manifest_fd, *files]
        try:
            manifest = _read_manifest(manifest_fd)
            _check_files(manifest, files)
            _check_name(name, path=True)
            entry = self.store.find((), key_of(manifest.members))
            if entry is None:
                entry = self._admit(key_of(manifest.members), name, "file", manifest, manifest_fd)
                taken.remove(manifest_fd)
                self._read(entry, manifest, files)
                taken.clear()
        finally:
            close_all(taken)
        self._free(self.store.give_name(entry.key, name))
        self._attend(connection, entry)

    def _admit(self, key: str, name: str, provenance: str, manifest: Manifest, manifest_fd: int) -> Entry:
        """A new entry and its empty block. On success the manifest's descriptor is held; on an error nothing is."""
        entry = Entry(
            key=key,
            name=name,
            provenance=provenance,
            source=tuple(member.path for member in manifest.members),
            bytes=manifest.nbytes,
            extent_bytes=manifest.extent_bytes,
            tensors=len(manifest.tensors),
        )
        self._free(self.store.admit(entry))
        try:
            self._held[key] = Held(SharedBlock.create(name, manifest.extent_bytes), manifest_fd)
        except OSError as error:
            self.store.fail(key)
            raise HostMemoryFull(f"{name}: the system gives no {manifest.extent_bytes} bytes: {error.strerror}") from error
        return entry

    def _read(self, entry: Entry, manifest: Manifest, files: Sequence[int]) -> None:
        block = self._held[entry.key].block
        job = self._jobs[entry.key] = Job(Staging(manifest, files))
        log.info("staging %s: %d bytes in %d tensors", entry.name, entry.bytes, entry.tensors)

        def fill() -> None:
            with block.writable() as view:
                job.staging.run(view, self._reader.threads)
            block.seal()

        def done(error: Exception | None) -> None:
            self._reports.put(partial(self._staged, entry, job, error))
            self._wake()

        self._reader.start(job.staging, fill, done)

    def _staged(self, entry: Entry, job: Job, error: Exception | None) -> None:
        del self._jobs[entry.key]
        waiters = sorted(job.waiters, key=lambda connection: connection.number)
        if error is None:
            log.info("staged %s", entry.name)
            self._free(self.store.complete(entry.key))
            for connection in waiters:
                self._grant(connection, entry, staged=True)
            return
        log.warning("staging %s failed: %s", entry.name, error)
        self.store.fail(entry.key)
        self._free_memory(entry.key)
        known = error if isinstance(error, NBCacheError) else NBCacheError(f"{entry.name}: {type(error).__name__}: {error}")
        for connection in waiters:
            connection.state = State.IDLE
            self._reply(connection, m.Failed(type(known).__name__, str(known)))

    def _tell_progress(self, job: Job, now: float) -> None:
        staged = job.staging.staged_bytes
        if staged == job.told_bytes and now - job.told_s < HEARTBEAT_S:
            return
        job.told_bytes, job.told_s = staged, now
        for connection in list(job.waiters):
            self._reply(connection, m.Progress(staged, job.staging.total_bytes))

    def _reserve(self, connection: Connection, reserve: m.Reserve, descriptors: list[int]) -> None:
        manifest = _read_manifest(descriptors[0])
        _check_name(reserve.name, path=False)
        if manifest.members:
            raise ProtocolError("a put entry with files")
        entry = self._admit("put-" + secrets.token_hex(16), reserve.name, "put", manifest, descriptors[0])
        descriptors.clear()
        self.store.give_name(entry.key, reserve.name)
        connection.state, connection.key = State.FILLING, entry.key
        self._reply(connection, m.Reserved(), [self._held[entry.key].block.fd])

    def _commit(self, connection: Connection, _commit: m.Commit, _: list[int]) -> None:
        try:
            self._held[connection.key].block.seal()
        except OSError as error:
            raise ProtocolError(f"commit while the block is still mapped writable: {error.strerror}") from error
        entry = self.store.entries[connection.key]
        self._free(self.store.complete(entry.key))
        self._grant(connection, entry, staged=True)

    def _evict(self, connection: Connection, evict: m.Evict, _: list[int]) -> None:
        if evict.everything:
            keys, kept = self.store.evictable_by_all()
        else:
            keys, kept = [self.store.check_evictable(evict.names).key], []
        names = tuple(self.store.entries[key].name for key in keys)
        freed = sum(self.store.entries[key].extent_bytes for key in keys)
        self._free(keys)
        self._reply(connection, m.Evicted(names, freed, tuple(kept)))

    def _pin(self, connection: Connection, pin: m.Pin, _: list[int]) -> None:
        self.store.pin(pin.names, pin.pinned)
        self._reply(connection, m.Done())

    def _query(self, connection: Connection, _query: m.Query, _: list[int]) -> None:
        fd = seal_bytes("status", msgspec.json.encode(self._status()))
        try:
            self._reply(connection, m.Document(), [fd])
        finally:
            os.close(fd)

    def _status(self) -> m.Status:
        now = self._clock()
        return m.Status(
            version=__version__,
            protocol=m.PROTOCOL_VERSION,
            pid=os.getpid(),
            uptime_s=round(now - self._started_s, 3),
            host=m.HostStatus(self.store.used_bytes, self.store.limit_bytes),
            devices=(),
            entries=tuple(self._entry_status(entry, now) for entry in self.store.entries.values()),
        )

    def _entry_status(self, entry: Entry, now: float) -> m.EntryStatus:
        users = [self.connections[lease] for lease in entry.leases]
        return m.EntryStatus(
            name=entry.name,
            aliases=tuple(name for name in entry.names if name != entry.name),
            provenance=entry.provenance,
            source=entry.source,
            bytes=entry.bytes,
            tensors=entry.tensors,
            host=entry.host.value,
            devices=(),
            leases=len(entry.leases),
            pinned=entry.pinned,
            last_used_s=round(now - entry.last_used_s, 3),
            key=entry.key,
            used_by=tuple(m.Lease(connection.pid, connection.label) for connection in users),
        )

    # Memory

    def _free(self, keys: Sequence[str]) -> None:
        """Evict entries that the store chose."""
        for key in keys:
            log.info("evicting %s (%s)", self.store.entries[key].name, key)
            self.store.evict(key)
            self._free_memory(key)

    def _free_memory(self, key: str) -> None:
        """Close an entry's memory, elsewhere: giving 24 GB back takes the system a while."""
        self._disposer.submit(self._held.pop(key).close)


def _pidfd_of(sock: socket.socket, pid: int) -> int | None:
    """A pidfd of the peer; -1 where the peer is in a process namespace that is not ours to see; None if it is gone already."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:
        pass  # Linux before 6.5
    try:
        return os.pidfd_open(pid) if pid > 0 else -1
    except ProcessLookupError:
        return None


def _read_manifest(fd: int) -> Manifest:
    manifest = decode_manifest(read_sealed(fd, MAX_MANIFEST_BYTES))
    manifest.check()
    return manifest


def _check_files(manifest: Manifest, files: Sequence[int]) -> None:
    """Hold the manifest against the files that came with it (I5, I6)."""
    if not files or len(files) != len(manifest.members):
        raise ProtocolError(f"{len(files)} files for a manifest of {len(manifest.members)}")
    for fd, member in zip(files, manifest.members, strict=True):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ProtocolError(f"{member.path}: not a regular file")
        check_unchanged(fd, member)


def _check_name(name: str, path: bool) -> None:
    """A file entry is named by its absolute path; a put entry by a plain word, so that the two never meet."""
    if path:
        if not name.startswith("/") or len(name) > 4096:
            raise InvalidName(f"{name!r} cannot name a file entry: it is named by its absolute path")
    elif not name or len(name) > 200 or "/" in name or not name.isprintable() or name != name.strip():
        raise InvalidName(f"{name!r} cannot name a saved entry: use a printable word without a slash, up to 200 characters")
