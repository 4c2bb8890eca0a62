"""What a benchmark has found so far, kept for whoever cuts it off: in the file that ``--save`` names, and to be printed.

Owns the file, and what a termination signal does. Must not know what is measured. It exists because a measurement on a borrowed
machine may be ended at any moment, and what it has found by then is all that there is.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import msgspec

from nbcache.errors import BenchmarkFailed
from nbcache.output import print_result, print_step

R = TypeVar("R", bound=msgspec.Struct)

TERMINATED = 128 + signal.SIGTERM


class Results(Generic[R]):
    """The latest report of a benchmark: ``keep`` is called with each, and ``path``, where one is given, holds the last.

    BenchmarkFailed, before anything is measured, if the path's folder is not there or may not be written to.
    """

    def __init__(self, path: Path | None) -> None:
        self.latest: R | None = None
        self._path = path
        if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise BenchmarkFailed(f"--save {path}: no file can be written there")

    def keep(self, report: R) -> None:
        """Note the report so far, and write it: whole, or not at all."""
        self.latest = report
        if self._path is not None:
            write_document(self._path, report)

    @contextmanager
    def shown(self, render: Callable[[R], str], as_json: bool) -> Iterator[None]:
        """Print the latest report at the end, also if what is inside fails, is interrupted, or is told to terminate."""
        with _terminable():
            try:
                yield
            except BaseException:
                if self.latest is not None:
                    print_step("cut off; what there is by now:")
                    self._print(render, as_json)
                raise
        self._print(render, as_json)

    def _print(self, render: Callable[[R], str], as_json: bool) -> None:
        assert self.latest is not None
        print_result(self.latest if as_json else render(self.latest))
        sys.stdout.flush()


def write_document(path: Path, document: object) -> None:
    """Write JSON to a file, which has the old content or the new one, never a part."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(document)))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does: temporary files, kernels and the daemon go too."""

    def end(*_: object) -> NoReturn:
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
