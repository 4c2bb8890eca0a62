"""One connection to the daemon, which is one lease; and starting the daemon where there is none.

A session that was granted an entry is the lease on it: closing the session ends the lease, and so does the end of this
process. A forked child does not inherit it (its copy is closed there, and what it has all the same is shut here), so DataLoader
workers neither prolong nor break what their parent holds. No torch here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from select import POLLIN, poll, select
from typing import TypeVar

from nbcache import __version__
from nbcache.client import ends
from nbcache.config import NBCache, RuntimePaths, SocketAddress
from nbcache.config import reply_timeout_s as default_reply_timeout_s
from nbcache.errors import (
    DaemonLost,
    DaemonUnavailable,
    DaemonUnresponsive,
    ProtocolError,
    UnsupportedPlatform,
    VersionMismatch,
    named,
)
from nbcache.protocol import messages as m
from nbcache.protocol.wire import Channel, Closed, close_all, daemon_messages
from nbcache.settings import adopt

ProgressCallback = Callable[[int, int], None]
"""Called with staged and total bytes while a staging is waited for."""

M = TypeVar("M", bound=m.Message)

OTHER_S = 1.0
"""For how long a daemon that lives may not serve, before a start is tried again: it may be leaving."""

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])

_open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """A connection that said hello. Use :meth:`open`; close it, or use it as a context manager.

    The daemon's welcome is read with the first answer, so that a hit takes one round trip.

    Notes
    -----
    Not locked: one thread at a time. After any exception out of :meth:`request` the connection is in an unknown state and is
    closed, so an interrupted wait leaves no lease behind.
    """

    def __init__(self, channel: Channel[m.DaemonMessage], reply_timeout_s: float) -> None:
        self._channel = channel
        self._channel.socket.settimeout(reply_timeout_s)
        self._timeout_s = reply_timeout_s
        self._owner_pid = os.getpid()
        self.daemon_pid = 0
        _open_sessions.add(self)

    @classmethod
    def open(cls, start: bool = True, reply_timeout_s: float | None = None) -> Session:
        """Connect to this user's daemon, starting it if ``start`` and there is none; ``reply_timeout_s`` is the setting's.

        DaemonUnavailable if there is none, or it cannot be started; UnsupportedPlatform outside Linux. What this process has
        let go before is let go first.
        """
        ends.wait()
        if not sys.platform.startswith("linux"):
            raise UnsupportedPlatform(f"nbcache needs Linux (memfd, pidfd, descriptor passing), this is {sys.platform}")
        paths, timeout_s = RuntimePaths.of_user(), reply_timeout_s or default_reply_timeout_s()
        sock = _connect(paths) or (_start(paths) if start else None)
        if sock is None:
            raise DaemonUnavailable(f"no daemon runs ({paths.socket}); the first load starts one")
        session = cls(Channel(sock, daemon_messages), timeout_s)
        session.send(m.Hello(m.PROTOCOL_VERSION, __version__, os.environ.get("JPY_SESSION_NAME", "")[-200:]))
        return session

    def _greet(self) -> None:
        """Read the daemon's greeting, which comes before its first answer."""
        welcome, _ = expect(self._channel.receive(), m.Welcome)
        self.daemon_pid = welcome.pid
        if welcome.protocol != m.PROTOCOL_VERSION:
            raise VersionMismatch(
                f"the daemon is nbcache {welcome.version} (protocol {welcome.protocol}), this is nbcache {__version__} "
                f"(protocol {m.PROTOCOL_VERSION}); run `nbcache restart`"
            )

    def send(self, message: m.Message, descriptors: Sequence[int] = ()) -> None:
        """Send without waiting for an answer. The descriptors stay the caller's."""
        with self._failing_closed():
            self._channel.send(message, descriptors)

    def request(
        self,
        message: m.Message,
        descriptors: Sequence[int] = (),
        on_progress: ProgressCallback | None = None,
    ) -> tuple[m.DaemonMessage, list[int]]:
        """Send, and wait for the answer; the descriptors that come with it are the caller's.

        Raises what the daemon's Failed names; the session lives on after that. DaemonLost, DaemonUnresponsive, ProtocolError
        and, on the first request, VersionMismatch end it.
        """
        self.send(message, descriptors)
        return self.receive(on_progress)

    def receive(self, on_progress: ProgressCallback | None = None) -> tuple[m.DaemonMessage, list[int]]:
        """Wait for the next answer. As :meth:`request`, for who sends several requests ahead."""
        with self._failing_closed():
            if not self.daemon_pid:
                self._greet()
            while True:
                answer, received = self._channel.receive()
                if not isinstance(answer, m.Progress):
                    break
                if on_progress and answer.total_bytes:  # without, it only says that the daemon lives
                    on_progress(answer.staged_bytes, answer.total_bytes)
        if isinstance(answer, m.Failed):
            raise named(answer.error, answer.message)
        return answer, received

    @contextlib.contextmanager
    def _failing_closed(self) -> Iterator[None]:
        try:
            yield
        except Closed:
            self.close()
            raise DaemonLost("the daemon closed the connection; its log says why") from None
        except TimeoutError:
            self.close()
            raise DaemonUnresponsive(
                f"no answer from the daemon for {self._timeout_s:g} s; `nbcache stop` ends it, the next load starts a new one"
            ) from None
        except OSError as error:
            self.close()
            if error.errno == errno.EMFILE:
                raise DaemonUnavailable(f"cannot take what the daemon sends: {told(error)}") from error
            raise DaemonLost(f"the daemon went away: {error.strerror}; load again to start a new one") from error
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether the connection is gone from this process."""
        return self._channel.socket.fileno() < 0

    def await_end(self, timeout_s: float) -> None:
        """Wait until the daemon ends the connection, or says anything, or another thread shuts it."""
        waiter = poll()
        with contextlib.suppress(OSError, ValueError):  # closed already
            waiter.register(self._channel.socket, POLLIN)
            waiter.poll(timeout_s * 1000)

    def shut(self) -> None:
        """Have :meth:`await_end` return, in whichever thread that is."""
        with contextlib.suppress(OSError):
            self._channel.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and the lease it stands for. Tensors that were mapped stay valid.

        In a forked child, the copy is closed and the lease lives on.
        """
        if os.getpid() == self._owner_pid:
            self.shut()  # a child that was forked while another thread connected has the socket too, and does not know it
        self._channel.close()
        _open_sessions.discard(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def expect(answer: tuple[m.DaemonMessage, list[int]], kind: type[M]) -> tuple[M, list[int]]:
    """The answer, if it is of this kind; ProtocolError, and its descriptors closed, if not."""
    message, descriptors = answer
    if not isinstance(message, kind):
        close_all(descriptors)
        raise ProtocolError(f"the daemon answered {type(message).__name__}, expected {kind.__name__}")
    return message, descriptors


def told(error: OSError) -> str:
    """What the system says; if this process has too many files open, with the remedy."""
    if error.errno != errno.EMFILE:
        return str(error.strerror)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"too many open files, {limit} are allowed here; raise that (ulimit -n), or close some"


def _close_in_child() -> None:
    for session in list(_open_sessions):
        session.close()


os.register_at_fork(after_in_child=_close_in_child)


def _connect(paths: RuntimePaths) -> socket.socket | None:
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise DaemonUnavailable(f"cannot connect to {paths.socket}: {told(error)}") from error
    try:
        with SocketAddress(paths.socket) as address:
            sock.connect(address)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise DaemonUnavailable(f"cannot connect to {paths.socket}: {told(error)}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _start(paths: RuntimePaths) -> socket.socket:
    """Start a daemon, one starter at a time, and connect to it."""
    adopt()
    config = NBCache()
    paths.create()
    deadline = time.monotonic() + config.start_timeout_s
    try:
        lock_fd = os.open(paths.start_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        remedy = "" if error.errno == errno.EMFILE else "; set NBCACHE_RUNTIME_DIR to a directory that you may write"
        raise DaemonUnavailable(f"cannot write {paths.start_lock}: {told(error)}{remedy}") from error
    try:
        _lock_until(lock_fd, deadline, paths.start_lock)
        sock = _connect(paths)
        while sock is None:
            if _spawn(paths, config, deadline):
                sock = _connect(paths)
                break
            sock = _await_other(paths, deadline)
    finally:
        os.close(lock_fd)
    if sock is None:
        raise DaemonUnavailable(f"the daemon started and left again; see {paths.log}")
    return sock


def _await_other(paths: RuntimePaths, deadline: float) -> socket.socket | None:
    """Connect to a daemon that lives and does not serve yet; None, after a while, if it left instead."""
    until = min(deadline, time.monotonic() + OTHER_S)
    while True:
        sock, now = _connect(paths), time.monotonic()
        if sock is None and now > deadline:
            raise DaemonUnavailable(
                f"another daemon holds {paths.lock} and does not serve; end it (the file names its process), then load again"
            )
        if sock is not None or now > until:
            return sock
        time.sleep(0.01)


def _lock_until(fd: int, deadline: float, path: Path) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DaemonUnavailable(f"another process has been starting a daemon for too long ({path} is locked)") from None
            time.sleep(0.01)  # flock has no timeout


def _spawn(paths: RuntimePaths, config: NBCache, deadline: float) -> bool:
    """Start a daemon, and wait until it serves; False if another is alive. DaemonUnavailable if it cannot serve."""
    try:
        read_fd, write_fd = os.pipe()
    except OSError as error:
        raise DaemonUnavailable(f"cannot start a daemon: {told(error)}") from error
    try:
        with open(paths.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
            starter = subprocess.Popen(
                [sys.executable, "-P", "-m", "nbcache.daemon", str(write_fd)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_daemon_environment(config),
                pass_fds=[write_fd],
                start_new_session=True,
            )
    except OSError as error:
        os.close(read_fd)
        reason = told(error) if error.errno == errno.EMFILE else error
        raise DaemonUnavailable(f"cannot start a daemon: {reason}") from error
    finally:
        os.close(write_fd)
    answer = ""
    try:
        answer = _read_until(read_fd, deadline)
    finally:
        os.close(read_fd)
        if answer not in ("ok", "held"):  # it may hang before it leaves our process tree
            starter.kill()
        starter.wait()
    if answer not in ("ok", "held"):
        raise DaemonUnavailable(f"the daemon did not start: {answer or 'it ended at once'}; see {paths.log}")
    return answer == "ok"


def _read_until(fd: int, deadline: float) -> str:
    parts = b""
    while True:
        ready, _, _ = select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return "it took too long"
        part = os.read(fd, 4096)
        if not part:
            return parts.decode(errors="replace")
        parts += part


def _daemon_environment(config: NBCache) -> dict[str, str]:
    """The kernel's environment, without what would tie the daemon to this kernel, its GPU or its directory."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "PYTHONPATH")}
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    environment["PYTHONPATH"] = os.pathsep.join([_PACKAGE_ROOT, *inherited])
    environment["NBCACHE_HOST_LIMIT"] = config.host_limit
    environment["MALLOC_ARENA_MAX"] = "2"  # its threads read files into memory that is not the heap's
    environment["OPENBLAS_NUM_THREADS"] = (
        "1"  # numpy comes with CuPy, and the daemon computes nothing: 16 idle threads' buffers
    )
    return environment


def stop_daemon(timeout_s: float = 20.0) -> int:
    """End this user's daemon, of whichever version, and wait until it is gone. Returns its pid, or 0 if none runs.

    One that does not end when asked is killed. DaemonUnresponsive if even that does not help.
    """
    sock = _connect(RuntimePaths.of_user())
    if sock is None:
        return 0
    with sock:
        pid = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return pid
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(pidfd, number)
            if select([pidfd], [], [], timeout_s)[0]:
                return pid
    finally:
        os.close(pidfd)
    raise DaemonUnresponsive(f"the daemon, process {pid}, does not end, not even when killed")
