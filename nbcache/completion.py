"""What a name may be completed to: entries, aliases, files that can be loaded, folders. For the shell and for Jupyter alike.

Quick and silent: a daemon that does not run, hangs or speaks otherwise has no names to offer. Starts none.
"""

from __future__ import annotations

import os

from nbcache.checkpoints import aliases
from nbcache.checkpoints.formats import format_of, stem_of
from nbcache.checkpoints.known import KNOWN
from nbcache.client.api import query
from nbcache.client.session import Session
from nbcache.errors import CheckpointNotFound, EntryNotFound, NBCacheError
from nbcache.typos import nearest

PATIENCE_S = 0.5
MOST = 200


def entry_names() -> list[str]:
    """Names and aliases of what is cached."""
    try:
        with Session.open(start=False, reply_timeout_s=PATIENCE_S) as session:
            status = query(session)
    except NBCacheError:
        return []
    return [name for entry in status.entries for name in (entry.name, *entry.aliases)]


def alias_names() -> list[str]:
    """The user's aliases."""
    try:
        return sorted(aliases.listing())
    except NBCacheError:
        return []


def aliases_of(text: str) -> list[str]:
    """The user's aliases that begin so."""
    return [name for name in alias_names() if name.startswith(text)]


def paths(text: str) -> list[str]:
    """Folders and loadable files that a path begun so may become, folders with a slash; hidden ones only if asked for."""
    folder, start = os.path.split(text)
    try:
        found = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    names = []
    for entry in found:
        if not entry.name.startswith(start) or (entry.name.startswith(".") and not start.startswith(".")):
            continue
        if entry.is_dir():
            names.append(os.path.join(folder, entry.name, ""))
        elif format_of(entry.name):
            names.append(os.path.join(folder, entry.name))
    return names[:MOST]


def cached(text: str) -> list[str]:
    """What is cached and begins so: for commands on entries."""
    full = os.path.abspath(os.path.expanduser(text)) if "/" in text else text
    names = entry_names()
    matching = {name: None for name in names if name.startswith(text)}
    matching |= {text + name[len(full) :]: None for name in names if "/" in text and name.startswith(full) and name != full}
    return list(matching)[:MOST]


def suggest(error: NBCacheError) -> str:
    """``; did you mean flux-dev?`` for an error about a name that does not exist; empty for others, and where none is near.

    What a command on entries may have meant is cached; what a load may have meant may be a file, too.
    """
    if not isinstance(error, CheckpointNotFound | EntryNotFound):
        return ""
    wanted = str(error).partition(":")[0]
    known = [*alias_names(), *entry_names()]
    if isinstance(error, CheckpointNotFound):
        known += [*KNOWN, *(path.rstrip("/") for path in paths(os.path.join(os.path.dirname(wanted), "")))]
    by_stem = {stem_of(os.path.basename(name)): name for name in known if os.path.basename(name)}
    near = nearest(wanted, known, 0.75) or by_stem.get(nearest(stem_of(os.path.basename(wanted)), by_stem, 0.7), "")
    return f"; did you mean {near}?" if near and near != wanted else ""


def loadable(text: str) -> list[str]:
    """What can be loaded and begins so: aliases, built-in ones once something is typed, what is cached, paths."""
    built_in = [name for name in sorted(KNOWN) if text and name.startswith(text)]
    return list(dict.fromkeys([*aliases_of(text), *built_in, *cached(text), *paths(text)]))[:MOST]
