"""What every command shares: ``--json``, and how a result is printed. Text as it is, anything else as one JSON document."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def print_result(result: object) -> None:
    """Print a result on stdout."""
    text = result if isinstance(result, str) else msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    print(text)  # noqa: T201


def print_step(text: str) -> None:
    """Print what goes on, on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201
