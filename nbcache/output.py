"""What every command shares: ``--json``, and how a result is printed. Text as it is, anything else as one JSON document."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated

import msgspec
import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


PAGE_COLUMNS = 100
"""Longer lines are hard to read."""


def print_result(result: object) -> None:
    """Print a result on stdout."""
    text = result if isinstance(result, str) else msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    print(text)  # noqa: T201


def print_page(text: str) -> None:
    """Print Markdown: laid out on a terminal, as it is elsewhere."""
    if not sys.stdout.isatty():
        print(text.rstrip())  # noqa: T201
        return
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.theme import Theme

    console = Console(theme=Theme({"markdown.code": "bold cyan"}))  # its own has a background, for dark terminals
    console.print(Markdown(text, code_theme="ansi_dark"), width=min(console.width, PAGE_COLUMNS))


def print_step(text: str) -> None:
    """Print what goes on, on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def steps_from_now() -> Callable[[str], None]:
    """As :func:`print_step`, with the seconds since this was called: a run that is cut off tells what took long."""
    start = time.monotonic()
    return lambda text: print_step(f"{time.monotonic() - start:7.1f} s  {text}")
