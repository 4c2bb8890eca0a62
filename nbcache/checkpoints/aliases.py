"""Short names for paths, in one JSON file in the user's state directory."""

from __future__ import annotations

import os
import re

import msgspec

from nbcache.config import RuntimePaths
from nbcache.errors import InvalidName, InvalidOption


def listing() -> dict[str, str]:
    """Each alias, and what it stands for. InvalidOption if the file is no such table."""
    path = RuntimePaths.of_user().state / "aliases.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidOption(f"{path}: not a table of aliases ({error}); mend it, or delete it") from error


def add(name: str, target: str) -> None:
    """Let a name stand for a path; one that exists is kept absolute. InvalidName for a name that could be a path."""
    if not re.fullmatch(r"[^\s/~.-][^\s/]*", name):
        raise InvalidName(f"alias {name!r}: an alias has no slash and no blank, and does not start with '.', '-' or '~'")
    full = os.path.abspath(os.path.expanduser(target))
    _write(listing() | {name: full if os.path.exists(full) else target})


def remove(name: str) -> None:
    """Forget an alias. InvalidName if there is none of that name."""
    table = listing()
    if name not in table:
        raise InvalidName(f"alias {name!r}: you have no such alias; yours: {', '.join(table) or 'none'}")
    del table[name]
    _write(table)


def _write(table: dict[str, str]) -> None:
    paths = RuntimePaths.of_user()
    paths.create()
    draft = paths.state / f"aliases.json.{os.getpid()}"
    draft.write_bytes(msgspec.json.encode(table))
    draft.replace(paths.state / "aliases.json")
