"""A kernel that opens its ports before its peers expect it: what it tells them arrives; what was not for it is not obeyed."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from nbcache.bench.clients import RestClient
from tests.restart.test_server import WHO, jupyter_path, state_after, who, with_server  # noqa: F401
from tests.support.kernels import Kernel
from tests.support.waiting import eventually
from tests.support.zygotes import is_forked, zygote

TIMES = 10
"""Each of these was lost in one to eight of ten restarts, while kernels did not mind their peers."""


def restart_under(kernel: Kernel) -> None:
    """Restart a kernel without a word to the client, which stays connected, or is not yet again."""
    kernel._runner.run(kernel._kernel.restart_kernel())


def message_of(kernel: Kernel, get: Callable[..., Any], kind: str) -> dict[str, Any]:
    """The next message of a kind on a channel."""

    async def next_of_kind() -> dict[str, Any]:
        while (message := await get())["msg_type"] != kind:
            pass
        return message

    return kernel._runner.run(asyncio.wait_for(next_of_kind(), 20))


def test_what_a_cell_shows_reaches_a_client_that_was_there_before(kernel):
    for number in range(TIMES):
        restart_under(kernel)
        cell = kernel.begin(f"print('before'); {number}")
        outcome = kernel.finish(cell, 20)
        assert (outcome.stdout, outcome.results) == ("before\n", [str(number)])
        assert is_forked(kernel)


def test_a_question_reaches_a_client_that_was_there_before(kernel):
    client = kernel._client
    for number in range(TIMES):
        restart_under(kernel)
        cell = kernel.begin("input('which? ')")
        assert message_of(kernel, client.get_stdin_msg, "input_request")["content"]["prompt"] == "which? "
        client.input(str(number))
        assert kernel.finish(cell, 20).results == [repr(str(number))]


def test_what_a_forked_process_shows_at_once(kernel):
    code = "import os, time\nif not os.fork():\n    print('from below', flush=True)\n    os._exit(0)\ntime.sleep(0.3)"
    for _ in range(3):
        restart_under(kernel)
        assert kernel.finish(kernel.begin(code), 20).stdout == "from below\n"


def test_a_kernel_that_ends_at_once_says_so(kernel):
    client = kernel._client
    for _ in range(3):
        restart_under(kernel)
        process = kernel._process
        client.shutdown(restart=True)
        assert message_of(kernel, client.get_iopub_msg, "shutdown_reply")["content"]["restart"] is True
        assert process.wait(20) == 0


def test_a_server_knows_how_a_kernel_is_that_crashed_when_it_was_busy(warm, jupyter_path):  # noqa: F811
    """Busy it would stay, if that a new one starts were lost. With Python's own kernel, it does in some of ten crashes."""

    async def known(client: RestClient) -> str:
        return (await client.ask("GET", f"kernels/{client.kernel}"))["execution_state"]

    async def crash(client: RestClient) -> None:
        pid, _ = await who(client)
        await client.send("import os, signal, time; time.sleep(0.2); os.kill(os.getpid(), signal.SIGKILL)")
        await state_after(client, "restarting")
        while await known(client) == "busy":
            await asyncio.sleep(0.05)
        assert (await client.run(WHO))[0] != pid
        while await known(client) != "idle":
            await asyncio.sleep(0.05)

    async def work(client: RestClient) -> None:
        zygote()
        await client.start("nbcache")
        for _ in range(3):
            await asyncio.wait_for(crash(client), 60)

    with_server(jupyter_path, work)


def test_a_restart_of_a_kernel_that_has_died(kernel):
    """Nobody is there to be asked to shut down; what was to be brought to it must not end the next kernel on its ports."""

    async def restart() -> None:
        await asyncio.sleep(0.3)  # until ZeroMQ knows that the kernel is gone, and holds back what it is to bring
        kernel._kernel._connect_control_socket()
        kernel._kernel._control_socket.linger = 2000  # 100 ms, else: enough in some restarts, not in all
        await kernel._kernel.restart_kernel()
        await kernel._connect()

    kernel.kill()
    for _ in range(3):
        kernel._runner.run(restart())
        assert is_forked(kernel)
        log_lines(kernel)
        kernel.kill()


def log_lines(kernel: Kernel) -> None:
    """Have the kernel collect its own log in ``lines``."""
    kernel.run(
        "import logging\nlines = []\n"
        "class Lines(logging.Handler):\n    def emit(self, record): lines.append(record.getMessage())\n"
        "log = get_ipython().kernel.log\nlog.setLevel('INFO')\nlog.addHandler(Lines())"
    )


def test_a_request_to_shut_down_made_before_the_kernel_was(kernel):
    def ask(age_s: float) -> None:
        request = session.msg("shutdown_request", {"restart": True})
        request["header"]["date"] -= timedelta(seconds=age_s)
        session.send(client.control_channel.socket, request)

    client, session, process = kernel._client, kernel._client.session, kernel._process
    log_lines(kernel)
    ask(age_s=60)
    eventually(lambda: "Disregarded" in kernel.run("lines"))
    assert process.poll() is None
    ask(age_s=0)
    assert process.wait(20) == 0


def test_ipykernels_classes_are_as_they_were(kernel):
    names = ["init_poller", "init_iopub", "init_heartbeat", "init_kernel"]
    look = f"from ipykernel.kernelapp import IPKernelApp as App\n[vars(App)[name].__qualname__ for name in {names}]"
    assert ast.literal_eval(kernel.run(look)) == [f"IPKernelApp.{name}" for name in names]
    eventually(lambda: kernel.run("'_really_send' in vars(get_ipython().kernel.iopub_thread)") == "False")
