"""``%weights release NAME``: let go of what the shell itself keeps, and say what else still holds a tensor.

A shell keeps results in ``Out`` and ``_``, and the last error's frames in ``sys.last_traceback``: what was shown once is alive
after ``del``. Owns that clearing; touches no variable of the user's.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from nbcache.client import spare
from nbcache.client.fill import spellings
from nbcache.client.users import storage_of, users_of
from nbcache.client.weights import Weights, alive
from nbcache.errors import EntryNotFound
from nbcache.jupyter.display import short_name
from nbcache.units import format_size

MOST_NAMED = 8
LAST_ERROR = ("last_traceback", "last_value", "last_type", "last_exc")
RECENT = ("_", "__", "___")


def release(shell: InteractiveShell, name: str) -> str:
    """Release this kernel's weights of a name; what came of it, in words. EntryNotFound if it holds none."""
    held = [weights for weights in alive() if _is_called(weights, name)]
    if not held:
        others = ", ".join(sorted({short_name(weights.name) for weights in alive()})) or "none"
        raise EntryNotFound(f"{name}: this kernel holds no weights of that name; it holds {others}")
    storages = frozenset(storage_of(tensor) for weights in held for tensor in weights.values())
    size = sum(weights.nbytes for weights in held)
    spare.let_go({weights.name for weights in held})
    for weights in held:
        weights.release()
    del weights
    _clear_results(shell, held, storages)
    for attribute in LAST_ERROR:
        if hasattr(sys, attribute):
            delattr(sys, attribute)
    called = short_name(held[0].name)
    del held
    gc.collect()
    found = users_of(storages, shell.user_ns, skip=("In", "Out"))
    said = f"released {called} ({format_size(size)})"
    if not found:
        return f"{said}; no variable refers to it any more"
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return f"{said}, but these still hold tensors of it: {', '.join(found[:MOST_NAMED])}{more}; delete them to free the memory"


def _is_called(weights: Weights, name: str) -> bool:
    return weights.name in spellings(name) or name in (weights.name, short_name(weights.name))


def _clear_results(shell: InteractiveShell, held: Iterable[Weights], storages: frozenset[int]) -> None:
    """Take results that are, or hold, such weights out of Out, ``_``, ``_5`` and the displayhook."""
    results: dict[int, Any] = shell.user_ns.get("Out", {})
    gone = [number for number, value in results.items() if _holds(value, held, storages)]
    for number in gone:
        del results[number]
        for namespace in (shell.user_ns, shell.user_ns_hidden):  # the second has what IPython put into the first
            namespace.pop(f"_{number}", None)
    hook: Any = shell.displayhook
    for recent in RECENT:
        for namespace in (shell.user_ns, shell.user_ns_hidden):
            if _holds(namespace.get(recent), held, storages):
                namespace[recent] = ""
        if _holds(getattr(hook, recent, None), held, storages):
            setattr(hook, recent, "")


def _holds(value: object, held: Iterable[Weights], storages: frozenset[int]) -> bool:
    return any(value is weights for weights in held) or bool(users_of(storages, {"value": value}))
