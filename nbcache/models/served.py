"""A file that a stock loader opened, with the cache's tensors in it.

Owns what ``safe_open`` gives while the switch is on. Everything but the tensors' bytes (names, metadata, shapes, errors) is the
stock object's own, so that it cannot differ. Knows nothing of who opened it, nor of models and where they go. Needs torch.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from nbcache.checkpoints.catalog import SUFFIX, resolve
from nbcache.client import tensors as edge
from nbcache.errors import NBCacheError

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")

Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Source:
    """A file that the cache may have, and the key of what it holds now.

    ``whole`` is the key of the sharded checkpoint that the file is a shard of; empty if it is none.
    """

    path: str
    key: str
    whole: str = ""

    def alone(self) -> Source:
        """The file for itself, and not as a shard."""
        return replace(self, whole="")

    @classmethod
    def of(cls, filename: object) -> Source | None:
        """The source of this name; None if it is not that of an ordinary ``.safetensors`` file."""
        name = os.fspath(filename) if isinstance(filename, str | os.PathLike) else None
        if not isinstance(name, str) or not name.endswith(SUFFIX) or os.path.isdir(name):
            return None
        path = os.path.abspath(name)
        try:
            return cls(path, resolve(path).key, _key_of_whole(path))
        except NBCacheError:
            return None


def _key_of_whole(path: str) -> str:
    index = _SHARD.sub(f"{SUFFIX}.index.json", path)
    try:
        return resolve(index).key if index != path and os.path.lexists(index) else ""
    except NBCacheError:
        return ""


Fetch = Callable[[Source, torch.device, torch.dtype | None], Tensors | None]
"""All tensors of a file from the cache, on a device, cast if a dtype is given; None if the cache does not serve them."""


class ServedFile:
    """What ``safe_open`` gives: the stock object ``opened``, with the cache's tensors.

    Nothing is read, and nothing asked of the daemon, before the first tensor. ``fall_back`` opens the file as the caller asked
    for it, should the cache fail. ``opened`` was opened after ``source`` was looked at, so that another generation's tensors
    are noticed by their key.

    Notes
    -----
    Locked where threads meet: the first tensor.
    """

    def __init__(
        self,
        fetch: Fetch,
        source: Source,
        device: torch.device,
        opened: Any,  # noqa: ANN401 - safetensors has no types
        fall_back: Callable[[], Any],
    ) -> None:
        self._fetch = fetch
        self._source = source
        self._device = device
        self._dtype: torch.dtype | None = None
        self._whole = device.type == "cpu"
        self._opened = opened
        self._fall_back = fall_back
        self._stock: Any = None
        self._tensors: Tensors | None = None
        self._lock = threading.Lock()

    def place(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """All tensors will be wanted on this device, cast if a dtype is given: have them there at once, and not one by one.

        Before the first tensor is asked for.
        """
        self._device, self._dtype, self._whole = device, dtype, True

    def cached(self, name: str) -> torch.Tensor | None:
        """A tensor from the cache: where the file is placed, else on the CPU. None if the cache does not serve it."""
        with self._lock:
            if self._tensors is None:
                found = self._fetch(self._source, self._device if self._whole else CPU, self._dtype)
                if found is None and self._whole and self._device.type != "cpu":
                    self._whole, found = False, self._fetch(self._source, CPU, None)
                self._tensors = found or {}
        return self._tensors.get(name)

    def delivered(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor where the caller asked for it."""
        return tensor if self._whole else tensor.to(edge.real_device(self._device))

    def stock_slice(self, name: str, opened: Any) -> Any:  # noqa: ANN401
        """The stock slice of a tensor; ``opened`` is the one on the CPU."""
        return opened if self._stock_file() is self._opened else self._stock_file().get_slice(name)

    def _stock_file(self) -> Any:  # noqa: ANN401
        with self._lock:
            if self._stock is None:
                self._stock = self._fall_back()
        return self._stock

    def get_tensor(self, name: str) -> torch.Tensor:
        """See safetensors."""
        self._opened.get_slice(name)  # SafetensorError if it is closed, or has no such tensor
        tensor = self.cached(name)
        if tensor is None:
            found: torch.Tensor = self._stock_file().get_tensor(name)
            return found
        return self.delivered(tensor)

    def get_tensors(self) -> Tensors:
        """See safetensors; its older versions have none."""
        return {name: self.get_tensor(name) for name in self._opened.offset_keys()}

    def get_slice(self, name: str) -> ServedSlice:
        """See safetensors."""
        return ServedSlice(self, name, self._opened.get_slice(name))

    def __enter__(self) -> ServedFile:
        self._opened.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.__exit__(*exception)
        if self._stock is not None and self._stock is not self._opened:
            self._stock.__exit__(*exception)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._opened, name)


class ServedSlice:
    """What ``get_slice`` gives: shape and dtype from the stock slice ``opened``, tensors from the cache."""

    def __init__(self, file: ServedFile, name: str, opened: Any) -> None:  # noqa: ANN401
        self.file = file
        self._name = name
        self._opened = opened

    def __getitem__(self, index: Any) -> torch.Tensor:  # noqa: ANN401 - whatever torch takes, and so does stock
        tensor = self.file.cached(self._name)
        if tensor is None:
            found: torch.Tensor = self.file.stock_slice(self._name, self._opened)[index]
            return found
        return self.file.delivered(tensor[index])

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._opened, name)
