"""Weights for models, and the count of them: how many, how large, whether they were cached, and how long they took.

Owns what a model load wants of every checkpoint (device, dtype, share) and the clocks of the load. Must not know what is built
of the tensors.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from nbcache.client import api
from nbcache.client import tensors as edge
from nbcache.client.options import Options, Share
from nbcache.client.session import ProgressCallback
from nbcache.client.weights import Weights
from nbcache.errors import InvalidOption
from nbcache.models.derived import Derived


@dataclass
class Spent:
    """Where the time of a load went, in seconds."""

    imports_s: float = 0.0
    """Importing the libraries and the classes."""
    map_s: float = 0.0
    """Getting the weights: finding and mapping them, or reading them where they were not cached."""
    build_s: float = 0.0
    """Everything else: making the modules, tokenizers, schedulers."""


@dataclass
class Tally:
    """What a load was given, over all its checkpoints."""

    tensors: int = 0
    nbytes: int = 0
    private_bytes: int = 0
    hits: list[bool] = field(default_factory=list)
    read: bool = False
    """Whether files were read."""
    converted: bool = False
    """Whether something had to be converted."""

    @property
    def hit(self) -> bool:
        """Whether all of it was cached already."""
        return all(self.hits)


LONG_IMPORT_S = 0.5


class Clock:
    """Adds up the parts of a load. What is not imported or mapped is building."""

    def __init__(self) -> None:
        self.spent = Spent()
        self._start = time.perf_counter()
        self._imports_s = 0.0

    @contextlib.contextmanager
    def imports(self) -> Iterator[None]:
        """The time inside is imports', and that of the garbage collection which so many new objects bring about."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if time.perf_counter() - start > LONG_IMPORT_S:
                gc.collect()  # now: it would come anyway, while a model is built, and be taken for building (0.26 s seen)
            seconds = time.perf_counter() - start
            self.spent.imports_s += seconds
            self._imports_s += seconds

    @contextlib.contextmanager
    def map(self) -> Iterator[None]:
        """The time inside is the weights'."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent.map_s += time.perf_counter() - start

    def stop(self) -> Spent:
        """All parts."""
        self.spent.build_s = time.perf_counter() - self._start - self._imports_s - self.spent.map_s
        return self.spent


class Supply:
    """Gives weights on one device, shared one way. ``device`` is where the tensors are, for an emulated GPU the CPU."""

    def __init__(self, device: object, dtype: object, share: Share, on_progress: ProgressCallback | None = None) -> None:
        Options(device, None, share).check()
        self.clock = Clock()
        self.tally = Tally()
        self.named_device = edge.resolve_device(device)
        if self.named_device.type == "cuda" and self.named_device.index is None:
            self.named_device = torch.device("cuda", edge.current_ordinal())
        self.device = edge.real_device(self.named_device)
        self._dtypes = _resolve_dtypes(dtype)
        self._share = share
        self._on_progress = on_progress

    def dtype_of(self, component: str) -> torch.dtype | None:
        """What a component is to be cast to; None leaves the file's own."""
        return self._dtypes.get(component, self._dtypes.get("default"))

    def weights(self, source: str | Derived, dtype: torch.dtype | None = None) -> Weights:
        """The weights of a checkpoint, by its path, or of a derived entry. Raises as :func:`nbcache.load`."""
        with self.clock.map():
            found = self._load(source, Options(self.named_device, dtype, self._share))
        self.tally.tensors += len(found)
        self.tally.nbytes += found.nbytes
        self.tally.private_bytes += found.private_bytes
        self.tally.hits.append(found.hit)
        self.tally.read |= found.read
        return found

    def _load(self, source: str | Derived, options: Options) -> Weights:
        if isinstance(source, str):
            return api.load(source, options.device, options.dtype, options.share, self._on_progress)  # type: ignore[arg-type]
        loaded, made = source.obtain(options, self._on_progress)
        self.tally.converted |= made
        return Weights(replace(loaded, hit=loaded.hit and not made), options)

    def tensors(
        self, source: str | Derived, dtype: torch.dtype | None = None, keeps: Callable[[str], bool] = lambda _: False
    ) -> dict[str, torch.Tensor]:
        """Tensors of a checkpoint as a dict of the caller's own, cast as stock loaders do; what ``keeps`` names to float32."""
        found = self.weights(source, dtype)
        given = dict(found)
        kept = [name for name, tensor in given.items() if dtype is not None and tensor.is_floating_point() and keeps(name)]
        if kept:  # from the file's own bytes: what was rounded on the way would stay so
            with self.clock.map():
                raw = self._load(source, Options("cpu", None, self._share))
                given |= {name: raw[name].to(self.device, torch.float32) for name in kept}
            self.tally.private_bytes += sum(given[name].nbytes for name in kept)
        return given


def _resolve_dtypes(dtype: object) -> dict[str, torch.dtype | None]:
    """A dtype, or one for each component with ``default`` for the rest. ``auto`` and None mean the file's own."""
    wanted = dtype if isinstance(dtype, Mapping) else {"default": dtype}
    return {str(name): None if value == "auto" else edge.resolve_dtype(value) for name, value in wanted.items()}


def one_dtype(dtype: object, torch_dtype: object) -> object:
    """What was asked for by either name. InvalidOption if both were, and differ."""
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise InvalidOption(f"dtype={dtype!r} and torch_dtype={torch_dtype!r}: give one of them")
    return torch_dtype if dtype is None else dtype


def widest_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype | None:
    """The widest floating-point dtype among tensors: what holds them all."""
    return widest({tensor.dtype for tensor in tensors.values()})


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The widest floating-point one of these; None if there is none."""
    found = (dtype for dtype in dtypes if dtype.is_floating_point)
    return max(found, key=lambda dtype: (dtype.itemsize, str(dtype)), default=None)


def floating_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype | None:
    """The dtype of the first floating-point tensor, which is what a library would take a checkpoint's dtype to be."""
    return next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
