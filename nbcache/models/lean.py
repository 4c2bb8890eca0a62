"""Building a model around tensors that are there already, without what libraries do for those that are not.

Owns the shortcuts: parameters made without memory at once, patterns compiled when they are used. Each gives what the library's
own way gives, and leaves it to that where anything is out of the ordinary. Must not know where tensors come from. It exists
because building is most of what a load of a whole pipeline takes. Needs torch.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.GroupNorm,
)  # fmt: skip
"""Those whose parameters are most of a model's. They have no buffers, which would have to be real."""


@contextlib.contextmanager
def layers_without_memory() -> Iterator[None]:
    """Have the common layers make their parameters on the meta device, rather than in memory that is given up at once.

    Unless they are told a device. In this thread alone, as transformers 5 does.
    """
    with contextlib.ExitStack() as stack:
        for layer in LAYERS:
            stack.enter_context(_made_on_meta(layer))
        stack.enter_context(no_values_on_meta())
        yield


@contextlib.contextmanager
def no_values_on_meta() -> Iterator[None]:
    """Have the common layers not initialise what has no memory, which takes as long as if it had."""
    with contextlib.ExitStack() as stack:
        for kind in {next(k for k in layer.__mro__ if "reset_parameters" in k.__dict__) for layer in LAYERS}:
            stack.enter_context(_without_values(kind))
        yield


@contextlib.contextmanager
def _made_on_meta(layer: type[nn.Module]) -> Iterator[None]:
    """A layer's ``device`` defaults to meta."""
    init, thread = layer.__init__, threading.get_ident()
    names = init.__code__.co_varnames[: init.__code__.co_argcount] if isinstance(init, FunctionType) else ()
    if "device" not in names:
        yield  # somebody else's
        return
    before = names.index("device") - 1  # and self is not counted

    @functools.wraps(init)
    def made(self: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        if len(args) <= before and threading.get_ident() == thread:
            kwargs.setdefault("device", "meta")
        init(self, *args, **kwargs)

    layer.__init__ = made  # type: ignore[method-assign]
    try:
        yield
    finally:
        layer.__init__ = init  # type: ignore[method-assign]


@contextlib.contextmanager
def _without_values(kind: type[Any]) -> Iterator[None]:
    """A layer on the meta device is not initialised."""
    stock = kind.reset_parameters

    def reset(self: Any) -> None:  # noqa: ANN401
        weight = self._parameters.get("weight")
        if weight is not None and not weight.is_meta:
            stock(self)

    kind.reset_parameters = reset
    try:
        yield
    finally:
        kind.reset_parameters = stock


@contextlib.contextmanager
def late_patterns(module: ModuleType) -> Iterator[None]:
    """Have a module of a library compile its regular expressions when it first uses them.

    transformers makes one for each tensor that it loads, of its name, and uses none of those.
    """
    stock = getattr(module, "re", None)
    if stock is not re:
        yield
        return
    module.re = _LateRe()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.re = stock  # type: ignore[attr-defined]


class _LateRe:
    """The module ``re``, but for ``compile``."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(re, name)

    @staticmethod
    def compile(pattern: str, flags: int = 0) -> _LatePattern:
        """See :func:`re.compile`; errors come later, too."""
        return _LatePattern(pattern, flags)


class _LatePattern:
    """Stands for a compiled pattern."""

    def __init__(self, pattern: str, flags: int) -> None:
        self._made = pattern, flags

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(re.compile(*self._made), name)  # which remembers the last 512

    def __reduce__(self) -> Any:  # noqa: ANN401
        return re.compile, self._made
