"""What kernels of an environment were seen to import, what of that is worth importing ahead of them, and what must not be.

One JSON file for each interpreter, in the state directory. Kernels note candidates after cells that took long; a zygote
measures them, keeps what takes over 200 ms, and notes what breaks a fork. Writers hold a lock and replace the file as a whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from nbcache.config import RuntimePaths

SLOW_S = 0.2
MAX_CANDIDATES = 50_000


class Experience(msgspec.Struct):
    """What is known of an environment."""

    executable: str = ""
    learned: dict[str, float] = {}
    """Modules, and how many seconds their import took."""
    candidates: list[str] = []
    """Modules that a kernel imported in a cell that took long, in order. Not measured yet."""
    quick: list[str] = []
    """Modules that were measured, and are not worth it."""
    broken: dict[str, str] = {}
    """Packages, and single modules, that cannot be imported ahead of a fork, and why."""
    installed_at: int = 0
    """When something was last installed, as of then. In nanoseconds, of the newest folder's time."""

    def is_broken(self, name: str) -> bool:
        """Whether a module is one that cannot be imported ahead, or of such a package."""
        return name in self.broken or name.partition(".")[0] in self.broken


def by_package(seconds: Mapping[str, float]) -> dict[str, float]:
    """The seconds of modules, summed up by package; the slowest first."""
    sums: dict[str, float] = {}
    for name, took in seconds.items():
        package = name.partition(".")[0]
        sums[package] = sums.get(package, 0.0) + took
    return {package: round(took, 3) for package, took in sorted(sums.items(), key=lambda item: -item[1])}


def experience_path(executable: str | None = None) -> Path:
    """The file for an interpreter, this one by default."""
    name = os.path.abspath(executable or sys.executable)
    return RuntimePaths.of_user().state / f"imports-{zlib.crc32(name.encode(errors='surrogateescape')):08x}.json"


def recall(executable: str | None = None) -> Experience:
    """What is known; nothing, if nothing can be read."""
    try:
        return msgspec.json.decode(experience_path(executable).read_bytes(), type=Experience)
    except (OSError, msgspec.DecodeError):
        return Experience()


@contextlib.contextmanager
def revise() -> Iterator[Experience]:
    """What is known, to be changed, for one writer at a time. OSError if it cannot be kept."""
    path = experience_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = recall()
        before = msgspec.json.encode(known)
        yield known
        known.executable = os.path.abspath(sys.executable)
        after = msgspec.json.encode(known)
        if after != before:
            fresh = path.with_suffix(f".{os.getpid()}")
            fresh.write_bytes(after)
            fresh.replace(path)
