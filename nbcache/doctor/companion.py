"""The daemon and the places where it is met: runtime directory, socket, version. Starts none, and removes nothing."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nbcache import __version__
from nbcache.client.api import query
from nbcache.client.session import Session
from nbcache.config import RuntimePaths
from nbcache.doctor.findings import Finding, broken, ok, warning
from nbcache.doctor.machine import check_limits
from nbcache.errors import DaemonError, DaemonUnavailable, DaemonUnresponsive, NBCacheError
from nbcache.protocol.messages import PROTOCOL_VERSION, Status
from nbcache.settings import in_force
from nbcache.units import format_duration

PATIENCE_S = 5.0
"""How long the daemon may take to answer before it counts as hung."""


def check_directory(paths: RuntimePaths) -> Finding:
    """Whether the runtime directory can be used, or made."""
    subject, here = "runtime directory", paths.runtime
    move = "set NBCACHE_RUNTIME_DIR to a directory of your own"
    try:
        found = here.stat()
    except FileNotFoundError:
        parent = next(parent for parent in here.parents if parent.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            return ok(subject, f"{here}, made when it is needed")
        return broken(subject, f"{here} is not there, and you may not write to {parent}", move)
    except OSError as error:
        return broken(subject, f"{here}: {error.strerror}", move)
    if not stat.S_ISDIR(found.st_mode):
        return broken(subject, f"{here} is not a directory", f"rm {here}, or {move}")
    if found.st_uid != os.getuid():
        return broken(subject, f"{here} belongs to user {found.st_uid}, you are {os.getuid()}", move)
    if stat.S_IMODE(found.st_mode) & 0o022:
        return broken(subject, f"others may write to {here}", f"chmod 700 {here}")
    if not os.access(here, os.W_OK | os.X_OK):
        return broken(subject, f"you may not write to {here}", f"chmod 700 {here}, or {move}")
    return ok(subject, str(here))


def check_daemon(paths: RuntimePaths, wanted_bytes: int) -> Iterator[Finding]:
    """Whether one runs, answers, and is of this version; and its limits if so."""
    try:
        with Session.open(start=False, reply_timeout_s=PATIENCE_S) as session:
            status = query(session)
    except DaemonUnavailable as error:
        yield _unreachable(paths, error)
    except DaemonUnresponsive:
        yield broken("daemon", f"no answer within {PATIENCE_S:g} s", "`nbcache stop`; the next load starts a new one")
    except DaemonError as error:  # another protocol's, for one
        yield broken("daemon", str(error), "`nbcache restart`")
    except NBCacheError as error:
        yield broken("daemon", f"its answer breaks the protocol: {error}", "`nbcache restart`")
    else:
        yield _version(status)
        try:
            yield from (finding for finding in check_limits(wanted_bytes, status.pid) if finding.state != "ok")
        except OSError:  # it ended meanwhile, or runs where its limits are hidden
            return


def _version(status: Status) -> Finding:
    seen = f"process {status.pid}, nbcache {status.version}, up {format_duration(status.uptime_s)}"
    anew = "`nbcache restart`, when what is saved may go"
    if status.version != __version__:
        return warning("daemon", f"{seen}; this is nbcache {__version__}", anew)
    others = _other_options(status)
    if others:
        return warning("daemon", f"{seen}; it was started with {', '.join(others)}, which is set otherwise now", anew)
    return ok("daemon", f"{seen}, protocol {PROTOCOL_VERSION}")


def _other_options(status: Status) -> list[str]:
    """The daemon's options that a new one would have otherwise; none where what is set is wrong, which is told elsewhere."""
    with contextlib.suppress(NBCacheError):
        settings = in_force(started_with=status.settings)
        return [f"{each.option} = {each.daemon or '-'}" for each in settings if each.daemon is not None]
    return []


def _unreachable(paths: RuntimePaths, error: DaemonUnavailable) -> Finding:
    holder = lock_holder(paths.lock)
    if holder:
        seen = f"process {holder} holds {paths.lock}, and cannot be reached on {paths.socket}"
        return broken("daemon", seen, f"kill {holder}; the next load starts a new one")
    if not os.path.lexists(paths.socket):
        return ok("daemon", "none runs; the first load starts one")
    if paths.socket.is_dir():
        return broken("socket", f"{paths.socket} is a directory", f"rm -r {paths.socket}")
    if not os.access(paths.socket, os.W_OK):
        return broken("socket", str(error), f"rm -f {paths.socket}")
    return warning("socket", f"{paths.socket} is stale: nobody listens", f"rm {paths.socket}, or let the next load replace it")


def lock_holder(path: Path, root: Path = Path("/")) -> int:
    """The process that holds a ``flock`` on a file, as ``/proc/locks`` tells without touching the lock; 0 if none does."""
    try:
        found = path.stat()
        lines = (root / "proc/locks").read_text().splitlines()
    except OSError:
        return 0
    name = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in lines:
        fields = line.split()
        if "FLOCK" in fields and name in fields and "->" not in fields:
            return int(fields[4])
    return 0
