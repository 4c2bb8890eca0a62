"""Processes that a test drives from outside: a real Jupyter kernel, and a bare interpreter.

Both run code that is sent to them, can be killed, interrupted and restarted, and leave nothing behind when they are closed.
They inherit this process's environment, and so the test's runtime directory.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = float(os.environ.get("NBCACHE_TEST_PATIENCE_S", "60"))
"""How long a process may take to answer; `make gpu` gives it longer, for a machine that has read no library yet."""


class RemoteError(AssertionError):
    """Code that was sent raised; the message is its traceback."""


@dataclass
class Outcome:
    """What one cell did: the text it showed, the error it ended with, and whether the front end was shown a traceback."""

    stdout: str = ""
    stderr: str = ""
    results: list[str] = field(default_factory=list)
    displays: list[dict[str, Any]] = field(default_factory=list)
    updates: list[dict[str, Any]] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)
    error: str = ""
    traceback: str = ""


class Kernel:
    """A real kernel of this interpreter. Use it as a context manager.

    Notes
    -----
    Owns an event loop, a ZMQ context, a folder for its sockets and the kernel's process; :meth:`close` ends them all. One
    thread at a time. ``spec`` names a kernelspec; ``spec_folder`` is where to look for it, in place of Jupyter's own folders.
    """

    def __init__(self, spec: str = "python3", spec_folder: Path | None = None, **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nbk")
        self._environment = {**os.environ, "IPYTHONDIR": self._folder.name, **environment}
        self._runner = asyncio.Runner()
        self._context = zmq.asyncio.Context()
        self._kernel = AsyncKernelManager(
            kernel_name=spec,
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(spec_folder)]) if spec_folder else KernelSpecManager(),
            context=self._context,
            transport="ipc",
            ip=f"{self._folder.name}/k",
            connection_file=f"{self._folder.name}/connection.json",
        )
        self._client: AsyncKernelClient | None = None

    def __enter__(self) -> Kernel:
        try:
            self._runner.run(self._start())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The kernel's process."""
        return self._process.pid

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        return self._kernel.provisioner.process  # type: ignore[union-attr]

    async def _start(self) -> None:
        await self._kernel.start_kernel(env=self._environment)
        await self._connect()

    async def _connect(self) -> None:
        if self._client is not None:
            self._client.stop_channels()
        self._client = self._kernel.client()
        self._client.start_channels(hb=False)
        await self._client.wait_for_ready(timeout=PATIENCE_S)

    def run(self, code: str) -> str:
        """Run a cell and return what it printed and returned, as text; RemoteError, with the traceback, if it raised."""
        outcome = self.try_run(code)
        if outcome.error:
            raise RemoteError(outcome.traceback or outcome.stderr or outcome.error)
        return "".join([outcome.stdout, *outcome.results]).strip()

    def try_run(self, code: str) -> Outcome:
        """Run a cell, whatever comes of it."""
        return self.finish(self.begin(code))

    def begin(self, code: str) -> str:
        """Send a cell and do not wait for it. Returns what :meth:`finish` wants."""
        assert self._client is not None
        return self._client.execute(code, store_history=True)

    def finish(self, cell: str, timeout_s: float = PATIENCE_S) -> Outcome:
        """Wait for a cell that :meth:`begin` sent."""
        return self._runner.run(asyncio.wait_for(self._collect(cell), timeout_s))

    async def _collect(self, cell: str) -> Outcome:
        assert self._client is not None
        outcome = Outcome()
        while True:
            message = await self._client.get_iopub_msg()
            if message["parent_header"].get("msg_id") != cell:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
            _note(outcome, message)
        while True:
            reply = await self._client.get_shell_msg()
            if reply["parent_header"].get("msg_id") == cell:
                break
        content = reply["content"]
        if content["status"] != "ok":
            outcome.error = f"{content.get('ename', content['status'])}: {content.get('evalue', '')}"
        outcome.pages += [page["data"]["text/plain"] for page in content.get("payload", ()) if page["source"] == "page"]
        return outcome

    def complete(self, code: str) -> list[str]:
        """What the kernel offers at the end of this code, as texts that stand for the whole."""
        assert self._client is not None
        reply = self._runner.run(asyncio.wait_for(self._client.complete(code, reply=True, timeout=PATIENCE_S), PATIENCE_S))
        content = reply["content"]
        return [code[: content["cursor_start"]] + match for match in content["matches"]]

    def restart(self) -> None:
        """Restart as a front end does: the kernel is asked to end, and a new one starts. A killed one just starts anew."""
        self._runner.run(self._restart())

    async def _restart(self) -> None:
        await self._kernel.restart_kernel(now=self._process.poll() is not None)
        await self._connect()

    def restart_in(self, directory: Path) -> None:
        """End it, and start it in a directory, where it is restarted from then on."""
        self._runner.run(self._kernel.shutdown_kernel())
        self._runner.run(self._kernel.start_kernel(env=self._environment, cwd=str(directory)))
        self._runner.run(self._connect())

    def kill(self) -> None:
        """End the kernel with SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def interrupt(self) -> None:
        """Interrupt the running cell as a front end does."""
        self._runner.run(self._kernel.interrupt_kernel())

    def close(self) -> None:
        """End the kernel, and give back everything that was opened to talk to it."""
        try:
            if self._client is not None:
                self._client.stop_channels()
                self._client = None
            if self._kernel.has_kernel:
                self._runner.run(self._kernel.shutdown_kernel(now=True))
        finally:
            self._context.destroy(linger=0)
            self._runner.close()
            self._folder.cleanup()


def _note(outcome: Outcome, message: dict[str, Any]) -> None:
    """Add one message of the kernel's broadcast channel to an outcome."""
    kind, content = message["msg_type"], message["content"]
    if kind == "stream":
        setattr(outcome, content["name"], getattr(outcome, content["name"]) + content["text"])
    elif kind == "execute_result":
        outcome.results.append(content["data"]["text/plain"])
        outcome.displays.append(content["data"])
    elif kind == "display_data":
        outcome.displays.append(content["data"])
    elif kind == "update_display_data":
        outcome.updates.append(content["data"])
    elif kind == "error":
        outcome.traceback = "\n".join(content["traceback"])


class Interpreter:
    """A bare Python process that runs what it is sent. Use it as a context manager.

    Notes
    -----
    Code runs in its ``__main__``, one request after the other, in its main thread. ``group`` gives it a session of its own.
    Closing it ends it with SIGKILL; processes that it forked are the test's to end.
    """

    def __init__(self, *imports: str, group: bool = False, **environment: str) -> None:
        replies, child = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _DRIVER, str(child)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                pass_fds=[child],
                start_new_session=group,
            )
        except BaseException:
            os.close(replies)
            raise
        finally:
            os.close(child)
        self._replies = replies
        self._received = b""
        self._imports = imports

    def __enter__(self) -> Interpreter:
        try:
            if self._imports:
                self.run("\n".join(f"import {name}" for name in self._imports))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process."""
        return self.process.pid

    def run(self, code: str) -> Any:
        """Run code; returns the value of its last expression, which must be JSON. RemoteError if it raised."""
        self.begin(code)
        return self.finish()

    def begin(self, code: str) -> None:
        """Send code, and do not wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(code).encode() + b"\n")
        self.process.stdin.flush()

    def finish(self, timeout_s: float = PATIENCE_S) -> Any:
        """Wait for what :meth:`begin` sent."""
        answer = json.loads(self._line(time.monotonic() + timeout_s))
        if "error" in answer:
            raise RemoteError(answer["error"])
        return answer["value"]

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._replies], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"process {self.pid} did not answer in time"
            part = os.read(self._replies, 1 << 16)
            assert part, f"process {self.pid} ended, status {self.process.wait()}"
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line

    def interrupt(self) -> None:
        """Send SIGINT."""
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it with SIGKILL, and wait until it is gone. What it forked lives on."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it, and give the pipes back."""
        self.kill()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        if self._replies >= 0:
            os.close(self._replies)
            self._replies = -1


_DRIVER = """
import ast, json, os, sys, traceback
replies = os.fdopen(int(sys.argv.pop()), "w")
os.set_inheritable(replies.fileno(), False)
main = sys.modules["__main__"].__dict__
def _answer(code):
    tree = ast.parse(code)
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<sent>", "exec"), main)
    return eval(compile(last, "<sent>", "eval"), main) if last else None
for _line in sys.stdin.buffer:
    try:
        _reply = json.dumps({"value": _answer(json.loads(_line))})
    except BaseException:
        _reply = json.dumps({"error": traceback.format_exc()})
    replies.write(_reply + "\\n")
    replies.flush()
"""


WITH_SAME = """
import gc, json, os, torch, warnings
import nbcache
from safetensors.torch import load_file

def same(weights, path, dtype=None):
    stock = load_file(path)
    cast = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in stock.items()}
    alike = (torch.equal(weights[n], cast[n]) and weights[n].dtype == cast[n].dtype for n in cast)
    return list(weights) == list(cast) and all(alike)
"""
"""What an interpreter runs that is to hold weights against their file: ``same(weights, path, dtype)``."""


def value(kernel: Kernel, code: str) -> Any:
    """What a cell ends with, a literal."""
    return ast.literal_eval(kernel.run(code))
