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
from nbcache.config import NBCache
from nbcache.errors import BenchmarkFailed, NBCacheError, named

T = TypeVar("T")

Tell = Callable[[object], None]
"""How a measuring process tells something before it ends."""

PATIENCE_S = 60.0
"""How long a process that has answered may take to end."""

NOTE = "note"
"""What a process sends before its answer; an answer comes under the name of an error, or of none."""


@contextlib.contextmanager
def own_daemon(host_bytes: int = 0) -> Iterator[Path]:
    """A temporary directory, and in it a daemon that is nobody else's: it neither meets nor disturbs the user's.

    ``host_bytes`` is what its host tier shall hold at once. Where the default limit, half of the memory that the machine has
    now, is less, the limit is that: some machines' memory grows as it is used. A limit that the user has set stays.
    """
    chosen = {}
    with tempfile.TemporaryDirectory(prefix="nbcache-bench-") as directory:
        chosen["NBCACHE_RUNTIME_DIR"] = directory
        config = NBCache()
        if not config.host_limit and config.host_limit_bytes() < host_bytes:
            chosen["NBCACHE_HOST_LIMIT"] = str(host_bytes)
        before = {name: os.environ.get(name) for name in chosen}
        os.environ.update(chosen)
        try:
            yield Path(directory)
        finally:
            stop_daemon()
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def run_fresh(work: Callable[[], T], timeout_s: float = 600.0) -> T:
    """What ``work`` returns in a new interpreter, gone when this returns. What it prints goes to stderr.

    An exception there is raised here: one of nbcache's own as it was, any other as BenchmarkFailed with its class name.
    BenchmarkFailed, too, if the process dies or takes longer than ``timeout_s``.
    """
    result: T = _run_fresh(_Silent(work), lambda _: None, timeout_s)
    return result


def run_fresh_telling(work: Callable[[Tell], T], on_note: Callable[[Any], None], timeout_s: float = 600.0) -> T:
    """As :func:`run_fresh`, of work that takes long: what it tells on the way is handed to ``on_note`` as it comes.

    ``timeout_s`` is how long it may be silent.
    """
    return _run_fresh(work, on_note, timeout_s)


class _Silent:
    """Work that tells nothing on the way."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work

    def __call__(self, tell: Tell) -> Any:  # noqa: ANN401 - what the work returns
        return self._work()


def _run_fresh(work: Callable[[Tell], T], on_note: Callable[[Any], None], timeout_s: float) -> T:
    context = multiprocess.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    with receiving:
        process = context.Process(target=_answer, args=(sending, work))
        process.start()
        try:
            sending.close()  # the child's copy is the last one: its end is seen here
            result: T = _receive(receiving, process, on_note, timeout_s)
            return result
        except (KeyboardInterrupt, SystemExit):
            process.kill()  # its answer is not wanted any more
            raise
        finally:
            process.join(PATIENCE_S)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _receive(receiving: Any, process: Any, on_note: Callable[[Any], None], timeout_s: float) -> Any:  # noqa: ANN401 - untyped
    while True:
        if not receiving.poll(timeout_s):
            process.kill()
            raise BenchmarkFailed(f"a measuring process took longer than {timeout_s:g} s")
        try:
            kind, content = receiving.recv()
        except EOFError:
            process.join()
            raise BenchmarkFailed(f"a measuring process died: exit code {process.exitcode}") from None
        if kind == NOTE:
            on_note(content)
        elif kind:
            raise named(kind, content)
        else:
            return content


def _answer(sending: Any, work: Callable[[Tell], object]) -> None:  # noqa: ANN401
    os.dup2(2, 1)  # what a library prints is no result of ours
    try:
        answer = ("", work(lambda content: sending.send((NOTE, content))))
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
