"""What people do in kernels, done in a forked one: threads, workers, debuggers, subshells."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.kernels import Kernel

WORKERS = """
import torch
from torch.utils.data import DataLoader, Dataset

class Squares(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return (torch.ones(1 << 18) * i).mean() ** 2

def squares(**options):
    return [round(float(x)) for x in DataLoader(Squares(), batch_size=None, num_workers=2, **options)]
"""


def test_parallel_operations(kernel):
    kernel.run("import torch, numpy")
    assert kernel.run("torch.get_num_threads() > 0, float((torch.ones(1 << 22) + 1).sum()) == 2 ** 23") == "(True, True)"
    assert kernel.run("float((torch.ones(600, 600) @ torch.ones(600, 600))[1, 1])") == "600.0"
    assert kernel.run("float((numpy.ones((600, 600)) @ numpy.ones((600, 600)))[1, 1])") == "600.0"


def test_dataloader_workers(kernel):
    kernel.run(WORKERS)
    assert kernel.run("squares()") == str([i * i for i in range(8)])
    kernel.run("import torch; torch.ones(1 << 22).add_(1)")


def test_pools(kernel):
    kernel.run("import multiprocess, multiprocessing, os, math\ndef double(x):\n    return 2 * x")
    assert kernel.run("with multiprocess.Pool(2) as pool: print(pool.map(double, range(4)))") == "[0, 2, 4, 6]"
    spawned = "with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.map(math.sqrt, [4.0, 9.0]))"
    assert kernel.run(spawned) == "[2.0, 3.0]"
    kernel.run("from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor")
    assert kernel.run("with ThreadPoolExecutor() as pool: print(list(pool.map(double, range(3))))") == "[0, 2, 4]"
    assert kernel.run("with ProcessPoolExecutor(1) as pool: print(list(pool.map(math.sqrt, [4.0])))") == "[2.0]"


def test_shell_and_system(kernel):
    assert kernel.run("!echo hello") == "hello"
    assert kernel.run("%%bash\necho $((6 * 7))") == "42"


def test_await_and_history(kernel):
    assert kernel.run("import asyncio\nawait asyncio.sleep(0, 'awaited')") == "'awaited'"
    assert "awaited" in kernel.run("%history")


async def ask(kernel: Kernel, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """A request on the control channel, and what it was answered."""
    client = kernel._client
    message = client.session.msg(kind, content)
    client.control_channel.send(message)
    while True:
        reply = await client.control_channel.get_msg()
        if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
            return reply["content"]


def control(kernel: Kernel, kind: str, **content: Any) -> dict[str, Any]:
    return kernel._runner.run(asyncio.wait_for(ask(kernel, kind, content), 40))


def debug(kernel: Kernel, command: str, **arguments: Any) -> dict[str, Any]:
    debug.number += 1
    return control(kernel, "debug_request", type="request", seq=debug.number, command=command, arguments=arguments)


debug.number = 0


def test_the_debugger_attaches_and_stops_at_a_breakpoint(kernel):
    code = "def f(x):\n    y = 2 * x\n    return y\nresult = f(21)"
    assert debug(kernel, "initialize", clientID="test", adapterID="", pathFormat="path")["success"]
    assert debug(kernel, "attach")["success"]
    path = debug(kernel, "dumpCell", code=code)["body"]["sourcePath"]
    placed = debug(kernel, "setBreakpoints", source={"path": path}, breakpoints=[{"line": 3}], sourceModified=False)
    assert placed["body"]["breakpoints"][0]["verified"]
    assert debug(kernel, "configurationDone")["success"]
    cell = kernel.begin(code)

    async def until_it_stops() -> int:
        while True:
            message = await kernel._client.get_iopub_msg()
            if message["msg_type"] == "debug_event" and message["content"]["event"] == "stopped":
                return message["content"]["body"]["threadId"]

    thread = kernel._runner.run(asyncio.wait_for(until_it_stops(), 40))
    frame = debug(kernel, "stackTrace", threadId=thread)["body"]["stackFrames"][0]
    assert frame["line"] == 3
    seen = debug(kernel, "evaluate", expression="y", frameId=frame["id"], context="watch")
    assert seen["body"]["result"] == "42"
    debug(kernel, "continue", threadId=thread)
    assert not kernel.finish(cell).error
    assert debug(kernel, "disconnect", restart=False, terminateDebuggee=False)["success"]
    assert kernel.run("result") == "42"


def test_the_post_mortem_debugger(kernel):
    assert kernel.try_run("def g(x):\n    return 1 / x\ng(0)").error.startswith("ZeroDivisionError")

    async def converse() -> str:
        client, shown = kernel._client, ""
        cell = client.execute("%debug", allow_stdin=True)
        for line in ("p x + 41", "q"):
            await client.get_stdin_msg()
            client.input(line)
        while True:
            message = await client.get_iopub_msg()
            if message["parent_header"].get("msg_id") != cell:
                continue
            if message["msg_type"] == "stream":
                shown += message["content"]["text"]
            if message["content"].get("execution_state") == "idle":
                return shown

    assert "41" in kernel._runner.run(asyncio.wait_for(converse(), 40))


def test_subshells(kernel):
    if "subshell" not in kernel.run("' '.join(get_ipython().kernel.kernel_info.get('supported_features', []))"):
        pytest.fail("this ipykernel has no subshells; the newest has")
    subshell = control(kernel, "create_subshell_request")["subshell_id"]
    kernel.run("import threading; freed = threading.Event()")
    waiting = kernel.begin("freed.wait(30)")
    client = kernel._client
    message = client.session.msg("execute_request", {"code": "freed.set()", "silent": False})
    message["header"]["subshell_id"] = subshell
    client.shell_channel.send(message)
    assert kernel.finish(waiting, 30).results == ["True"]
    assert control(kernel, "delete_subshell_request", subshell_id=subshell)["status"] == "ok"


def test_a_completion_and_an_inspection(kernel):
    async def ask_shell(send: str, *arguments: Any) -> dict[str, Any]:
        asked = getattr(kernel._client, send)(*arguments)
        while True:
            reply = await kernel._client.get_shell_msg()
            if reply["parent_header"].get("msg_id") == asked:
                return reply["content"]

    kernel.run("import torch")
    found = kernel._runner.run(asyncio.wait_for(ask_shell("complete", "torch.zer", 9), 40))
    assert any(match.endswith("zeros") for match in found["matches"])
    assert kernel._runner.run(asyncio.wait_for(ask_shell("inspect", "torch.zeros", 8), 40))["found"]
