"""What a zygote has imported ahead of its kernels: the modules by package, what each needs, has read, and has changed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Set
from types import BuiltinFunctionType, FunctionType, MappingProxyType, ModuleType
from typing import Any

from nbcache.jupyter.effects import Effects
from nbcache.jupyter.experience import by_package
from nbcache.jupyter.installed import OWN, top_level

READ_BY_LIBRARIES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_", "ONEDNN_"): ("torch",),
    ("OMP_", "OPENBLAS_", "GOTO_", "BLIS_", "MKL_"): ("numpy", "scipy"),
}
"""Beginnings of the names of variables that compiled libraries read when a package loads them, which nobody sees."""


class Ahead:
    """The modules that are in this process, and would not be in one that became a kernel without help.

    Attributes
    ----------
    modules : their names by unit, in the order of their import; a unit is a package, or one module of nbcache's own
    needs : by unit, the others whose objects its modules hold
    solid : the units with compiled modules, which no process can import twice
    effects : what each package has changed in the whole process

    Notes
    -----
    ``visible`` are modules that such a kernel has imported too by the time that a notebook can import anything, ``read`` the
    variables of the environment that each package has read, and ``seconds`` how long modules took.
    """

    def __init__(
        self,
        visible: Set[str],
        effects: Effects,
        read: Mapping[str, Set[str]],
        seconds: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        shared = (top_level(visible) | sys.stdlib_module_names | {"__main__", "__mp_main__"}) - {OWN}
        self.modules: dict[str, list[str]] = {}
        for name in sys.modules:
            if top_level([name]).isdisjoint(shared) and name not in visible:
                self.modules.setdefault(unit_of(name), []).append(name)
        self.needs = {unit: _needs(names, self.modules.keys()) - {unit} for unit, names in self.modules.items()}
        self.solid = {unit for unit, names in self.modules.items() if any(map(_is_compiled, names))}
        self.effects = effects
        self._read = read
        self._seconds = by_package(seconds)

    @property
    def packages(self) -> set[str]:
        """Those that a kernel without help would still look for."""
        return top_level(self.modules) - {OWN}

    def has_read(self, package: str, variable: str) -> bool:
        """Whether a variable counted when a package was imported."""
        return variable in self._read.get(package, ()) or any(
            package in packages and variable.startswith(beginnings) for beginnings, packages in READ_BY_LIBRARIES.items()
        )

    def seconds(self, units: Iterable[str]) -> float:
        """How long it takes to import these, about."""
        return sum(self._seconds.get(unit, 0.0) for unit in units)

    def below(self, unit: str) -> set[str]:
        """A unit and all that it needs."""
        return _reachable([unit], self.needs)

    def above(self, units: Iterable[str]) -> set[str]:
        """These units and all that need them."""
        needed_by: dict[str, set[str]] = {}
        for unit, needs in self.needs.items():
            for needed in needs:
                needed_by.setdefault(needed, set()).add(unit)
        return _reachable(units, needed_by)


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


def _needs(names: Iterable[str], units: Iterable[str]) -> set[str]:
    """The units that what these modules hold comes from."""
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
    return {unit_of(origin) for origin in origins if isinstance(origin, str)} & set(units)


def _is_compiled(name: str) -> bool:
    return str(attributes(sys.modules[name]).get("__file__") or "").endswith(".so")
