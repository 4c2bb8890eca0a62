"""What is installed, and whether it still is what a zygote has imported.

User code is never imported ahead of a kernel: :class:`InstalledOnly` keeps imports to the standard library and to folders of
installed distributions. :class:`Snapshot` notices when a file that was imported, or a folder of distributions, has changed
since; :func:`shadowed` when the notebook's folder has a module of its own under the name of an imported one.
"""

from __future__ import annotations

import contextlib
import os
import site
import sys
import sysconfig
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from nbcache.jupyter.deferred import DeferredLoader, is_deferred

OWN = "nbcache"
"""Imported from wherever it is: whoever runs it has it installed, or works on it."""

SUFFIXES = (".py", ".so", ".pyc")
STARTUP = frozenset({"sitecustomize", "usercustomize"})
"""What an interpreter imports when it starts, if it is there."""

Stamp = tuple[int, int, int]


class InstalledOnly:
    """A finder, to be the first, that refuses top-level modules which are not installed, and defers some that are.

    Notes
    -----
    Many packages try an import and do without it, so a refusal may go unnoticed where it happened: ``refused`` keeps them.
    ``on_find`` is told of each top-level module that is looked for, and each is executed within ``around``.
    """

    def __init__(
        self,
        folders: Sequence[str],
        deferred: Container[str] = (),
        on_find: Callable[[str], None] = lambda _: None,
        around: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        self._folders = tuple(folder.rstrip("/") + "/" for folder in folders)
        self._deferred = deferred
        self._on_find = on_find
        self._around = around
        self.refused: list[str] = []

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The import system calls this. None for what is installed; ImportError for what is not."""
        if path is not None or name == OWN:
            return None
        self._on_find(name)
        if (spec := spec_of_others(self, name, path, target)) is not None:
            self._check(name, spec)
            if name in self._deferred and hasattr(spec.loader, "exec_module"):
                spec.loader = DeferredLoader(spec.loader)
            execute_within(spec.loader, self._around, name)
        return spec

    def _check(self, name: str, spec: ModuleSpec) -> None:
        places = [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or ())
        for place in places:
            if not os.path.abspath(place).startswith(self._folders):
                self.refused.append(f"{name} ({place})")
                raise ImportError(f"{name} is not installed, it lies in {place}", name=name)


def spec_of_others(own: object, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """What the first of the other finders has for a module."""
    for finder in sys.meta_path:
        if finder is not own and hasattr(finder, "find_spec") and (spec := finder.find_spec(name, path, target)) is not None:
            return spec
    return None


def execute_within(loader: Any, around: Callable[[str], AbstractContextManager[None]], name: str) -> None:  # noqa: ANN401
    """Have a loader execute the next module within a context; it is as it was then."""
    stock = getattr(loader, "exec_module", None)
    if stock is None or isinstance(loader, type):
        return

    def exec_module(module: ModuleType) -> None:
        vars(loader).pop("exec_module", None)
        with around(name):
            stock(module)

    with contextlib.suppress(AttributeError):
        loader.exec_module = exec_module


def installed_folders() -> list[str]:
    """Folders whose modules are not the user's own: the standard library's, and those with installed distributions."""
    paths = sysconfig.get_paths()
    found = [paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    found += [*site.getsitepackages(), site.getusersitepackages(), *filter(_holds_distributions, sys.path)]
    found += [f"{sys.base_prefix}/lib/python{sys.version_info[0]}.{sys.version_info[1]}"]
    return sorted({os.path.abspath(folder) for folder in found if os.path.isdir(folder)})


def _holds_distributions(folder: str) -> bool:
    try:
        return any(name.endswith(".dist-info") for name in os.listdir(folder or "."))
    except OSError:
        return False


def is_below(path: str, folders: Iterable[str]) -> bool:
    """Whether a file lies in one of the folders."""
    return path.startswith(tuple(folder.rstrip("/") + "/" for folder in folders))


def entries_in(directory: str) -> list[str]:
    """What PYTHONPATH names relative to the directory that an interpreter is started in, as folders if that is this one."""
    named = "" if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "")
    entries = named.split(os.pathsep) if named else []  # an empty one among others is the directory itself
    return [os.path.abspath(os.path.join(directory, entry)) for entry in entries if not os.path.isabs(entry)]


CONFIGURED_HERE = {"matplotlib": "matplotlibrc", "numba": ".numba_config.yaml"}
"""What packages read when they are imported, if it is in the directory that they are imported in."""


def configured_in(directory: str) -> str:
    """The file in a directory that one of the packages imported here would have read there; empty if there is none."""
    files = (file for package, file in CONFIGURED_HERE.items() if _is_imported(package))
    return next((path for file in files if os.path.exists(path := os.path.join(directory, file))), "")


def _is_imported(package: str) -> bool:
    return package in sys.modules and not is_deferred(sys.modules[package])


def configuration_files() -> list[str]:
    """Where matplotlib, if it is imported, has looked for what the user sets: it and whether it is there may change."""
    if not _is_imported("matplotlib"):
        return []
    folder = sys.modules["matplotlib"].get_configdir()
    return [os.path.join(folder, name) for name in ("matplotlibrc", "stylelib")]


def site_folders() -> list[str]:
    """Folders that an interpreter adds to its path when it starts, with what their ``.pth`` files name, if they are there."""
    return [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]


def _absent_folders() -> set[str]:
    """What would be on the path, were it there: entries of it, and what ``.pth`` files name."""
    named = [os.path.abspath(entry) for entry in sys.path]
    for folder in site_folders():
        for file in _pth_files(folder):
            named += [os.path.abspath(os.path.join(folder, line)) for line in _lines_of(file)]
    return {path for path in named if not os.path.exists(path)}


def _pth_files(folder: str) -> list[str]:
    try:
        return [f"{folder}/{name}" for name in os.listdir(folder) if name.endswith(".pth")]
    except OSError:
        return []


def _lines_of(pth: str) -> list[str]:
    """The lines of a ``.pth`` file that name folders."""
    try:
        with open(pth, encoding="utf-8-sig", errors="surrogateescape") as file:
            return [line for text in file if (line := text.rstrip()) and not line.startswith(("#", "import ", "import\t"))]
    except OSError:
        return []


class Snapshot:
    """The files that this process has imported and the folders they can come from, as they were; and others, there or not.

    Folders are among them that were not there, and would be on the path if they had been.
    """

    def __init__(self, others: Iterable[str] = ()) -> None:
        self._stamps = {path: stamp(path) for path in (*self._watched(), *others)}

    def _watched(self) -> set[str]:
        files = {file for module in list(sys.modules.values()) if isinstance(file := getattr(module, "__file__", None), str)}
        folders = {folder for folder in sys.path if folder and os.path.isdir(folder) and _holds_distributions(folder)}
        folders.update(site_folders())
        pth = {file for folder in folders for file in _pth_files(folder)}
        venv = os.path.join(sys.prefix, "pyvenv.cfg")
        return {*files, *_mapped_libraries(), *folders, *pth, *_absent_folders(), venv, sys.executable}

    def __len__(self) -> int:
        return len(self._stamps)

    def changed(self) -> str | None:
        """The first path that is not as it was; None if all are."""
        for path, known in self._stamps.items():
            if stamp(path) != known:
                return path
        return None


def stamp(path: str) -> Stamp | None:
    """What a file or folder is known again by; None if it is not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # a .pth file may hold anything
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _mapped_libraries() -> set[str]:
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        names = (line.split(maxsplit=5)[5].rstrip("\n") for line in maps if line.count(" ") > 5 and "/" in line)
        return {name for name in names if ".so" in name and not name.endswith("(deleted)")}


def mapped_math_libraries() -> set[str]:
    """Libraries in this process that start threads of their own when they are loaded, and mend them after a fork."""
    return {name for name in _mapped_libraries() if "openblas" in os.path.basename(name)}


def top_level(names: Iterable[str]) -> set[str]:
    """The packages of these modules."""
    return {name.partition(".")[0] for name in names}


def own_startup_code() -> str:
    """The file of the user's own code that this interpreter ran when it started; empty if there is none."""
    for name in sorted(STARTUP & sys.modules.keys()):
        file = str(getattr(sys.modules[name], "__file__", None) or "")
        if file and (name == "usercustomize" or not is_below(os.path.abspath(file), installed_folders())):
            return file
    return ""


def shadowed(folders: Iterable[str], names: set[str]) -> str | None:
    """The first module in these folders with the name of an imported one, which an ordinary kernel would have found first."""
    for folder in folders:
        for entry in _modules_in(folder):
            name = entry.partition(".")[0]
            if name in names and not _is_loaded_from(name, folder):
                return os.path.join(folder, entry)
    return None


def _modules_in(folder: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIXES) or ("." not in entry.name and _is_package(entry)):
                    yield entry.name
    except OSError:
        return


def _is_package(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir() and os.path.exists(os.path.join(entry.path, "__init__.py"))
    except OSError:
        return False


def _is_loaded_from(name: str, folder: str) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None)
    return isinstance(file, str) and is_below(os.path.abspath(file), [os.path.abspath(folder)])
