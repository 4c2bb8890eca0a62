"""What imports change in the whole process, beside the modules that they bring: noted by package, undone, and done again.

A zygote imports for kernels that may never import the same. Without this, a package that silences all warnings when it is
imported would silence those of every notebook. Owns the list of what is looked at: warning filters, the import system's
hooks, log handlers, variables, signals, limits, number formats. What it does not list stays as the import left it.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import locale
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
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
    """A place that holds one value; ``read`` raises something while there is none, its package being imported just now say."""

    read: Callable[[], Any]
    write: Callable[[Any], object]

    def look(self) -> object:
        """What is there now."""
        try:
            return self.read()
        except Exception:  # noqa: BLE001 - a package that is imported by half may raise anything
            return ABSENT

    def changes(self, before: object, after: object) -> Iterator[Change]:
        """What has become of it."""
        if ABSENT not in (before, after) and not _same(before, after):
            yield Change(lambda: self.write(after), lambda: self.write(before))


@dataclass(frozen=True)
class Items:
    """A place that holds values by key; ABSENT is written to remove one. With ``gently``, what others have set since stays."""

    read: Callable[[], Mapping[Any, Any]]
    write: Callable[[Any, Any], object]
    gently: bool = False

    def look(self) -> Mapping[Any, Any]:
        """What is there now."""
        return dict(self.read())

    def changes(self, before: Mapping[Any, Any], after: Mapping[Any, Any]) -> Iterator[Change]:
        """What has become of it."""
        for key in before.keys() | after.keys():
            old, new = before.get(key, ABSENT), after.get(key, ABSENT)
            if not _same(old, new):
                yield Change(lambda k=key, o=old, n=new: self._put(k, o, n), lambda k=key, o=old, n=new: self._put(k, n, o))  # type: ignore[misc]

    def _put(self, key: object, old: object, new: object) -> None:
        if not self.gently or _same(self.read().get(key, ABSENT), old):
            self.write(key, new)


@dataclass(frozen=True)
class Entries:
    """A place that holds a list, whose order counts."""

    read: Callable[[], list[Any]]

    def look(self) -> list[Any]:
        """What is there now."""
        return list(self.read())

    def changes(self, before: list[Any], after: list[Any]) -> Iterator[Change]:
        """What has become of it."""
        if len(before) == len(after) and all(map(_same, before, after)):
            return
        kept = [number for number, entry in enumerate(after) if _is_in(entry, before)]
        first = kept[0] if kept else len(after)
        front = [entry for entry in after[:first]]
        back = [entry for entry in after[first:] if not _is_in(entry, before)]
        gone = [entry for entry in before if not _is_in(entry, after)]
        yield Change(lambda: self._put(front, back, gone), lambda: self._put(gone, [], [*front, *back]))

    def _put(self, front: list[Any], back: list[Any], gone: list[Any]) -> None:
        entries = self.read()
        kept = [entry for entry in entries if not any(_is_in(entry, others) for others in (front, back, gone))]
        entries[:] = [*front, *kept, *back]


def _same(one: object, other: object) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, PLAIN) and bool(one == other))


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


def _decimals() -> tuple[Any, ...]:
    context = sys.modules["decimal"].getcontext()
    traps = tuple(kind for kind, is_set in context.traps.items() if is_set)
    return context.prec, context.rounding, context.Emin, context.Emax, context.capitals, context.clamp, traps


def _write_decimals(setting: tuple[Any, ...]) -> None:
    context = sys.modules["decimal"].getcontext()
    context.prec, context.rounding, context.Emin, context.Emax, context.capitals, context.clamp = setting[:6]
    for kind in context.traps:
        context.traps[kind] = kind in setting[6]


def _hook(owner: Any, name: str) -> Value:  # noqa: ANN401
    return Value(lambda: vars(owner)[name], lambda value: setattr(owner, name, value))


def _of_package(package: str, getter: str, setter: Callable[[Any, Any], object]) -> Value:
    """A setting of a package, read by a function of it; there is none until it has been imported."""
    return Value(lambda: getattr(sys.modules[package], getter)(), lambda value: setter(sys.modules[package], value))


PLACES: tuple[Value | Items | Entries, ...] = (
    Entries(lambda: warnings.filters),  # type: ignore[arg-type, return-value]
    Entries(lambda: sys.meta_path),
    Entries(lambda: sys.path_hooks),
    Entries(lambda: sys.path),
    Entries(lambda: logging.root.handlers),
    Entries(lambda: logging.root.filters),
    Items(lambda: os.environ, _write_variable, gently=True),
    Items(lambda: vars(builtins), _write_builtin),
    Items(_signals, _write_signal),
    Value(lambda: logging.root.level, lambda level: logging.root.setLevel(level)),
    Value(lambda: logging.root.manager.disable, lambda level: logging.disable(level)),
    Value(logging.getLoggerClass, logging.setLoggerClass),
    Value(logging.getLogRecordFactory, logging.setLogRecordFactory),
    _hook(warnings, "showwarning"),
    _hook(warnings, "formatwarning"),
    _hook(sys, "excepthook"),
    _hook(sys, "displayhook"),
    _hook(sys, "unraisablehook"),
    _hook(threading, "excepthook"),
    Value(sys.getrecursionlimit, sys.setrecursionlimit),
    Value(sys.getswitchinterval, sys.setswitchinterval),
    Value(lambda: (gc.get_threshold(), gc.isenabled()), _write_collector),
    Value(lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name)),
    Value(_decimals, _write_decimals),
    _of_package("numpy", "get_printoptions", lambda numpy, options: numpy.set_printoptions(**options)),
    _of_package("numpy", "geterr", lambda numpy, options: numpy.seterr(**options)),
    _of_package("torch", "get_default_dtype", lambda torch, dtype: torch.set_default_dtype(dtype)),
    _of_package("torch", "is_grad_enabled", lambda torch, is_on: torch.set_grad_enabled(is_on)),
    _of_package("torch", "get_float32_matmul_precision", lambda torch, name: torch.set_float32_matmul_precision(name)),
)


class Effects:
    """What each package has changed since this was made.

    Notes
    -----
    What happens while one package is executed that another one imports, is that one's own.
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
        try:
            yield
        finally:
            self._note()
            self._executing.pop()

    def _note(self) -> None:
        now: list[Any] = [place.look() for place in PLACES]
        if self._executing:
            for place, before, after in zip(PLACES, self._seen, now, strict=True):
                self._changes += ((self._executing[-1], change) for change in place.changes(before, after))
        self._seen = now

    def undo(self, packages: Container[str]) -> None:
        """Have all places as if these packages had changed nothing, the latest change first."""
        for package, change in reversed(self._changes):
            if package in packages:
                change.undo()

    def do_again(self, package: str) -> None:
        """Change what a package has changed."""
        for other, change in self._changes:
            if other == package:
                change.do()
