"""The machine beside its GPU: interpreter, system calls, memory, and the limits that this process and the daemon live under.

Reads, and tries what a load would do in the smallest way; changes nothing. ``root`` is where ``/proc`` and ``/sys`` are found.
"""

from __future__ import annotations

import errno
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from nbcache.config import NBCache, available_memory_bytes
from nbcache.doctor.findings import Finding, broken, ok, warning
from nbcache.errors import NBCacheError
from nbcache.memory.shared import SharedBlock
from nbcache.settings import in_force
from nbcache.units import format_size

ROOT = Path("/")
LITTLE_BYTES = 10**9
"""A limit below this is one that no model fits in."""
ENOUGH_DESCRIPTORS = 4096
"""A pinned copy takes a descriptor for each 512 MiB, a slab one, a connection one."""


def check_interpreter() -> Finding:
    """CPython, 3.11 or newer, on Linux."""
    seen = f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}"
    if not sys.platform.startswith("linux"):
        return broken("interpreter", f"{seen}, on {sys.platform}", "use Linux: nbcache needs memfd, pidfd and fd passing")
    if sys.implementation.name != "cpython" or sys.version_info < (3, 11):
        return broken("interpreter", seen, "make an environment with CPython 3.11 or newer, and install nbcache there")
    return ok("interpreter", f"{seen}, {platform.system()} {platform.release()}")


def check_settings() -> Finding:
    """Configuration files and variables: options that exist, with values that can be."""
    try:
        changed = [setting.option for setting in in_force() if setting.source != "default"]
    except NBCacheError as error:
        return broken("settings", str(error), "mend it there; `nbcache config` shows what is in force")
    return ok("settings", f"set: {', '.join(changed)}" if changed else "all as they come")


def check_system_calls() -> Finding:
    """A sealed memfd and a pidfd, which a container may forbid."""
    try:
        block = SharedBlock.create("doctor", 4096)
        try:
            block.seal()
        finally:
            block.close()
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        if error.errno == errno.EFBIG:
            return broken("system calls", "a memfd of 4 kB is refused: file too large", "ulimit -f unlimited")
        return broken(
            "system calls",
            f"memfd_create or pidfd_open is refused: {error.strerror}",
            "allow both where this runs: the container's seccomp profile, sysctl vm.memfd_noexec below 2, Linux 5.3 or newer",
        )
    return ok("system calls", "sealed memfd, pidfd")


def check_memory(config: NBCache, root: Path = ROOT) -> Iterator[Finding]:
    """What there is, what the control group leaves of it, and how much of that entries may take."""
    machine, usable = int(psutil.virtual_memory().total), available_memory_bytes(root)
    free = format_size(int(psutil.virtual_memory().available))
    yield ok("memory", f"{format_size(machine)}, {free} available")
    if usable < machine:
        yield ok("control group", f"leaves {format_size(usable)} of the machine's {format_size(machine)}")
    else:
        yield ok("control group", "no memory limit below the machine's")
    try:
        limit = config.host_limit_bytes()
    except NBCacheError as error:
        yield broken("host tier", str(error), "unset NBCACHE_HOST_LIMIT, or give it a size such as 48G")
        return
    seen = f"entries may take {format_size(limit)}"
    if limit > usable:
        remedy = f"NBCACHE_HOST_LIMIT={usable // 2 // 10**6}M, then `nbcache restart`"
        yield warning("host tier", f"{seen}, more than the {format_size(usable)} that there are", remedy)
    elif limit < LITTLE_BYTES:
        remedy = "give this machine or container more memory, or set NBCACHE_HOST_LIMIT, then `nbcache restart`"
        yield warning("host tier", f"{seen}: few models are so small", remedy)
    else:
        yield ok("host tier", seen)


_LIMITS = (
    ("file size", "f", resource.RLIMIT_FSIZE, "a file or a memfd may have"),
    ("address space", "v", resource.RLIMIT_AS, "may be mapped"),
)


def check_limits(wanted_bytes: int, pid: int = 0) -> Iterator[Finding]:
    """The limits of a process (0: this one, which a daemon inherits) on what an entry of ``wanted_bytes`` needs.

    ProcessLookupError or PermissionError if it cannot be asked.
    """
    of = "daemon's " if pid else ""
    for name, letter, number, what in _LIMITS:
        soft, hard = resource.prlimit(pid, number)
        if soft == resource.RLIM_INFINITY or soft >= wanted_bytes:
            yield ok(f"{of}{name} limit", "unlimited" if soft == resource.RLIM_INFINITY else format_size(soft))
            continue
        raised = hard == resource.RLIM_INFINITY or hard >= wanted_bytes
        how = f"`ulimit -{letter} unlimited`" if raised else f"have the hard limit raised (`ulimit -H{letter}`)"
        told = broken if soft < LITTLE_BYTES else warning
        yield told(
            f"{of}{name} limit",
            f"{format_size(soft)} {what}, entries may take {format_size(wanted_bytes)}",
            f"{how}, then `nbcache restart`",
        )
    yield _check_descriptors(pid, of)
    soft, _ = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
    amount = "unlimited" if soft == resource.RLIM_INFINITY else f"{format_size(soft)}; pinned memory comes from the GPU driver"
    yield ok(f"{of}locked memory limit", amount)


def _check_descriptors(pid: int, of: str) -> Finding:
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    seen = f"{soft}, the daemon raises it to {hard}" if not pid and soft < hard else str(soft)
    most = soft if pid else hard
    if most != resource.RLIM_INFINITY and most < ENOUGH_DESCRIPTORS:
        remedy = f"have the hard limit raised to {ENOUGH_DESCRIPTORS} (`ulimit -Hn`), then `nbcache restart`"
        return warning(f"{of}open files limit", seen, remedy)
    return ok(f"{of}open files limit", seen)


def check_overcommit(wanted_bytes: int, root: Path = ROOT) -> Iterator[Finding]:
    """Strict accounting (``vm.overcommit_memory=2``) refuses memory that is there; nothing is said where it is off."""
    try:
        if (root / "proc/sys/vm/overcommit_memory").read_text().strip() != "2":
            return
        lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
        counts = {line[0].rstrip(":"): int(line[1]) << 10 for line in lines if len(line) > 1}
    except OSError:
        return
    left = counts.get("CommitLimit", 0) - counts.get("Committed_AS", 0)
    if left < wanted_bytes:
        seen = (
            f"vm.overcommit_memory=2 leaves {format_size(max(0, left))} to commit, entries may take {format_size(wanted_bytes)}"
        )
        yield warning("overcommit", seen, "`sysctl vm.overcommit_memory=0` as root, or a smaller NBCACHE_HOST_LIMIT")
