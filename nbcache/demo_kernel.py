"""A real kernel, started, restarted and driven from this process, for the demo.

Owns the kernel's process and connection. It knows neither what the cells mean nor what they print. The kernel is started by
jupyter_client, the way that Jupyter's own servers start theirs, so that a restart here is a restart there.
"""

from __future__ import annotations

import ast
import json
import os
import queue
import signal
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import KernelManager

from nbcache.errors import NBCacheError

START_TIMEOUT_S = 120.0
POLL_S = 1.0
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a program to end: Ctrl-C, ``kill``, a terminal that closes."""


class DemoKernel:
    """A kernel of this interpreter, and a client that runs cells in it. A context manager.

    Notes
    -----
    For the main thread. Its connection file and its log are in ``directory``. NBCacheError if it does not start, if a cell
    raises, or if it dies.
    """

    def __init__(self, directory: str, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._log_path = Path(directory, "kernel.log")
        self._manager = KernelManager(
            kernel_spec_manager=_ThisInterpreter(), connection_file=os.path.join(directory, "kernel.json")
        )
        self._client: Any = None
        self._closing = ExitStack()

    def __enter__(self) -> DemoKernel:
        with ExitStack() as stack:
            log = stack.enter_context(self._log_path.open("wb"))  # open until the end: a restart hands it over again
            stack.callback(self._manager.cleanup_resources)
            stack.callback(self._end_process)
            with _uninterrupted():
                self._manager.start_kernel(env=self._environment, stdout=log, stderr=log)
            self._client = self._manager.blocking_client()
            stack.callback(self._client.stop_channels)
            self._client.start_channels()
            self._wait_until_ready()
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _end_process(self) -> None:
        if self._manager.has_kernel:
            self._manager.shutdown_kernel(now=True)

    def _wait_until_ready(self) -> None:
        try:
            self._client.wait_for_ready(timeout=START_TIMEOUT_S)
        except RuntimeError as error:
            raise NBCacheError(f"the demo's kernel does not start ({error}): {self._last_words()}") from error

    def _last_words(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def restart(self) -> None:
        """Restart the process, politely, as Jupyter's button does."""
        with _uninterrupted():
            self._manager.restart_kernel()
        self._wait_until_ready()

    def run(self, cell: str) -> str:
        """Run a cell; what it printed. NBCacheError, with the kernel's own words, if it raised or the kernel died."""
        printed, _ = self._execute(textwrap.dedent(cell), {})
        return printed.rstrip()

    def value(self, expression: str) -> Any:  # noqa: ANN401
        """The value of an expression there, by way of JSON."""
        _, values = self._execute("", {"value": f"__import__('json').dumps({expression})"})
        answer = values["value"]
        if answer["status"] != "ok":
            raise NBCacheError(f"the kernel raised {answer['ename']}: {answer['evalue']}")
        return json.loads(ast.literal_eval(answer["data"]["text/plain"]))

    def _execute(self, code: str, expressions: dict[str, str]) -> tuple[str, dict[str, Any]]:
        request = self._client.execute(code, user_expressions=expressions, store_history=bool(code), allow_stdin=False)
        printed = ""
        while True:
            message = self._next(self._client.get_iopub_msg, request)
            content = message["content"]
            if message["msg_type"] == "stream" and content["name"] == "stdout":
                printed += content["text"]
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                break
        reply = self._next(self._client.get_shell_msg, request)["content"]
        if reply["status"] != "ok":
            kind = "" if reply.get("ename") == "UsageError" else f"{reply.get('ename', reply['status'])}: "
            raise NBCacheError(f"in the demo's kernel: {kind}{reply.get('evalue', '')}")
        return printed, reply["user_expressions"]

    def _next(self, get: Any, request: str) -> dict[str, Any]:  # noqa: ANN401
        """The next message on a channel that belongs to this request."""
        while True:
            try:
                message: dict[str, Any] = get(timeout=POLL_S)
            except queue.Empty:
                if not self._manager.is_alive():
                    raise NBCacheError(f"the demo's kernel died: {self._last_words()}") from None
                continue
            if message["parent_header"].get("msg_id") == request:
                return message


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals that end the program wait for the end of the block.

    An exception in the middle of jupyter_client's start or restart leaves its tasks half done, and the kernel without a master.
    """
    waiting: list[int] = []
    before = {number: signal.signal(number, lambda number, _: waiting.append(number)) for number in ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if waiting:
        signal.raise_signal(waiting[0])


class _ThisInterpreter(KernelSpecManager):
    """Knows one kernel, this Python's, whatever kernelspecs the user has installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The spec of this interpreter's ipykernel."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")
