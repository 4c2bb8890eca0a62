"""Packages that a zygote cannot import, imported by each kernel when it first uses them.

A package that starts threads or asks the GPU when it is imported would spoil forks; so would whatever imports it. Most of that
only binds its name (``import onnxruntime as ort``) and uses it later. Here that name gets a module which is yet to be
executed, so that everything above it can be imported ahead. Unlike :class:`importlib.util.LazyLoader`'s, it may be looked
at: what the import system knows of a module, and :mod:`inspect` asks of all there are, executes nothing.
"""

from __future__ import annotations

import importlib.abc
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ASKED_OF_MODULES = frozenset({"__file__", "__doc__", "__wrapped__", "__signature__", "__warningregistry__", "__bases__"})
"""What is asked of any module, though few have it; not worth executing one."""

_executing = threading.RLock()


class DeferredLoader(importlib.abc.Loader):
    """Makes a package's module, and executes it when an attribute is missed."""

    def __init__(self, loader: Any) -> None:  # noqa: ANN401 - whatever kind it has
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See :class:`importlib.abc.Loader`."""
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave it for later."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__dict__.pop("__path__", None)  # who imports a module of a package executes the package first
        module.__class__ = _Deferred


class _Deferred(ModuleType):
    """A module that is not executed yet."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name in ASKED_OF_MODULES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        execute(self)
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        if name != "__class__":
            execute(self)
        ModuleType.__setattr__(self, name, value)  # which is its class by now

    def __delattr__(self, name: str) -> None:
        execute(self)
        ModuleType.__delattr__(self, name)

    def __dir__(self) -> list[str]:
        execute(self)
        return list(self.__dir__())


def is_deferred(module: object) -> bool:
    """Whether a module is yet to be executed."""
    return type(module) is _Deferred


def execute(module: ModuleType) -> None:
    """Execute a module that was deferred, once. If that fails, the next use tries again."""
    with _executing:
        if not is_deferred(module):
            return
        spec = module.__spec__
        assert spec is not None
        before = dict(module.__dict__)
        module.__class__ = ModuleType
        if spec.submodule_search_locations is not None:
            module.__path__ = spec.submodule_search_locations
        try:
            assert spec.loader is not None
            spec.loader.exec_module(module)
        except BaseException:
            module.__dict__.clear()
            module.__dict__.update(before)
            module.__class__ = _Deferred
            raise
