"""In a forked kernel: what was imported ahead is out of sight until the kernel imports it.

An ordinary kernel can still set a variable that a package reads when it is imported, install another version, or put a folder
before the installed packages, and then import. So can a forked one: a package comes back when it is imported, with what it
needs and with what it had changed in the process; but if something that counts for it has changed by then, it is imported
anew, with all that stands on it. Packages with compiled modules cannot be, nor what these need: they come back as they are,
and a warning says so. Owns what is hidden.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from nbcache.client.notices import ImportedAnew, SetTooLate
from nbcache.jupyter.ahead import Ahead, attributes, unit_of
from nbcache.jupyter.deferred import execute, is_deferred
from nbcache.jupyter.installed import OWN, execute_within, spec_of_others

SET_EARLIER = "Set it where Jupyter is started, or in the kernelspec's env"
REMEDY = f"{SET_EARLIER}; or choose an ordinary kernel (Python 3) for this notebook"
NOTICED_S = 0.5
"""An import that takes so long is told of, if it need not have been."""
SET_BY_IMPORT = ("__spec__", "__loader__", "__package__", "__path__", "__file__", "__cached__")
"""What the import system gives each module."""
TWO_THREADS: type[Exception] = getattr(importlib, "_bootstrap")._DeadlockError  # noqa: B009 - it has no public name
"""Raised in one of two threads that import, in opposite order, what needs each other; the other thread goes on."""


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
        self._retrievable: dict[str, dict[str, Any]] = {}
        self._coming: list[str] = []
        self._is_settled = False
        self._folders: Mapping[str, object] = {}
        self._environment: dict[str, str] = {}
        self._path: list[str] = []
        self._told: set[str] = set()

    def draw(self) -> None:
        """Hide all of it."""
        for names in self._ahead.modules.values():
            self._hidden.update((name, sys.modules.pop(name)) for name in names if name in sys.modules)
        for name in self._hidden:
            parent, _, child = name.rpartition(".")
            attributes(sys.modules.get(parent)).pop(child, None)
        sys.meta_path.insert(0, self)

    def settle(self, shell: Any = None) -> None:  # noqa: ANN401 - IPython's
        """The kernel is set up: from now on, what changes counts. ``shell`` is where cells are run."""
        self._is_settled = True
        self._environment, self._path = dict(os.environ), _searched()
        if shell is not None:
            shell.events.register("post_run_cell", self.after_cell)

    def known(self, name: str) -> Any:  # noqa: ANN401
        """A module that was imported, hidden or not; None if there is none."""
        return self._hidden.get(name, sys.modules.get(name))

    def has_brought(self, name: str) -> bool:
        """Whether a module was hidden, and came back as it was."""
        return name in self._brought

    # Imports

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the import system asks for: the very module, if it is hidden and nothing that counts for it has changed."""
        if fullname in self._hidden and self._is_settled:
            self._heed(unit_of(fullname))
        if (module := self._hidden.get(fullname)) is not None:
            return _spec_of(fullname, module, self)
        return self._spec_anew(fullname, path, target) if fullname in self._retrievable else None

    def bring(self, fullname: str) -> None:
        """Import what a module needs that is being imported, and bring back what comes with it; all, or nothing."""
        unit = unit_of(fullname)
        self._coming.append(unit)
        try:
            self._import_needs(unit)
            self._show(unit, fullname)
        finally:
            self._coming.remove(unit)

    def _spec_anew(self, unit: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        """What other finders have for a unit that is to be imported anew: if it cannot be, it comes back as it was."""
        modules = self._retrievable.pop(unit)
        spec = spec_of_others(self, unit, path, target)
        if spec is not None:
            execute_within(spec.loader, lambda _: self._or_as_it_was(unit, modules), unit)
        return spec

    @contextlib.contextmanager
    def _or_as_it_was(self, unit: str, modules: dict[str, Any]) -> Iterator[None]:
        """Some have registered with another package what that does not take twice."""
        try:
            yield
        except ImportError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, an ordinary kernel would hardly have it
            for name in [name for name in sys.modules if unit_of(name) == unit]:
                del sys.modules[name]
            self._hidden.update(modules)
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            self._tell(SetTooLate, f"{unit} cannot be imported anew ({said}); it is as before. {REMEDY}")
            sys.modules[unit] = modules[unit]
            self.bring(unit)

    def _import_needs(self, unit: str) -> None:
        for needed in sorted(self._ahead.needs[unit]):
            if needed in sys.modules:
                continue
            if needed not in self._hidden:  # it is to be executed here; who needs it may do without
                with contextlib.suppress(Exception):
                    __import__(needed)
            elif isinstance(module := self._hidden[needed], ModuleType) and not is_deferred(module):
                with contextlib.suppress(TWO_THREADS):
                    __import__(needed)
            else:
                sys.modules.setdefault(needed, self._hidden.pop(needed, module))

    def _show(self, unit: str, fullname: str) -> None:
        """Have the modules of a unit where modules are looked for, and done again what they had changed."""
        modules = {name: self._hidden.pop(name) for name in self._ahead.modules[unit] if name in self._hidden}
        try:
            for name, module in modules.items():
                if name != fullname:
                    sys.modules.setdefault(name, module)
            self._brought.update(modules)
            for finder in list(sys.meta_path):
                if (notice := getattr(finder, "came_back", None)) is not None:  # one that looks for imports, which these are
                    notice(modules.values())
            for state in self._ahead.loggers.get(unit, ()):
                state.logger.disabled = False  # by a configuration that took it for one that is in use
            self._ahead.effects.do_again(unit)
        except BaseException:
            for name, module in modules.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]
            self._hidden.update(modules)
            raise

    # Changes

    def _heed(self, unit: str) -> None:
        """Forget what would be something else by now, of a unit and all that it needs; tell of what cannot be forgotten."""
        if (folders := self._ahead.changed_folders()) != self._folders:  # something was installed: who knows who looks for it
            self._folders = folders
            self._forget(set(self._ahead.modules))
        environment = dict(os.environ)
        readers: dict[str, list[str]] = {}
        for each in sorted(self._ahead.below(unit)):
            if each not in self._hidden or each in self._coming or each.startswith(f"{OWN}."):
                continue
            if each in sys.modules:  # somebody has put another there
                self._forget({each})
            elif self._ahead.has_changed(each):
                self._forget_or_tell(each, f"{each} has changed since it was imported ahead of this kernel. Restart the kernel")
            elif (elsewhere := self._found_elsewhere(each)) is not None:
                text = f"{elsewhere} is not what `import {each}` gives: another was imported ahead of this kernel. {REMEDY}"
                self._forget_or_tell(each, text)
            else:
                for variable in self._ahead.changed_variables(each, environment):
                    readers.setdefault(variable, []).append(each)
        for variable, units in readers.items():
            self._heed_variable(variable, units)

    def _forget_or_tell(self, unit: str, text: str) -> None:
        if unit in self._ahead.solid:
            self._tell(SetTooLate, text)
        self._forget({unit})

    def _heed_variable(self, variable: str, units: list[str]) -> None:
        anew = self._forget(set(units))
        self._retrievable |= anew
        if solid := " and ".join(unit for unit in units if unit in self._ahead.solid):
            text = (
                f"{variable} had another value when {solid} came to be imported, ahead of this kernel; what was read then stays"
            )
            self._tell(SetTooLate, f"{text}. {REMEDY}")
        if self._ahead.seconds(anew) >= NOTICED_S:
            text = (
                f"{variable} had another value when this was imported ahead, so it is imported anew: {', '.join(sorted(anew))}"
            )
            self._tell(ImportedAnew, f"{text}. {SET_EARLIER}, to be quicker")

    def _found_elsewhere(self, unit: str) -> str | None:
        """The file that would be imported now for a unit, if it is another."""
        here = attributes(self.known(unit)).get("__file__")
        found = PathFinder.find_spec(unit)
        if found is None or not found.origin or not here or os.path.abspath(found.origin) == os.path.abspath(here):
            return None
        return found.origin

    def _forget(self, units: Set[str]) -> dict[str, dict[str, Any]]:
        """Have these imported anew, and what needs them, but not what is solid, or ours. What was hidden of them."""
        above = self._ahead.above(units - self._ahead.solid) - self._ahead.solid
        forgotten: dict[str, dict[str, Any]] = {}
        for unit in [unit for unit in above if unit in self._hidden and not unit.startswith(f"{OWN}.")]:
            names = self._ahead.modules[unit]
            forgotten[unit] = {name: self._hidden.pop(name) for name in names if name in self._hidden}
            for state in self._ahead.loggers.get(unit, ()):
                state.undo()
        return forgotten

    def after_cell(self, result: Any) -> None:  # noqa: ANN401 - IPython's
        """Tell of what a cell has set too late for what came back before, with something else perhaps."""
        cell = str(getattr(getattr(result, "info", None), "raw_cell", ""))
        known, self._environment = self._environment, dict(os.environ)
        changed = {name for name, value in self._environment.items() if known.get(name) != value and name in cell}
        folders, self._path = self._path, _searched()
        if not changed and folders == self._path:
            return
        for unit in sorted({unit_of(name) for name in self._brought}):
            for variable in changed.intersection(self._ahead.changed_variables(unit, self._environment)):
                text = f"{variable} was set after {unit} had been imported, which goes on with what it has read"
                self._tell(SetTooLate, f"{text}. {REMEDY}")
            if folders != self._path and (elsewhere := self._found_elsewhere(unit)) is not None:
                self._tell(SetTooLate, f"{elsewhere} is not what `import {unit}` gives: another was imported before. {REMEDY}")

    def _tell(self, category: type[UserWarning], message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            try:
                warnings.warn_explicit(message, category, "nbcache", 1)
            except UserWarning as warning:  # warnings are errors here; but the import is none
                print(f"nbcache: {type(warning).__name__}: {warning}", file=sys.stderr)  # noqa: T201


class _Known(importlib.abc.Loader):
    """Gives a module that is there already. Whoever asks for its source, asks the loader that it came from."""

    def __init__(self, name: str, module: Any, veil: Veil) -> None:  # noqa: ANN401 - some packages put other objects there
        self._name = name
        self._module = module
        self._veil = veil
        self._before = {name: value for name, value in attributes(module).items() if name in SET_BY_IMPORT}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        original = getattr(self.__dict__.get("_before", {}).get("__spec__"), "loader", None)
        if original is None or name.startswith("__"):
            raise AttributeError(name)
        return getattr(original, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See :class:`importlib.abc.Loader`. For what is no ordinary module, another stands in until it is there."""
        if is_deferred(self._module):
            execute(self._module)
        kind = type(self._module)
        is_ordinary = issubclass(kind, ModuleType) and kind.__setattr__ is ModuleType.__setattr__
        return self._module if is_ordinary else None

    def exec_module(self, module: ModuleType) -> None:
        """It was executed; what the import system has set is as it was."""
        self._veil.bring(self._name)
        if module is not self._module:
            sys.modules[self._name] = self._module
        own = attributes(module)
        for name in SET_BY_IMPORT:
            own.pop(name, None)
        own.update(self._before)


def _spec_of(name: str, module: Any, veil: Veil) -> ModuleSpec:  # noqa: ANN401
    original = attributes(module).get("__spec__")
    spec = ModuleSpec(name, _Known(name, module, veil), origin=getattr(original, "origin", None))
    spec.submodule_search_locations = getattr(original, "submodule_search_locations", None)
    spec.has_location = getattr(original, "has_location", False)
    return spec


def _searched() -> list[str]:
    """Where modules are looked for."""
    return [os.path.abspath(folder) for folder in sys.path if isinstance(folder, str)]


def has_come_back(name: str) -> bool:
    """Whether a module of this process was imported ahead of it."""
    return any(isinstance(finder, Veil) and finder.has_brought(name) for finder in sys.meta_path)
