"""The daemon as a process: one per user, found by its socket, gone without a trace.

A daemon owns its lock file for as long as it lives; who holds the lock may remove a stale socket and bind a new one. The
lock, not the socket's existence, says whether a daemon is alive. It never imports torch and makes no GPU context.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import logging.handlers
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from nbcache.config import NBCache, RuntimePaths, SocketAddress
from nbcache.daemon.connection import Port
from nbcache.daemon.policy import GpuPolicy
from nbcache.daemon.server import Server
from nbcache.daemon.service import Service
from nbcache.errors import DaemonUnavailable
from nbcache.memory.driver import open_driver
from nbcache.settings import of_daemon
from nbcache.units import parse_size

log = logging.getLogger("nbcache.daemon")


class Daemon:
    """One daemon: lock, socket, server.

    Notes
    -----
    :meth:`serve` holds the lock from before it binds until after it has removed the socket. If the runtime directory vanishes
    under it (a logout, a cleaner), it makes the directory and socket anew; if another daemon was quicker, it serves its
    connections to their end and leaves.
    """

    def __init__(self, paths: RuntimePaths, config: NBCache) -> None:
        self._paths = paths
        self._config = config
        self._lock_fd = -1
        self._identity = (0, 0)

    def serve(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM or SIGINT. ``on_ready`` is called once clients may connect.

        LockHeld if another daemon is alive, DaemonUnavailable if the runtime directory cannot be used.
        """
        self._config.host_limit_bytes()  # nonsense in the settings is to be told now, not at the first load
        self._paths.create()
        self._lock_fd = _acquire_lock(self._paths.lock)
        try:
            server = Server(self._bind(), self._open_service, on_tick=self._check_reachable)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: server.stop())
            log.info("serving on %s, process %d", self._paths.socket, os.getpid())
            on_ready()
            server.run()
            log.info("stopped")
        finally:
            self._unbind()
            os.close(self._lock_fd)

    def _open_service(self, port: Port) -> Service:
        policy = GpuPolicy(self._config.gpu_keep_s, parse_size(self._config.gpu_low_watermark))
        return Service(port, self._config.host_limit_bytes, open_driver, policy, settings=of_daemon(self._config))

    def _bind(self) -> socket.socket:
        self._paths.socket.unlink(missing_ok=True)  # stale: we hold the lock
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            with SocketAddress(self._paths.socket) as address:
                listener.bind(address)
            self._paths.socket.chmod(0o600)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
        found = self._paths.socket.stat()
        self._identity = (found.st_dev, found.st_ino)
        return listener

    def _unbind(self) -> None:
        if self._is_reachable():
            self._paths.socket.unlink(missing_ok=True)

    def _is_reachable(self) -> bool:
        try:
            found = self._paths.socket.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def _check_reachable(self, server: Server) -> None:
        """Called by the server every few seconds."""
        if self._is_reachable():
            return
        if server.is_idle:
            log.warning("the socket vanished, and there is nothing to serve: leaving")
            server.stop()
            return
        try:
            self._paths.create()
            lock_fd = _acquire_lock(self._paths.lock) if not _is_same_file(self._lock_fd, self._paths.lock) else -1
        except (DaemonUnavailable, LockHeld) as error:
            if not server.connections:
                log.warning("unreachable, and %s; nobody is connected: leaving", error)
                server.stop()
            return
        if lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = lock_fd
        server.listen(self._bind())
        log.warning("the socket had vanished; listening on %s again", self._paths.socket)


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


class LockHeld(Exception):
    """Another daemon is alive."""


def _acquire_lock(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DaemonUnavailable(f"cannot write {path}: {error.strerror}; set NBCACHE_RUNTIME_DIR") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
    except BlockingIOError as error:
        os.close(fd)
        raise LockHeld(f"another daemon holds {path}") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def _logging_to(handler: logging.Handler) -> Iterator[None]:
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def serve_foreground(config: NBCache) -> None:
    """``nbcache serve``: log to stderr, until Ctrl-C."""
    _raise_descriptor_limit()
    with _logging_to(logging.StreamHandler()):
        try:
            Daemon(RuntimePaths.of_user(), config).serve()
        except LockHeld as error:
            raise DaemonUnavailable(f"{error}; see it with `nbcache status`, end it with `nbcache stop`") from error


def main() -> None:
    """``python -m nbcache.daemon READY_FD``, what a client starts: leave its process tree, then serve.

    The starter waits for the ready descriptor: ``ok``, ``held`` if another daemon is alive, or why not. The parent half exits
    at once, so that the daemon is nobody's child: Jupyter ends the children of a kernel, and a kernel would have to reap it.
    """
    ready = os.fdopen(int(sys.argv[1]), "w")
    if os.fork():
        os._exit(0)
    os.setsid()
    os.umask(0o077)
    _raise_descriptor_limit()
    try:
        paths = RuntimePaths.of_user()
        paths.create()
        with _logging_to(logging.handlers.RotatingFileHandler(paths.log, maxBytes=1 << 20, backupCount=2)):
            try:
                Daemon(paths, NBCache()).serve(lambda: _report(ready, "ok"))
            except LockHeld as error:  # one whose starter was killed, and that does not serve yet
                log.info("%s; leaving", error)
                _report(ready, "held")
            except BaseException:
                log.critical("the daemon ends", exc_info=True)
                raise
    except Exception as error:  # noqa: BLE001 - whatever it was, the starter is told
        _report(ready, f"{type(error).__name__}: {error}")
        sys.exit(1)


def _report(ready: TextIO, text: str) -> None:
    """Tell the starter, once; it may have lost patience."""
    if not ready.closed:
        with contextlib.suppress(BrokenPipeError), ready:
            ready.write(text)
