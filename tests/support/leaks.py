"""What a test left behind: descriptors, processes, maps of nbcache memory.

A snapshot before, a comparison after. Descriptors cover sockets, memfds, pipes and pidfds. Threads and the kernel may close
things a moment later, so the comparison waits for them, to a limit.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from dataclasses import dataclass

import psutil

PATIENCE_S = 10.0


@dataclass(frozen=True)
class Snapshot:
    """What this process and its descendants hold. ``daemons`` are processes anywhere whose runtime directory is the test's."""

    descriptors: frozenset[tuple[int, str]]
    maps: frozenset[str]
    processes: frozenset[int]
    daemons: frozenset[int]

    @classmethod
    def take(cls, root: str) -> Snapshot:
        return cls(_descriptors(), _maps(), _children(), _daemons(root))


def leaked(before: Snapshot, root: str) -> list[str]:
    """What is there now and was not before, once everything had time to go; empty if nothing is."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        now = Snapshot.take(root)
        found = [
            *(f"descriptor {fd} -> {target}" for fd, target in sorted(now.descriptors - before.descriptors)),
            *(f"map {line}" for line in sorted(now.maps - before.maps)),
            *(f"process {_describe(pid)}" for pid in sorted(now.processes - before.processes)),
            *(f"daemon {_describe(pid)}" for pid in sorted(now.daemons - before.daemons)),
        ]
        if not found or time.monotonic() > deadline:
            return found
        gc.collect()
        time.sleep(0.02)


def _descriptors() -> frozenset[tuple[int, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith("/proc/"):  # the listing's own
                found.add((int(name), target))
    return frozenset(found)


def _maps() -> frozenset[str]:
    with open("/proc/self/maps") as maps:
        return frozenset(line.split()[0] + " " + line.split()[5] for line in maps if "memfd:nbcache" in line)


def _children() -> frozenset[int]:
    return frozenset(
        child.pid for child in psutil.Process().children(recursive=True) if "resource_tracker" not in _describe(child.pid)
    )


def _daemons(root: str) -> frozenset[int]:
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("NBCACHE_RUNTIME_DIR", "").startswith(root):
                found.add(process.pid)
    return frozenset(found) - {os.getpid()}


def _describe(pid: int) -> str:
    try:
        return f"{pid} {' '.join(psutil.Process(pid).cmdline())[:120]}"
    except psutil.Error:
        return f"{pid} (gone)"
