"""How our magics behave, whatever they do: errors of one line, silence after a semicolon, a bar where one may be drawn.

Owns what is printed from a cell, and how the words of a line are read. Must not know what a magic is for.
"""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics
from IPython.core.magic_arguments import parse_argstring

from nbcache import completion
from nbcache.errors import NBCacheError
from nbcache.jupyter.completer import meant
from nbcache.jupyter.display import short_name
from nbcache.jupyter.progress import Progress, find_screen

R = TypeVar("R")


def one_line_errors(magic: Callable[..., R]) -> Callable[..., R | None]:
    """A magic whose expected errors are one line, with what a mistyped word may have meant, and which a semicolon silences."""

    @wraps(magic)
    def wrapped(self: MannerlyMagics, line: str) -> R | None:
        try:
            if not line.rstrip().endswith(";"):
                return magic(self, line)
            with self.silent():
                given = magic(self, line.rstrip().rstrip(";"))
            return given if self.is_assigned() else None
        except NBCacheError as error:
            raise UsageError(f"{error}{completion.suggest(error)}") from error
        except UsageError as error:
            raise UsageError(f"{error}{meant(getattr(magic, 'parser', None), str(error))}") from None

    return wrapped


class MannerlyMagics(Magics):
    """Magics that speak when they should."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self._silent = False

    def say(self, line: str, progress: Progress | None = None) -> None:
        """Print, in place of a load's bar where there is one, and not if the line that was typed ends in a semicolon."""
        if not (progress and progress.finish(line)) and not self._silent:
            print(line)  # noqa: T201

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Say nothing meanwhile."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def is_assigned(self) -> bool:
        """Whether the cell that runs ends with an assignment from a magic rather than with a magic alone."""
        history: Any = self.the_shell.history_manager
        lines = [line for line in history.input_hist_raw[-1].splitlines() if line.strip()]
        return not (lines and lines[-1].lstrip().startswith("%"))

    def progress(self, name: str) -> Progress:
        """The bar of a load, where it may be drawn."""
        return Progress(short_name(name), None if self._silent else find_screen(sys.stdout, self.the_shell))

    @property
    def the_shell(self) -> InteractiveShell:
        """The shell that these are the magics of."""
        assert self.shell is not None
        return self.shell


def first_word(line: str) -> tuple[str, str]:
    """The first word of a line, which quotes may hold together, and the rest."""
    quoted = line[:1] in ("'", '"') and line[0] in line[1:]
    end = line.index(line[0], 1) + 1 if quoted else len(line.partition(" ")[0])
    return line[:end], line[end:]


def parsed(magic: Callable[..., Any], line: str) -> Namespace:
    """The arguments of a line. Quotes that hold words together are not part of them."""
    arguments: Namespace = parse_argstring(magic, line)  # type: ignore[no-untyped-call]
    for name, value in vars(arguments).items():
        if isinstance(value, str):
            setattr(arguments, name, unquoted(value))
    return arguments


def unquoted(text: str) -> str:
    """IPython splits a line at blanks and leaves the quotes that protect some of them."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
