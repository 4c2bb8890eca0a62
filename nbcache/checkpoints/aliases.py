"""A user's own short names for paths and hub ids, in one JSON file beside the daemon's log.

Changed rarely and read by every load, so reading is one small file, and changing replaces it whole, under a lock: a reader sees
the table before or after a change, never half of one.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from pathlib import Path

import msgspec

from nbcache.checkpoints.known import KNOWN
from nbcache.config import RuntimePaths
from nbcache.errors import InvalidName, InvalidOption

FILE = "aliases.json"
_NAME = re.compile(r"[^\s/~.-][^\s/]*")


def listing() -> dict[str, str]:
    """The user's aliases: name to path or hub id. InvalidOption if the file is not such a table, or not to be read."""
    path = _file()
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InvalidOption(f"{path}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidOption(f"{path}: not a table of aliases ({error}); mend it, or delete it") from error


def resolve(name: str) -> str | None:
    """What a name stands for: the user's alias, else the one that everybody has; None if it is none."""
    return listing().get(name) or KNOWN.get(name)


def add(name: str, target: str) -> None:
    """Let a name stand for a path or a hub id; a path that exists is kept absolute. What it stood for is replaced.

    InvalidName for a name that could be a path, InvalidOption for an empty target or one that is an alias itself.
    """
    if not _NAME.fullmatch(name):
        raise InvalidName(f"alias {name!r}: an alias has no slash and no blank, and does not start with '.', '-' or '~'")
    full = os.path.abspath(os.path.expanduser(target))
    table = listing()
    if not target.strip():
        raise InvalidOption(f"alias {name}: for what? Give a path or a hub id")
    if target in table or (target in KNOWN and target == name):
        raise InvalidOption(f"alias {name}: {target!r} is an alias itself; give what that stands for")
    _change(name, full if os.path.exists(full) else KNOWN.get(target, target))


def remove(name: str) -> None:
    """Forget an alias of the user's. InvalidName if there is none of that name."""
    if name not in listing():
        own = ", ".join(listing()) or "none"
        built_in = " (that one is built in; an alias of yours goes before it)" if name in KNOWN else ""
        raise InvalidName(f"alias {name!r}: you have no such alias{built_in}; yours: {own}")
    _change(name, None)


def _change(name: str, target: str | None) -> None:
    paths = RuntimePaths.of_user()
    paths.create()
    with (paths.state / f"{FILE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = listing()
        if target is None:
            table.pop(name, None)
        else:
            table[name] = target
        with tempfile.NamedTemporaryFile(dir=paths.state, prefix=FILE, delete=False) as file:
            file.write(msgspec.json.format(msgspec.json.encode(table)))
        Path(file.name).replace(_file())


def _file() -> Path:
    return RuntimePaths.of_user().state / FILE
