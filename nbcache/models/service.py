"""Stock calls, served: what each replaced function does while the switch is on.

Owns which calls are served, and what happens when one cannot be: the stock function is called, with what the caller gave. Knows
nothing of who imported what (:mod:`nbcache.models.hooks`). Needs torch.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from nbcache.client import tensors as edge
from nbcache.client.loading import load_key, load_name
from nbcache.client.notices import NotServed, notify
from nbcache.client.options import Options
from nbcache.errors import (
    CheckpointError,
    DaemonError,
    DaemonLost,
    DaemonUnavailable,
    EntryNotFound,
    InvalidOption,
    NBCacheError,
    UnsupportedFormat,
    UnsupportedPlatform,
)
from nbcache.models.served import ServedFile, ServedSlice, Source, Tensors

Stock = Callable[..., Any]

FRAMEWORKS = ("pt", "torch", "pytorch")
READING: Mapping[str, tuple[object, ...]] = {"backend": ("mmap", "pread")}
"""Keywords of the stock functions that only say how a file is read."""


@dataclass(frozen=True, eq=False)
class _Loading:
    """One call of ``load_file``, which gave ``count`` tensors."""

    source: Source
    count: int


@dataclass(frozen=True)
class _Origin:
    """Where a tensor came from, and its version as it was handed out: a tensor that was written to has a later one."""

    loading: _Loading
    name: str
    version: int


class Service:
    """Serves the calls of one process. A method for each kind in :mod:`nbcache.models.points`, given the stock function first.

    ``given_up``: there is no daemon, and a warning said so.

    Notes
    -----
    Not locked: the worst that threads may do to each other is to warn twice.
    """

    def __init__(self) -> None:
        self.given_up = False
        self._warned: set[type[Exception]] = set()
        self._filling = threading.local()
        """``gpu``: the one that this thread's library is filling a whole model on."""
        self._origins: Any = WeakTensorKeyDictionary()
        """Where tensors on the CPU came from; kept where there is a GPU that they may go to."""

    def resume(self) -> None:
        """Ask for a daemon again."""
        self.given_up = False
        self._warned.clear()

    def load_file(self, stock: Stock, filename: Any, device: Any = "cpu", **options: Any) -> Any:  # noqa: ANN401
        """``safetensors.torch.load_file``."""
        source, target = Source.of(filename), _target(device)
        if source is not None and target is not None and _known(options):
            on_cpu = target.type == "cpu"
            tensors = self.fetch(source if on_cpu else source.alone(), target)  # other shards may be meant for other GPUs
            if tensors is not None:
                if on_cpu and (torch.cuda.is_available() or edge.EMULATED):
                    self._remember(source, tensors)
                return _in_stock_order(tensors)
        return stock(filename, device, **options)

    def safe_open(self, stock: Stock, filename: Any, framework: Any, device: Any = "cpu", **options: Any) -> Any:  # noqa: ANN401
        """``safetensors.safe_open``."""
        source, target = Source.of(filename), _target(device)
        if source is None or target is None or framework not in FRAMEWORKS or not _known(options):
            return stock(filename, framework, device, **options)
        opened = stock(filename, framework, "cpu", **options)  # for all but the tensors
        if target.type == "cpu":
            return ServedFile(self.fetch, source, target, opened, lambda: opened)
        file = ServedFile(self.fetch, source, target, opened, lambda: stock(filename, framework, device, **options))
        if getattr(self._filling, "gpu", None) is not None:
            file.place(target, None)
        return file

    def warmup(self, stock: Stock, model: Any, device_map: Any, *rest: Any) -> Any:  # noqa: ANN401
        """``caching_allocator_warmup``: a model that comes as a slab needs no memory of torch's beside it.

        Of transformers and diffusers; the last argument of both is a quantizer.
        """
        if rest[-1:] == (None,) and _only_gpu(device_map.values()) is not None:
            return None
        return stock(model, device_map, *rest)

    def convert(self, stock: Stock, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Transformers' ``convert_and_load_state_dict_in_model``: what goes to one GPU as a whole is had there at once."""
        state, config, model = (kwargs.get(name) for name in ("state_dict", "load_config", "model"))
        if state and config is not None and config.hf_quantizer is None and config.device_mesh is None:
            gpu = _only_gpu((config.device_map or {}).values())
            wanted = Counter(value.file for value in state.values() if isinstance(value, ServedSlice))
            for file, count in wanted.items():
                if gpu is not None and count == len(file.keys()):
                    file.place(gpu, _one_dtype(model, config))
        return stock(*args, **kwargs)

    def fill(self, stock: Stock, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """``_load_state_dict_into_meta_model`` of transformers 4: the same, for the file that it opens."""
        whole = kwargs.get("hf_quantizer") is None and kwargs.get("device_mesh") is None
        self._filling.gpu = _only_gpu((kwargs.get("device_map") or {}).values()) if whole else None
        try:
            return stock(*args, **kwargs)
        finally:
            self._filling.gpu = None

    def place(self, stock: Stock, model: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Diffusers' ``load_model_dict_into_meta``: the same, for a state dict that was loaded to the CPU."""
        gpu = _only_gpu((kwargs.get("device_map") or {}).values())
        if gpu is not None and kwargs.get("hf_quantizer") is None:
            dtype = None if kwargs.get("keep_in_fp32_modules") else kwargs.get("dtype")
            state_dict = self._on_gpu(state_dict, gpu, dtype)
        return stock(model, state_dict, *args, **kwargs)

    def _on_gpu(self, state_dict: Mapping[str, Any], gpu: torch.device, dtype: torch.dtype | None) -> Mapping[str, Any]:
        """The state dict, with those tensors on the GPU whose files are in it whole, as they were loaded."""
        names: dict[_Loading, dict[str, str]] = {}
        for name, tensor in state_dict.items():
            origin = self._origins.get(tensor) if isinstance(tensor, torch.Tensor) else None
            if origin is not None and origin.version == tensor._version:
                names.setdefault(origin.loading, {})[name] = origin.name
        replaced: Tensors = {}
        for loading, renamed in names.items():
            tensors = self.fetch(loading.source, gpu, dtype) if len(renamed) == loading.count else None
            if tensors is not None:
                replaced |= {name: tensors[origin] for name, origin in renamed.items()}
        return {**state_dict, **replaced}

    def _remember(self, source: Source, tensors: Tensors) -> None:
        loading = _Loading(source, len(tensors))
        for name, tensor in tensors.items():
            if not tensor.is_inference():  # whether such a one was written to nobody could tell
                self._origins[tensor] = _Origin(loading, name, tensor._version)

    def fetch(self, source: Source, device: torch.device, dtype: torch.dtype | None = None) -> Tensors | None:
        """All tensors of a file, from the cache; None, and perhaps a warning, if the cache does not serve them."""
        if self.given_up:
            return None
        try:
            tensors = self._from_whole(source, Options(device, dtype)) if source.whole else None
            if tensors is not None:
                return tensors
            loaded = load_name(source.path, Options(device, dtype), None)
        except (CheckpointError, UnsupportedFormat):
            return None  # the stock function says what is wrong, or loads it
        except (NBCacheError, OSError) as error:
            self._excuse(error, source)
            return None
        return loaded.tensors if loaded.key == source.key else None

    def _from_whole(self, source: Source, options: Options) -> Tensors | None:
        """A shard's tensors from the checkpoint that it belongs to, if that is cached already: not the same bytes twice."""
        try:
            tensors = load_key(source.whole, options).tensors
        except (EntryNotFound, DaemonUnavailable):
            return None
        if Source.of(source.path) != source:  # the file changed since; its own entry's key will tell
            return None
        names = set(_stock_open()(source.path, "pt", "cpu").keys())
        return {name: tensors[name] for name in tensors if name in names} if tensors.keys() >= names else None

    def _excuse(self, error: Exception, source: Source) -> None:
        """Say, once for each kind of error, why weights are not from the cache."""
        self.given_up |= isinstance(error, DaemonError | UnsupportedPlatform) and not isinstance(error, DaemonLost)
        if type(error) not in self._warned:
            self._warned.add(type(error))
            what = "files are read as ever, until nbcache is turned on again" if self.given_up else "this file is read as ever"
            notify(NotServed, f"{source.path}: {what}: {error}")


def _target(device: object) -> torch.device | None:
    """The device that was asked for, as the stock functions take it, if nbcache serves it."""
    if device is None:
        return torch.device("cpu")
    if isinstance(device, int) and not isinstance(device, bool):
        device = f"cuda:{device}"
    if not isinstance(device, str) or (device.startswith("cpu") and device != "cpu"):
        return None
    return _resolved(device)


def _only_gpu(devices: Iterable[object]) -> torch.device | None:
    """The GPU that a device map sends everything to; None if there is another device in it, or no GPU."""
    distinct = {_resolved(f"cuda:{device}" if isinstance(device, int) else device) for device in set(devices)}
    only = distinct.pop() if len(distinct) == 1 else None
    return only if only is not None and only.type == "cuda" else None


def _resolved(device: object) -> torch.device | None:
    try:
        return edge.resolve_device(device) if device is not None else None
    except InvalidOption:
        return None


def _known(options: Mapping[str, object]) -> bool:
    return all(value in READING.get(name, ()) for name, value in options.items())


def _one_dtype(model: Any, config: Any) -> torch.dtype | None:  # noqa: ANN401 - transformers' own
    """The dtype that a model's floating-point tensors are all to have; None if they differ."""
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes == {config.dtype} and not config.dtype_plan else None


def _in_stock_order(tensors: Tensors) -> Tensors:
    """In the order of the file, or of the names: as the ``load_file`` of this safetensors has them."""
    return tensors if hasattr(_stock_open(), "offset_keys") else {name: tensors[name] for name in sorted(tensors)}


def _stock_open() -> Stock:
    import safetensors

    return getattr(safetensors.safe_open, "__wrapped__", safetensors.safe_open)
