"""nbcache keeps model weights alive across kernel restarts.

``%load_ext nbcache`` in a notebook, then ``w = %load_weights model.safetensors``; or the same in Python: :func:`load`,
:func:`load_model`, :func:`put`, :func:`status`, :func:`evict`, :func:`pin`, :func:`unpin`; and for the LoRAs of a pipeline
:func:`load_lora`, :func:`set_lora`, :func:`unload_lora`. See :mod:`nbcache.errors` for what they raise.

:func:`enable`, :func:`disable` and :func:`enabled` serve unchanged programs: ordinary ``from_pretrained`` and ``load_file``.

Importing this module imports neither torch nor anything else that is slow.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = [
    "NBCacheError",
    "Weights",
    "__version__",
    "disable",
    "enable",
    "enabled",
    "errors",
    "evict",
    "evict_all",
    "free_gpu",
    "load",
    "load_lora",
    "load_model",
    "pin",
    "put",
    "set_lora",
    "status",
    "unload_lora",
    "unpin",
]

_HOMES = {
    "load_model": "nbcache.models.api",
    **dict.fromkeys(("enable", "disable", "enabled"), "nbcache.models.hooks"),
    **dict.fromkeys(("load_lora", "set_lora", "unload_lora"), "nbcache.models.lora"),
}
"""Where public functions live that are not in the client's API."""

TYPE_CHECKING = False  # checkers know the name; a restart need not wait for typing
if TYPE_CHECKING:
    from typing import Any

    from IPython.core.interactiveshell import InteractiveShell

    from nbcache import errors
    from nbcache.client.api import evict, evict_all, free_gpu, load, pin, put, status, unpin
    from nbcache.client.weights import Weights
    from nbcache.errors import NBCacheError
    from nbcache.models.api import load_model
    from nbcache.models.hooks import disable, enable, enabled
    from nbcache.models.lora import load_lora, set_lora, unload_lora


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if name == "errors":
        return importlib.import_module("nbcache.errors")
    if name == "NBCacheError":
        return importlib.import_module("nbcache.errors").NBCacheError
    return getattr(importlib.import_module(_HOMES.get(name, "nbcache.client.api")), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def load_ipython_extension(shell: InteractiveShell) -> None:
    """IPython calls this for ``%load_ext nbcache``."""
    from nbcache.jupyter.magics import register

    register(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """IPython calls this for ``%unload_ext nbcache``: everything the extension added goes."""
    from nbcache.jupyter.magics import unregister

    unregister(shell)
