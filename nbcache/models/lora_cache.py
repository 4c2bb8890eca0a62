"""Converted LoRAs: found in the cache, or converted and kept there; the last used of them hot on the GPU.

Owns what a LoRA is converted from, and which converted ones this process keeps mapped. Must not know pipelines, only families.
It exists so that a swap asks the daemon for nothing when the LoRA is hot, and reads no file when it is not.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import msgspec
import torch

from nbcache.checkpoints import names as catalogue
from nbcache.checkpoints.catalog import Checkpoint, resolve
from nbcache.checkpoints.formats import format_of
from nbcache.client import spare
from nbcache.client import tensors as edge
from nbcache.client.api import free_gpu
from nbcache.client.fill import meaning_of
from nbcache.client.options import Loaded, Options
from nbcache.client.weights import Weights
from nbcache.config import lora_gpu_limit_bytes
from nbcache.errors import CheckpointInvalid, LoraMismatch, NBCacheError, UnsupportedFormat
from nbcache.manifest import Fingerprint, Member
from nbcache.models.derived import Derived, Made, name_of
from nbcache.models.lora_convert import METADATA_KEY, A, Family, Recipe, brief, convert

CONFIG = "adapter_config.json"
"""Beside a LoRA that peft saved: its alpha and the like."""


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
    derived = _derived(name, family)
    if _on_gpu_tier(device):
        return _hot.find(derived, device)
    return _lora(derived, *derived.obtain(Options(str(device))))


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


def _derived(name: str | os.PathLike[str], family: Family) -> Derived:
    """The entry that is made of a LoRA for such a pipeline."""
    text, meaning = meaning_of(name)
    path = catalogue.find(text) if meaning.repo_id else meaning.path if meaning.aliased else text
    checkpoint = resolve(path)
    (file,) = _only(checkpoint)
    config = _config_beside(file)
    members = (file, *([config] if config else []))
    return Derived(name_of("lora", members, family.identity), path, members, lambda: _convert(path, file, config, family))


def _convert(path: str, file: Member, config: Member | None, family: Family) -> Made:
    """What comes of the file."""
    try:
        text = Path(config.path).read_text(encoding="utf-8") if config else ""
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointInvalid(f"{os.path.join(os.path.dirname(file.path), CONFIG)}: {error}") from error
    tensors, metadata = _read(file.path)
    try:
        converted, recipe = convert(tensors, metadata, text, family)
    except (UnsupportedFormat, LoraMismatch) as error:
        raise type(error)(f"{path}: {error}") from error
    return Made(converted, {METADATA_KEY: msgspec.json.encode(recipe).decode()})


def _read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file's tensors and metadata, by the stock readers. CheckpointInvalid; UnsupportedFormat for what needs code."""
    from safetensors import SafetensorError, safe_open

    kind = format_of(path)
    if kind is not None and kind.name == "torch":
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise UnsupportedFormat(f"{path}: torch.load with weights_only says {brief(error)}") from error
        if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
            raise UnsupportedFormat(f"{path}: not a dict of tensors, as a LoRA is")
        return found, {}
    try:
        with safe_open(path, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise CheckpointInvalid(f"{path}: {error}") from error


def _lora(derived: Derived, loaded: Loaded, converted: bool) -> Lora:
    tensors = loaded.tensors
    recipe = _recipe(loaded.manifest.metadata[METADATA_KEY])
    ranks = {module: tensors[module + A].shape[0] for module in recipe.alphas}
    nbytes = sum(extent.nbytes for extent in loaded.manifest.tensors)
    return Lora(derived.path, derived.name, tensors, recipe, ranks, nbytes, "converted" if converted else "cached")


@lru_cache(16)
def _recipe(text: str) -> Recipe:
    """A recipe as it is kept. LoRAs that are swapped again and again are described by the same text."""
    return msgspec.json.decode(text, type=Recipe)


class HotLoras:
    """The LoRAs that this process holds on its GPUs, the least recently used first; within ``NBCache.lora_gpu_limit``.

    Notes
    -----
    Each holds a read-only map of the daemon's slab, and the lease on it. Beyond the limit the least recently used are let go,
    and their slabs freed unless another process uses them: they are in pinned host memory still. The one that was asked for
    last stays, whatever its size. All give way to loads of this process that do not fit. Not locked: one thread at a time.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, str], tuple[Weights, Lora]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of all that are held."""
        return sum(lora.nbytes for _, lora in self._held.values())

    def find(self, derived: Derived, device: torch.device) -> Lora:
        """The LoRA, mapped on the device."""
        key = (derived.name, str(device))
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][1]
        where = "cuda" if device.type == "cpu" else str(device)  # an emulated GPU's tensors are on the CPU
        options = Options(where, None, "readonly")
        loaded, converted = derived.obtain(options)
        lora = _lora(derived, loaded, converted)
        self._held[key] = Weights(loaded, options), dataclasses.replace(lora, how="hot")
        self.keep_within(lora_gpu_limit_bytes())
        return lora

    def keep_within(self, limit_bytes: int) -> None:
        """Let go of the least recently used until the others fit; the last used stays."""
        while len(self._held) > 1 and self.nbytes > limit_bytes:
            entry = next(iter(self._held))[0]
            self.let_go_oldest()
            _free_slab(entry)

    def clear(self) -> None:
        """Let go of all, and free their slabs."""
        entries = {entry for entry, _ in self._held}
        self.let_go()
        for entry in entries:
            _free_slab(entry)

    def let_go(self, names: Collection[str] | None = None) -> bool:
        """See :class:`nbcache.client.spare.Keeper`."""
        keys = [key for key in self._held if names is None or key[0] in names]
        for key in keys:
            self._held.pop(key)[0].release()  # the map and the lease go with the last reference, which this was
        return bool(keys)

    def let_go_oldest(self) -> bool:
        """See :class:`nbcache.client.spare.Keeper`."""
        return bool(self._held) and self.let_go({next(iter(self._held))[0]})


def _free_slab(entry: str) -> None:
    try:
        free_gpu(entry)
    except NBCacheError:  # in use by another process, evicted meanwhile, or the daemon is gone: it is not ours to free
        return


_hot = HotLoras()
spare.register(_hot)


def hot() -> HotLoras:
    """This process's."""
    return _hot
