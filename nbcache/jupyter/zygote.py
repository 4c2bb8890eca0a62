"""``python -m nbcache.jupyter.zygote KEY [successor] [careful]``: how a zygote comes to be.

One for each interpreter and environment, started by the first launcher that found none. It imports, has a forked child prove
that forks of it work, binds its socket, and then is a :class:`~nbcache.jupyter.nursery.Nursery`. What breaks the proof is noted
and left out, a package below a module or the module itself: the process starts over without it. When kernels have been seen to
import something new, it starts a successor, which takes its place once it is ready.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

from nbcache import settings
from nbcache.jupyter import handover, proof
from nbcache.jupyter.experience import Experience, by_package, experience_path, recall, revise
from nbcache.jupyter.installed import installed_folders, own_startup_code
from nbcache.jupyter.nursery import Nursery, log
from nbcache.jupyter.preload import (
    Broken,
    Preloaded,
    attempt,
    leave_out,
    preload,
    prepare_environment,
    settle,
    wanted,
    weigh,
)

MODULE = "nbcache.jupyter.zygote"
SUCCESSOR, CAREFUL, ATTEMPT = "successor", "careful", "attempt"
BROKEN = 3
"""The status of an attempt that has shown something wrong."""
CULPRIT_S = 60.0
"""How long to look for the package that is to blame."""
IMPORT_S = 600
"""How long one import may take. A module that takes longer ends the process, as one that crashes does."""
DEATHS = 2
"""So many processes must have ended with a module before it is left out: the first may have been ended by somebody."""


class Obituary:
    """What is imported now, noted in the file of the lock: whoever has the lock next knows what the process before died of.

    ``name`` is the module that it died of, if it did, and ``deaths`` how many have in a row.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.name, _, count = os.pread(fd, 4096, 0).decode(errors="replace").partition("\n")
        self.deaths = (int(count) if count.isdecimal() else 0) + 1 if self.name else 0

    def begin(self, name: str) -> None:
        """This module comes next."""
        self._write(f"{name}\n{self.deaths if name == self.name else 0}")
        signal.alarm(IMPORT_S)

    def end(self) -> None:
        """All is well, or will be told otherwise."""
        signal.alarm(0)
        self._write("")

    def _write(self, text: str) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(errors="replace"), 0)


class Upbringing:
    """From a fresh interpreter to a zygote.

    Notes
    -----
    Holds the lock of the place until it listens, so that one process at a time comes to be there.
    """

    def __init__(self, options: list[str]) -> None:
        self._options = options
        self._environment = dict(os.environ)  # as launchers have it: what follows changes our own
        self._flags = handover.interpreter_flags(MODULE)
        self._identity = handover.identity(self._flags)
        self._settings = settings.configured()
        self._successor_pid = 0
        self._experience_seen = 0
        self._names: list[str] = []
        self.place = handover.Place(self._identity)

    def run(self) -> None:
        """Come to be, and serve. Returns when there is nothing left to do."""
        if self._settings.zygote_idle_s <= 0:
            return  # it is off, by a configuration file: launchers read none
        lock = _lock(self.place.lock)
        if lock < 0 or (SUCCESSOR not in self._options and _is_answered(self.place.socket)):
            return
        if file := own_startup_code():
            raise RuntimeError(f"{file} is to run in each kernel that starts")
        prepare_environment()
        preloaded = self._import(Obituary(lock))
        settle()
        if reason := proof.probe():
            self._begin_again(reason)
        with contextlib.suppress(OSError), revise() as known:
            weigh(known, self._names, preloaded.seconds)
        listener = _bind(self.place.socket)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.place.failure)
        os.close(lock)
        log(f"ready: {', '.join(f'{name} {took:.2f} s' for name, took in by_package(preloaded.seconds).items())}")
        prepare = proof.start_gpu_context if self._settings.standby == "cuda" else None
        nursery = Nursery(
            self.place, listener, self._identity, preloaded, self._settings.zygote_idle_s, prepare, self._consider_successor
        )
        nursery.run()

    def _import(self, obituary: Obituary) -> Preloaded:
        newest = max(_modified(folder) for folder in installed_folders())
        with contextlib.suppress(OSError), revise() as known:
            if known.installed_at != newest:
                known.installed_at, known.broken = newest, {}  # it may work now
            if obituary.deaths >= DEATHS and obituary.name in wanted(self._settings.preload, known):
                leave_out(known, obituary.name, "ends the process that imports it, or does not come to an end")
        known = recall()
        self._names = names = wanted(self._settings.preload, known)
        try:
            try:
                return preload(names, known.broken, obituary.begin, self._prove if CAREFUL in self._options else lambda _: None)
            finally:
                obituary.end()
        except Broken as error:
            if error.name not in names:
                raise
            name, reason = self._culprit(error, known) or (error.name, error.reason)
            log(f"left out: {name}: {reason}")
            with revise() as known:
                leave_out(known, name, reason)
            self._become(self._options)

    def _culprit(self, broken: Broken, known: Experience) -> tuple[str, str] | None:
        """Which of the packages that came with a module is to blame, and for what: the first that does it alone, too."""
        limit = time.monotonic() + CULPRIT_S
        for name in broken.suspects:
            if not known.is_broken(name) and time.monotonic() < limit and (reason := self._attempt(name)):
                return name, reason
        return None

    def _attempt(self, name: str) -> str:
        """See :func:`nbcache.jupyter.preload.attempt`; in a process of its own."""
        command = [sys.executable, *self._flags, "-m", MODULE, self.place.key, ATTEMPT, name]
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            done = subprocess.run(
                command, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=CULPRIT_S, check=False
            )
            return done.stdout.decode(errors="replace").splitlines()[-1] if done.returncode == BROKEN else ""
        return ""

    def _prove(self, name: str) -> None:
        if reason := proof.probe():
            raise Broken(name, reason)

    def _begin_again(self, reason: str) -> NoReturn:
        """Something breaks forks: start over, and prove after each module. If that was done already, give up."""
        if CAREFUL in self._options:
            raise RuntimeError(reason)
        log(f"forks do not work: {reason}; looking for the module that breaks them")
        self._become([*self._options, CAREFUL])

    def _become(self, options: list[str]) -> NoReturn:
        os.execve(sys.executable, self._command(options), self._environment)  # noqa: S606 - this process, anew

    def _command(self, options: list[str]) -> list[str]:
        return [sys.executable, *self._flags, "-m", MODULE, self.place.key, *options]

    def _consider_successor(self) -> None:
        """Start a successor if kernels have imported something new since; once for each change."""
        if self._successor_pid:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(self._successor_pid, os.WNOHANG) == (0, 0):
                    return
            self._successor_pid = 0
        modified = _modified(str(experience_path()))
        if modified == self._experience_seen or self._settings.preload is not None:
            return
        self._experience_seen = modified
        if recall().candidates:
            log("kernels have imported something new: starting a successor")
            self._successor_pid = _spawn(self._command([SUCCESSOR]), self._environment)


def _spawn(command: list[str], environment: Mapping[str, str]) -> int:
    return os.posix_spawn(command[0], command, dict(environment), setsid=True)


def _modified(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _lock(path: str) -> int:
    """Lock a file; -1 if another process has locked it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return -1
    return fd


def _is_answered(path: str) -> bool:
    connection = handover.connect(path)
    if connection is None:
        return False
    connection.close()
    return True


def _bind(path: str) -> socket.socket:
    """Listen at a path, in the place of whoever did so before."""
    fresh = f"{path}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    with handover.Address(fresh) as address:
        listener.bind(address)
    os.chmod(fresh, 0o600)
    listener.listen(64)
    os.rename(fresh, path)
    return listener


def main() -> None:
    """Become a zygote. What goes wrong is noted, and kernels start the ordinary way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o077)
    if not sys.flags.safe_path:
        del sys.path[0]  # the directory this runs in; a kernel puts its own there
    if sys.argv[2:3] == [ATTEMPT]:
        prepare_environment()
        reason = attempt(sys.argv[3], recall().broken)
        print(reason, flush=True)  # noqa: T201 - for the process that asked
        os._exit(BROKEN if reason else 0)  # threads may be there
    upbringing = Upbringing(sys.argv[2:])
    if sys.argv[1:2] != [upbringing.place.key]:
        log("the environment is not the launcher's")
        sys.exit(1)
    try:
        upbringing.run()
    except Exception as error:
        with open(upbringing.place.failure, "w", encoding="utf-8", errors="replace") as note:
            note.write(f"{type(error).__name__}: {error}\n")
        raise


if __name__ == "__main__":
    main()
