"""The daemon's loop: connections in, packets to the service, its answers out.

One thread owns everything here; reading runs elsewhere and reports through a queue. A connection is a lease: what it was
granted ends when it, or the process behind it, ends (I1). A peer that breaks the protocol costs itself its connection (I5).

Owns the sockets and the peers' pidfds. Knows nothing of entries or memory: what may be asked when, and what a request does, is
the service's to say. It exists so that every way in which a connection can begin, stall or end is in one place.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import selectors
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from nbcache import __version__
from nbcache.daemon.connection import HEARTBEAT_S, MESSAGE_CHARACTERS, PROGRESS_PERIOD_S, Connection, Phase, Port
from nbcache.daemon.entries import IllegalTransition
from nbcache.daemon.service import Requests, Service
from nbcache.errors import NBCacheError, ProtocolError
from nbcache.protocol import messages as m
from nbcache.protocol.wire import Channel, Closed, client_messages, close_all

log = logging.getLogger("nbcache.daemon")

SO_PEERPIDFD = 77
PATIENCE_S = 10.0
"""How long a peer may leave a greeting, or a request in several messages, half said."""


@dataclass(frozen=True, eq=False)
class Line:
    """What a connection comes through. ``pidfd`` is -1 where the peer's process is not ours to see."""

    channel: Channel[m.ClientMessage]
    pidfd: int


class Server:
    """Serves one listening socket until :meth:`stop`. ``open_service`` is called once, with the port to the connections.

    Notes
    -----
    Everything but :meth:`stop` and :meth:`post` runs in the thread of :meth:`run`. :meth:`stop` may be called from a signal's
    callback or another thread. An :class:`IllegalTransition` ends :meth:`run` with that error: a daemon that does not know what
    it holds must not hand it out.
    """

    def __init__(
        self,
        listener: socket.socket,
        open_service: Callable[[Port], Service],
        clock: Callable[[], float] = time.monotonic,
        on_tick: Callable[[Server], None] | None = None,
        tick_s: float = 5.0,
    ) -> None:
        self.connections: dict[int, Connection] = {}
        self._lines: dict[int, Line] = {}
        self._clock = clock
        self._listener = listener
        self._on_tick, self._tick_s = on_tick, tick_s
        self._next_tick_s = clock() + tick_s
        self._numbers = iter(range(1, 1 << 62))
        self._selector = selectors.DefaultSelector()
        self._reports: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._service = open_service(self)
        self._requests: Requests = {(Phase.GREETING, m.Hello): self._hello, **self._service.requests}

    @property
    def is_idle(self) -> bool:
        """Whether nobody is connected and nothing is cached."""
        return not self.connections and self._service.is_empty

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

    def post(self, report: Callable[[], None]) -> None:
        """See :class:`Port`. Called from other threads."""
        self._reports.put(report)
        self._wake()

    def _timeout_s(self) -> float:
        timeout = self._next_tick_s - self._clock()
        if any(connection.is_waiting for connection in self.connections.values()):
            timeout = min(timeout, PROGRESS_PERIOD_S)
        if any(connection.is_limited for connection in self.connections.values()):
            timeout = min(timeout, HEARTBEAT_S)
        return max(0.0, timeout)

    def _tick(self) -> None:
        now = self._clock()
        for connection in list(self.connections.values()):
            if connection.is_limited and now - connection.since_s > PATIENCE_S:
                self.end(connection, f"left {connection.phase.value} for {PATIENCE_S:.0f} s")
        for connection in list(self.connections.values()):
            if connection.is_waiting:
                self._service.tell_progress(connection, now)
        if now >= self._next_tick_s:
            self._next_tick_s = now + self._tick_s
            self._service.free_expired()
            if self._on_tick:
                self._on_tick(self)

    def _shut_down(self) -> None:
        for connection in list(self.connections.values()):
            self.end(connection, "the daemon stops")
        self._service.close()
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
        self._begin(Connection(next(self._numbers), pid, self._clock()), Line(Channel(sock, client_messages), pidfd))

    def _begin(self, connection: Connection, line: Line) -> None:
        self.connections[connection.number], self._lines[connection.number] = connection, line
        self._selector.register(line.channel.socket, selectors.EVENT_READ, partial(self._readable, connection))
        if line.pidfd >= 0:
            self._selector.register(line.pidfd, selectors.EVENT_READ, partial(self.end, connection, "its process ended"))

    def _readable(self, connection: Connection) -> None:
        line = self._lines.get(connection.number)
        if line is None:
            return  # ended earlier in this round
        descriptors: list[int] = []
        try:
            message, descriptors = line.channel.receive()
            if connection.phase is not Phase.CLOSING:
                self._dispatch(connection, message, descriptors)
        except BlockingIOError:
            pass
        except Closed:
            self.end(connection, "it closed")
        except ProtocolError as error:
            self._refuse(connection, error)
        except NBCacheError as error:
            self.fail(connection, error)
        except (IllegalTransition, AssertionError):
            raise
        except OSError as error:
            if error.errno == errno.EMFILE:
                self._refuse(connection, ProtocolError("the daemon has too many files open to take what came"))
            else:
                self.end(connection, f"{error}")
        except Exception:
            log.exception("a bug met by process %d", connection.pid)
            self.end(connection, "a bug, see above")
        finally:
            close_all(descriptors)  # those that no request took

    def _dispatch(self, connection: Connection, message: m.ClientMessage, descriptors: list[int]) -> None:
        """A request takes the descriptors it keeps out of the list."""
        request = self._requests.get((connection.phase, type(message)))
        if request is None:
            raise ProtocolError(f"{type(message).__name__} while {connection.phase.value}")
        request(connection, message, descriptors)

    def _hello(self, connection: Connection, hello: m.Hello, _: list[int]) -> None:
        connection.label = hello.label[:200]
        self.reply(connection, m.Welcome(m.PROTOCOL_VERSION, __version__, os.getpid()))
        if hello.protocol == m.PROTOCOL_VERSION:
            connection.phase = Phase.IDLE
        else:
            log.warning("process %d speaks protocol %d (nbcache %s)", connection.pid, hello.protocol, hello.version)
            self._run_dry(connection)

    def reply(self, connection: Connection, message: m.Message, descriptors: Sequence[int] = ()) -> None:
        """See :class:`Port`."""
        line = self._lines.get(connection.number)
        if line is None:
            return
        try:
            line.channel.send(message, descriptors)
        except (OSError, ProtocolError) as error:  # gone, or so many replies unread that the socket is full, or too long
            self.end(connection, f"cannot reply: {error}")

    def fail(self, connection: Connection, error: NBCacheError) -> None:
        """See :class:`Port`. A message may quote what a peer sent, so it is cut."""
        self.reply(connection, m.Failed(type(error).__name__, str(error)[:MESSAGE_CHARACTERS]))

    def _refuse(self, connection: Connection, error: ProtocolError) -> None:
        """Say why, and let the connection run dry: an immediate close could overtake the words."""
        if connection.phase is Phase.CLOSING:
            return
        log.warning("refused process %d: %s", connection.pid, error)
        self.fail(connection, error)
        self._service.let_go(connection)
        self._run_dry(connection)

    def _run_dry(self, connection: Connection) -> None:
        connection.phase, connection.since_s = Phase.CLOSING, self._clock()
        line = self._lines.get(connection.number)
        if line is None:
            return
        try:
            line.channel.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.end(connection, f"{error}")

    def end(self, connection: Connection, why: str) -> None:
        """See :class:`Port`."""
        if self.connections.pop(connection.number, None) is None:
            return
        log.debug("connection %d of process %d ends: %s", connection.number, connection.pid, why)
        line = self._lines.pop(connection.number)
        self._selector.unregister(line.channel.socket)
        line.channel.close()
        if line.pidfd >= 0:
            self._selector.unregister(line.pidfd)
            os.close(line.pidfd)
        self._service.let_go(connection)


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
