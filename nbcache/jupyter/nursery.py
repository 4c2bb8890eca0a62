"""A zygote at work: gives launchers the kernels that it forks, and looks after these to their end.

It keeps one forked process waiting, gives it away to the next launcher that fits, tells that how its kernel ended, and ends a
kernel whose launcher is gone. It leaves when it was idle for long, when what it imported is not what is installed any more, or
when a successor has taken its place; but never while it has kernels. It uses no GPU and no threads.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable

from nbcache import settings
from nbcache.jupyter import handover
from nbcache.jupyter.experience import by_package
from nbcache.jupyter.installed import (
    STARTUP,
    Snapshot,
    configuration_files,
    configured_in,
    entries_in,
    installed_folders,
    shadowed,
    top_level,
)
from nbcache.jupyter.preload import Preloaded
from nbcache.jupyter.supervision import Child, fork_child
from nbcache.jupyter.visitor import Visitor

TICK_S = 2.0


class Nursery:
    """The event loop over launchers, kernels and the waiting child. One thread.

    Notes
    -----
    ``prepare`` is done in each child that is to wait, if given; such a child is no use to a kernel that is to see other GPUs.
    ``tick`` is called every few seconds. The listener is this one's from now on.
    """

    def __init__(
        self,
        place: handover.Place,
        listener: socket.socket,
        identity: bytes,
        preloaded: Preloaded,
        idle_s: float,
        prepare: Callable[[], None] | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._place = place
        self._listener: socket.socket | None = listener
        self._inode = os.stat(place.socket).st_ino
        self._identity = identity
        self._preloaded = preloaded
        self._ahead = preloaded.ahead.packages
        self._user_folders = _user_folders()
        self._snapshot = Snapshot([*settings.files(), *configuration_files()])
        self._idle_s = idle_s
        self._prepare = prepare
        self._tick = tick
        self._visitors: set[Visitor] = set()
        self._children: dict[int, Child] = {}
        self._spare: Child | None = None
        self._spares_lost = 0
        self._last_use_s = time.monotonic()
        self._wakeup = socket.socketpair()
        self._kept = _open_descriptors() - {listener.fileno(), *(sock.fileno() for sock in self._wakeup)}
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._welcome)
        self._selector.register(self._wakeup[0], selectors.EVENT_READ, self._hear_signals)

    def run(self) -> None:
        """Serve until there is no reason to stay; SIGTERM is one to take no more launchers."""
        self._wakeup[1].setblocking(False)
        signal.set_wakeup_fd(self._wakeup[1].fileno())
        signal.signal(signal.SIGTERM, lambda *_: None)  # heard in its turn, not in the middle of something
        self._fork_spare()
        next_tick_s = time.monotonic() + TICK_S
        while self._listener is not None or self._children:
            for key, _ in self._selector.select(max(0.0, next_tick_s - time.monotonic())):
                key.data()
            if time.monotonic() >= next_tick_s:
                next_tick_s = time.monotonic() + TICK_S
                self._look_around()
        for visitor in list(self._visitors):
            self._part_with(visitor)

    def stop_listening(self, reason: str) -> None:
        """Take no more launchers; the kernels that there are stay."""
        if self._listener is None:
            return
        log(f"no more kernels: {reason}")
        self._selector.unregister(self._listener)
        self._listener.close()
        self._listener = None
        with contextlib.suppress(OSError):
            if os.stat(self._place.socket).st_ino == self._inode:
                os.unlink(self._place.socket)
        if self._spare is not None:
            self._spare.kill()
            self._spare = None  # reaped as any child

    def _look_around(self) -> None:
        if self._listener is None:
            return
        try:
            reachable = os.stat(self._place.socket).st_ino == self._inode
        except OSError:
            reachable = False
        if not reachable:
            self.stop_listening("another has taken this one's place")
        elif self._kernels():
            self._last_use_s = time.monotonic()
        elif time.monotonic() - self._last_use_s > self._idle_s:
            self.stop_listening(f"idle for {self._idle_s:g} s")
        if self._listener is not None:
            self._tick()

    def _kernels(self) -> list[Child]:
        return [child for child in self._children.values() if child is not self._spare]

    def _hear_signals(self) -> None:
        if signal.SIGTERM in self._wakeup[0].recv(64):
            self.stop_listening("asked to leave")

    # Launchers

    def _welcome(self) -> None:
        if self._listener is None:  # it was given up in the same round
            return
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            self.stop_listening(f"no launcher can be heard: {error}")
            return
        visitor = Visitor(connection)
        self._visitors.add(visitor)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(visitor))

    def _hear(self, visitor: Visitor) -> None:
        try:
            packet, received = handover.receive(visitor.connection)
        except OSError:
            packet, received = b"", []
        if not packet:
            self._part_with(visitor)
        elif packet == b"request" and visitor.request is None and received:
            self._consider(visitor, received)
        elif packet == handover.GO and visitor.request is not None and visitor.kernel is None:
            visitor.waiting = True
            self._start_waiting()
        elif packet.startswith(handover.SIGNAL) and visitor.kernel is not None:
            visitor.kernel.signal(int(packet.split()[1]))
        elif packet == handover.LEAVE:
            self.stop_listening("asked to leave")
            visitor.say(handover.ACCEPTED)
        elif packet == handover.REPORT:
            visitor.say(self._report())
        else:
            self._part_with(visitor)

    def _consider(self, visitor: Visitor, received: list[int]) -> None:
        """Accept a request, or refuse it. Nothing is started yet."""
        visitor.received = received
        try:
            reason = self._staleness()
            if not reason:
                request = handover.read_request(received[0])
                reason = self._objection(request)
            if not reason:
                visitor.request = request
                received.insert(1, os.pidfd_open(visitor.peer()))
        except Exception as error:  # noqa: BLE001 - whatever it was, the launcher is told and starts an ordinary kernel
            reason = f"{type(error).__name__}: {error}"
        visitor.say(handover.REFUSED + reason.encode(errors="replace") if reason else handover.ACCEPTED)
        if reason:
            log(f"refused a kernel: {reason}")
            visitor.drop_received()

    def _staleness(self) -> str:
        """Why no kernel may be forked any more; empty if one may. A request is read after that: it may be of newer code."""
        path = self._snapshot.changed()
        if not path:
            return ""
        self.stop_listening(f"{path} has changed")
        return f"{path} has changed"

    def _objection(self, request: handover.Request) -> str:
        """Why no kernel may be forked for a request; empty if one may."""
        if request.identity != self._identity:
            return "another environment"
        if path := shadowed([request.directory, *self._user_folders], self._ahead):
            return f"{path} comes before an installed module of that name"
        if path := shadowed(entries_in(request.directory), top_level(sys.modules) | STARTUP):  # they come before all else
            return f"{path} comes before what was imported here"
        if path := configured_in(request.directory):
            return f"{path} is for a package that was imported elsewhere"
        return ""

    def _part_with(self, visitor: Visitor) -> None:
        """A launcher is gone, and so its kernel is to go."""
        if visitor.kernel is not None and self._children.get(visitor.kernel.pid) is visitor.kernel:
            visitor.kernel.kill()
        self._selector.unregister(visitor.connection)
        visitor.connection.close()
        visitor.drop_received()
        self._visitors.discard(visitor)

    # Kernels

    def _start_waiting(self) -> None:
        """Start the kernels that may be started now: not before the last one of the same connection file is gone."""
        for visitor in [visitor for visitor in self._visitors if visitor.waiting]:
            request = visitor.request
            assert request is not None
            file = handover.connection_file(request.arguments, request.directory)
            if file and any(child.file == file for child in self._kernels()):
                continue
            visitor.waiting = False
            self._start(visitor, request, file)

    def _start(self, visitor: Visitor, request: handover.Request, file: str) -> None:
        self._last_use_s = time.monotonic()
        try:
            child = self._take_spare(request)
            child.file = file
            child.give(visitor.received)
        except OSError as error:
            visitor.say(handover.FAILED + str(error).encode(errors="replace"))
            return
        finally:
            visitor.drop_received()
        visitor.kernel = child
        visitor.say(handover.STARTED + b"%d" % child.pid, (child.pidfd,))

    def _take_spare(self, request: handover.Request) -> Child:
        spare, self._spare = self._spare, None
        if spare is not None and (self._prepare is None or not _gpus_differ(request)):
            return spare
        if spare is not None:
            spare.kill()
        return self._fork(None)

    def _fork_spare(self) -> None:
        if self._spare is None and self._listener is not None and self._spares_lost < 3:
            try:
                self._spare = self._fork(self._prepare)
            except OSError as error:
                self._spares_lost += 1
                log(f"no process waits: {error}")

    def _fork(self, prepare: Callable[[], None] | None) -> Child:
        done = self._preloaded
        child = fork_child(self._forget, prepare, done.variables, done.shell_askers, done.ahead)
        self._children[child.pid] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._bury(child))
        self._selector.register(child.job, selectors.EVENT_READ, lambda: self._hear_child(child))
        return child

    def _forget(self, job: int) -> None:
        """In a child: what the zygote holds is not the child's. Sockets forget their numbers, which others will get."""
        signal.set_wakeup_fd(-1)
        self._selector.close()
        for sock in (
            *(visitor.connection for visitor in self._visitors),
            *(child.job for child in self._children.values()),
            *self._wakeup,
            *([self._listener] if self._listener is not None else []),
        ):
            if sock.fileno() >= 0:
                os.close(sock.detach())
        for fd in _open_descriptors() - self._kept - {job}:
            os.close(fd)

    def _hear_child(self, child: Child) -> None:
        if child.pid not in self._children:  # buried in the same round
            return
        try:
            packet, _ = handover.receive(child.job)
        except OSError:
            packet = b""
        if not packet:
            self._selector.unregister(child.job)
            return
        for visitor in self._visitors:
            if visitor.kernel is child:
                visitor.say(packet)
        if packet == handover.SERVING:
            child.serving = True
            self._fork_spare()

    def _bury(self, child: Child) -> None:
        """A child has ended."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(child.job)
        self._selector.unregister(child.pidfd)
        del self._children[child.pid]
        status = child.reap()
        for visitor in self._visitors:
            if visitor.kernel is child:
                visitor.say(handover.EXITED + b"%d" % status)
        if child is self._spare:
            self._spare = None
            self._spares_lost += 1
            log(f"the waiting process ended, status {status}")
        self._fork_spare()
        self._start_waiting()

    def _report(self) -> bytes:
        packages = list(by_package(self._preloaded.seconds).items())[:60]  # a packet has room for so many
        return ascii(
            {
                "pid": os.getpid(),
                "executable": sys.executable,
                "kernels": len(self._kernels()),
                "ready": self._spare is not None,
                "preloaded": dict(packages),
                "files": len(self._snapshot),
            }
        ).encode()


def _gpus_differ(request: handover.Request) -> bool:
    name = "CUDA_VISIBLE_DEVICES"
    return request.environment.get(name.encode()) != os.environb.get(name.encode())


def _open_descriptors() -> set[int]:
    """Those that are open now; the one that the listing itself needs is not."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            os.fstat(int(name))
            found.add(int(name))
    return found


def _user_folders() -> list[str]:
    """Folders on the path that hold the user's own modules, an editable installation's say."""
    installed = set(installed_folders())
    return [folder for folder in sys.path if folder and os.path.isdir(folder) and os.path.abspath(folder) not in installed]


def log(text: str) -> None:
    """Write a line to the zygote's log, which is its stdout."""
    print(f"{time.strftime('%F %T')} [{os.getpid()}] {text}", flush=True)  # noqa: T201
