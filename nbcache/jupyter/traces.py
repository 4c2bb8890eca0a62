"""What imports leave in a process that each kernel must have of its own, or as if it had imported them itself.

A zygote's imports run once, for all its kernels: a generator of random numbers that a module makes would give each of them the
same numbers, a log handler would write where the zygote writes. Owns what is noted during the imports, and what is done about
it in a forked process, for Python's own modules and sympy, which torch brings; what else libraries keep is in the guide.
"""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import random
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

_generators: list[weakref.ref[random.Random]] = []


@contextlib.contextmanager
def noting_generators() -> Iterator[None]:
    """Note the generators that are made meanwhile with a seed of the system's, as ``random.Random()`` makes them."""
    stock = random.Random.seed

    def seed(self: random.Random, a: Any = None, version: int = 2) -> None:  # noqa: ANN401
        if a is None and type(self) is random.Random:
            _generators.append(weakref.ref(self))
        stock(self, a, version)

    random.Random.seed = seed  # type: ignore[method-assign]
    try:
        yield
    finally:
        random.Random.seed = stock  # type: ignore[method-assign]


def reseed_generators(find: Callable[[str], Any]) -> None:
    """Give those that were noted new seeds of the system's. What was seeded on purpose stays. ``find`` gives modules."""
    for known in _generators:
        if (generator := known()) is not None:
            generator.seed()
    if (symbol := find("sympy.core.symbol")) is not None:  # it drew at once what tells Dummy symbols apart
        with contextlib.suppress(AttributeError):
            symbol.Dummy._base_dummy_index = random.randint(10**6, 9 * 10**6)  # noqa: S311 - as sympy does


@contextlib.contextmanager
def noting_folders(found: list[str]) -> Iterator[None]:
    """Note the temporary directories that are made meanwhile. The first kernel that ends would remove them for all."""
    stock = tempfile.mkdtemp

    def mkdtemp(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        folder = stock(*arguments, **options)
        found.append(str(folder))
        return folder

    tempfile.mkdtemp = mkdtemp
    try:
        yield
    finally:
        tempfile.mkdtemp = stock


@contextlib.contextmanager
def noting_imports(found: dict[str, set[str]]) -> Iterator[None]:
    """Note the packages that each package imports meanwhile, whether they were there already or not."""
    stock = builtins.__import__

    def noting(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        name, scope, _, _, level = (*arguments, *(None,) * 5)[:5]
        if scope is not None and not level:
            found.setdefault(_package_of(scope), set()).add(name.partition(".")[0])
        return stock(*arguments, **options)

    builtins.__import__ = noting
    try:
        yield
    finally:
        builtins.__import__ = stock


Reads = dict[str, dict[str, str | None]]
"""By package, the variables of the environment that it has read, and what it found first."""


@contextlib.contextmanager
def noting_reads(found: Reads) -> Iterator[None]:
    """Note the variables that are read meanwhile, for each package that asks. Going through all of them does not count."""
    kind: Any = type(os.environ)
    stock_get, stock_iterate = kind.__getitem__, kind.__iter__
    passed: deque[Any] = deque()  # what was gone through: its values come next, in this order

    def get(self: object, key: Any) -> Any:  # noqa: ANN401
        value = None
        try:
            value = stock_get(self, key)
        finally:
            if passed and key == passed[0]:
                passed.popleft()
            elif isinstance(key, str):
                for package in _asking():
                    found.setdefault(package, {}).setdefault(key, value)
        return value

    def iterate(self: object) -> Iterator[Any]:
        passed.clear()
        for key in stock_iterate(self):
            passed.append(key)
            yield key

    kind.__getitem__, kind.__iter__ = get, iterate
    try:
        yield
    finally:
        kind.__getitem__, kind.__iter__ = stock_get, stock_iterate


@contextlib.contextmanager
def noting_operators(found: set[str]) -> Iterator[None]:
    """Note the packages that register operators with torch meanwhile, but for custom ones: it does not take them twice."""
    kind: Any = sys.modules["torch"].library.Library
    stock = kind.__init__

    @wraps(stock)
    def noting(self: object, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        if sys._getframe(1).f_globals.get("__name__") != "torch._library.custom_ops":
            found.update(_asking())
        stock(self, *arguments, **options)

    kind.__init__ = noting
    try:
        yield
    finally:
        kind.__init__ = stock


def _asking() -> set[str]:
    """The packages of the module that is being executed, and of the functions that it has called."""
    found: set[str] = set()
    frame = sys._getframe(2)
    while frame is not None:
        found.add(_package_of(frame.f_globals))
        if frame.f_code.co_name == "<module>":
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _package_of(scope: dict[str, Any]) -> str:
    return str(scope.get("__name__", "")).partition(".")[0]


class Writers:
    """The log handlers that write to ``stdout`` or ``stderr`` as these are now, in a process that is to get others.

    To be made before the kernel is: it sets up logging for itself, and Python forgets then which handlers there are.
    """

    def __init__(self) -> None:
        self._streams = (sys.stdout, sys.stderr)
        known = [reference() for reference in logging._handlerList]  # type: ignore[attr-defined]
        self._handlers = [handler for handler in known if self._which(getattr(handler, "stream", None)) is not None]

    def _which(self, stream: object) -> int | None:
        return next((number for number, own in enumerate(self._streams) if own is stream and own is not None), None)

    def hand_over(self) -> None:
        """Have them write to ``stdout`` and ``stderr`` as they are now."""
        new = (sys.stdout, sys.stderr)
        for handler in self._handlers:
            if (number := self._which(handler.stream)) is not None:
                handler.stream = new[number]
            flush = vars(handler).get("flush")  # transformers and its kin give theirs that of the stream
            if (number := self._which(getattr(flush, "__self__", None))) is not None:
                handler.flush = new[number].flush


def begin_logging_anew() -> None:
    """Have log records tell the time since this process started."""
    is_ns = isinstance(logging._startTime, int)  # type: ignore[attr-defined] # from Python 3.13 on
    logging._startTime = time.time_ns() if is_ns else time.time()  # type: ignore[attr-defined]
