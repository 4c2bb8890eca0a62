"""What imports change in the whole process, beside the modules that they bring: noted by package, undone, and done again.

A zygote imports for kernels that may never import the same. Without this, a package that silences all warnings when it is
imported would silence those of every notebook. Owns the list of what is looked at: warning filters, the import system's
hooks, log handlers, variables, signals, limits, number formats. What it does not list stays as the import left it.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import importlib
import locale
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

ABSENT: Any = object()
PLAIN = (str, int, float, bool, tuple, dict, list)
"""Types whose values are compared; others are the same only if they are the same object."""


@dataclass(frozen=True)
class Change:
    """One thing that an import has changed."""

    do: Callable[[], object]
    undo: Callable[[], object]


@dataclass(frozen=True)
class Value:
    """A place that holds one value; if reading it raises, there is none. With ``gently``, what others have set stays."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    gently: bool = False

    def look(self) -> object:
        """What is there now."""
        try:
            return self.read()
        except Exception:  # noqa: BLE001 - a package that is imported by half may raise anything
            return ABSENT

    def changes(self, before: object, after: object) -> Iterator[Change]:
        """What has become of it."""
        if ABSENT not in (before, after) and not _same(before, after):
            yield Change(lambda: self._put(before, after), lambda: self._put(after, before))

    def _put(self, old: object, new: object) -> None:
        if not self.gently or _same(self.look(), old):
            self.write(new)


@dataclass(frozen=True)
class Items:
    """A place that holds values by key; ABSENT is written to remove one. With ``gently``, what others have set stays."""

    read: Callable[[], Mapping[Any, Any]]
    write: Callable[[Any, Any], object]
    gently: bool = False

    def look(self) -> Mapping[Any, Any]:
        """What is there now; nothing where reading raises."""
        try:
            return dict(self.read())
        except Exception:  # noqa: BLE001 - as above
            return {}

    def changes(self, before: Mapping[Any, Any], after: Mapping[Any, Any]) -> Iterator[Change]:
        """What has become of it."""
        for key in before.keys() | after.keys() if before and after else ():
            old, new = before.get(key, ABSENT), after.get(key, ABSENT)
            if not _same(old, new):
                yield Change(partial(self._put, key, old, new), partial(self._put, key, new, old))

    def _put(self, key: object, old: object, new: object) -> None:
        if not self.gently or _same(self.look().get(key, ABSENT), old):
            self.write(key, new)


@dataclass(frozen=True)
class Entries:
    """A place that holds a list, whose order counts. With ``gently``, a list that others have changed stays."""

    read: Callable[[], list[Any]]
    gently: bool = False

    def look(self) -> list[Any]:
        """What is there now."""
        return list(self.read())

    def changes(self, before: list[Any], after: list[Any]) -> Iterator[Change]:
        """What has become of it."""
        if not _all_same(before, after):
            yield Change(lambda: self._put(before, after), lambda: self._put(after, before))

    def _put(self, old: list[Any], new: list[Any]) -> None:
        """Do to the list what made ``new`` of ``old``: what was put or moved to the front, appended, and removed.

        What was there before and after, and is gone by now, stays away.
        """
        entries = self.read()
        if self.gently and not _all_same(entries, old):
            return
        end = len(new)
        while end and not _is_in(new[end - 1], old):
            end -= 1
        same = 0
        while same < min(end, len(old)) and _same(new[end - 1 - same], old[-1 - same]):
            same += 1
        front = [entry for entry in new[: end - same] if not _is_in(entry, old) or _is_in(entry, entries)]
        back = [entry for entry in new[end:] if not _is_in(entry, entries)]
        gone = [entry for entry in old if not _is_in(entry, new)]
        entries[:] = [*front, *(entry for entry in entries if not _is_in(entry, front) and not _is_in(entry, gone)), *back]


def _same(one: object, other: object) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, PLAIN) and bool(one == other))


def _all_same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(_same, some, others))


def _is_in(entry: object, entries: list[Any]) -> bool:
    return any(_same(entry, other) for other in entries)


def _write_variable(name: str, value: str) -> None:
    if value is ABSENT:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _write_builtin(name: str, value: object) -> None:
    if value is ABSENT:
        vars(builtins).pop(name, None)
    else:
        vars(builtins)[name] = value


def _signals() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in range(1, signal.NSIG)}


def _write_signal(number: int, handler: Any) -> None:  # noqa: ANN401
    with contextlib.suppress(ValueError, OSError, TypeError):  # another thread than the first imports
        signal.signal(number, handler)


def _write_collector(setting: tuple[tuple[int, int, int], bool]) -> None:
    gc.set_threshold(*setting[0])
    (gc.enable if setting[1] else gc.disable)()


def _decimals() -> dict[str, Any]:
    context = sys.modules["decimal"].getcontext()
    own = {name: getattr(context, name) for name in ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")}
    return own | {kind: bool(is_set) for kind, is_set in context.traps.items()}


def _write_decimal(key: Any, value: Any) -> None:  # noqa: ANN401
    context = importlib.import_module("decimal").getcontext()
    if isinstance(key, str):
        setattr(context, key, value)
    else:
        context.traps[key] = value


def _hook(owner: Any, name: str) -> Value:  # noqa: ANN401
    return Value(lambda: vars(owner)[name], lambda value: setattr(owner, name, value))


def _numpys(getter: str, setter: str) -> Items:
    """Settings of NumPy's, by the names of the setter's arguments; there are none until it has been imported."""
    return Items(
        lambda: getattr(sys.modules["numpy"], getter)(),
        lambda name, value: getattr(importlib.import_module("numpy"), setter)(**{name: value}),
    )


def _torchs(getter: str, setter: str) -> Value:
    return Value(
        lambda: getattr(sys.modules["torch"], getter)(),
        lambda value: getattr(importlib.import_module("torch"), setter)(value),
    )


PLACES: tuple[Value | Items | Entries, ...] = (
    Entries(lambda: warnings.filters),  # type: ignore[arg-type, return-value]
    Entries(lambda: sys.meta_path),
    Entries(lambda: sys.path_hooks),
    Entries(lambda: sys.path),
    Entries(lambda: logging.root.handlers, gently=True),
    Entries(lambda: logging.root.filters),
    Items(lambda: os.environ, _write_variable, gently=True),
    Items(lambda: vars(builtins), _write_builtin),
    Items(_signals, _write_signal),
    Value(lambda: logging.root.level, lambda level: logging.root.setLevel(level), gently=True),
    Value(lambda: logging.root.manager.disable, lambda level: logging.disable(level)),
    Value(logging.getLoggerClass, logging.setLoggerClass),
    Value(logging.getLogRecordFactory, logging.setLogRecordFactory),
    _hook(logging, "_warnings_showwarning"),
    _hook(warnings, "showwarning"),
    _hook(warnings, "formatwarning"),
    _hook(sys, "excepthook"),
    _hook(sys, "displayhook"),
    _hook(sys, "unraisablehook"),
    _hook(threading, "excepthook"),
    Value(sys.getrecursionlimit, sys.setrecursionlimit, gently=True),
    Value(sys.getswitchinterval, sys.setswitchinterval),
    Value(lambda: (gc.get_threshold(), gc.isenabled()), _write_collector),
    Value(lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name)),
    Items(_decimals, _write_decimal),
    _numpys("get_printoptions", "set_printoptions"),
    _numpys("geterr", "seterr"),
    _torchs("get_default_dtype", "set_default_dtype"),
    _torchs("is_grad_enabled", "set_grad_enabled"),
    _torchs("get_float32_matmul_precision", "set_float32_matmul_precision"),
)


class Effects:
    """What each package has changed since this was made.

    Notes
    -----
    What happens while one package is executed that another one imports, is that one's own; but if it fails, the other's, which
    may do without. If there is none, it is undone at once.
    """

    def __init__(self) -> None:
        self._executing: list[str] = []
        self._seen: list[Any] = [place.look() for place in PLACES]
        self._changes: list[tuple[str, Change]] = []

    @contextlib.contextmanager
    def of(self, package: str) -> Iterator[None]:
        """What changes meanwhile is this package's doing."""
        self._note()
        self._executing.append(package)
        first = len(self._changes)
        try:
            yield
        except BaseException:
            self._note()
            self._blame(package, first)
            raise
        finally:
            self._note()
            self._executing.pop()

    def _blame(self, package: str, first: int) -> None:
        """What a failing import has changed is the doing of who has asked for it; if nobody has, it is undone."""
        fresh = self._changes[first:]
        if len(self._executing) > 1:
            asking = self._executing[-2]
            self._changes[first:] = [(asking if other == package else other, change) for other, change in fresh]
            return
        for other, change in reversed(fresh):
            if other == package:
                _try(change.undo)
        self._changes[first:] = [(other, change) for other, change in fresh if other != package]
        self._seen = [place.look() for place in PLACES]

    def _note(self) -> None:
        now: list[Any] = [place.look() for place in PLACES]
        if self._executing:
            for place, before, after in zip(PLACES, self._seen, now, strict=True):
                self._changes += ((self._executing[-1], change) for change in place.changes(before, after))
        self._seen = now

    def undo(self) -> None:
        """Have all places as if nothing had been changed, the latest change first. What the standard library changes, stays."""
        for package, change in reversed(self._changes):
            if package not in sys.stdlib_module_names:
                _try(change.undo)
        _tell_of_filters()

    def do_again(self, package: str) -> None:
        """Change what a package has changed."""
        own = [change for other, change in self._changes if other == package]
        for change in own:
            _try(change.do)
        if own:
            _tell_of_filters()


def _try(work: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):  # an import that somebody waits for does not fail for it
        work()


def _tell_of_filters() -> None:
    """Have Python note that warning filters have changed: what was shown once is shown again."""
    with warnings.catch_warnings():
        pass
