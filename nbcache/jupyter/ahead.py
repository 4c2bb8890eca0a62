"""What a zygote has imported ahead of its kernels: the modules by package, what each needs, has read, and has changed."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MappingProxyType, ModuleType
from typing import Any

from nbcache.jupyter.effects import Effects
from nbcache.jupyter.experience import by_package
from nbcache.jupyter.installed import OWN, Stamp, installed_folders, stamp, top_level
from nbcache.jupyter.traces import Reads

READ_UNSEEN: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_", "ONEDNN_"): ("torch",),
    ("OMP_", "GOMP_", "KMP_"): ("sklearn", "xgboost", "lightgbm", "faiss"),
    ("OMP_", "OPENBLAS_", "GOTO_", "BLIS_", "MKL_"): ("numpy", "scipy", "cv2"), ("OPENCV_",): ("cv2",),
    ("TQDM_",): ("tqdm",), ("FSSPEC_",): ("fsspec",), ("NUMBA_",): ("numba",), ("NETWORKX_",): ("networkx",),
}  # fmt: skip
"""Beginnings of the names of variables that compiled libraries read when they are loaded, or that are looked for one by one."""


class Notes:
    """What is noted while packages are imported.

    Attributes
    ----------
    effects : what each has changed in the whole process
    read : the variables of the environment that each has read, and what it found
    imported : the packages that each has imported, or that came while it was executed
    registering : those that have registered operators with torch
    environment : the variables as they were before
    """

    def __init__(self) -> None:
        self.effects = Effects()
        self.read: Reads = {}
        self.imported: dict[str, set[str]] = {}
        self.registering: set[str] = set()
        self.environment = dict(os.environ)

    @contextlib.contextmanager
    def of(self, package: str) -> Iterator[None]:
        """What happens meanwhile, is this package's doing."""
        before = set(sys.modules)
        try:
            with self.effects.of(package):
                yield
        finally:
            self.imported.setdefault(package, set()).update(top_level(sys.modules.keys() - before) - {package})


@dataclass(frozen=True)
class LoggerState:
    """A logger, and what an import has made of it."""

    logger: logging.Logger
    handlers: list[logging.Handler]
    level: int
    propagate: bool

    def undo(self) -> None:
        """Have it as before that import, but for what others have changed since."""
        for handler in self.handlers:
            self.logger.removeHandler(handler)
        if self.logger.level == self.level:
            self.logger.setLevel(logging.NOTSET)
        self.logger.propagate = self.logger.propagate or not self.propagate


class Ahead:
    """The modules that are in this process, and would not be in one that became a kernel without help.

    Attributes
    ----------
    modules : their names by unit, in the order of their import; a unit is a package, or one module of nbcache's own
    needs : by unit, the others that it has imported, or whose objects its modules hold
    solid : the units that cannot be imported twice, as they have compiled modules or operators of torch's, and what those need
    effects : what each package has changed in the whole process
    loggers : by unit, as imports have left them

    Notes
    -----
    ``visible`` are modules that such a kernel has imported too by the time that a notebook can import anything; ``seconds`` is
    how long modules took.
    """

    def __init__(self, visible: Set[str], notes: Notes, seconds: Mapping[str, float] = MappingProxyType({})) -> None:
        shared = (top_level(visible) | sys.stdlib_module_names | {"__main__", "__mp_main__"}) - {OWN}
        self.modules: dict[str, list[str]] = {}
        for name in sys.modules:
            if name.partition(".")[0] not in shared and name not in visible:
                self.modules.setdefault(unit_of(name), []).append(name)
        self.needs = {
            unit: ((_held(names) | notes.imported.get(unit, set())) & self.modules.keys()) - {unit}
            for unit, names in self.modules.items()
        }
        registering = notes.registering
        solid = [unit for unit, names in self.modules.items() if unit in registering or any(map(_is_compiled, names))]
        self.solid = _reachable(solid, self.needs)
        self.effects = notes.effects
        self.loggers: dict[str, list[LoggerState]] = {}
        for name, logger in logging.root.manager.loggerDict.items():
            if isinstance(logger, logging.Logger):
                state = LoggerState(logger, list(logger.handlers), logger.level, logger.propagate)
                self.loggers.setdefault(unit_of(name), []).append(state)
        self._notes = notes
        was = notes.environment
        self._usual = {name: {was.get(name), value} for name, value in os.environ.items() if was.get(name) != value}
        self._seconds = by_package(seconds)
        self._needed_by: dict[str, set[str]] = {}
        for unit, needs in self.needs.items():
            for needed in needs:
                self._needed_by.setdefault(needed, set()).add(unit)
        self._files = {unit: (file, stamp(file)) for unit in self.modules if isinstance(file := _file_of(unit), str)}
        self._folders = {path: stamp(path) for path in installed_folders()}

    @property
    def packages(self) -> set[str]:
        """Those that a kernel without help would still look for."""
        return top_level(self.modules) - {OWN}

    def changed_variables(self, unit: str, environment: Mapping[str, str]) -> list[str]:
        """The variables that a unit has read when it was imported, and that were something else then.

        What a package sets is no change: it may do so before another reads it, or after.
        """
        known = dict(self._notes.read.get(unit, {}))
        for beginnings in (begin for begin, packages in READ_UNSEEN.items() if unit in packages):
            names = [name for name in (*environment, *self._notes.environment) if name.startswith(beginnings)]
            known |= {name: self._notes.environment.get(name) for name in names}
        return sorted(
            name
            for name, value in known.items()
            if (now := environment.get(name)) != value and not {now, value} <= self._usual.get(name, set())
        )

    def has_changed(self, unit: str) -> bool:
        """Whether a unit's file is not what was imported."""
        path, known = self._files.get(unit, ("", None))
        return stamp(path) != known

    def changed_folders(self) -> dict[str, Stamp | None]:
        """Folders of installed packages in which something was installed, or removed, since; as they are now."""
        return {path: now for path, known in self._folders.items() if (now := stamp(path)) != known}

    def seconds(self, units: Iterable[str]) -> float:
        """How long it took to import these, and what was asked for of them."""
        return sum(self._seconds.get(unit, 0.0) for unit in units)

    def below(self, unit: str) -> set[str]:
        """A unit and all that it needs."""
        return _reachable([unit], self.needs)

    def above(self, units: Iterable[str]) -> set[str]:
        """These units and all that need them."""
        return _reachable(units, self._needed_by)


def unit_of(name: str) -> str:
    """What a module comes back with."""
    package = name.partition(".")[0]
    return name if package == OWN else package


def attributes(module: object) -> dict[str, Any]:
    """A module's names, without executing it if that was deferred; none of what only stands in for one."""
    try:
        found: dict[str, Any] = object.__getattribute__(module, "__dict__")
    except AttributeError:
        return {}
    return found


def _reachable(starts: Iterable[str], edges: Mapping[str, Set[str]]) -> set[str]:
    todo = list(starts)
    seen = set(todo)
    while todo:
        fresh = edges.get(todo.pop(), set()) - seen
        seen |= fresh
        todo += fresh
    return seen


def _held(names: Iterable[str]) -> set[str]:
    """The units whose objects these modules hold."""
    origins: set[object] = set()
    for name in names:
        for value in list(attributes(sys.modules[name]).values()):
            kind = type(value)  # asking the value itself may execute something, or warn
            if issubclass(kind, ModuleType):
                origins.add(attributes(value).get("__name__"))
            elif issubclass(kind, type | FunctionType | BuiltinFunctionType):
                origins.add(value.__module__)
            else:
                origins.add(kind.__module__)
    return {unit_of(origin) for origin in origins if isinstance(origin, str)}


def _is_compiled(name: str) -> bool:
    own = attributes(sys.modules[name])
    is_library = str(own.get("__file__") or "").endswith(".so")
    return is_library and own.get("__name__") == name  # or it is another package's, by an alias


def _file_of(unit: str) -> object:
    return attributes(sys.modules.get(unit)).get("__file__")
