"""The processes that a zygote has forked: how they are forked, told their job, signalled, and reaped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NoReturn

from nbcache.jupyter import forked, proof
from nbcache.jupyter.ahead import Ahead

Forget = Callable[[int], None]
"""Called in a forked child with the one descriptor to keep: gives up what only the zygote may hold."""


class Child:
    """One forked process: waiting for a job, or a kernel.

    Notes
    -----
    Owns its pidfd and the connection to it, until :meth:`reap`. The number stays its own until then, so that a signal cannot
    reach a stranger.
    """

    def __init__(self, pid: int, job: socket.socket) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.job = job
        self.file = ""
        """The connection file of a kernel."""
        self.serving = False

    def give(self, descriptors: Iterable[int]) -> None:
        """Tell it its job: the request's memfd, the launcher's pidfd, and the descriptors to inherit. OSError if it is gone."""
        socket.send_fds(self.job, [b"request"], list(descriptors))

    def signal(self, number: int) -> None:
        """Signal its process group; it is the leader of a session of its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """End it and its group."""
        self.signal(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # it may not have left the zygote's group yet

    def reap(self) -> int:
        """Wait for its end, give everything back, and return its status."""
        _, status = os.waitpid(self.pid, 0)
        self.job.close()
        os.close(self.pidfd)
        return status


def fork_child(
    forget: Forget,
    prepare: Callable[[], None] | None,
    variables: Mapping[str, str],
    anew: Iterable[str],
    ahead: Ahead,
) -> Child:
    """Fork a process that waits for a job. OSError if the system refuses one. The rest: :func:`nbcache.jupyter.forked.live`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        pid = proof.fork()
        if not pid:
            _live(ours, theirs, forget, partial(forked.live, theirs, prepare, variables, anew, ahead))
        theirs.close()
        return Child(pid, ours)
    except BaseException:
        ours.close()
        theirs.close()
        raise


def _live(ours: socket.socket, theirs: socket.socket, forget: Forget, live: Callable[[], NoReturn]) -> None:
    try:
        os.setsid()
        ours.close()
        forget(theirs.fileno())
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        live()
    finally:
        os._exit(forked.START_ERROR)
