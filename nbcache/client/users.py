"""What in a namespace still holds a tensor of some weights: by name, so that a user can let go of it.

Compares storages by identity and reads no data, so a copy-on-write tensor stays one. Needs tensors, not torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

DEPTH = 3
"""How deep containers are looked into."""


def storage_of(tensor: Any) -> int:  # noqa: ANN401 - a tensor, without importing torch
    """A number that tensors share if and only if they share memory that torch manages as one."""
    return int(tensor.untyped_storage()._cdata)


def users_of(storages: frozenset[int], namespace: Mapping[str, object], skip: Iterable[str] = ()) -> list[str]:
    """Names of variables, items, parameters and buffers over these storages: ``x``, ``d['k']``, ``model.head.weight``."""
    left = set(namespace) - set(skip)
    return [path for name in sorted(left) if not name.startswith("_") for path in _search(name, namespace[name], storages, 0)]


def _search(path: str, value: object, storages: frozenset[int], depth: int) -> Iterator[str]:
    if callable(getattr(value, "untyped_storage", None)):
        if getattr(value, "layout", None) is not None and _is_over(value, storages):
            yield path
    elif callable(getattr(value, "named_parameters", None)) and not isinstance(value, type):
        yield from _in_module(path, value, storages)
    elif depth < DEPTH and isinstance(value, dict):
        for key, inner in list(value.items()):
            yield from _search(f"{path}[{key!r}]", inner, storages, depth + 1)
    elif depth < DEPTH and isinstance(value, list | tuple | set):
        for number, inner in enumerate(list(value)):
            yield from _search(f"{path}[{number}]", inner, storages, depth + 1)


def _is_over(tensor: object, storages: frozenset[int]) -> bool:
    try:
        return storage_of(tensor) in storages
    except (RuntimeError, NotImplementedError):  # sparse, meta: no storage
        return False


def _in_module(path: str, module: Any, storages: frozenset[int]) -> Iterator[str]:  # noqa: ANN401
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if _is_over(tensor, storages):
            yield f"{path}.{name}"
