"""Converted LoRAs: found in the cache, or converted and kept there; the last used of them hot on the GPU.

Owns what a converted entry is called (by the file's fingerprint and the converter's identity, so a changed file or library is
another entry) and which of them this process keeps mapped. Must not know pipelines, only families. It exists so that a swap
asks the daemon for nothing when the LoRA is hot, and reads no file when it is not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from nbcache.checkpoints.catalog import Checkpoint, is_unchanged, resolve
from nbcache.client import tensors as edge
from nbcache.client.api import free_gpu
from nbcache.client.fill import put_bytes
from nbcache.client.loading import load_name
from nbcache.client.options import Loaded, Options
from nbcache.client.weights import Weights
from nbcache.config import lora_gpu_limit_bytes
from nbcache.errors import (
    CheckpointChanged,
    CheckpointInvalid,
    CheckpointNotFound,
    LoraMismatch,
    NBCacheError,
    UnsupportedFormat,
)
from nbcache.manifest import Fingerprint, Member
from nbcache.models.lora_convert import METADATA_KEY, A, Family, Recipe, convert

CONFIG = "adapter_config.json"
"""Beside a LoRA that peft saved: its alpha and the like."""

LONGEST_STEM = 120


@dataclass(frozen=True)
class Lora:
    """A converted LoRA, at hand. ``tensors`` are shared with the cache on a GPU: never to be written, nor given away.

    ``ranks`` and ``recipe.alphas`` are by module. ``how`` is ``converted``, ``cached`` or, if nothing had to be asked, ``hot``.
    """

    source: str
    entry: str
    tensors: Mapping[str, torch.Tensor]
    recipe: Recipe
    ranks: Mapping[str, int]
    nbytes: int
    how: str

    @property
    def shared(self) -> bool:
        """Whether a write to its tensors would be a write to the cache."""
        return _on_gpu_tier(next(iter(self.tensors.values())).device)


def find_lora(name: str | os.PathLike[str], family: Family, device: torch.device) -> Lora:
    """The LoRA of this file or folder for such a pipeline, with its tensors where ``device`` is; converted first if need be.

    CheckpointError and its kinds, UnsupportedFormat; HostMemoryFull, DeviceMemoryFull, DaemonError.
    """
    path = os.fspath(name)
    checkpoint = resolve(path)
    (file,) = _only(checkpoint)
    config = _config_beside(file)
    entry = _entry_name(checkpoint, config, family)
    if _on_gpu_tier(device):
        return _hot.find(path, entry, checkpoint, config, family, device)
    loaded, converted = _load_or_convert(path, entry, checkpoint, config, family, Options(str(device)))
    return _lora(path, entry, loaded.tensors, loaded.manifest.metadata, "converted" if converted else "cached")


def _on_gpu_tier(device: torch.device) -> bool:
    return device.type == "cuda" or edge.EMULATED


def _only(checkpoint: Checkpoint) -> tuple[Member]:
    if checkpoint.index is not None or len(checkpoint.members) != 1:
        raise UnsupportedFormat(f"{checkpoint.name}: a LoRA is one file; this is {len(checkpoint.members)}")
    return (checkpoint.members[0],)


def _config_beside(file: Member) -> Member | None:
    path = os.path.join(os.path.dirname(file.path), CONFIG)
    try:
        return Member(path, Fingerprint.of(os.stat(path)))
    except OSError:
        return None


def _entry_name(checkpoint: Checkpoint, config: Member | None, family: Family) -> str:
    members = [*checkpoint.members, *([config] if config else [])]
    known_by = [family.identity, [member.identity() for member in members]]
    digest = hashlib.blake2b(msgspec.json.encode(known_by), digest_size=8).hexdigest()
    stem = "".join(c if c.isprintable() else "?" for c in Path(checkpoint.members[0].path).stem)[:LONGEST_STEM].strip()
    return f"{stem or 'lora'} [lora {digest}]"


def _load_or_convert(
    path: str, entry: str, checkpoint: Checkpoint, config: Member | None, family: Family, options: Options
) -> tuple[Loaded, bool]:
    """The entry; if it is not cached (any more), after converting the file. The second says whether it was converted."""
    try:
        return load_name(entry, options, None), False
    except CheckpointNotFound:
        _convert(path, entry, checkpoint, config, family)
        return load_name(entry, options, None), True


def _convert(path: str, entry: str, checkpoint: Checkpoint, config: Member | None, family: Family) -> None:
    """Convert the file and keep what comes of it, as an entry that can be made again."""
    from safetensors import SafetensorError, safe_open

    (file,) = checkpoint.members
    try:
        text = Path(config.path).read_text() if config else ""
        with safe_open(file.path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
        converted, recipe = convert(tensors, metadata, text, family)
    except SafetensorError as error:
        raise CheckpointInvalid(f"{file.path}: {error}") from error
    except (UnsupportedFormat, LoraMismatch) as error:
        raise type(error)(f"{path}: {error}") from error
    manifest = edge.plan_put(converted, {METADATA_KEY: msgspec.json.encode(recipe).decode()})
    put_bytes(entry, manifest, lambda area: edge.write_tensors(converted, manifest, area), derived=True).close()
    if not is_unchanged(path, checkpoint.members):  # I6: what was read may be neither the old file nor the new
        raise CheckpointChanged(f"{path}: changed while it was converted; load it again")


def _lora(path: str, entry: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], how: str) -> Lora:
    recipe = msgspec.json.decode(metadata[METADATA_KEY], type=Recipe)
    ranks = {module: tensors[module + A].shape[0] for module in recipe.alphas}
    return Lora(path, entry, tensors, recipe, ranks, sum(tensor.nbytes for tensor in tensors.values()), how)


class HotLoras:
    """The LoRAs that this process holds on its GPUs, the least recently used first; within ``NBCache.lora_gpu_limit``.

    Notes
    -----
    Each holds a read-only map of the daemon's slab, and the lease on it. Beyond the limit the least recently used are let go,
    and their slabs freed unless another process uses them: they are in pinned host memory still. The one that was asked for
    last stays, whatever its size. Not locked: one thread at a time.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, str], tuple[Weights, Lora]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of all that are held."""
        return sum(lora.nbytes for _, lora in self._held.values())

    def find(
        self, path: str, entry: str, checkpoint: Checkpoint, config: Member | None, family: Family, device: torch.device
    ) -> Lora:
        """The LoRA, mapped on the device."""
        key = (entry, str(device))
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][1]
        where = "cuda" if device.type == "cpu" else str(device)  # an emulated GPU's tensors are on the CPU
        options = Options(where, None, "readonly")
        loaded, converted = _load_or_convert(path, entry, checkpoint, config, family, options)
        how = "converted" if converted else "cached"
        lora = _lora(path, entry, loaded.tensors, loaded.manifest.metadata, how)
        self._held[key] = Weights(loaded, options), dataclasses.replace(lora, how="hot")
        self.keep_within(lora_gpu_limit_bytes())
        return lora

    def keep_within(self, limit_bytes: int) -> None:
        """Let go of the least recently used until the others fit; the last used stays."""
        while len(self._held) > 1 and self.nbytes > limit_bytes:
            self._let_go(next(iter(self._held)))

    def clear(self) -> None:
        """Let go of all."""
        while self._held:
            self._let_go(next(iter(self._held)))

    def _let_go(self, key: tuple[str, str]) -> None:
        self._held.pop(key)[0].release()  # the map and the lease go with the last reference, which this was
        _free_slab(key[0])


def _free_slab(entry: str) -> None:
    try:
        free_gpu(entry)
    except NBCacheError:  # in use by another process, evicted meanwhile, or the daemon is gone: it is not ours to free
        return


_hot = HotLoras()


def hot() -> HotLoras:
    """This process's."""
    return _hot
