"""When a kernel is forked, and when it is not: whatever stands in the way of it, there is a kernel, and never an error."""

from __future__ import annotations

import contextlib
import inspect
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbcache.jupyter import handover, launcher
from nbcache.jupyter.deferred import is_deferred
from nbcache.jupyter.experience import Experience, recall, revise
from nbcache.jupyter.installed import InstalledOnly, Snapshot, installed_folders, shadowed
from nbcache.jupyter.kernelspec import end_zygotes, examine
from nbcache.jupyter.preload import leave_out, wanted, weigh
from nbcache.jupyter.zygote import Obituary
from tests.support.kernels import PATIENCE_S, REPOSITORY, Kernel
from tests.support.waiting import eventually
from tests.support.zygotes import installed, is_forked, processes_of, start_zygote, zygote

WERE_AHEAD = "from nbcache.jupyter.veil import has_come_back; [has_come_back(name) for name in {names}]"
SLEEP = "import time\ntime.sleep(0.3)\n"
AT_IMPORT = [
    "PYTHONPATH", "LD_LIBRARY_PATH", "HF_HOME", "OMP_NUM_THREADS", "LC_ALL", "TZ", "CUDA_HOME", "PATH", "TMP",
    "SKLEARN_ASSUME_FINITE", "TQDM_DISABLE", "MATPLOTLIBRC", "NLTK_DATA", "PYDEVD_USE_CYTHON", "DEBUGPY_LOG_DIR",
    "PYTENSOR_FLAGS", "MODIN_ENGINE", "DGLBACKEND", "PYOPENGL_PLATFORM", "MUJOCO_GL", "KERAS_BACKEND", "ATEN_CPU_CAPABILITY",
    "PLOTLY_RENDERER", "MPMATH_NOGMPY", "AOTINDUCTOR_REPRO_LEVEL", "ONEDNN_VERBOSE", "PYZMQ_BACKEND", "COVERAGE_PROCESS_START",
    "COV_CORE_SOURCE",
]  # fmt: skip
NOT_AT_IMPORT = [
    "CUDA_VISIBLE_DEVICES",
    "DEBUGPY_ADAPTER_ENDPOINTS",
    "JPY_PARENT_PID",
    "JPY_SESSION_NAME",
    "OPENAI_API_KEY",
    "PWD",
]


def test_what_was_learned_is_imported_ahead_and_what_breaks_forks_is_left_out(environment, own_specs):
    installed(environment, "slow_one", SLEEP)
    installed(environment, "slow_two", SLEEP)
    installed(environment, "quick_one", "value = 1")
    installed(
        environment,
        "threads",
        "import threading, time\ntime.sleep(0.3)\nthreading.Thread(target=time.sleep, args=(9,)).start()",
    )
    installed(environment, "computes", f"{SLEEP}import torch\n(torch.ones(1 << 22) + 1).sum()")
    with Kernel("nbcache", own_specs) as kernel:
        zygote()
        kernel.run("import slow_one, quick_one, threads, computes")
        assert set(recall().candidates) >= {"slow_one", "quick_one", "threads", "computes"}
        eventually(lambda: not recall().candidates, 100)
        known = recall()
        assert set(known.learned) >= {"slow_one"}
        assert {"quick_one"} <= set(known.quick)
        assert "starts threads" in known.broken["threads"]
        assert "computes" in known.broken
        eventually(lambda: any("slow_one" in each.preloaded for each in examine().zygotes), 60)
        state = examine()
        assert state.learned["slow_one"] >= 0.2
        assert not state.failures
        kernel.restart()
        assert is_forked(kernel)
        kernel.run("import slow_one, threads, computes, torch")
        assert kernel.run(WERE_AHEAD.format(names=("slow_one", "threads", "computes"))) == "[True, False, False]"
        assert kernel.run("float((torch.ones(1 << 22) + 1).sum())") == str(float(2 << 22))


def test_what_stands_on_a_package_that_starts_threads_is_imported_ahead_all_the_same(environment, own_specs):
    start = "threading.Thread(target=time.sleep, args=(9,), name='of threads').start()"
    installed(environment, "threads", f"import threading, time\n{start}\nvalue = 42")
    installed(environment, "above", f"{SLEEP}import threads\ndef value():\n    return threads.value")
    installed(environment, "uses", f"{SLEEP}import threads\nvalue = threads.value")
    with Kernel("nbcache", own_specs) as kernel:
        zygote()
        kernel.run("import above, uses")
        eventually(lambda: not recall().candidates and "above" in recall().learned, 100)
        known = recall()
        assert set(known.broken) == {"threads", "uses"}
        eventually(lambda: any("above" in each.preloaded for each in examine().zygotes), 60)
        kernel.restart()
        assert is_forked(kernel)
        kernel.run("import inspect, threading, above")
        kernel.run("def count(): return [thread.name for thread in threading.enumerate()].count('of threads')")
        assert kernel.run("import sys; [n in sys.modules for n in ('above', 'threads', 'uses')]") == "[True, True, False]"
        kernel.run("inspect.getmodule(inspect.currentframe()); assert not count()")
        assert kernel.run("import above; above.value(), count()") == "(42, 1)"
        assert kernel.run("import uses; uses.value, count()") == "(42, 1)"


def test_a_thread_that_nobody_misses_after_a_fork_is_none(environment, own_specs):
    """Made as pyarrow's allocator makes its own: not by Python's threading, and with this name."""
    thread = "open('/proc/thread-self/comm', 'w').write('jemalloc_bg_thd'); started.release(); time.sleep(99)"
    installed(
        environment,
        "allocates",
        f"{SLEEP}import _thread\nstarted = _thread.allocate_lock()\nstarted.acquire()\n"
        f"def work():\n    {thread}\n_thread.start_new_thread(work, ())\nstarted.acquire()\n",
    )
    with Kernel("nbcache", own_specs) as kernel:
        zygote()
        kernel.run("import allocates")
        eventually(lambda: any("allocates" in each.preloaded for each in examine().zygotes), 100)
        assert not recall().broken
        kernel.restart()
        assert is_forked(kernel)


@pytest.mark.parametrize("source", ["import os\nos._exit(0)", "import os\nos.abort()"], ids=["exits", "crashes"])
def test_a_module_that_ends_the_zygote_is_left_out_after_the_second_time(environment, own_specs, monkeypatch, tmp_path, source):
    """The first time may be anybody's: a shutdown, somebody's kill."""
    monkeypatch.setenv("NBCACHE_PRELOAD", "fatal,fine")
    installed(environment, "fatal", source)
    installed(environment, "fine", "value = 1")

    def died(deaths: int) -> bool:
        notes = [file.read_text() for file in (tmp_path / "runtime" / "zygotes").glob("*.lock")]
        return notes == [f"fatal\n{deaths}"] and not processes_of(tmp_path)

    for deaths in (0, 1):
        with Kernel("nbcache", own_specs) as kernel:
            assert not is_forked(kernel)
            eventually(lambda deaths=deaths: died(deaths), 100)
            assert not recall().broken
    assert set(start_zygote(own_specs).preloaded) == {"torch", "fine"}
    assert list(recall().broken) == ["fatal"]
    assert "ends the process" in examine().broken["fatal"]
    with Kernel("nbcache", own_specs) as kernel:
        assert is_forked(kernel)


def test_an_import_that_does_not_end_ends_the_zygote(tmp_path):
    note = tmp_path / "lock"
    code = f"""
import os, time
from nbcache.jupyter import zygote
zygote.IMPORT_S = 1
zygote.Obituary(os.open({str(note)!r}, os.O_RDWR | os.O_CREAT)).begin("hangs")
time.sleep(60)
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], timeout=50, check=False).returncode == -signal.SIGALRM
    with note.open("r+b") as file:
        found = Obituary(file.fileno())
        assert (found.name, found.deaths) == ("hangs", 2)
        found.begin("another")
        assert Obituary(file.fileno()).deaths == 1
        found.end()
        assert (Obituary(file.fileno()).name, Obituary(file.fileno()).deaths) == ("", 0)


def test_a_driver_that_was_initialised_before_the_fork_is_noticed():
    """Where torch did not do it, and then finds no GPU in the child: the driver says why."""
    code = "import torch\nfrom nbcache.jupyter import proof\nproof._driver_status = lambda: 3\nprint(proof.probe())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=REPOSITORY)
    assert done.stdout == "the GPU was initialised before the fork\n", done.stderr


def test_an_empty_list_learns_nothing(environment, own_specs, monkeypatch):
    monkeypatch.setenv("NBCACHE_PRELOAD", "")
    installed(environment, "slow_one", SLEEP)
    with Kernel("nbcache", own_specs) as kernel:
        kernel.run("import slow_one")
        assert recall().candidates == []
        assert set(zygote().preloaded) == {"torch"}


def test_a_changed_file_a_new_installation_and_a_shadow_mean_an_ordinary_kernel(environment, own_specs, monkeypatch, tmp_path):
    monkeypatch.setenv("NBCACHE_PRELOAD", "slow_one")
    installed(environment, "slow_one", "value = 1")
    first = start_zygote(own_specs)
    with Kernel("nbcache", own_specs) as kernel:
        assert is_forked(kernel)
        assert kernel.run("import slow_one; slow_one.value") == "1"
        installed(environment, "slow_one", "value = 2  # longer")
        kernel.restart()
        assert not is_forked(kernel)
        assert kernel.run("import slow_one; slow_one.value") == "2"
        eventually(lambda: zygote().pid != first.pid)
        installed(environment, "another", "")
        kernel.restart()
        assert not is_forked(kernel)
        zygote()
        kernel.restart()
        assert is_forked(kernel)
        assert kernel.run("import slow_one; slow_one.value") == "2"
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    (notebooks / "slow_one.py").write_text("value = 'mine'")
    with Kernel("nbcache", own_specs) as kernel:
        kernel.restart_in(notebooks)
        assert not is_forked(kernel)
        assert kernel.run("import slow_one; slow_one.value") == "'mine'"


def test_another_environment_has_another_zygote_and_other_gpus_have_not(environment, own_specs, monkeypatch):
    monkeypatch.setenv("NBCACHE_PRELOAD", "")
    start_zygote(own_specs)
    with Kernel("nbcache", own_specs, OMP_NUM_THREADS="1") as kernel:
        assert not is_forked(kernel)
        assert kernel.run("import torch; torch.get_num_threads()") == "1"
    with Kernel("nbcache", own_specs, CUDA_VISIBLE_DEVICES="3") as kernel:
        assert is_forked(kernel)
        assert kernel.run("import os; os.environ['CUDA_VISIBLE_DEVICES']") == "'3'"
    eventually(lambda: len(examine().zygotes) == 2, 60)


def test_a_zygote_that_cannot_serve_says_why_and_is_not_tried_again_at_once(environment, own_specs, monkeypatch):
    monkeypatch.setenv("NBCACHE_PRELOAD", "")
    (environment / "made_up-1.0.dist-info").rmdir()  # what lies here is not installed any more
    installed(environment, "jedi", "raise SystemExit('user code was imported')")
    with Kernel("nbcache", own_specs) as kernel:
        assert not is_forked(kernel)
        (failure,) = eventually(lambda: examine().failures, 60)
        assert "what is not installed" in failure
        assert str(environment / "jedi.py") in failure
    with Kernel("nbcache", own_specs) as kernel:
        assert not is_forked(kernel)
    assert examine().zygotes == ()


ASKS = """
import IPython
from IPython import get_ipython

def helper():
    return get_ipython()

shell, again = helper(), IPython.get_ipython()
"""


def test_what_asks_for_the_shell_when_it_is_imported_finds_it(environment, own_specs, monkeypatch):
    """As matplotlib's inline backend and ipywidgets do, to which nothing is shown else."""
    installed(environment, "asks", f"{SLEEP}{ASKS}")
    installed(environment, "stands_on_it", f"{SLEEP}import asks")
    monkeypatch.setenv("NBCACHE_PRELOAD", "asks,stands_on_it")
    start_zygote(own_specs)
    with Kernel("nbcache", own_specs) as kernel:
        assert is_forked(kernel)
        assert kernel.run("import sys, stands_on_it; [n in sys.modules for n in ('asks', 'stands_on_it')]") == "[True, True]"
        assert kernel.run(WERE_AHEAD.format(names=("asks", "stands_on_it"))) == "[False, True]"
        assert kernel.run("import asks; asks.shell is asks.again is get_ipython() is not None") == "True"
        assert kernel.run("import IPython; IPython.get_ipython() is asks.shell") == "True"


ASKS_WHERE = """
import functools, sys

@functools.lru_cache
def is_in_notebook():
    shell = sys.modules["IPython"].get_ipython()
    return "IPKernelApp" in shell.config and shell.__class__.__name__ == "ZMQInteractiveShell"

answer = is_in_notebook()
"""


def test_what_asks_only_whether_it_is_in_a_notebook_is_told_so_ahead(environment, own_specs, monkeypatch):
    """As transformers and tqdm do, for the progress they show; others take over what they chose."""
    installed(environment, "where", ASKS_WHERE)
    installed(environment, "hooks", "import IPython\nshell = IPython.get_ipython()\nif shell is not None:\n"
        "    shell.events.register('post_run_cell', bool)\n    del shell\nanswer = 1")  # fmt: skip
    installed(environment, "stands_on_it", "from where import answer, is_in_notebook\nimport hooks")
    monkeypatch.setenv("NBCACHE_PRELOAD", "where,hooks,stands_on_it")
    start_zygote(own_specs)
    with Kernel("nbcache", own_specs) as kernel:
        assert is_forked(kernel)
        assert kernel.run("import stands_on_it, hooks, where; where.answer, where.is_in_notebook()") == "(True, True)"
        assert kernel.run(WERE_AHEAD.format(names=("where", "stands_on_it", "hooks"))) == "[True, True, False]"
        assert kernel.run("bool in get_ipython().events.callbacks['post_run_cell']").startswith("True")


def test_a_module_that_ends_the_process_when_it_is_imported_is_left_out(environment, own_specs, monkeypatch):
    installed(environment, "leaves", "raise SystemExit(3)")
    installed(environment, "gives_up", "raise KeyboardInterrupt")
    monkeypatch.setenv("NBCACHE_PRELOAD", "leaves,gives_up")
    assert not {"leaves", "gives_up"} & set(start_zygote(own_specs).preloaded)


def test_a_configuration_file_switches_it_off_too(environment, own_specs, monkeypatch, tmp_path):
    monkeypatch.delenv("NBCACHE_ZYGOTE_IDLE_S")
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "config"))
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "jupyter_nbcache_config.py").write_text("c.NBCache.zygote_idle_s = 0")
    with Kernel("nbcache", own_specs) as kernel:
        eventually(lambda: not processes_of(tmp_path), 30)
        kernel.restart()
        assert not is_forked(kernel)
        eventually(lambda: not processes_of(tmp_path), 30)
    assert examine().zygotes == ()


def test_a_configuration_file_that_is_written_later_counts_from_the_next_start_on(
    environment, own_specs, monkeypatch, tmp_path
):
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "config"))
    (tmp_path / "config").mkdir()
    installed(environment, "chosen", "value = 1")
    first = start_zygote(own_specs)
    (tmp_path / "config" / "jupyter_nbcache_config.py").write_text("c.NBCache.preload = ['chosen']")
    with Kernel("nbcache", own_specs) as kernel:
        assert not is_forked(kernel)
        eventually(lambda: [each.pid for each in examine().zygotes if each.ready] not in ([], [first.pid]), 100)
        assert set(zygote().preloaded) == {"torch", "chosen"}
        kernel.restart()
        assert is_forked(kernel)


def test_no_zygote_takes_over_the_limits_of_a_confined_launcher(environment, own_specs, tmp_path):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    command = f"ulimit -n 200; exec {sys.executable} -c {shlex.quote(IS_CONFINED)}"
    confined, free = (subprocess.run(c, shell=True, capture_output=True, text=True).stdout for c in (command, command[15:]))
    assert confined == "True\n"
    assert free == f"{0 <= hard < launcher.LEAST_DESCRIPTORS}\n"


IS_CONFINED = "import sys; sys.argv = ['x']; from nbcache.jupyter import launcher; print(launcher._is_confined())"


def test_it_can_be_switched_off(environment, own_specs, monkeypatch, tmp_path):
    monkeypatch.setenv("NBCACHE_ZYGOTE_IDLE_S", "0")
    with Kernel("nbcache", own_specs) as kernel:
        kernel.restart()
        assert not is_forked(kernel)
    assert not processes_of(tmp_path)


def test_a_zygote_leaves_when_idle_but_not_its_kernels(environment, own_specs, monkeypatch, tmp_path):
    monkeypatch.setenv("NBCACHE_PRELOAD", "")
    monkeypatch.setenv("NBCACHE_ZYGOTE_IDLE_S", "1")
    start_zygote(own_specs)
    with Kernel("nbcache", own_specs) as kernel:
        assert is_forked(kernel)
        assert end_zygotes() == 1
        assert examine().zygotes == ()
        assert kernel.run("6 * 7") == "42"
        assert processes_of(tmp_path)
    eventually(lambda: not processes_of(tmp_path), 20)
    start_zygote(own_specs)
    eventually(lambda: not processes_of(tmp_path), 30)


def test_a_directory_that_others_may_write_to_is_not_trusted(environment, own_specs, monkeypatch):
    monkeypatch.setenv("NBCACHE_PRELOAD", "")
    start_zygote(own_specs)
    os.chmod(handover.zygote_folder(), 0o777)
    try:
        with Kernel("nbcache", own_specs) as kernel:
            assert not is_forked(kernel)
    finally:
        os.chmod(handover.zygote_folder(), 0o700)


def test_there_are_not_too_many_zygotes(runtime_dir, monkeypatch):
    """The sockets of killed ones do not count, and go."""
    folder = Path(handover.zygote_folder())
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o700)
    with contextlib.ExitStack() as stack:
        for number in range(launcher.MOST_ZYGOTES + 1):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            with handover.Address(str(folder / f"{number}.sock")) as address:
                listener.bind(address)
            if number:
                listener.listen()
        monkeypatch.setenv("NBCACHE_ZYGOTE_IDLE_S", "60")
        launcher.start_zygote(handover.Place(b"another"), [])
        assert sorted(path.name for path in folder.iterdir()) == [f"{n}.sock" for n in range(1, launcher.MOST_ZYGOTES + 1)]


# The parts


NURSERY = """
import os, signal, socket, sys
from nbcache.jupyter import handover, nursery, zygote
from nbcache.jupyter.preload import Preloaded

class Listener(socket.socket):
    def accept(self):
        {meanwhile}
        return super().accept()

place = handover.Place(b"", sys.argv[1])
listener = zygote._bind(place.socket)
nursery.Nursery(place, Listener(fileno=listener.detach()), b"", Preloaded(), 600.0).run()
"""


@pytest.mark.parametrize("meanwhile", ["os.kill(os.getpid(), signal.SIGTERM)", "raise OSError('no descriptors')"])
def test_a_zygote_that_takes_no_more_launchers_ends_in_good_order(tmp_path, meanwhile):
    """It would leave its kernels alone otherwise."""
    command = [sys.executable, "-c", NURSERY.format(meanwhile=meanwhile), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        visitor = eventually(lambda: handover.connect(handover.Place(b"", str(tmp_path)).socket), PATIENCE_S)
        with visitor:
            said, _ = process.communicate(timeout=PATIENCE_S)
    assert "no more kernels" in said
    assert process.returncode == 0
    assert not list(tmp_path.iterdir())


HEAVY = {
    "pathlib",
    "subprocess",
    "json",
    "logging",
    "inspect",
    "dataclasses",
    "asyncio",
    "hashlib",
    "tempfile",
    "threading",
    "typing",
    "re",
    "ast",
}


HOLDS_PORTS = """
import socket, sys, time

held = []
for port in map(int, sys.argv[1:]):
    while True:
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("127.0.0.1", port))
            holder.listen()
        except OSError:
            holder.close()
            time.sleep(0.002)
        else:
            held.append(holder)
            break
print("held", flush=True)
time.sleep(4)
"""


def test_an_ordinary_kernel_waits_for_the_ports_too(environment, own_specs, monkeypatch, tmp_path):
    """Whoever had them may be dying still: its memory takes a while to be given back."""
    monkeypatch.setenv("NBCACHE_ZYGOTE_IDLE_S", "0")
    with Kernel("nbcache", own_specs) as kernel:
        ports = [getattr(kernel._kernel, name) for name in ("shell_port", "hb_port")]
        with subprocess.Popen([sys.executable, "-c", HOLDS_PORTS, *map(str, ports)], stdout=subprocess.PIPE) as process:
            kernel.restart()
            assert kernel.run("6 * 7") == "42"
            assert process.stdout.readline() == b"held\n"


@pytest.mark.parametrize(
    "text", ["no json", "[]", '{"shell_port": "x", "hb_port": 70000, "ip": 5}', '{"shell_port": 70000}', "{}"]
)
def test_a_strange_connection_file_is_the_kernels_to_refuse(tmp_path, text):
    (tmp_path / "k.json").write_text(text)
    launcher.await_ports(["-f", str(tmp_path / "k.json")])
    launcher.await_ports([])


def test_a_launcher_imports_little():
    code = "import sys\nbefore = set(sys.modules)\nimport nbcache.jupyter.launcher\nprint(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    imported = set(run.stdout.split())
    assert "nbcache.jupyter.handover" in imported
    assert {name.partition(".")[0] for name in imported} <= {"nbcache", *sys.stdlib_module_names}
    assert not imported & HEAVY


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-f", "/a/k.json"], "/a/k.json"),
        (["-f", "k.json"], "/here/k.json"),
        (["--f=/a/k.json", "--ext=nbcache"], "/a/k.json"),
        (["-f=/a/k.json"], "/a/k.json"),
        (["--IPKernelApp.connection_file=/a/../b/k.json"], "/b/k.json"),
        (["--ext=nbcache"], ""),
        (["-f"], ""),
    ],
)
def test_connection_files_are_found(arguments, expected):
    assert handover.connection_file(arguments, "/here") == expected


@pytest.mark.parametrize(
    "text", [b"", b"1", b"()", b"{}", b"{'identity': b''}", b"{1: 2}", b"__import__('os')", b"\xff", b"(" * 1000]
)
def test_what_is_no_request_is_refused(text):
    with pytest.raises((ValueError, SyntaxError, MemoryError, RecursionError)):
        handover.Request.decode(text)


def test_a_request_survives_the_journey():
    request = handover.describe(["-X", "dev"], ["-f", "ü\udc80"], [0, 1, 2], [1])
    assert vars(handover.Request.decode(request.encode())) == vars(request)
    assert request.directory == os.getcwd()
    assert request.environment == dict(os.environb)


@pytest.mark.parametrize("name", AT_IMPORT)
def test_variables_that_are_read_at_import_are_part_of_the_identity(name, monkeypatch):
    before = handover.identity([])
    monkeypatch.setenv(name, "/other")
    assert handover.identity([]) != before


@pytest.mark.parametrize("name", NOT_AT_IMPORT)
def test_others_are_not(name, monkeypatch):
    before = handover.identity([])
    monkeypatch.setenv(name, "/other")
    assert handover.identity([]) == before


def test_what_is_not_installed_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "user_code_of_a_test.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path))
    guard = InstalledOnly(installed_folders())
    monkeypatch.setattr(sys, "meta_path", [guard, *sys.meta_path])
    with pytest.raises(ImportError, match="not installed"):
        __import__("user_code_of_a_test")
    assert len(guard.refused) == 1
    assert guard.find_spec("torch") is not None
    assert guard.find_spec("no_such_module_anywhere") is None


def test_a_shadow_is_seen(tmp_path):
    for name in ("data.csv", "torch.txt", "numpy"):
        (tmp_path / name).touch()
    (tmp_path / "pandas").mkdir()
    names = {"torch", "numpy", "pandas"}
    assert shadowed([str(tmp_path), "/no/such/folder"], names) is None
    (tmp_path / "pandas" / "__init__.py").touch()
    assert shadowed([str(tmp_path)], names) == str(tmp_path / "pandas")
    assert shadowed([str(tmp_path)], {"torch"}) is None
    (tmp_path / "torch.py").touch()
    assert shadowed([str(tmp_path)], {"torch"}) == str(tmp_path / "torch.py")


def test_a_snapshot_sees_a_changed_file(tmp_path, monkeypatch):
    module = tmp_path / "module_of_a_test.py"
    module.write_text("value = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("module_of_a_test")
    try:
        snapshot = Snapshot()
        assert snapshot.changed() is None
        module.write_text("value = 22")
        assert snapshot.changed() == str(module)
        assert Snapshot().changed() is None
        module.unlink()
        assert snapshot.changed() == str(module)
    finally:
        del sys.modules["module_of_a_test"]


def test_slow_packages_are_kept_whole_and_quick_ones_are_not_asked_again():
    known = Experience(candidates=["slow", "slow.part", "quick", "gone", "later"], broken={"bad": "why"})
    assert wanted(None, known) == ["slow", "slow.part", "quick", "gone", "later"]
    assert wanted(["a", "bad"], known) == ["a"]
    weigh(known, ["slow", "slow.part", "quick", "gone"], {"slow": 0.15, "slow.part": 0.06, "quick": 0.1})
    assert known.learned == {"slow": 0.15, "slow.part": 0.06}
    assert known.quick == ["quick", "gone"]
    assert known.candidates == ["later"]


def test_of_a_package_with_many_broken_modules_all_is_left_out():
    known = Experience(learned={"big": 1.0, "big.a": 1.0, "other": 1.0}, candidates=["big.b", "big.c", "other.d"])
    leave_out(known, "big.a", "why")
    assert known.learned == {"big": 1.0, "other": 1.0}
    leave_out(known, "big.b", "why")
    assert wanted(None, known) == ["big", "other", "big.c", "other.d"]
    leave_out(known, "big.c", "why")
    assert wanted(None, known) == ["other", "other.d"]
    assert known.is_broken("big.anything") and not known.is_broken("bigger")


@pytest.fixture
def deferred_package(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages" / "late"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import sys\nsys.late_runs = getattr(sys, 'late_runs', 0) + 1\nvalue = 7\n")
    (folder / "part.py").write_text("from late import value")
    monkeypatch.syspath_prepend(str(folder.parent))
    guard = InstalledOnly([str(folder.parent)], {"late"})
    monkeypatch.setattr(sys, "meta_path", [guard, *sys.meta_path])
    yield folder
    for name in ("late", "late.part"):
        sys.modules.pop(name, None)
    if hasattr(sys, "late_runs"):
        del sys.late_runs


@pytest.mark.parametrize(
    "use",
    ["late.value", "from late import value", "import late.part", "late.new = 1", "dir(late).index('value')", "late.__path__"],
)
def test_a_deferred_package_is_executed_by_its_first_use(deferred_package, use):
    late = __import__("late")
    assert is_deferred(late)
    assert late.__file__ == str(deferred_package / "__init__.py") and late.__name__ == "late"
    assert inspect.getmodule(inspect.currentframe()) is sys.modules[__name__]
    assert not hasattr(sys, "late_runs") and is_deferred(late)
    exec(use, {"late": late})
    assert sys.late_runs == 1 and not is_deferred(late)
    assert late.value == 7 and type(late) is type(sys) and late.__spec__.loader is late.__loader__
    __import__("late.part")
    assert sys.late_runs == 1 and late.part.value == 7


def test_a_deferred_package_that_fails_fails_at_each_use(deferred_package):
    (deferred_package / "__init__.py").write_text("import sys\nif sys.late_fails: raise ImportError('not now')\nvalue = 8\n")
    sys.late_fails = True
    try:
        late = __import__("late")
        for _ in range(2):
            with pytest.raises(ImportError, match="not now"):
                _ = late.value
        sys.late_fails = False
        assert late.value == 8
    finally:
        del sys.late_fails


def test_experience_is_kept_and_survives_garbage(runtime_dir):
    with revise() as known:
        known.learned["torch"] = 2.0
    assert recall().learned == {"torch": 2.0}
    next(runtime_dir.glob("imports-*.json")).write_bytes(b"{nonsense")
    assert recall() == Experience()
