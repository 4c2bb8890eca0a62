"""The Hugging Face hub: what of it is in the local cache, and fetching what is not.

Looking into the cache reads one small file and imports nothing, so that a load by id is as cheap as one by path. Fetching goes
through ``huggingface_hub``, with its progress, its login and its settings; only the files that a load needs are fetched.

Sources: the cache's layout in huggingface_hub's guide to it (``models--ORG--NAME/refs/REVISION`` holds a commit,
``snapshots/COMMIT/`` its files, links to ``blobs/``), the environment variables in its reference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from nbcache.checkpoints.folders import PIPELINE_INDEX, STEMS, FolderKind, kind_of, read_json, read_pipeline
from nbcache.errors import (
    CheckpointError,
    CheckpointNotFound,
    HubDenied,
    HubError,
    HubUnreachable,
    PackageMissing,
)

_ID = re.compile(r"[\w][\w.-]{0,95}(/[\w][\w.-]{0,95})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".msgpack",
    ".h5",
    ".onnx",
    ".gguf",
    ".onnx_data",
    ".pb",
    ".tflite",
    ".ot",
)
_SHARD = r"-\d{5}-of-\d{5}"
_IGNORED = (".gitattributes", ".md", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4", ".svg", ".pdf", ".xml", ".ipynb", ".py")


def cache_folder() -> str:
    """Where the hub's cache is: by ``HF_HUB_CACHE``, else ``HF_HOME``, else ``XDG_CACHE_HOME``, as huggingface_hub does."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return os.path.expandvars(os.path.expanduser(chosen))


def is_offline() -> bool:
    """Whether the user wants the hub left alone (``HF_HUB_OFFLINE``)."""
    wish = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return wish.upper() in ("1", "ON", "YES", "TRUE")


def is_id(text: str) -> bool:
    """Whether a text can be a repository's id: ``org/name``, or a bare name of the hub's early days."""
    return bool(_ID.fullmatch(text)) and "--" not in text and ".." not in text


def cached_snapshot(repo_id: str, revision: str = "") -> str | None:
    """The folder of a repository's revision (a branch, a tag or a commit; empty: main) in the local cache, if it is there."""
    repository = os.path.join(cache_folder(), "models--" + repo_id.replace("/", "--"))
    revision = revision or "main"
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = Path(repository, "refs", revision).read_text().strip()
        except (OSError, ValueError):
            return None
    snapshot = os.path.join(repository, "snapshots", commit)
    return snapshot if os.path.isdir(snapshot) else None


def is_complete(snapshot: str, subfolder: str = "", variant: str = "") -> bool:
    """Whether a snapshot holds what a load needs: its config files, and the weights that go with them."""
    folder = os.path.join(snapshot, subfolder) if subfolder else snapshot
    if not os.path.isdir(folder):
        return False
    if kind_of(folder) is not FolderKind.PIPELINE:
        return _has_weights(folder, variant)
    index = read_pipeline(folder)
    homes = [os.path.join(folder, component.name) for component in index.components]
    return all(map(os.path.isdir, homes)) and all(_has_weights(home, variant) for home in index.model_homes())


def _has_weights(folder: str, variant: str) -> bool:
    names = set(os.listdir(folder))
    chosen = choose_weights(names, variant)
    if not chosen:
        return False
    shards: set[str] = set()
    for index in (name for name in chosen if name.endswith(".json")):
        shards |= set(read_json(os.path.join(folder, index)).get("weight_map", {}).values())
    return shards <= names


def fetch(repo_id: str, revision: str = "", subfolder: str = "", variant: str = "", weights: bool = True) -> str:
    """Download what a load of a repository needs into the hub's cache, or its config files alone; the snapshot's folder.

    PackageMissing; HubUnreachable, HubDenied, each with what to do; CheckpointNotFound if there is no such repository,
    revision or folder in it.
    """
    if is_offline():
        which = f", revision {revision}" if revision else ""
        raise HubUnreachable(
            f"{repo_id}{which}: not (or not wholly) in {cache_folder()}, and HF_HUB_OFFLINE is set; unset it, or give a path"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise PackageMissing(
            f"{repo_id}: no such path, and not in the hub's cache; downloading it needs huggingface_hub: "
            "pip install 'nbcache[hub]'"
        ) from error
    try:
        listed = huggingface_hub.HfApi().model_info(repo_id, revision=revision or None)
        wanted = files_needed((sibling.rfilename for sibling in listed.siblings or ()), subfolder, variant)
        if not wanted:
            where = f" in {subfolder}" if subfolder else ""
            raise CheckpointNotFound(f"{repo_id}: the repository has no weights that nbcache reads{where}")
        if not weights:
            wanted = [name for name in wanted if not name.endswith(_WEIGHTS)]
        folder: str = huggingface_hub.snapshot_download(
            repo_id, revision=revision or None, cache_dir=cache_folder(), allow_patterns=list(map(_literally, wanted))
        )
        return folder
    except (CheckpointError, HubError):
        raise
    except Exception as error:
        raise _translated(error, repo_id, revision) from error


def _literally(name: str) -> str:
    """A file's name as a pattern that matches it alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _translated(error: Exception, repo_id: str, revision: str) -> Exception:
    """An error of huggingface_hub's (or of the network's, below it) as ours; anything else as it is."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, errors.GatedRepoError):
        return HubDenied(
            f"{repo_id} is gated: accept its licence at {page}, log in (hf auth login), and load it again; or give a path"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointNotFound(f"{repo_id}: no revision {revision!r}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointNotFound(
            f"{repo_id}: no such path, and no such repository on the hub (or a private one: hf auth login)"
        )
    if isinstance(error, (errors.HfHubHTTPError, OSError)) or type(error).__module__.split(".")[0] in (
        "httpx",
        "httpx2",
        "requests",
    ):
        return HubUnreachable(
            f"{repo_id}: no such path, not in {cache_folder()}, and the hub could not be asked; check the connection, or give "
            f"a path ({' '.join(str(error).split())[:200]})"
        )
    return error


def files_needed(names: Iterable[str], subfolder: str = "", variant: str = "") -> list[str]:
    """Which of a repository's files a load needs: configs, tokenizers, and one set of weights for each folder.

    Of a pipeline the folders of its components alone, never the single-file checkpoints beside its index. ``subfolder`` takes
    that folder alone.
    """
    folders: dict[str, set[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, set()).add(file)
    pipeline = PIPELINE_INDEX in folders.get("", ()) and not subfolder
    wanted = []
    for folder, files in folders.items():
        if subfolder and folder != subfolder and not folder.startswith(f"{subfolder}/"):
            continue
        if not subfolder and not pipeline and folder:
            continue  # a model's own files lie at the top
        weights = set() if pipeline and not folder else choose_weights(files, variant)
        others = {file for file in files if not file.endswith((*_WEIGHTS, *_IGNORED)) and ".index." not in file}
        wanted += [f"{folder}/{file}" if folder else file for file in sorted(weights | others)]
    return wanted if any(name.endswith(_WEIGHTS) for name in wanted) else []


def choose_weights(files: set[str], variant: str = "") -> set[str]:
    """The files of one set of weights, index and shards together: of the variant where there is one, safetensors first."""
    for chosen in [variant, ""] if variant else [""]:
        for suffix in ("safetensors", "bin"):
            for stem in STEMS:
                found = _one_set(files, stem, suffix, chosen)
                if found:
                    return found
    lone = {file for file in files if file.endswith(".safetensors")}
    return lone if len(lone) == 1 else set()


def _one_set(files: set[str], stem: str, suffix: str, variant: str) -> set[str]:
    middle = f".{re.escape(variant)}" if variant else ""
    index = re.compile(rf"{stem}\.{suffix}\.index{middle}\.json")
    shard = re.compile(rf"{stem}({middle}{_SHARD}|{_SHARD}{middle})\.{suffix}")
    indices = {file for file in files if index.fullmatch(file)}
    if indices:
        return indices | {file for file in files if shard.fullmatch(file)}
    whole = f"{stem}.{variant}.{suffix}" if variant else f"{stem}.{suffix}"
    return {whole} & files
