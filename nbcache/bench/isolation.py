"""What keeps a measurement apart: a daemon of its own, and a fresh process for what a kernel would do."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import multiprocess

from nbcache.client.session import stop_daemon
from nbcache.errors import BenchmarkFailed, NBCacheError, named

T = TypeVar("T")

PATIENCE_S = 60.0
"""How long a process that has answered may take to end."""


@contextlib.contextmanager
def own_daemon() -> Iterator[Path]:
    """A temporary directory, and in it a daemon that is nobody else's: it neither meets nor disturbs the user's."""
    before = os.environ.get("NBCACHE_RUNTIME_DIR")
    with tempfile.TemporaryDirectory(prefix="nbcache-bench-") as directory:
        os.environ["NBCACHE_RUNTIME_DIR"] = directory
        try:
            yield Path(directory)
        finally:
            stop_daemon()
            if before is None:
                del os.environ["NBCACHE_RUNTIME_DIR"]
            else:
                os.environ["NBCACHE_RUNTIME_DIR"] = before


def run_fresh(work: Callable[[], T], timeout_s: float = 600.0) -> T:
    """What ``work`` returns in a new interpreter, gone when this returns. What it prints goes to stderr.

    An exception there is raised here: one of nbcache's own as it was, any other as BenchmarkFailed with its class name.
    BenchmarkFailed, too, if the process dies or takes longer than ``timeout_s``.
    """
    context = multiprocess.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    with receiving:
        process = context.Process(target=_answer, args=(sending, work))
        process.start()
        try:
            sending.close()  # the child's copy is the last one: its end is seen here
            result: T = _receive(receiving, process, timeout_s)
            return result
        finally:
            process.join(PATIENCE_S)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _receive(receiving: Any, process: Any, timeout_s: float) -> Any:  # noqa: ANN401 - multiprocess carries no types
    if not receiving.poll(timeout_s):
        process.kill()
        raise BenchmarkFailed(f"a measuring process took longer than {timeout_s:g} s")
    try:
        error, answer = receiving.recv()
    except EOFError:
        process.join()
        raise BenchmarkFailed(f"a measuring process died: exit code {process.exitcode}") from None
    if error:
        raise named(error, answer)
    return answer


def _answer(sending: Any, work: Callable[[], object]) -> None:  # noqa: ANN401
    os.dup2(2, 1)  # what a library prints is no result of ours
    try:
        answer = ("", work())
    except NBCacheError as error:
        answer = (type(error).__name__, str(error))
    except Exception as error:  # noqa: BLE001 - told to the parent
        answer = (BenchmarkFailed.__name__, f"{type(error).__name__}: {error}")
    sending.send(answer)


def time_call(work: Callable[[], object]) -> float:
    """Seconds until ``work`` returned; letting go of the result does not count."""
    start = time.perf_counter()
    result = work()
    elapsed = time.perf_counter() - start
    del result
    return elapsed
