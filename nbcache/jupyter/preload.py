"""In a zygote: imports what kernels need, and nothing that is not installed.

The GPU driver must stay untouched: a process that initialised it cannot give a working GPU to its children. Importing diffusers
asks ``torch.cuda.is_available()``, which initialises it unless ``PYTORCH_NVML_BASED_CUDA_CHECK`` is set: NVML is asked then, as
a child may go on doing. Nor may threads be started, but those that nobody misses: a package that does is deferred
(:mod:`nbcache.jupyter.deferred`), so that what imports it need not be left out. Whether the whole can still be forked is for
:mod:`nbcache.jupyter.proof` to show.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Container, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from nbcache.jupyter.ahead import Ahead, Notes
from nbcache.jupyter.experience import SLOW_S, Experience, by_package
from nbcache.jupyter.installed import InstalledOnly, installed_folders, mapped_math_libraries, top_level
from nbcache.jupyter.traces import noting_folders, noting_generators, noting_imports, noting_operators, noting_reads

KERNEL_MODULES = (
    "ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell", "ipykernel.debugger", "ipykernel.pickleutil",
    "ipykernel.datapub", "ipykernel.embed", "ipykernel.comm", "ipykernel.subshell", "ipykernel_launcher",
    "IPython.core.magics", "IPython.core.completerlib", "IPython.core.debugger", "IPython.core.interactiveshell",
    "IPython.lib.display", "IPython.extensions.storemagic",
    "debugpy", "debugpy.server.api", "comm", "psutil", "jedi", "runpy", "sqlite3", "tempfile", "uuid", "zmq.utils.garbage",
    "nbcache.jupyter.magics", "nbcache.jupyter.forked",
)  # fmt: skip
"""What a kernel has imported by the time that it answers, as far as it is installed."""
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
READ_ANYWAY = (
    NVML_CHECK, "TMPDIR", "TEMP", "TMP", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
)  # fmt: skip
"""Variables that are not for kernels, or are looked at again: what is read of them here does not matter."""
INLINE_BACKEND = "module://matplotlib_inline.backend_inline"


MATHEMATICAL = ("torch", "scipy.linalg")
"""Modules that bring math libraries with them."""
HARMLESS_THREADS = frozenset({"jemalloc_bg_thd"})
"""Threads by the name that the kernel shows, of libraries that do without them after a fork: jemalloc, which pyarrow brings."""
SHELL_PACKAGES = frozenset({"", "__main__", "IPython", "ipykernel", "nbcache"})
"""Packages whose modules may ask for IPython's shell when they are imported, and need no answer: they are a kernel's own."""
SHELL_USERS = frozenset({"matplotlib_inline"})
"""Packages that change others when they find a shell: they are told that there is none, and a kernel executes them anew."""
MAX_BROKEN_MODULES = 2
"""Of a package; with one more, the package is deferred as a whole."""


class Broken(Exception):
    """A module that a process cannot import and still be forked; the message says why.

    ``suspects`` are the packages that came with it, which may be to blame; the likeliest first.
    """

    def __init__(self, name: str, reason: str, suspects: Sequence[str] = ()) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
        self.suspects = list(suspects)


@dataclass
class Preloaded:
    """What a zygote has imported."""

    seconds: dict[str, float] = field(default_factory=dict)
    """By module, in order; those that were asked for, and that no earlier one had imported."""
    variables: dict[str, str] = field(default_factory=dict)
    """What the kernel's own modules have set in the environment, as they do in an ordinary kernel."""
    shell_askers: set[str] = field(default_factory=set)
    """Modules that wanted IPython's shell when they were imported: there was none. A kernel imports them anew."""
    ahead: Ahead = field(default_factory=lambda: Ahead(set(sys.modules), Notes()))
    """What an ordinary kernel would not have imported by the time that a notebook can import anything."""


def prepare_environment() -> None:
    """Set what must be set before anything is imported. A kernel gets its own environment."""
    os.environ[NVML_CHECK] = "1"
    if not os.environ.get("MPLBACKEND"):
        os.environ["MPLBACKEND"] = INLINE_BACKEND  # as ipykernel sets it, and matplotlib reads it when it is imported


def preload(
    names: Sequence[str],
    deferred: Container[str] = (),
    before_each: Callable[[str], None] = lambda _: None,
    after_each: Callable[[str], None] = lambda _: None,
) -> Preloaded:
    """Import the kernel's modules, torch, and these. Broken for the first that a fork would not survive.

    A module that cannot be imported is left out; ImportError only for what a kernel cannot do without. The packages that are
    ``deferred`` get modules that are executed when they are used. ``before_each`` and ``after_each`` are called with each name,
    before and after its import, and may raise what the caller likes.
    """
    watch = _Watch(deferred)
    done, before = Preloaded(), dict(os.environ)
    with watch, asking_for_the_shell(done.shell_askers), noting_generators():
        for name in KERNEL_MODULES:
            _import_kernel_module(name)
        done.variables = {name: value for name, value in os.environ.items() if before.get(name) != value}
        _set_as_kernels_do()
        watch.begin()
        visible = set(sys.modules)
        with contextlib.ExitStack() as noting:
            noting.enter_context(noting_reads(watch.notes.read))
            noting.enter_context(noting_imports(watch.notes.imported))
            for name in ("torch", *names):
                if name in sys.modules:
                    continue
                before_each(name)
                seconds = watch.load(name)
                if seconds is not None:
                    done.seconds[name] = seconds
                    after_each(name)
                    if name == "torch":
                        noting.enter_context(noting_operators(watch.notes.registering))
            if "torch" in sys.modules:
                importlib.import_module("nbcache.client.api").prepare()
    if watch.refused:
        raise Broken("a kernel's own modules", f"import what is not installed: {watch.refused[0]}")
    _drop_orphans(visible)
    for read in watch.notes.read.values():
        for name in READ_ANYWAY:
            read.pop(name, None)
    done.ahead = Ahead(visible, watch.notes, done.seconds)
    watch.notes.effects.undo()
    return done


def _drop_orphans(visible: Set[str]) -> None:
    """Forget modules of a package that could not be imported itself: it may be in a kernel."""
    for name in [name for name in sys.modules if name not in visible]:
        if "." in name and name.rpartition(".")[0] not in sys.modules:
            del sys.modules[name]


@contextlib.contextmanager
def asking_for_the_shell(found: set[str]) -> Iterator[None]:
    """Give modules that call ``IPython.get_ipython()`` meanwhile a stand-in, and note those that want more than it has.

    Most only ask whether this is a notebook, which it will be. The function stays the object that it is, for whoever imports
    it: it is what it does that changes. The kernel's own modules ask too, and are given nothing.
    """
    from IPython.core import getipython

    def answering() -> object:
        import sys

        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "<module>":
            frame = frame.f_back  # type: ignore[assignment]
        name = frame.f_globals.get("__name__", "") if frame is not None else ""
        return globals()["stand_in_for_the_shell"](name)  # IPython's globals, once it is there

    given: list[tuple[str, weakref.ref[object]]] = []

    def stand_in(name: str) -> object:
        if name.partition(".")[0] in SHELL_PACKAGES:
            return None
        if name.partition(".")[0] in SHELL_USERS:
            found.add(name)
            return None
        shell = _Shell(partial(found.add, name))
        given.append((name, weakref.ref(shell)))
        return shell

    function = getipython.get_ipython
    code = function.__code__
    function.__globals__["stand_in_for_the_shell"] = stand_in
    function.__code__ = answering.__code__
    try:
        yield
    finally:
        function.__code__ = code
        del function.__globals__["stand_in_for_the_shell"]
        gc.collect()
        found.update(name for name, shell in given if shell() is not None)  # who keeps it, wants the shell itself


class _Inert:
    """What comes of using the stand-in for the shell: nothing, but no error."""

    def __getattr__(self, name: str) -> _Inert:
        return self

    def __call__(self, *_: object, **__: object) -> _Inert:
        return self

    def __iter__(self) -> Iterator[object]:
        return iter(())


class _Shell:
    """A stand-in for IPython's shell, which says that it is a kernel's, and tells if somebody wants more."""

    config: ClassVar[dict[str, dict[str, Any]]] = {"IPKernelApp": {}}

    def __init__(self, want_more: Callable[[], None]) -> None:
        self._want_more = want_more

    def __getattr__(self, name: str) -> _Inert:
        self._want_more()
        return _Inert()


_Shell.__name__ = "ZMQInteractiveShell"  # which many ask for
_Shell.__module__ = "ipykernel.zmqshell"


def attempt(name: str, deferred: Container[str] = ()) -> str:
    """Import a package; why a process that did cannot be forked, or nothing."""
    try:
        with _Watch(deferred) as watch:
            for other in MATHEMATICAL:  # whose threads would excuse those of the package
                with contextlib.suppress(ImportError):
                    importlib.import_module(other)
            watch.begin()
            watch.load(name)
    except Broken as error:
        return error.reason
    return ""


def _set_as_kernels_do() -> None:
    """Set the variables that a kernel sets when its shell is made; colours hang on them."""
    from ipykernel.zmqshell import ZMQInteractiveShell

    shell: Any = ZMQInteractiveShell
    with contextlib.suppress(AttributeError):
        shell.init_environment(None)


def _import_kernel_module(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception:  # most likely it is not installed
        if name in ("ipykernel.kernelapp", "nbcache.jupyter.forked"):
            raise


class _Watch:
    """Imports one module after the other, and looks what each does to the process."""

    def __init__(self, deferred: Container[str] = ()) -> None:
        self._guard = InstalledOnly(installed_folders(), deferred, self._look, lambda name: self.notes.of(name))
        self.notes = Notes()
        self._libraries: set[str] = set()
        self._threads = 0
        self._found = ""
        self._rises: list[str] = []

    def __enter__(self) -> Self:
        sys.meta_path.insert(0, self._guard)
        return self

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self._guard)

    @property
    def refused(self) -> list[str]:
        """What was not installed."""
        return self._guard.refused

    def begin(self) -> None:
        """Take what is there now as harmless, and NVML's thread, which whoever asks for GPUs would start."""
        _start_nvml()
        self.notes = Notes()
        self._libraries = mapped_math_libraries()
        self._threads = _thread_count()

    def _look(self, name: str) -> None:
        """The next top-level module is looked for: if there are more threads now, the one before is a suspect."""
        if (threads := _thread_count()) > self._threads:
            self._rises.append(self._found)
        self._threads, self._found = threads, name

    def load(self, name: str) -> float | None:
        """Import a module; the seconds it took, None if it cannot be imported. Broken if forks would not survive it."""
        threads, known = self._threads, len(sys.modules)
        self._found, self._rises = name.partition(".")[0], []
        folders: list[str] = []
        start = time.perf_counter()
        try:
            with noting_folders(folders), self.notes.of(self._found):
                importlib.import_module(name)
            imported = True
        except (Exception, SystemExit, KeyboardInterrupt):  # noqa: BLE001 - it will fail in the kernel too, and be told there
            imported = False
        seconds = time.perf_counter() - start
        self._look("")
        reason = self._trouble(threads)
        if not reason and (left := [folder for folder in folders if os.path.exists(folder)]):
            reason = f"makes a temporary directory when it is imported: {left[0]}"
            _remove_empty(left)
        if reason:
            raise Broken(name, reason, self._suspects(known))
        return seconds if imported else None

    def _trouble(self, threads: int) -> str:
        """What is wrong with the process now, which had so many threads before."""
        if self.refused:
            return f"imports what is not installed: {self.refused[0]}"
        if threading.active_count() > 1:
            return f"starts threads: {', '.join(t.name for t in threading.enumerate()[1:])}"
        if self._threads > threads and not self._are_of_new_math_libraries():
            return "starts threads, which a forked kernel would lack"
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
            return "uses the GPU when it is imported"
        return ""

    def _are_of_new_math_libraries(self) -> bool:
        """Whether threads that appeared are those of a math library, which mends itself after a fork. Adds it to the known."""
        found = mapped_math_libraries()
        is_new = not found <= self._libraries
        self._libraries |= found
        return is_new

    def _suspects(self, known: int) -> list[str]:
        """The packages that came since there were so many modules: first those with which threads came, then the latest."""
        modules = list(sys.modules)
        fresh = top_level(modules[known:]) - top_level(modules[:known])
        order = [*self._rises, *(name.partition(".")[0] for name in reversed(modules[known:]))]
        return [name for name in dict.fromkeys(order) if name in fresh]


def _remove_empty(folders: Sequence[str]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def _thread_count() -> int:
    """How many threads there are that a fork would miss."""
    count = 0
    for number in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            count += Path(f"/proc/self/task/{number}/comm").read_text().rstrip("\n") not in HARMLESS_THREADS
    return count


def _start_nvml() -> None:
    """Start NVML, where there is one."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libnvidia-ml.so.1").nvmlInit_v2()


def wanted(chosen: Sequence[str] | None, known: Experience) -> list[str]:
    """What to import: what the setting names, or else what was learned, and what is to be measured."""
    names = list(chosen) if chosen is not None else [*known.learned, *known.candidates]
    return [name for name in dict.fromkeys(names) if not known.is_broken(name)]


def leave_out(known: Experience, name: str, reason: str) -> None:
    """Note what breaks forks: a package, which is deferred from now on, or one module of it. Of many, their package."""
    package = name.partition(".")[0]
    if sum(other.partition(".")[0] == package for other in known.broken) >= MAX_BROKEN_MODULES:
        name = package
    known.broken[name] = reason
    known.learned = {other: took for other, took in known.learned.items() if not known.is_broken(other)}
    known.candidates = [other for other in known.candidates if not known.is_broken(other)]


def weigh(known: Experience, names: Sequence[str], seconds: dict[str, float]) -> None:
    """Turn the candidates among the names that were asked for into what is learned, and what is quick.

    A package is slow as a whole: all its modules that had to be imported are kept, or none.
    """
    asked, quick = set(names), set(known.quick)
    packages = by_package({**known.learned, **seconds})
    for name in known.candidates:
        if name in seconds and packages[name.partition(".")[0]] >= SLOW_S:
            known.learned.setdefault(name, round(seconds[name], 4))
        elif name in asked and name not in quick:
            known.quick.append(name)
    known.candidates = [name for name in known.candidates if name not in asked]


def settle() -> None:
    """Collect what the imports left, and keep the collector off the rest: each child would copy the pages it touches."""
    gc.collect()
    gc.freeze()
