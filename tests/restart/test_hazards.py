"""What may befall a forked kernel, its launcher, its zygote or Jupyter: a working kernel or a clean exit, and nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nbcache.jupyter import handover
from nbcache.jupyter.kernelspec import FOR_DEBUGGERS, examine
from tests.support.kernels import REPOSITORY, Kernel
from tests.support.waiting import eventually
from tests.support.zygotes import is_forked, is_gone, kernel_pid, kill, zygote

SLEEP = "import time\nprint('begun')\ntime.sleep(600)"  # unflushed: it arrives once the sleep has long begun


def begin_and_wait(kernel: Kernel, code: str) -> str:
    """Send a cell, and return once what it printed has arrived.

    It must not flush: an interrupt in the midst of that can leave a lock of the kernel's stream taken for good.
    """

    async def until_it_prints() -> None:
        while (await kernel._client.get_iopub_msg())["msg_type"] != "stream":
            pass

    cell = kernel.begin(code)
    kernel._runner.run(asyncio.wait_for(until_it_prints(), 30))
    return cell


def test_a_kernel_is_forked_and_restarted(kernel):
    first = kernel_pid(kernel)
    assert is_forked(kernel)
    kernel.restart()
    assert is_forked(kernel)
    assert kernel_pid(kernel) != first
    assert is_gone(first)
    assert kernel.run("import torch; float(torch.ones(3).sum())") == "3.0"


def test_an_interrupt_stops_the_cell_alone(kernel):
    pid = kernel_pid(kernel)
    cell = begin_and_wait(kernel, SLEEP)
    kernel.interrupt()
    assert kernel.finish(cell).error.startswith("KeyboardInterrupt")
    assert kernel_pid(kernel) == pid


def test_an_interrupt_before_there_is_a_cell_is_for_nobody(kernel):
    def listens() -> bool:
        caught = next(line for line in Path(f"/proc/{kernel.pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGWINCH - 1) & 1)  # the last that the launcher takes care of

    for _ in range(5):
        kernel._runner.run(kernel._kernel.restart_kernel())
        eventually(listens)
        kernel._process.send_signal(signal.SIGINT)
        kernel._runner.run(kernel._connect())
        assert is_forked(kernel)


def test_an_interrupt_is_not_lost_while_the_zygote_is_busy(start):
    kernel = start(slow="import os, time\nos.register_at_fork(after_in_parent=lambda: time.sleep(1))")
    for _ in range(2):
        cell = begin_and_wait(kernel, SLEEP)  # the zygote forks the next process meanwhile
        kernel.interrupt()
        assert kernel.finish(cell).error.startswith("KeyboardInterrupt")
        kernel.restart()


STARTS_A_PROGRAM = """
import subprocess
program = subprocess.Popen(["sleep", "600"])
print("begun")
program.wait()
"""


def test_an_interrupt_reaches_what_a_cell_has_started(kernel):
    cell = begin_and_wait(kernel, STARTS_A_PROGRAM)
    kernel.interrupt()
    assert kernel.finish(cell).error.startswith("KeyboardInterrupt")
    sleeper = int(kernel.run("program.pid"))  # how it ended, the kernel may not know: an interrupted wait can lose that
    eventually(lambda: is_gone(sleeper))


def test_a_killed_launcher_takes_its_kernel_along(kernel):
    pid = kernel_pid(kernel)
    sleeper = int(kernel.run("import subprocess; subprocess.Popen(['sleep', '600']).pid"))
    kernel.kill()
    eventually(lambda: is_gone(pid) and is_gone(sleeper))
    kernel.restart()  # on the same ports
    assert is_forked(kernel)
    assert kernel.run("6 * 7") == "42"


def test_a_restart_without_mercy_waits_for_the_ports(kernel):
    for _ in range(3):
        pid = kernel_pid(kernel)
        kernel._runner.run(kernel._kernel.restart_kernel(now=True))
        kernel._runner.run(kernel._connect())
        assert is_forked(kernel)
        assert is_gone(pid)


def test_two_restarts_within_a_second(kernel):
    async def twice() -> None:
        await kernel._kernel.restart_kernel()
        await kernel._kernel.restart_kernel()
        await kernel._connect()

    for _ in range(2):
        pid = kernel_pid(kernel)
        kernel._runner.run(twice())
        assert kernel.run("6 * 7") == "42"
        assert is_gone(pid)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import os; os._exit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            -signal.SIGSEGV,
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
            -signal.SIGTERM,
        ),
    ],
)
def test_a_launcher_ends_as_its_kernel_did(kernel, code, status):
    process = kernel._process
    kernel.begin(code)
    assert process.wait(20) == status
    kernel.restart()
    assert is_forked(kernel)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1])
def test_a_signal_to_the_launcher_is_one_to_the_kernel(kernel, number):
    pid, process = kernel_pid(kernel), kernel._process
    kernel.run("import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))")
    process.send_signal(number)
    assert process.wait(20) == -number
    assert is_gone(pid)


def test_a_signal_that_the_kernel_handles_is_its_own(kernel):
    kernel.run("import signal; seen = []; signal.signal(signal.SIGUSR1, lambda *a: seen.append(a[0]))")
    kernel._process.send_signal(signal.SIGUSR1)
    eventually(lambda: kernel.run("len(seen)") == "1")


def test_exit_hooks_run_and_output_is_flushed(kernel, tmp_path):
    """In an interpreter's order: threads end, hooks run, what C libraries have buffered is written."""
    kernel.run(
        f"""
import atexit, ctypes, threading, time
log = open({str(tmp_path / "log")!r}, "w")
def late():
    threading.main_thread().join()  # it ends when the interpreter does
    log.write("thread ")
def hook():
    log.write("hook ")
    log.close()
atexit.register(hook)
threading.Thread(target=late).start()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
stream = libc.fopen({str(tmp_path / "c")!r}.encode(), b"w")
libc.fputs(b"from C", ctypes.c_void_p(stream))
"""
    )
    kernel.restart()
    assert (tmp_path / "log").read_text() == "thread hook "
    assert (tmp_path / "c").read_text() == "from C"


def test_files_that_are_open_when_a_kernel_leaves_are_written(kernel, tmp_path):
    """Held by a module, by a function, by a variable; as an interpreter writes them when it tears everything down."""
    (tmp_path / "holds.py").write_text(f"import gzip\nheld = open({str(tmp_path / 'module')!r}, 'w')\nheld.write('module')\n")
    kernel.run(
        f"""
import sys, gzip
sys.path.insert(0, {str(tmp_path)!r})
import holds
def write(text, file=open({str(tmp_path / "function")!r}, "wb")):
    file.write(text)
write(b"function")
zipped = gzip.open({str(tmp_path / "zipped")!r}, "wt")
zipped.write("zipped")
"""
    )
    kernel.restart()
    assert (tmp_path / "module").read_text() == "module"
    assert (tmp_path / "function").read_text() == "function"
    assert gzip.decompress((tmp_path / "zipped").read_bytes()) == b"zipped"


STACK_OF_A_THREAD = """
import ctypes, threading
def size():
    library, attributes, found, base = ctypes.CDLL(None), ctypes.create_string_buffer(128), ctypes.c_size_t(), ctypes.c_void_p()
    library.pthread_self.restype = ctypes.c_ulong
    library.pthread_getattr_np(ctypes.c_ulong(library.pthread_self()), attributes)
    library.pthread_attr_getstack(attributes, ctypes.byref(base), ctypes.byref(found))
    sizes.append(found.value >> 20)
sizes = []
thread = threading.Thread(target=size)
thread.start()
thread.join()
sizes[0]
"""


def test_the_stack_of_threads_is_the_launchers(warm, specs, monkeypatch):
    """glibc reads the limit when a process starts, which for a forked one was long ago."""
    limits = resource.getrlimit(resource.RLIMIT_STACK)
    found = []
    for size in (48 << 20, limits[0]):
        resource.setrlimit(resource.RLIMIT_STACK, (size, limits[1]))
        try:
            for spec in ("nbcache", "stock"):
                with Kernel(spec, specs) as kernel:
                    assert is_forked(kernel) is (spec == "nbcache")
                    found.append(kernel.run(STACK_OF_A_THREAD))
        finally:
            resource.setrlimit(resource.RLIMIT_STACK, limits)
    assert found[0] == found[1] == "48"
    assert found[2] == found[3]


def test_a_kernel_outlives_its_zygote(kernel, specs):
    pid = kernel_pid(kernel)
    kernel.run("kept = 42")
    kill(zygote().pid)
    assert kernel.run("kept") == "42"
    cell = begin_and_wait(kernel, SLEEP)
    kernel.interrupt()
    assert kernel.finish(cell).error.startswith("KeyboardInterrupt")
    kernel.restart()  # an ordinary one, at once
    assert is_gone(pid)
    assert not is_forked(kernel)
    zygote()
    kernel.restart()
    assert is_forked(kernel)


def test_how_a_kernel_ends_that_has_outlived_its_zygote_is_not_known_as_the_guide_says(kernel):
    process = kernel._process
    kill(zygote().pid)
    kernel.begin("import os; os._exit(7)")
    assert process.wait(20) == 0
    told = " ".join((REPOSITORY / "nbcache" / "guide" / "restarts.md").read_text().split())
    assert "how one of them ends, nobody learns then: Jupyter is told exit status 0" in told
    kernel.restart()
    zygote()


def test_a_kernel_does_not_outlive_both(kernel):
    pid = kernel_pid(kernel)
    kill(zygote().pid)
    assert not is_gone(pid)
    kernel.kill()
    eventually(lambda: is_gone(pid))
    kernel.restart()
    zygote()


def test_a_zygote_that_hangs_costs_seconds_not_a_kernel(kernel, specs):
    hanging = zygote().pid
    os.kill(hanging, signal.SIGSTOP)
    try:
        with Kernel("nbcache", specs) as other:
            assert not is_forked(other)
            assert other.run("6 * 7") == "42"
    finally:
        os.kill(hanging, signal.SIGCONT)
    assert kernel.run("6 * 7") == "42"
    eventually(lambda: zygote().pid != hanging, 30)


SERVER = """
import sys, time
from pathlib import Path
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
manager = KernelManager(kernel_name="nbcache", kernel_spec_manager=KernelSpecManager(kernel_dirs=[sys.argv[1]]))
manager.start_kernel()
client = manager.blocking_client()
client.start_channels()
client.wait_for_ready(timeout=60)
reply = client.execute_interactive("import os", user_expressions={"pid": "os.getpid()"}, output_hook=lambda _: None)
print(reply["content"]["user_expressions"]["pid"]["data"]["text/plain"], manager.provisioner.process.pid, flush=True)
time.sleep(600)
"""


def test_a_killed_server_leaves_no_kernel(warm, specs):
    zygote()
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(specs)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=REPOSITORY
    ) as server:
        assert server.stdout is not None
        kernel, launcher = map(int, server.stdout.readline().split())
        assert kernel != launcher
        server.kill()
    eventually(lambda: is_gone(kernel) and is_gone(launcher))
    eventually(lambda: zygote().kernels == 0)


def test_garbage_does_not_harm_a_zygote(kernel):
    path = next(Path(handover.zygote_folder()).glob("*.sock"))
    for packets in ([b"go"], [b"signal 9"], [b"nonsense"], [b"request"], [b"request", b"request"], []):
        with handover.connect(str(path)) as connection, contextlib.suppress(ConnectionError):  # it may hang up at once
            for packet in packets:
                connection.send(packet)
    with handover.connect(str(path)) as connection, open("/dev/null") as nothing:
        connection.settimeout(10)
        import socket

        socket.send_fds(connection, [b"request"], [nothing.fileno()])
        assert handover.receive(connection)[0].startswith(handover.REFUSED)
    assert kernel.run("6 * 7") == "42"
    kernel.restart()
    assert is_forked(kernel)


def test_a_launcher_that_leaves_before_it_says_go_has_started_nothing(kernel):
    before = zygote()
    request = handover.describe([*FOR_DEBUGGERS], ["-f", "x"], [0, 1, 2], [])
    path = next(Path(handover.zygote_folder()).glob("*.sock"))
    with handover.connect(str(path)) as connection:
        connection.settimeout(10)
        handover.send_request(connection, request)
        assert handover.receive(connection)[0] == handover.ACCEPTED
    eventually(lambda: zygote().kernels == before.kernels)
    assert examine().failures == ()
