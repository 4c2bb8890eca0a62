"""The switch that serves unchanged programs: while it is on, their ``from_pretrained`` and ``load_file`` use the cache.

Owns which names are replaced, and that each is put back. Must not know how anything is served (:mod:`nbcache.models.service`),
and imports neither torch nor safetensors: switching on is cheap, and a module that is imported later is bound when it comes.
The switch is one for the process, as the modules whose names it replaces are.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nbcache.models.aside import is_aside
from nbcache.models.points import POINTS, Kind, Point, watched

if TYPE_CHECKING:
    from nbcache.models.service import Service

Function = Callable[..., Any]

KEPT = frozenset((point.module, point.name) for point in POINTS if point.kind == "keep")

ALIASED: frozenset[Kind] = frozenset({"load_file", "safe_open"})
"""Functions that anyone may have imported under any name, a notebook too."""


class Switch:
    """On while :meth:`turn` said so, or while a block of :meth:`block` is open.

    Notes
    -----
    Locked: threads may turn it, and import, at once. Off, no module has a replacement in it; a replacement that somebody kept
    elsewhere calls the stock function.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._turned_on = False
        self._blocks = 0
        self._bound = False
        self._service: Service | None = None
        self._watch = ImportWatch(watched(), self._imported)
        self._replacements: dict[tuple[Kind, int], Function] = {}
        """By kind and identity of the stock function."""
        self._stock: dict[int, Function] = {}
        """The stock function behind each replacement, by the identity of the latter."""

    @property
    def on(self) -> bool:
        """Whether loads are served."""
        return self._bound

    def turn(self, on: bool) -> None:
        """Turn it on or off. On again asks a daemon again that was given up."""
        with self._lock:
            self._turned_on = on
            if on and self._service is not None:
                self._service.resume()
            self._update()

    @contextmanager
    def block(self) -> Iterator[None]:
        """On inside, and as before after the last such block."""
        with self._lock:
            self._blocks += 1
            self._update()
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                self._update()

    def _update(self) -> None:
        wanted = self._turned_on or self._blocks > 0
        if wanted == self._bound:
            return
        self._bound = wanted
        if wanted:
            sys.meta_path.insert(0, self._watch)
            self._bind_all(list(sys.modules.values()))
        else:
            sys.meta_path.remove(self._watch)
            self._service = None
            _rebind(self._stock, list(sys.modules.values()))

    def _imported(self, modules: Iterable[object]) -> None:
        with self._lock:
            if self._bound:
                self._bind_all(list(modules))

    def _bind_all(self, modules: Collection[object]) -> None:
        """Replace what the table has for these modules, and in all of them what was imported from safetensors before."""
        for module in modules:
            if isinstance(module, ModuleType) and vars(module).get("__name__") in watched():
                self._bind(module)
        _rebind({stock: new for (kind, stock), new in self._replacements.items() if kind in ALIASED}, modules)

    def _bind(self, module: ModuleType) -> None:
        """Replace the names that the table has for a module. Those that are kept may have come from a module that was bound."""
        for point in (point for point in POINTS if point.module == module.__name__):
            found = vars(module).get(point.name)
            ours = id(found) in self._stock
            if ours and point.kind == "keep":
                vars(module)[point.name] = self._stock[id(found)]
            elif callable(found) and not ours and point.kind != "keep":
                vars(module)[point.name] = self._replacement(point, found)

    def _replacement(self, point: Point, stock: Function) -> Function:
        made = self._replacements.get((point.kind, id(stock)))
        if made is None:
            made = self._replacements[point.kind, id(stock)] = self._make(point.kind, stock)
            self._stock[id(made)] = stock
        return made

    def _make(self, kind: Kind, stock: Function) -> Function:
        @functools.wraps(stock, updated=())
        def replacement(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the stock function takes and gives
            service = self._serving()
            if service is None:
                return stock(*args, **kwargs)
            return getattr(service, kind)(stock, *args, **kwargs)

        return _type_like(stock, replacement) if isinstance(stock, type) else replacement

    def _serving(self) -> Service | None:
        """What serves a call now; None if it is the stock function's."""
        if not self._bound or is_aside():
            return None
        service = self._service
        if service is None:
            from nbcache.models.service import Service

            with self._lock:
                service = self._service = self._service or Service()
        return None if service.given_up else service


class _Opening(type):
    """Of a type that stands for another one: making one calls a function, and both kinds are its instances."""

    opened_by: Function

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the function takes and gives
        return cls.opened_by(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        served = getattr(sys.modules.get("nbcache.models.served"), "ServedFile", ())
        return isinstance(instance, (cls.__wrapped__, served))  # type: ignore[attr-defined]


def _type_like(stock: type, function: Function) -> Function:
    """The function as a type: annotations and ``isinstance`` go on as with the stock type."""
    described = {name: getattr(function, name) for name in ("__module__", "__qualname__", "__doc__", "__wrapped__")}
    return _Opening(stock.__name__, (), {**described, "opened_by": staticmethod(function)})


def _rebind(instead: dict[int, Function], modules: Iterable[object]) -> None:
    """In these modules, the notebook's own among them, put what ``instead`` has for an object's identity in its place."""
    for module in modules:
        if isinstance(module, ModuleType):
            names = vars(module)
            for name, value in list(names.items()):
                if id(value) in instead and (module.__name__, name) not in KEPT:
                    names[name] = instead[id(value)]


class ImportWatch(MetaPathFinder):
    """Says when one of the named modules was imported, right after its code ran. Finds nothing itself.

    In a kernel that was forked, many come at once, whose code ran before: then it is told of them, and says all.
    """

    def __init__(self, names: frozenset[str], imported: Callable[[Iterable[object]], None]) -> None:
        self._names = names
        self._callback = imported

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The other finders' answer, with a loader that reports; called by the import system."""
        if fullname not in self._names:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target) if finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Reporting(spec.loader, self._callback)
                return spec
        return None

    def came_back(self, modules: Iterable[object]) -> None:
        """The finder of :mod:`nbcache.jupyter.veil` calls this."""
        self._callback(modules)


class _Reporting(Loader):
    """A module's loader, until it has run: the module itself is given the original."""

    def __init__(self, original: Loader, imported: Callable[[Iterable[object]], None]) -> None:
        self._original = original
        self._callback = imported

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._original
        module.__loader__ = self._original
        self._original.exec_module(module)
        self._callback([module])

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._original, name)


_switch = Switch()


def enable() -> None:
    """Serve unchanged programs from the cache, until :func:`disable`.

    That is ``from_pretrained`` of transformers, diffusers and peft, ``safetensors.torch.load_file`` and
    ``safetensors.safe_open``, in all threads. What the cache does not serve (other formats, devices and options; files it has
    no room for) goes to the stock function, and so does everything, after one warning, when there is no daemon; calling this
    again asks for a daemon again.
    """
    _switch.turn(True)


def disable() -> None:
    """Undo :func:`enable`. Tensors that were served stay valid; open :func:`enabled` blocks go on."""
    _switch.turn(False)


def enabled() -> AbstractContextManager[None]:
    """Serve as :func:`enable` does, in a ``with`` block, in all threads. Blocks may be nested."""
    return _switch.block()


def turn(on: bool) -> None:
    """:func:`enable` or :func:`disable`."""
    _switch.turn(on)


def is_enabled() -> bool:
    """Whether loads are served now."""
    return _switch.on
