"""Ways to drive a kernel as people's programs do: jupyter_client's manager, and a Jupyter server's REST and websocket.

Each starts a kernel of a spec, restarts it, and runs cells in it. A cell says what it found in the variable ``answer``, which
comes back with its reply; it is done once what it shows has come too, as for somebody who looks at a notebook.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import secrets
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nbcache.errors import BenchmarkFailed

START_TIMEOUT_S = 120.0
HANG_UP_S = 5.0
CELL_TIMEOUT_S = 300.0
SHOWN_TIMEOUT_S = 2.0
"""For what a cell shows to come after its reply. An ordinary kernel may have said it before a client was connected again."""
POLL_S = 0.05
EXPRESSIONS = {"answer": "globals().get('answer')"}


class Client(Protocol):
    """A kernel and the way to it. TimeoutError if nothing answers."""

    async def start(self, spec: str) -> None:
        """Start a kernel; back when it answers."""

    async def restart(self) -> None:
        """Restart it; back when a cell may be sent, which may have to wait."""

    async def interrupt(self) -> None:
        """Interrupt it."""

    async def run(self, code: str) -> Any:  # noqa: ANN401
        """Run a cell, and return its ``answer`` once all that it shows is here. BenchmarkFailed if it raised."""

    async def close(self) -> None:
        """End the kernel, and give everything back."""


def answer_of(content: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The answer in the reply to a cell. BenchmarkFailed if it raised, or answered what is no literal."""
    if content["status"] != "ok":
        raise BenchmarkFailed(f"a cell raised {content.get('ename', content['status'])}: {content.get('evalue', '')}")
    answer = content["user_expressions"]["answer"]
    try:
        return ast.literal_eval(answer["data"]["text/plain"])
    except (KeyError, ValueError, SyntaxError) as error:
        raise BenchmarkFailed(f"a cell answered {answer}") from error


def is_end_of(message: Mapping[str, Any], request: str) -> bool:
    """Whether a message says that a cell is done, and all that it shows was sent."""
    header, is_its = message["header"], message["parent_header"].get("msg_id") == request
    return is_its and header["msg_type"] == "status" and bool(message["content"]["execution_state"] == "idle")


class ManagerClient:
    """A kernel under jupyter_client's manager, as nbclient and papermill have theirs."""

    def __init__(self, specs: Path, environment: Mapping[str, str]) -> None:
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager

        self._environment = dict(environment)
        self._manager: Any = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(specs / "kernels")]))
        self._client: Any = None

    async def start(self, spec: str) -> None:
        """Start a kernel; back when it answers."""
        self._manager.kernel_name = spec
        await self._manager.start_kernel(env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._connect()
        await self._client.wait_for_ready(timeout=START_TIMEOUT_S)

    def _connect(self) -> None:
        if self._client is not None:
            self._client.stop_channels()
        self._client = self._manager.client()
        self._client.start_channels(hb=False)

    async def restart(self) -> None:
        """Restart it; a cell may be sent at once, and waits for the kernel."""
        await self._manager.restart_kernel()
        self._connect()

    async def interrupt(self) -> None:
        """Interrupt it."""
        await self._manager.interrupt_kernel()

    async def run(self, code: str) -> Any:  # noqa: ANN401
        """Run a cell, and return its ``answer``."""
        request = self._client.execute(code, user_expressions=EXPRESSIONS)
        async with asyncio.timeout(CELL_TIMEOUT_S):
            while True:
                message = await self._client.get_shell_msg()
                if message["parent_header"].get("msg_id") == request:
                    break
        answer = answer_of(message["content"])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHOWN_TIMEOUT_S):
                while not is_end_of(await self._client.get_iopub_msg(), request):
                    pass
        return answer

    async def close(self) -> None:
        """End the kernel, and the sockets."""
        if self._client is not None:
            self._client.stop_channels()
        if self._manager.has_kernel:
            await self._manager.shutdown_kernel(now=True)
        self._manager.context.destroy(linger=0)


class RestClient:
    """A kernel of a real Jupyter server, over REST and a websocket, as JupyterLab has its own.

    BenchmarkFailed if jupyter_server is not installed, or the server does not answer.
    """

    def __init__(self, specs: Path, environment: Mapping[str, str]) -> None:
        self._environment = {**environment, "JUPYTER_PATH": str(specs)}
        self._token = secrets.token_hex(16)
        self._server: asyncio.subprocess.Process | None = None
        self._url = ""
        self._websocket: Any = None
        self.kernel = ""
        """The server's name for the kernel."""

    async def start(self, spec: str) -> None:
        """Start a server and a kernel; back when that answers."""
        if self._server is None:
            await self._start_server()
        self.kernel = (await self.ask("POST", "kernels", {"name": spec}))["id"]
        await self._connect()
        await self.run("answer = None")

    async def _start_server(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._url = f"127.0.0.1:{port}"
        self._server = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"),
            *(f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={self._token}"),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while self._server.returncode is None and asyncio.get_running_loop().time() < deadline:
            with contextlib.suppress(OSError):
                await self.ask("GET", "status")
                return
            await asyncio.sleep(POLL_S)
        raise BenchmarkFailed(f"no Jupyter server starts (pip install jupyter_server), status {self._server.returncode}")

    async def _connect(self) -> None:
        from tornado.websocket import websocket_connect

        url = f"ws://{self._url}/api/kernels/{self.kernel}/channels?token={self._token}&session_id={uuid.uuid4()}"
        self._websocket = await websocket_connect(url)

    async def ask(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401
        """One request of the REST interface, below ``/api``; what it answers."""
        from tornado.httpclient import AsyncHTTPClient

        response = await AsyncHTTPClient().fetch(
            f"http://{self._url}/api/{path}?token={self._token}",
            method=method,
            body=json.dumps(content or {}) if method == "POST" else None,
            request_timeout=START_TIMEOUT_S,
        )
        return json.loads(response.body) if response.body else None

    async def restart(self) -> None:
        """Restart it, as the Kernel menu does. The server answers once it has started the new one."""
        await self.ask("POST", f"kernels/{self.kernel}/restart")

    async def interrupt(self) -> None:
        """Interrupt it."""
        await self.ask("POST", f"kernels/{self.kernel}/interrupt")

    async def run(self, code: str) -> Any:  # noqa: ANN401
        """Run a cell, and return its ``answer``."""
        request = await self.send(code)
        replies: list[Any] = []
        is_done = False
        while not (replies and is_done):  # in whichever order
            try:
                message = await asyncio.wait_for(self.receive(), SHOWN_TIMEOUT_S if replies else CELL_TIMEOUT_S)
            except TimeoutError:
                if replies:
                    break
                raise
            if message["parent_header"].get("msg_id") == request and message["header"]["msg_type"] == "execute_reply":
                replies.append(answer_of(message["content"]))
            is_done |= is_end_of(message, request)
        return replies[0]

    async def send(self, code: str) -> str:
        """Send a cell, and do not wait for it."""
        request = uuid.uuid4().hex
        header = {"msg_id": request, "msg_type": "execute_request", "username": "", "session": request, "version": "5.3"}
        content = {"code": code, "user_expressions": EXPRESSIONS, "silent": False, "allow_stdin": False}
        message = {"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content}
        await self._websocket.write_message(json.dumps(message))
        return request

    async def receive(self) -> dict[str, Any]:
        """The next message of the kernel. BenchmarkFailed if the server closes the connection."""
        text = await asyncio.wait_for(self._websocket.read_message(), CELL_TIMEOUT_S)
        if text is None:
            raise BenchmarkFailed("the server closed the connection to the kernel")
        message: dict[str, Any] = json.loads(text)
        return message

    async def _end_of_messages(self) -> None:
        while await self._websocket.read_message() is not None:
            pass

    async def close(self) -> None:
        """End the kernel and the server."""
        if self._websocket is not None:
            self._websocket.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._end_of_messages(), HANG_UP_S)
        if self._server is None:
            return
        if self._server.returncode is None:
            self._server.terminate()  # it ends its kernels
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._server.wait(), START_TIMEOUT_S)
        if self._server.returncode is None:
            self._server.kill()
            await self._server.wait()
