"""Zygotes for tests: a folder of kernelspecs, a runtime directory with a zygote in it, and a look at what it has forked."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from nbcache.jupyter.kernelspec import (
    DISPLAY_NAME,
    FOR_DEBUGGERS,
    NAME,
    ZygoteState,
    argv_of_this_interpreter,
    end_zygotes,
    examine,
)
from tests.support.kernels import PATIENCE_S, Kernel
from tests.support.waiting import eventually


def write_specs(folder: Path) -> Path:
    """Ours, as ``nbcache kernelspec install`` writes it; an ordinary kernel with our magics; and Python's own."""
    stock = [sys.executable, *FOR_DEBUGGERS, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    argvs = {"nbcache": argv_of_this_interpreter(), "ordinary": [*stock, "--ext=nbcache"], "stock": stock}
    for name, argv in argvs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        display_name = DISPLAY_NAME if name == NAME else name
        document = {"argv": argv, "display_name": display_name, "language": "python", "metadata": {"debugger": True}}
        (folder / name / "kernel.json").write_text(json.dumps(document))
    return folder


def installed(site: Path, name: str, source: str) -> None:
    """Put a module into a folder of installed packages."""
    (site / f"{name}.py").write_text(source)


@contextmanager
def zygote_environment(folder: Path, **settings: str) -> Iterator[dict[str, str]]:
    """The environment whose kernels meet a zygote of the test's own. Every process of it is gone at the end."""
    chosen = {
        "NBCACHE_RUNTIME_DIR": str(folder / "runtime"),
        "NBCACHE_ZYGOTE_IDLE_S": "600",
        "NBCACHE_LAUNCHER_LOG": "1",
        **settings,
    }
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield chosen
    finally:
        eventually(lambda: _all_ended(folder), timeout_s=60)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _all_ended(folder: Path) -> bool:
    """End the zygotes that listen; whether there are no others, which may have only begun."""
    end_zygotes()
    return not processes_of(folder)


def processes_of(folder: Path) -> list[str]:
    """Zygotes, and what they have forked, of a runtime directory below ``folder``. Not its daemon."""
    found = []
    for process in psutil.process_iter(["pid"]):
        try:
            words = " ".join(process.cmdline())
            if "nbcache.jupyter.zygote" in words and process.cwd().startswith(str(folder)):
                found.append(f"{process.pid} {words}")
        except psutil.Error:
            continue
    return found


def start_zygote(specs: Path, spec: str = "nbcache") -> ZygoteState:
    """Start an ordinary kernel, whose launcher starts a zygote, and wait until that is ready."""
    with Kernel(spec, specs):
        return zygote()


def zygote() -> ZygoteState:
    """The zygote that listens, once it has a process waiting."""

    def ready() -> ZygoteState | None:
        state = examine()
        assert not state.failures, state.failures
        return next((each for each in state.zygotes if each.ready), None)

    return eventually(ready, PATIENCE_S)


def kernel_pid(kernel: Kernel) -> int:
    """The process that runs the cells."""
    return int(kernel.run("__import__('os').getpid()"))


def is_forked(kernel: Kernel) -> bool:
    """Whether a kernel was forked by a zygote; an ordinary one is the process that Jupyter started."""
    return kernel_pid(kernel) != kernel.pid


def is_gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill(pid: int) -> None:
    """End a process with SIGKILL, and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: is_gone(pid))
