"""What a name means: an alias, a path, a repository of the hub. In that order, the first that fits.

Looking up is cheap, as every load does it: a small file of aliases, a stat, for a hub id one file of the hub's cache. Fetching
is the one thing here that uses the network, and only for what is not on this machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from nbcache.checkpoints import aliases, hub
from nbcache.checkpoints.folders import FolderKind, kind_of, read_pipeline, variant_names, weights_path
from nbcache.checkpoints.known import KNOWN
from nbcache.errors import CheckpointNotFound, InvalidOption


@dataclass(frozen=True)
class Meaning:
    """What a name means. ``path`` may not exist; ``repo_id`` is set where it is (to be) in the hub's cache."""

    path: str
    repo_id: str = ""
    aliased: bool = False
    """Whether the user gave this name its meaning: then it is no saved entry's."""


def look_up(name: str, revision: str = "") -> Meaning:
    """What a name means, without the network and without reading any checkpoint."""
    own = aliases.listing().get(name)
    target = own or KNOWN.get(name) or name
    path = os.path.abspath(os.path.expanduser(target))
    if target == name and os.path.lexists(path):
        return Meaning(path)
    if not hub.is_id(target) or (own and os.path.lexists(path)):
        return Meaning(path, aliased=bool(own))
    snapshot = hub.cached_snapshot(target, revision)
    if snapshot is None and "/" not in target:
        return Meaning(path, aliased=bool(own))  # a bare word is a repository only where it is there already
    return Meaning(snapshot or path, target, bool(own))


def find(name: str, revision: str = "", subfolder: str = "", variant: str = "") -> str:
    """The path that a name means, downloaded if it is a repository's and not (wholly) here.

    CheckpointNotFound if it is nothing; InvalidOption for a revision of what is no repository; HubUnreachable, HubDenied,
    PackageMissing.
    """
    meaning = look_up(name, revision)
    if revision and not meaning.repo_id:
        raise InvalidOption(f"{name}: revision {revision!r} was given, but this is no repository of the hub")
    path = meaning.path
    if meaning.repo_id and not (os.path.isdir(path) and hub.is_complete(path, subfolder, variant)):
        path = hub.fetch(meaning.repo_id, revision, subfolder, variant)
    if subfolder:
        path = os.path.join(path, subfolder)
    if not os.path.lexists(path):
        raise CheckpointNotFound(f"{name}: no such file or folder, alias or repository ({path})")
    return path


def find_config(name: str) -> str:
    """As :func:`find`, for the config files of a folder or repository alone: its weights are not downloaded."""
    meaning = look_up(name)
    if meaning.repo_id and not os.path.isdir(meaning.path):
        return hub.fetch(meaning.repo_id, weights=False)
    if not os.path.isdir(meaning.path):
        raise CheckpointNotFound(f"{name}: no such folder, alias or repository ({meaning.path})")
    return meaning.path


def find_weights(name: str, revision: str = "", subfolder: str = "", variant: str = "") -> str:
    """As :func:`find`, for weights alone: of a variant, its own file."""
    return weights_of(find(name, revision, subfolder, variant), variant)


def weights_of(path: str, variant: str = "") -> str:
    """What a path's weights are loaded by: itself, or in a folder the file of a variant. Raises as :func:`weights_path`."""
    return weights_path(path, variant) if variant and os.path.isdir(path) else path


def members_of(path: str) -> tuple[tuple[str, ...], ...]:
    """The names that entries made from a path may have: one tuple of spellings for each, several for a pipeline's folder."""
    if kind_of(path) is not FolderKind.PIPELINE:
        return (_spellings(path),)
    return tuple(_spellings(home) for home in read_pipeline(path).model_homes()) or (_spellings(path),)


def _spellings(path: str) -> tuple[str, ...]:
    return (path, *(os.path.join(path, name) for name in variant_names(path))) if os.path.isdir(path) else (path,)
