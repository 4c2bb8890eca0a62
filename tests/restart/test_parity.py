"""A forked kernel beside an ordinary one, started the same way: everything that a kernel may assume is the same."""

from __future__ import annotations

import ast
import os
import re
import resource
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.kernels import Kernel
from tests.support.zygotes import is_forked, zygote

LOOK = """
import torch, numpy, multiprocess, multiprocessing  # what a zygote has imported, so that both have

def look():
    import builtins, faulthandler, gc, locale, logging, os, random, resource, signal, sys, tempfile, threading, warnings, time
    import subprocess

    def name(value):
        return getattr(value, "__qualname__", None) or repr(value)

    def stream(which):
        file = getattr(sys, f"__{which}__")
        return file and (type(file).__name__, file.name, file.mode, file.encoding, file.errors, file.newlines,
            file.line_buffering, file.write_through, file.fileno(), file.isatty(),
            os.readlink(f"/proc/self/fd/{file.fileno()}"))

    def inheritable():
        found = []
        for entry in os.listdir("/proc/self/fd"):
            try:
                if os.get_inheritable(int(entry)):
                    found.append((int(entry), os.readlink(f"/proc/self/fd/{entry}")))
            except OSError:
                pass
        return sorted(found)

    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    main = sys.modules["__main__"]
    child = subprocess.run([sys.executable, "-c", "import os, signal, sys\\nprint(os.environ, os.getcwd(), sys.path,"
        "[n for n in range(1, 32) if signal.getsignal(n) == signal.SIG_IGN], sorted(os.listdir('/proc/self/fd'))[:-1])"],
        capture_output=True, text=True).stdout
    return {
        "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "flags": str(sys.flags), "executable": sys.executable,
        "prefix": sys.prefix, "warnoptions": sys.warnoptions, "xoptions": sys._xoptions,
        "environment": dict(os.environ), "cwd": os.getcwd(),
        "umask": status["Umask"], "SigIgn": status["SigIgn"], "SigBlk": status["SigBlk"],
        "SigCgt": status["SigCgt"], "NoNewPrivs": status["NoNewPrivs"], "Groups": status["Groups"], "Uid": status["Uid"],
        "limits": {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT_")},
        "nice": os.getpriority(os.PRIO_PROCESS, 0), "affinity": sorted(os.sched_getaffinity(0)),
        "signals": {n: name(signal.getsignal(n)) for n in range(1, 65)},
        "stdin": stream("stdin"), "stdout": stream("stdout"), "stderr": stream("stderr"),
        "sys.stdout": type(sys.stdout).__name__, "sys.stdin": type(sys.stdin).__name__,
        "descriptors": inheritable(), "child": child,
        "main": (main.__name__, sorted(k for k in vars(main) if k.startswith("__")), repr(main.__spec__),
            getattr(main, "__file__", None)),
        "user names": sorted(get_ipython().user_ns_hidden),
        "main is user module": main is get_ipython().user_module,
        "warnings": sorted(repr((a, getattr(b, "pattern", b), c.__name__, getattr(d, "pattern", d), e))
            for a, b, c, d, e in warnings.filters),
        "locale": locale.setlocale(locale.LC_ALL), "encoding": (sys.getfilesystemencoding(), sys.getdefaultencoding()),
        "timezone": time.tzname,
        "faulthandler": (faulthandler.is_enabled(), name(faulthandler.enable)),
        "tempdir": tempfile.gettempdir(),
        "excepthook": name(sys.excepthook), "displayhook": type(sys.displayhook).__name__,
        "finders": [name(f).partition(" object at")[0] for f in sys.meta_path if type(f).__name__ != "Veil"],
        "hooks": [name(f) for f in sys.path_hooks],
        "packages": sorted({n.partition(".")[0] for n in sys.modules} - sys.stdlib_module_names),
        "gc": (gc.isenabled(), gc.get_threshold()), "recursion": sys.getrecursionlimit(), "switch": sys.getswitchinterval(),
        "root logger": [type(h).__name__ for h in logging.getLogger().handlers],
        "builtins": sorted(vars(builtins)),
        "main thread": (threading.current_thread() is threading.main_thread(), threading.main_thread().name),
        "threads": sorted(t.name.rstrip("0123456789-") for t in threading.enumerate()),
        "leader": (os.getpgrp() == os.getpid(), os.getsid(0) == os.getpid()),
        "multiprocessing": [(m.get_start_method(allow_none=True), m.current_process().name, m.parent_process(),
            m.process.ORIGINAL_DIR) for m in (multiprocessing, multiprocess)],
        "torch": (torch.get_num_threads(), torch.get_num_interop_threads(), str(torch.get_default_dtype()),
            torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.cuda.is_available()),
        "kernel": (type(get_ipython().kernel).__name__, type(get_ipython().kernel.parent).__name__,
            get_ipython().kernel.parent.parent_handle, sorted(get_ipython().magics_manager.magics["line"])),
    }

def draws():
    import os, random, tempfile, numpy, torch, uuid, multiprocessing, multiprocess
    return [random.random(), float(numpy.random.random()), float(torch.rand(1)), next(tempfile._get_candidate_names()),
        str(uuid.uuid4()), bytes(multiprocessing.current_process().authkey), bytes(multiprocess.current_process().authkey)]
"""

DIFFERENT = {"threads", "packages"}
"""Compared apart."""
PASSED = 77
"""The number of a descriptor that a kernel is given beside the standard streams."""


def start_as(stack: ExitStack, spec: str, specs: Path, folder: Path) -> Kernel:
    """A kernel in a directory of its own, with an environment, limits, a umask, a niceness and ignored signals of its own."""

    def be_special() -> None:
        os.umask(0o027)
        os.nice(3)
        resource.setrlimit(resource.RLIMIT_NOFILE, (700, 800))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    kernel = Kernel(spec, specs, SOMETHING="ün\udc80 valué", CUDA_VISIBLE_DEVICES="7", EMPTY="")
    stack.callback(kernel.close)
    options = {"cwd": str(folder), "preexec_fn": be_special, "pass_fds": [PASSED], "stdout": writing, "stderr": writing}
    try:
        kernel._runner.run(kernel._kernel.start_kernel(env=kernel._environment, **options))
    finally:
        os.close(writing)
    kernel._runner.run(kernel._connect())
    return kernel


@pytest.fixture(scope="module")
def pair(warm, specs, tmp_path_factory):
    """A forked kernel and an ordinary one, started alike."""
    zygote()
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("notebooks")
        os.dup2(0, PASSED)
        stack.callback(os.close, PASSED)
        kernels = [start_as(stack, spec, specs, folder) for spec in ("nbcache", "ordinary")]
        for kernel in kernels:
            kernel.run(LOOK)
        assert [is_forked(kernel) for kernel in kernels] == [True, False]
        yield kernels


def value(kernel: Kernel, expression: str) -> Any:
    return ast.literal_eval(kernel.run(f"print(ascii({expression}))"))


def neutral(text: str) -> str:
    """Without what is a kernel's own wherever it came from: its connection file, its pipes, its profile."""
    text = re.sub(r"/nbk[a-z0-9_]+", "/nbk", text)
    return re.sub(r"(pipe|socket):\[\d+\]", r"\1", text)


def differences(what: str, forked: Any, ordinary: Any) -> list[str]:
    """Where two values differ, told in few words."""
    if isinstance(forked, dict):
        return [
            line for key in {**forked, **ordinary} for line in differences(f"{what}[{key}]", forked.get(key), ordinary.get(key))
        ]
    if isinstance(forked, list) and len(forked) == len(ordinary):
        return [
            line for n, (a, b) in enumerate(zip(forked, ordinary, strict=True)) for line in differences(f"{what}[{n}]", a, b)
        ]
    mine, other = neutral(repr(forked)), neutral(repr(ordinary))
    return [] if mine == other else [f"{what}: forked {mine[:600]}, ordinary {other[:600]}"]


def test_they_are_the_same(pair):
    forked, ordinary = (value(kernel, "look()") for kernel in pair)
    assert forked.keys() == ordinary.keys()
    assert len(forked) > 40
    differing = [line for key in forked.keys() - DIFFERENT for line in differences(key, forked[key], ordinary[key])]
    assert not differing, "\n".join(differing)


def test_their_threads_are_the_same_but_for_who_watches_the_parent(pair):
    forked, ordinary = (value(kernel, "look()['threads']") for kernel in pair)
    assert "nbcache-watch" in forked
    assert len(forked) == len(ordinary)
    assert len(set(forked) ^ set(ordinary)) <= 2


def test_they_find_the_same_packages_imported_but_for_what_a_kernel_soon_imports_itself(pair):
    forked, ordinary = (set(value(kernel, "look()['packages']")) for kernel in pair)
    assert ordinary <= forked
    assert forked - ordinary <= {"ipykernel_launcher", "jedi", "parso"}


def test_what_must_differ_does(pair):
    """As README says."""
    forked, ordinary = pair
    assert value(forked, "os.getppid()" if forked.run("import os") == "" else "0") != os.getpid()
    assert value(ordinary, "__import__('os').getppid()") == os.getpid()
    first, second = (value(kernel, "draws()") for kernel in pair)
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_two_forked_kernels_draw_different_numbers(warm, specs):
    drawn = []
    for _ in range(2):
        zygote()
        with Kernel("nbcache", specs) as kernel:
            assert is_forked(kernel)
            kernel.run(LOOK)
            drawn.append(value(kernel, "draws()"))
    assert all(a != b for a, b in zip(*drawn, strict=True))
