"""A real Jupyter server over REST and websocket, and nbclient: start, restart, interrupt, crash; on both kernels."""

from __future__ import annotations

import ast
import asyncio
import os
from collections.abc import Awaitable, Callable

import nbformat
import psutil
import pytest
from nbclient import NotebookClient

from nbcache.bench.clients import RestClient
from nbcache.errors import BenchmarkFailed
from tests.support.waiting import eventually
from tests.support.zygotes import is_gone, zygote

WHO = "import os; answer = os.getpid(), os.getppid()"


@pytest.fixture(scope="module")
def jupyter_path(specs):
    """The kernelspecs, where a server looks for them."""
    folder = specs.parent / f"{specs.name}-jupyter"
    folder.mkdir()
    (folder / "kernels").symlink_to(specs)
    return folder


def with_server(jupyter_path, work: Callable[[RestClient], Awaitable[None]]) -> None:
    async def run() -> None:
        client = RestClient(jupyter_path, {**os.environ, "IPYTHONDIR": str(jupyter_path / "ipython")})
        try:
            await work(client)
        finally:
            await client.close()

    asyncio.run(run())


async def state_after(client: RestClient, wanted: str) -> None:
    """Wait until the server tells that the kernel is in a state."""
    while True:
        message = await client.receive()
        if message["header"]["msg_type"] == "status" and message["content"]["execution_state"] == wanted:
            return


async def who(client: RestClient) -> tuple[int, int]:
    """The kernel's process and its parent. For a moment after an interrupt a kernel aborts what it is asked."""
    while True:
        try:
            return await client.run(WHO)
        except BenchmarkFailed as error:
            if "aborted" not in str(error):
                raise


async def sleep_until_interrupted(client: RestClient) -> None:
    cell = await client.send("import time\nprint('begun')\ntime.sleep(600)")
    while (message := await client.receive())["header"]["msg_type"] != "stream":
        pass
    await client.interrupt()
    while message["header"]["msg_type"] != "execute_reply" or message["parent_header"]["msg_id"] != cell:
        message = await client.receive()
    assert message["content"]["ename"] == "KeyboardInterrupt"


@pytest.mark.parametrize("spec", ["nbcache", "stock"])
def test_start_restart_interrupt_and_crash(warm, jupyter_path, spec):
    seen = []

    async def work(client: RestClient) -> None:
        zygote()
        await client.start(spec)
        pid, parent = await client.run(WHO)
        assert (parent == zygote().pid) is (spec == "nbcache")
        await sleep_until_interrupted(client)
        assert (await who(client))[0] == pid

        await client.restart()
        second, parent = await client.run(WHO)
        assert second != pid
        assert is_gone(pid)
        assert (parent == zygote().pid) is (spec == "nbcache")

        await client.send("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
        await asyncio.wait_for(state_after(client, "restarting"), 30)  # the server noticed, and starts another
        third, _ = await asyncio.wait_for(client.run(WHO), 60)
        assert third not in (pid, second)
        with pytest.raises(BenchmarkFailed, match="ZeroDivisionError"):
            await client.run("1 / 0")
        seen.extend((second, third))

    with_server(jupyter_path, work)
    assert all(map(is_gone, seen))


def test_a_killed_server_leaves_nothing(warm, jupyter_path):
    async def work(client: RestClient) -> None:
        zygote()
        await client.start("nbcache")
        pid, parent = await client.run(WHO)
        launchers = psutil.Process(client._server.pid).children(recursive=True)
        assert parent == zygote().pid
        client._server.kill()
        await client._server.wait()
        eventually(lambda: is_gone(pid) and not any(each.is_running() for each in launchers))

    with_server(jupyter_path, work)
    eventually(lambda: zygote().kernels == 0)


async def run_with_restart(client: NotebookClient) -> list[str]:
    found = []
    async with client.async_setup_kernel():
        for number, cell in enumerate(client.nb.cells):
            if number:
                await client.km.restart_kernel()
                await client.kc.wait_for_ready(timeout=60)
            await client.async_execute_cell(cell, number)
            found.append(cell.outputs[-1]["data"]["text/plain"])
    return found


@pytest.mark.parametrize("spec", ["nbcache", "stock"])
def test_nbclient(warm, jupyter_path, spec, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PATH", str(jupyter_path))
    cell = "import os, torch\ntorch.ones(3).sum().item(), os.getpid(), os.getppid()"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for _ in range(2)])
    pid = zygote().pid
    client = NotebookClient(notebook, kernel_name=spec, timeout=60)
    outputs = [ast.literal_eval(text) for text in asyncio.run(run_with_restart(client))]
    assert [value for value, _, _ in outputs] == [3.0, 3.0]
    assert len({kernel for _, kernel, _ in outputs}) == 2
    assert [parent == pid for _, _, parent in outputs] == [spec == "nbcache"] * 2
