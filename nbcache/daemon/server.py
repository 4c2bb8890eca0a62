"""The daemon's loop: connections in, decisions from the store, memory held and freed.

One thread owns everything here; reading runs elsewhere and reports through a queue. A connection is a lease: what it was
granted ends when it, or the process behind it, ends (I1). A peer that breaks the protocol costs itself its connection (I5).
"""

from __future__ import annotations

import contextlib
import enum
import errno
import itertools
import logging
import os
import queue
import secrets
import selectors
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec

from nbcache import __version__
from nbcache.daemon.policy import GpuPolicy
from nbcache.daemon.reader import FileSource, Reader, Source, Staging, check_unchanged
from nbcache.daemon.report import describe_status
from nbcache.daemon.store import PINNED, SHARED, Entry, IllegalTransition, Kind, Place, Residences, State, Store
from nbcache.daemon.tiers import Tiers
from nbcache.errors import DeviceMemoryFull, DriverError, InvalidName, NBCacheError, ProtocolError
from nbcache.manifest import MAX_EXTENT_BYTES, MAX_MANIFEST_BYTES, Manifest, decode_manifest, key_of
from nbcache.memory.driver import Driver
from nbcache.memory.shared import read_sealed, seal_bytes
from nbcache.protocol import messages as m
from nbcache.protocol.wire import Channel, Closed, client_messages, close_all

log = logging.getLogger("nbcache.daemon")

SO_PEERPIDFD = 77
PROGRESS_PERIOD_S = 0.1
HEARTBEAT_S = 1.0
MESSAGE_CHARACTERS = 4000
"""What an answer quotes at most: escaped and in JSON it stays below a packet's limit."""
MAX_FILES = 10_000
PATIENCE_S = 10.0
"""How long a peer may leave a greeting, or a request in several messages, half said."""


class Phase(enum.Enum):
    """What a connection is in the middle of."""

    GREETING = "greeting"
    IDLE = "idle"
    COLLECTING = "collecting"
    WAITING = "waiting"
    RESERVED = "filling what it reserved"
    OFFERED = "offered a slab to fill"
    FILLING = "filling a slab"
    COMMITTING = "done filling a slab whose host copy is not complete"
    HOLDING = "holding"
    CLOSING = "closing"


@dataclass(eq=False)
class Connection:
    """One peer. ``number`` names its lease; ``key`` and ``place`` are the residence it waits for, fills or holds."""

    number: int
    channel: Channel[m.ClientMessage]
    pid: int
    pidfd: int
    since_s: float
    phase: Phase = Phase.GREETING
    label: str = ""
    key: str = ""
    place: Place = SHARED
    find: m.Find = field(default_factory=m.Find)
    """What it wished for last."""
    stage: m.Stage | None = None
    collected: list[int] = field(default_factory=list)
    """The manifest and files of a Stage that is not complete yet."""
    extent_bytes: int = 0
    """Of the slab it offered to fill."""
    wanted: list[int] = field(default_factory=list)
    """Blocks it asked for that are not staged yet."""
    told_s: float = 0.0
    """When it last heard of progress."""


@dataclass(eq=False)
class Job:
    """A host copy being filled."""

    staging: Staging
    told_bytes: int = -1


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
        open_driver: Callable[[], Driver],
        policy: GpuPolicy,
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
        self._policy = policy
        self._tiers = Tiers(open_driver, self._post, Reader(), policy.block_bytes)
        self._jobs: dict[tuple[str, Place], Job] = {}
        self._numbers = iter(range(1, 1 << 62))
        self._selector = selectors.DefaultSelector()
        self._reports: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._handlers: dict[tuple[Phase, type[m.Message]], Callable[..., None]] = {
            (Phase.GREETING, m.Hello): self._hello,
            (Phase.IDLE, m.Find): self._find,
            (Phase.IDLE, m.Stage): self._stage,
            (Phase.COLLECTING, m.Files): self._files,
            (Phase.OFFERED, m.Fill): self._fill,
            (Phase.FILLING, m.Want): self._want,
            (Phase.FILLING, m.Commit): self._commit_slab,
            (Phase.IDLE, m.Reserve): self._reserve,
            (Phase.RESERVED, m.Commit): self._commit_reserved,
            (Phase.IDLE, m.Evict): self._evict,
            (Phase.IDLE, m.FreeGpu): self._free_gpu,
            (Phase.IDLE, m.Pin): self._pin,
            (Phase.HOLDING, m.Pin): self._pin,
            (Phase.IDLE, m.Query): self._query,
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

    def _post(self, report: Callable[[], None]) -> None:
        """Have the loop's thread call ``report``. Called from other threads."""
        self._reports.put(report)
        self._wake()

    def _timeout_s(self) -> float:
        timeout = self._next_tick_s - self._clock()
        if any(self._is_waiting(connection) for connection in self.connections.values()):
            timeout = min(timeout, PROGRESS_PERIOD_S)
        if any(self._is_limited(connection) for connection in self.connections.values()):
            timeout = min(timeout, HEARTBEAT_S)
        return max(0.0, timeout)

    @staticmethod
    def _is_waiting(connection: Connection) -> bool:
        return connection.phase in (Phase.WAITING, Phase.COMMITTING) or bool(connection.wanted)

    @staticmethod
    def _is_limited(connection: Connection) -> bool:
        return connection.phase in (Phase.GREETING, Phase.COLLECTING, Phase.CLOSING)

    def _tick(self) -> None:
        now = self._clock()
        for connection in list(self.connections.values()):
            if self._is_limited(connection) and now - connection.since_s > PATIENCE_S:
                self._drop(connection, f"left {connection.phase.value} for {PATIENCE_S:.0f} s")
        for connection in list(self.connections.values()):
            if self._is_waiting(connection):
                self._tell_progress(connection, now)
        if now >= self._next_tick_s:
            self._next_tick_s = now + self._tick_s
            self._free(self._policy.expired(self.store, self._tiers.driver_in_use))
            if self._on_tick:
                self._on_tick(self)

    def _shut_down(self) -> None:
        self._tiers.close()
        for connection in list(self.connections.values()):
            self._drop(connection, "the daemon stops")
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
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED):
                raise
            log.error("cannot accept: %s; waiting for connections to end", error.strerror)
            time.sleep(PROGRESS_PERIOD_S)
            return
        sock.setblocking(False)
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            pidfd = _pidfd_of(sock, pid) if uid == os.getuid() else None
        except OSError as error:
            log.error("cannot watch process %d: %s", pid, error.strerror)
            sock.close()
            return
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
            if connection.phase is not Phase.CLOSING:
                self._handle(connection, message, descriptors)
        except BlockingIOError:
            pass
        except Closed:
            self._drop(connection, "it closed")
        except ProtocolError as error:
            self._refuse(connection, error)
        except NBCacheError as error:
            self._reply(connection, _failed(error))
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
        handler = self._handlers.get((connection.phase, type(message)))
        if handler is None:
            raise ProtocolError(f"{type(message).__name__} while {connection.phase.value}")
        handler(connection, message, descriptors)

    def _reply(self, connection: Connection, message: m.Message, descriptors: Sequence[int] = ()) -> None:
        try:
            connection.channel.send(message, descriptors)
        except (OSError, ProtocolError) as error:  # gone, or so many replies unread that the socket is full, or too long
            self._drop(connection, f"cannot reply: {error}")

    def _refuse(self, connection: Connection, error: ProtocolError) -> None:
        """Say why, and let the connection run dry: an immediate close could overtake the words."""
        if connection.phase is Phase.CLOSING:
            return
        log.warning("refused process %d: %s", connection.pid, error)
        self._reply(connection, _failed(error))
        self._let_go(connection)
        self._run_dry(connection)

    def _run_dry(self, connection: Connection) -> None:
        connection.phase, connection.since_s = Phase.CLOSING, self._clock()
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
        phase, connection.phase = connection.phase, Phase.CLOSING
        connection.wanted.clear()
        collected, connection.collected = connection.collected, []
        close_all(collected)
        if phase is Phase.RESERVED:
            self._abandon(connection.key, SHARED)
        elif phase in (Phase.FILLING, Phase.COMMITTING):
            self._abandon_slab(connection)
        elif phase is Phase.HOLDING:
            self._free(self.store.release(connection.key, connection.place, connection.number))
            if connection.place.kind is Kind.DEVICE and self._policy.keep_s == 0:
                self._free(self.store.idle_slabs(connection.place.uuid, (connection.key,)))

    # Finding and staging

    def _hello(self, connection: Connection, hello: m.Hello, _: list[int]) -> None:
        connection.label = hello.label[:200]
        self._reply(connection, m.Welcome(m.PROTOCOL_VERSION, __version__, os.getpid()))
        if hello.protocol == m.PROTOCOL_VERSION:
            connection.phase = Phase.IDLE
        else:
            log.warning("process %d speaks protocol %d (nbcache %s)", connection.pid, hello.protocol, hello.version)
            self._run_dry(connection)

    def _find(self, connection: Connection, find: m.Find, _: list[int]) -> None:
        connection.find = find
        entry = self.store.find(find.names, find.key)
        if entry is None:
            self._reply(connection, m.Absent())
            return
        if find.key:
            for name in find.names:
                _check_name(name, path=entry.provenance == "file")
            for name in find.names:
                self._free(self.store.give_name(entry.key, name))
        self._attend(connection, entry)

    def _attend(self, connection: Connection, entry: Entry) -> None:
        """Give a connection what it wished of an entry: now, when it is there, or by asking for the files or the filling."""
        connection.phase, connection.key = Phase.IDLE, entry.key
        connection.place = place = self._wished_place(connection.find)
        if entry.state(place) is State.READY:
            self._grant(connection, entry)
        elif entry.state(place) is State.FILLING or (place.on_host and self._is_coming(entry, place)):
            connection.phase, connection.told_s = Phase.WAITING, 0.0
        elif place.on_host or not self._is_coming(entry, PINNED):
            self._reply(connection, m.Absent())
        elif entry.state(PINNED) is State.ABSENT:  # on its way to the other kind of host copy, and from there to this one
            connection.phase, connection.told_s = Phase.WAITING, 0.0
        else:
            connection.phase = Phase.OFFERED
            self._reply(connection, m.Vacant(entry.key), [self._tiers.manifest_fd(entry.key)])

    def _wished_place(self, find: m.Find) -> Place:
        if find.device is not None:
            known = {gpu.uuid for gpu in self._tiers.driver.gpus()}
            if find.device.uuid not in known:
                raise DriverError(f"GPU {find.device.uuid} is not visible to the daemon, which sees {', '.join(sorted(known))}")
            return Place(Kind.DEVICE, find.device.uuid, find.device.dtype)
        return PINNED if find.warm and self._has_gpu() else SHARED

    def _has_gpu(self) -> bool:
        try:
            return bool(self._tiers.driver.gpus())
        except DriverError:
            return False

    def _is_coming(self, entry: Entry, place: Place) -> bool:
        """Whether a host copy is there or on its way, be it through the other kind; if it can be begun from that one, it is."""
        other = SHARED if place == PINNED else PINNED
        return (
            entry.state(place) is not State.ABSENT
            or entry.state(other) is State.FILLING
            or (entry.state(other) is State.READY and self._fill_from(entry, other, place))
        )

    def _fill_from(self, entry: Entry, other: Place, place: Place) -> bool:
        """Begin a host copy from the one of the other kind; False if there is room for one only, which is then neither."""
        self._free(self.store.fill(entry, place, entry.extent_bytes))
        if entry.state(other) is not State.READY:
            self._abandon(entry.key, place)
            return False
        with self._undone_on_error(entry.key, place):
            if place == PINNED:
                source = self._tiers.copy_source(entry.key, entry.name)
                self._start_pinned(entry, source)
            else:
                self._tiers.create_shared(entry.key, entry.name, entry.extent_bytes)
                self._track(entry, SHARED, self._tiers.fill_shared_from_pinned(entry.key, partial(self._filled, entry, SHARED)))
        return True

    @contextlib.contextmanager
    def _undone_on_error(self, key: str, place: Place) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._abandon(key, place)
            raise

    def _grant(self, connection: Connection, entry: Entry, staged: bool = False) -> None:
        place = connection.place
        self.store.grant(entry.key, place, connection.number, connection.pid)
        connection.phase, connection.key = Phase.HOLDING, entry.key
        descriptors = [self._tiers.manifest_fd(entry.key)]
        if place == SHARED:
            descriptors.append(self._tiers.shared_fd(entry.key))
        elif place.kind is Kind.DEVICE:
            descriptors.append(self._tiers.slab_fd(entry.key, place))
        self._reply(connection, m.Granted(entry.key, entry.name, entry.provenance, staged), descriptors)

    def _stage(self, connection: Connection, stage: m.Stage, descriptors: list[int]) -> None:
        if not 0 < stage.file_count <= MAX_FILES:
            raise ProtocolError(f"a checkpoint of {stage.file_count} files")
        connection.stage, connection.phase, connection.since_s = stage, Phase.COLLECTING, self._clock()
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
            taken, connection.collected = connection.collected, []
            connection.phase = Phase.IDLE
            try:
                self._start_staging(connection, connection.stage.name, taken)
            finally:
                close_all(taken)

    def _start_staging(self, connection: Connection, name: str, taken: list[int]) -> None:
        """Begin to read files, unless the entry is there or on its way. Takes what it keeps out of ``taken``."""
        manifest_fd, *files = taken
        manifest = _read_manifest(manifest_fd)
        _check_files(manifest, files)
        _check_name(name, path=True)
        place = self._wished_place(connection.find)
        host = SHARED if place == SHARED else PINNED
        key = key_of(manifest.members)
        entry = self.store.find((), key)
        if entry is None or not self._is_coming(entry, host):
            known = self.store.find((), key)  # its other host copy may have given way just now, and it with it
            entry = known or _new_entry(key, name, "file", manifest)
            self._free(self.store.fill(entry, host, entry.extent_bytes))
            if not known:
                taken.remove(manifest_fd)
                self._tiers.keep_manifest(entry.key, manifest_fd)
            with self._undone_on_error(entry.key, host):
                source = FileSource(manifest, files)
                del taken[-len(files) :]
                self._read(entry, host, source)
        self._free(self.store.give_name(entry.key, name))
        self._attend(connection, entry)

    def _read(self, entry: Entry, host: Place, source: FileSource) -> None:
        log.info("staging %s: %d bytes in %d tensors, %s", entry.name, entry.bytes, entry.tensors, host.kind.value)
        try:
            if host == PINNED:
                self._start_pinned(entry, source)
                return
            self._tiers.create_shared(entry.key, entry.name, entry.extent_bytes)
            self._track(entry, SHARED, self._tiers.fill_shared(entry.key, source, partial(self._filled, entry, SHARED)))
        except BaseException:
            source.close()
            raise

    def _start_pinned(self, entry: Entry, source: Source) -> None:
        on_block, done = partial(self._serve_wants, entry.key), partial(self._filled, entry, PINNED)
        self._track(entry, PINNED, self._tiers.fill_pinned(entry.key, source, entry.extent_bytes, on_block, done))

    def _track(self, entry: Entry, place: Place, staging: Staging) -> None:
        self._jobs[entry.key, place] = Job(staging)

    def _filled(self, entry: Entry, place: Place, error: Exception | None) -> None:
        """A host copy is complete, or came to nothing."""
        del self._jobs[entry.key, place]
        waiting = self._waiting_for(entry.key)
        if error is None:
            log.info("staged %s, %s", entry.name, place.kind.value)
            self._free(self.store.complete(entry.key, place))
            self._serve_wants(entry.key)
            for connection in self._fillers_of(entry.key) if place == PINNED else []:
                self.store.grant(entry.key, PINNED, connection.number, connection.pid)
                if connection.phase is Phase.COMMITTING:
                    self._finish_slab(connection, entry)
            for connection in waiting:
                self._again(connection, entry, staged=True)
            return
        log.warning("staging %s failed: %s", entry.name, error)
        known = error if isinstance(error, NBCacheError) else NBCacheError(f"{entry.name}: {type(error).__name__}: {error}")
        fillers = self._fillers_of(entry.key) if place == PINNED else []
        self._abandon(entry.key, place)
        for connection in [*waiting, *fillers]:
            if connection in fillers:
                self._let_go(connection)
            connection.phase = Phase.IDLE
            self._reply(connection, _failed(known))

    def _waiting_for(self, key: str) -> list[Connection]:
        return [c for c in self.connections.values() if c.phase is Phase.WAITING and c.key == key]

    def _fillers_of(self, key: str) -> list[Connection]:
        phases = (Phase.FILLING, Phase.COMMITTING)
        return [c for c in self.connections.values() if c.phase in phases and c.key == key]

    def _again(self, connection: Connection, entry: Entry, staged: bool = False) -> None:
        """Attend to a connection that waited; an error is its answer."""
        try:
            if staged and entry.state(connection.place) is State.READY:
                self._grant(connection, entry, staged=True)
            else:
                self._attend(connection, entry)
        except NBCacheError as error:
            connection.phase = Phase.IDLE
            self._reply(connection, _failed(error))

    def _tell_progress(self, connection: Connection, now: float) -> None:
        jobs = [job for (key, _), job in self._jobs.items() if key == connection.key]
        staged = jobs[0].staging.staged_bytes if jobs else 0
        total = jobs[0].staging.total_bytes if jobs else 0
        if now - connection.told_s >= (PROGRESS_PERIOD_S if jobs else HEARTBEAT_S):
            connection.told_s = now
            self._reply(connection, m.Progress(staged, total))

    # Filling slabs

    def _fill(self, connection: Connection, fill: m.Fill, _: list[int]) -> None:
        """Make the slab and let this connection fill it, unless another does (I3)."""
        if not 0 < fill.extent_bytes <= MAX_EXTENT_BYTES:
            raise ProtocolError(f"a slab of {fill.extent_bytes} bytes")
        entry = self.store.entries.get(connection.key)
        if entry is None:
            connection.phase = Phase.IDLE
            self._reply(connection, m.Absent())
            return
        if entry.state(connection.place) is not State.ABSENT or entry.state(PINNED) is State.ABSENT:
            self._attend(connection, entry)
            return
        fd = self._create_slab(connection, entry, fill.extent_bytes)
        connection.phase = Phase.FILLING
        if entry.state(PINNED) is State.READY:
            self.store.grant(entry.key, PINNED, connection.number, connection.pid)
        self._reply(connection, m.Filling(self._tiers.block_bytes), [fd])

    def _create_slab(self, connection: Connection, entry: Entry, extent_bytes: int) -> int:
        """A slab, for which idle ones give way one by one. DeviceMemoryFull, with who holds what, if that does not suffice."""
        place = connection.place
        while True:
            try:
                fd = self._tiers.create_slab(entry.key, place, extent_bytes)
                break
            except DeviceMemoryFull as error:
                connection.phase = Phase.IDLE
                idle = self.store.idle_slabs(place.uuid)
                if not idle:
                    free = self._tiers.free_bytes(place.uuid)
                    raise self.store.device_full(place.uuid, entry.name, extent_bytes, free) from error
                self._free(idle[:1])
                self._tiers.settle()
            except DriverError:
                connection.phase = Phase.IDLE
                raise
        self._free(self.store.fill(entry, place, extent_bytes))
        return fd

    def _want(self, connection: Connection, want: m.Want, _: list[int]) -> None:
        if not 0 <= want.number < 1 << 20 or len(connection.wanted) > 64:
            raise ProtocolError(f"block {want.number} wanted, with {len(connection.wanted)} outstanding")
        connection.wanted.append(want.number)
        connection.told_s = self._clock()
        self._serve_wants(connection.key)

    def _serve_wants(self, key: str) -> None:
        for connection in self._fillers_of(key):
            while connection.wanted:
                number = connection.wanted[0]
                block = self._tiers.pinned_block(key, number)
                if block is None:
                    break
                del connection.wanted[0]
                self._reply(connection, m.Block(number, block.size_bytes), [block.fd])

    def _commit_slab(self, connection: Connection, _commit: m.Commit, _: list[int]) -> None:
        entry = self.store.entries[connection.key]
        if entry.state(PINNED) is State.FILLING:  # its files are not proven unchanged yet (I6)
            connection.phase, connection.told_s = Phase.COMMITTING, self._clock()
        else:
            self._finish_slab(connection, entry)

    def _finish_slab(self, connection: Connection, entry: Entry) -> None:
        self._free(self.store.release(entry.key, PINNED, connection.number))
        self._free(self.store.complete(entry.key, connection.place))
        self._grant(connection, entry, staged=True)
        for waiting in self._waiting_for(entry.key):
            self._again(waiting, entry, staged=True)

    def _abandon_slab(self, connection: Connection) -> None:
        """The filler is gone (I2); whoever waits may fill (I3)."""
        entry = self.store.entries[connection.key]
        pinned = entry.residences.get(PINNED)
        if pinned is not None and connection.number in pinned.leases:
            self._free(self.store.release(entry.key, PINNED, connection.number))
        self._abandon(entry.key, connection.place)
        for waiting in self._waiting_for(entry.key):
            if waiting.place == connection.place:
                self._again(waiting, entry)

    # Saving, evicting, asking

    def _reserve(self, connection: Connection, reserve: m.Reserve, descriptors: list[int]) -> None:
        manifest = _read_manifest(descriptors[0])
        _check_name(reserve.name, path=False)
        if manifest.members:
            raise ProtocolError("a put entry with files")
        entry = _new_entry("put-" + secrets.token_hex(16), reserve.name, "put", manifest)
        self._free(self.store.fill(entry, SHARED, entry.extent_bytes))
        self._tiers.keep_manifest(entry.key, descriptors.pop())
        with self._undone_on_error(entry.key, SHARED):
            block = self._tiers.create_shared(entry.key, entry.name, entry.extent_bytes)
        self.store.give_name(entry.key, reserve.name)
        connection.phase, connection.key, connection.place = Phase.RESERVED, entry.key, SHARED
        self._reply(connection, m.Reserved(), [block.fd])

    def _commit_reserved(self, connection: Connection, _commit: m.Commit, _: list[int]) -> None:
        try:
            self._tiers.seal_shared(connection.key)
        except OSError as error:
            raise ProtocolError(f"commit while the block is still mapped writable: {error.strerror}") from error
        entry = self.store.entries[connection.key]
        self._free(self.store.complete(entry.key, SHARED))
        self._grant(connection, entry, staged=True)

    def _evict(self, connection: Connection, evict: m.Evict, _: list[int]) -> None:
        if evict.everything:
            keys, kept = self.store.evictable_by_all()
        else:
            keys, kept = [self.store.check_evictable(evict.names).key], []
        self._answer_evicted(connection, [(k, place) for k in keys for place in self.store.entries[k].residences], kept)

    def _free_gpu(self, connection: Connection, free: m.FreeGpu, _: list[int]) -> None:
        self._answer_evicted(connection, self.store.idle_slabs(names=free.names), [])
        self._tiers.settle()

    def _answer_evicted(self, connection: Connection, going: Residences, kept: Sequence[str]) -> None:
        entries = self.store.entries
        names = tuple(dict.fromkeys(entries[key].name for key, _ in going))
        freed = sum(entries[key].residences[place].extent_bytes for key, place in going)
        self._free(going)
        self._reply(connection, m.Evicted(_fitting(names), freed, _fitting(kept)))

    def _pin(self, connection: Connection, pin: m.Pin, _: list[int]) -> None:
        self._free(self.store.pin(pin.names, pin.pinned))
        self._reply(connection, m.Done())

    def _query(self, connection: Connection, _query: m.Query, _: list[int]) -> None:
        uptime_s = self._clock() - self._started_s
        document = describe_status(self.store, self.connections, self._tiers.driver_in_use, uptime_s, self._clock())
        fd = seal_bytes("status", msgspec.json.encode(document))
        try:
            self._reply(connection, m.Document(), [fd])
        finally:
            os.close(fd)

    # Memory

    def _free(self, residences: Residences) -> None:
        """Evict residences that the store chose."""
        for key, place in residences:
            log.info("evicting %s from %s (%s)", self.store.entries[key].name, place.kind.value, key)
            self.store.evict(key, place)
            self._give_back(key, place)

    def _abandon(self, key: str, place: Place) -> None:
        """Forget a residence whose filling came to nothing (I2)."""
        self.store.fail(key, place)
        self._give_back(key, place)

    def _give_back(self, key: str, place: Place) -> None:
        self._tiers.free(key, place)
        if key not in self.store.entries:
            self._tiers.forget(key)


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


def _failed(error: NBCacheError) -> m.Failed:
    """An error as an answer; a message may quote what a peer sent, so it is cut."""
    return m.Failed(type(error).__name__, str(error)[:MESSAGE_CHARACTERS])


def _fitting(names: Sequence[str]) -> tuple[str, ...]:
    """As many names as fit in a message."""
    lengths = itertools.accumulate(len(name) + 8 for name in names)
    fit = sum(length < MESSAGE_CHARACTERS for length in lengths)
    return (*names[:fit], f"and {len(names) - fit} more") if fit < len(names) else tuple(names)


def _new_entry(key: str, name: str, provenance: str, manifest: Manifest) -> Entry:
    return Entry(
        key=key,
        name=name,
        provenance=provenance,
        source=tuple(member.path for member in manifest.members),
        bytes=manifest.nbytes,
        extent_bytes=manifest.extent_bytes,
        tensors=len(manifest.tensors),
    )


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
        if not name.startswith("/") or len(name) > 4096 or "\0" in name:
            raise InvalidName(f"{name!r} cannot name a file entry: it is named by its absolute path")
    elif not name or len(name) > 200 or "/" in name or not name.isprintable() or name != name.strip():
        raise InvalidName(f"{name!r} cannot name a saved entry: use a printable word without a slash, up to 200 characters")
