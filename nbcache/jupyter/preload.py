"""In a zygote: imports what kernels need, and nothing that is not installed.

The GPU driver must stay untouched: a process that initialised it cannot give a working GPU to its children. Importing diffusers
asks ``torch.cuda.is_available()``, which initialises it unless ``PYTORCH_NVML_BASED_CUDA_CHECK`` is set. What starts threads is
left out too. Whether the whole can still be forked is for :mod:`nbcache.jupyter.proof` to show.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nbcache.jupyter.experience import SLOW_S, Experience, by_package
from nbcache.jupyter.installed import InstalledOnly, installed_folders, mapped_math_libraries, top_level

KERNEL_MODULES = (
    "ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell", "ipykernel.debugger", "ipykernel.pickleutil",
    "ipykernel.datapub", "ipykernel.embed", "ipykernel.comm", "ipykernel.subshell", "ipykernel_launcher",
    "IPython.core.magics", "IPython.core.completerlib", "IPython.core.debugger", "IPython.core.interactiveshell",
    "IPython.lib.display", "IPython.extensions.storemagic", "matplotlib_inline.config", "matplotlib_inline.backend_inline",
    "debugpy", "debugpy.server.api", "comm", "psutil", "jedi", "runpy", "sqlite3", "tempfile", "uuid", "zmq.utils.garbage",
    "nbcache.jupyter.magics", "nbcache.jupyter.forked",
)  # fmt: skip
"""What a kernel has imported by the time that it answers, as far as it is installed."""
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
INLINE_BACKEND = "module://matplotlib_inline.backend_inline"


class Broken(Exception):
    """A module that a process cannot import and still be forked; the message says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


@dataclass
class Preloaded:
    """What a zygote has imported."""

    seconds: dict[str, float] = field(default_factory=dict)
    """By module, in order; those that were asked for, and that no earlier one had imported."""
    kernel: set[str] = field(default_factory=set)
    """Packages that an ordinary kernel has imported too by the time that a notebook can import anything."""

    variables: dict[str, str] = field(default_factory=dict)
    """What the kernel's own modules have set in the environment, as they do in an ordinary kernel."""

    def ahead(self) -> set[str]:
        """Packages that a kernel would find imported, though an ordinary one would still look for them."""
        return top_level(sys.modules) - self.kernel - set(sys.stdlib_module_names)


def prepare_environment() -> None:
    """Set what must be set before anything is imported. A kernel gets its own environment."""
    os.environ[NVML_CHECK] = "1"
    if not os.environ.get("MPLBACKEND"):
        os.environ["MPLBACKEND"] = INLINE_BACKEND  # as ipykernel sets it, and matplotlib reads it when it is imported


def preload(names: Sequence[str], after_each: Callable[[str], None] | None = None) -> Preloaded:
    """Import the kernel's modules, torch, and these. Broken for the first that a fork would not survive.

    A module that cannot be imported is left out; ImportError only for what a kernel cannot do without. ``after_each`` is called
    with each name after its import, and may raise what the caller likes.
    """
    guard = InstalledOnly(installed_folders())
    sys.meta_path.insert(0, guard)
    done, before = Preloaded(), dict(os.environ)
    try:
        for name in KERNEL_MODULES:
            _import_kernel_module(name)
        libraries = mapped_math_libraries()
        done.kernel = top_level(sys.modules)
        done.variables = {name: value for name, value in os.environ.items() if before.get(name) != value}
        for name in ("torch", *names):
            seconds = _import(name, guard, libraries) if name not in sys.modules else None
            if seconds is not None:
                done.seconds[name] = seconds
                if after_each is not None:
                    after_each(name)
        if "torch" in sys.modules:
            importlib.import_module("nbcache.client.api").prepare()
    finally:
        sys.meta_path.remove(guard)
    if guard.refused:
        raise Broken("a kernel's own modules", f"import what is not installed: {guard.refused[0]}")
    return done


def _import_kernel_module(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        if name in ("ipykernel.kernelapp", "nbcache.jupyter.forked"):
            raise


def _import(name: str, guard: InstalledOnly, libraries: set[str]) -> float | None:
    """Import a module; the seconds it took, None if it cannot be imported. Broken if the process is unfit for forks then.

    ``libraries`` are the math libraries that were loaded before.
    """
    threads = _thread_count()
    start = time.perf_counter()
    try:
        importlib.import_module(name)
    except Exception:  # noqa: BLE001 - it will fail in the kernel too, and be told there
        if guard.refused:
            raise Broken(name, f"imports what is not installed: {guard.refused[0]}") from None
        return None
    seconds = time.perf_counter() - start
    if guard.refused:
        raise Broken(name, f"imports what is not installed: {guard.refused[0]}")
    if threading.active_count() > 1:
        raise Broken(name, f"starts threads: {', '.join(t.name for t in threading.enumerate()[1:])}")
    if _thread_count() > threads and not _are_of_new_math_libraries(libraries):
        raise Broken(name, "starts threads, which a forked kernel would lack")
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        raise Broken(name, "uses the GPU when it is imported")
    return seconds


def _are_of_new_math_libraries(known: set[str]) -> bool:
    """Whether threads that have appeared are those of a math library, which mends itself after a fork. Adds it to the known."""
    found = mapped_math_libraries()
    is_new = not found <= known
    known |= found
    return is_new


def _thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


def wanted(chosen: Sequence[str] | None, known: Experience) -> list[str]:
    """What to import: what the setting names, or else what was learned, and what is to be measured."""
    names = list(chosen) if chosen is not None else [*known.learned, *known.candidates]
    return [name for name in dict.fromkeys(names) if name not in known.broken]


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
