"""In a forked kernel: what was imported ahead is out of sight until the kernel imports it.

An ordinary kernel can still set a variable that a package reads when it is imported, or put a folder before the installed
packages, and then import. So can a forked one: a package comes back when it is imported, with what it needs and with what it
had changed in the process; but if something that it reads has changed by then, it is imported anew, with all that stands on
it. Packages with compiled modules cannot be: they come back as they are, and a warning says so. Owns what is hidden.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
import warnings
from collections.abc import Mapping, Sequence, Set
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from nbcache.client.notices import ImportedAnew, SetTooLate
from nbcache.jupyter.ahead import Ahead, attributes, unit_of
from nbcache.jupyter.deferred import is_deferred
from nbcache.jupyter.installed import OWN

REMEDY = (
    "Set it where Jupyter is started, or in the kernelspec's env; or choose an ordinary kernel (Python 3) for this notebook"
)
NOTICED_S = 0.5
"""An import that takes so long is told of, if it need not have been."""


class Veil(importlib.abc.MetaPathFinder):
    """Hides what was imported ahead, and is the import system's finder for it.

    Notes
    -----
    A package is brought back while it is being imported, and what it needs is imported in turn, so that the import system's
    own locks keep threads apart.
    """

    def __init__(self, ahead: Ahead) -> None:
        self._ahead = ahead
        self._hidden: dict[str, Any] = {}
        self._brought: set[str] = set()
        self._environment: dict[str, str] | None = None
        self._folders: list[str] = []
        self._told: set[str] = set()

    def draw(self) -> None:
        """Hide all of it."""
        for names in self._ahead.modules.values():
            self._hidden.update((name, sys.modules.pop(name)) for name in names if name in sys.modules)
        for name in self._hidden:
            parent, _, child = name.rpartition(".")
            attributes(sys.modules.get(parent)).pop(child, None)
        sys.meta_path.insert(0, self)

    def settle(self) -> None:
        """The kernel is set up: what changes from now on, the notebook changes."""
        self._environment = dict(os.environ)
        self._folders = _searched()

    def has_brought(self, name: str) -> bool:
        """Whether a module was hidden, and came back as it was."""
        return name in self._brought

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the import system asks for: the very module, if it is hidden and nothing that counts for it has changed."""
        if fullname not in self._hidden:
            return None
        unit = unit_of(fullname)
        if self._environment is not None:
            self._heed_variables(unit, self._environment)
            if _searched() != self._folders:
                self._heed_folders(unit)
        module = self._hidden.get(fullname)
        return None if module is None else _spec_of(fullname, module, self)

    def bring(self, fullname: str) -> None:
        """Import what a module needs that is being imported, and bring back what comes with it."""
        unit = unit_of(fullname)
        for needed in sorted(self._ahead.needs[unit]):
            if is_deferred(self._hidden.get(needed)):
                sys.modules.setdefault(needed, self._hidden.pop(needed))
            elif needed in self._hidden:
                __import__(needed)
        modules = {name: self._hidden.pop(name) for name in self._ahead.modules[unit] if name in self._hidden}
        for name, module in modules.items():
            if name != fullname:
                sys.modules.setdefault(name, module)
        self._brought.update(modules)
        for finder in list(sys.meta_path):
            if (notice := getattr(finder, "came_back", None)) is not None:  # one that looks for imports, which these are
                notice(modules.values())
        before = dict(os.environ)
        self._ahead.effects.do_again(unit)
        if self._environment is not None:
            self._environment.update((name, value) for name, value in os.environ.items() if before.get(name) != value)

    def _heed_variables(self, unit: str, known: Mapping[str, str]) -> None:
        """Forget what would read something else by now, of a unit and all that it needs."""
        now = dict(os.environ)
        for variable in sorted(name for name in now.keys() | known.keys() if now.get(name) != known.get(name)):
            readers = {each for each in self._below(unit) if self._ahead.has_read(each, variable)}
            if solid := " and ".join(sorted(readers & self._ahead.solid)):
                message = f"{variable} was set after {solid} had been imported ahead of this kernel, and has no effect there"
                self._tell(SetTooLate, f"{message}. {REMEDY}")
            anew = self._forget(readers)
            if (took := self._ahead.seconds(anew)) >= NOTICED_S:
                message = f"{variable} was set here, so {', '.join(sorted(anew))} are imported anew (about {took:.1f} s)"
                self._tell(
                    ImportedAnew, f"{message}. Set it where Jupyter is started, or in the kernelspec's env, to be quicker"
                )

    def _heed_folders(self, unit: str) -> None:
        """Forget what would be found elsewhere by now, of a unit and all that it needs."""
        for each in self._below(unit):
            here = attributes(self._hidden[each]).get("__file__")
            found = PathFinder.find_spec(each)
            if found is None or not found.origin or not here or os.path.abspath(found.origin) == os.path.abspath(here):
                continue
            if each in self._ahead.solid:
                message = f"{found.origin} is not what `import {each}` gives: {here} had been imported ahead of this kernel"
                self._tell(SetTooLate, f"{message}. {REMEDY}")
            self._forget({each})

    def _below(self, unit: str) -> list[str]:
        return sorted(each for each in self._ahead.below(unit) if each in self._hidden and not each.startswith(f"{OWN}."))

    def _forget(self, units: Set[str]) -> set[str]:
        """Have these imported anew, and what needs them, but not what is compiled, or ours. Which of them were hidden."""
        above = self._ahead.above(units - self._ahead.solid) - self._ahead.solid
        forgotten = {unit for unit in above if unit in self._hidden and not unit.startswith(f"{OWN}.")}
        for unit in forgotten:
            for name in self._ahead.modules[unit]:
                self._hidden.pop(name, None)
        return forgotten

    def _tell(self, category: type[UserWarning], message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn_explicit(message, category, "nbcache", 1)


class _Known(importlib.abc.Loader):
    """Gives a module that is there already. Whoever asks for its source, asks the loader that it came from."""

    def __init__(self, module: Any, veil: Veil) -> None:  # noqa: ANN401 - some packages put other objects there
        self._module = module
        self._veil = veil
        self._before = {name: value for name, value in attributes(module).items() if name in ("__spec__", "__loader__")}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(getattr(self._before.get("__spec__"), "loader", None), name)

    def create_module(self, spec: ModuleSpec) -> Any:  # noqa: ANN401
        """See :class:`importlib.abc.Loader`."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """It was executed; what the import system has set is as it was."""
        assert module.__spec__ is not None
        self._veil.bring(module.__spec__.name)
        attributes(module).update(self._before)


def _spec_of(name: str, module: Any, veil: Veil) -> ModuleSpec:  # noqa: ANN401
    original = attributes(module).get("__spec__")
    spec = ModuleSpec(name, _Known(module, veil), origin=getattr(original, "origin", None))
    spec.submodule_search_locations = getattr(original, "submodule_search_locations", None)
    spec.has_location = getattr(original, "has_location", False)
    return spec


def _searched() -> list[str]:
    """Where modules are looked for."""
    return [os.path.abspath(folder) for folder in sys.path if isinstance(folder, str)]


def has_come_back(name: str) -> bool:
    """Whether a module of this process was imported ahead of it."""
    return any(isinstance(finder, Veil) and finder.has_brought(name) for finder in sys.meta_path)
