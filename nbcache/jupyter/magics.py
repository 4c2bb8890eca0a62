"""``%load_weights``, ``%save_weights``, ``%load_lora``, ``%weights``: the Python API, typed into a cell.

Errors of nbcache become a ``UsageError``: one line, no traceback, the same words as in the API and on the command line.
"""

from __future__ import annotations

import contextlib
import keyword
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from IPython.core.error import UsageError
from IPython.core.interactiveshell import ExecutionResult, InteractiveShell
from IPython.core.magic import Magics, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from nbcache.client import api
from nbcache.client.options import SHARE_MODES
from nbcache.client.weights import Weights
from nbcache.config import NBCache
from nbcache.errors import NBCacheError
from nbcache.jupyter.display import StatusView, idle_slab_bytes, lora_summary, summary
from nbcache.units import format_size

R = TypeVar("R")


def _one_line_errors(magic: Callable[..., R]) -> Callable[..., R]:
    @wraps(magic)
    def wrapped(self: Magics, line: str) -> R:
        try:
            return magic(self, line)
        except NBCacheError as error:
            raise UsageError(str(error)) from error

    return wrapped


@magics_class
class NBCacheMagics(Magics):
    """The magics of one shell, and its settings: ``%config NBCache`` shows and sets them for what this kernel starts."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self.settings = NBCache(parent=shell)
        self.settings.observe(_export, self.settings.trait_names(config=True))

    @_one_line_errors
    @magic_arguments()
    @argument("name", metavar="NAME", help="A saved name, or the path of a .safetensors file, a shard index or a folder.")
    @argument("--as", dest="variable", metavar="VAR", help="Bind this variable and print a summary, instead of returning.")
    @argument("--device", help="cpu, cuda, cuda:1, ... Default: cuda where there is one, else cpu.")
    @argument("--dtype", help="Cast floating-point tensors, such as bfloat16. Default: as in the file.")
    @argument("--share", choices=SHARE_MODES, default="cow", help="How to share with the cache. Default: cow.")
    @line_magic
    def load_weights(self, line: str) -> Weights | None:
        """Load weights from the cache, reading them into it first if need be.

        Examples::

            w = %load_weights model.safetensors
            %load_weights ~/models/minilm --as w
        """
        args = parse_argstring(self.load_weights, line)
        if args.variable and (not args.variable.isidentifier() or keyword.iskeyword(args.variable)):
            raise UsageError(f"--as {args.variable}: not the name of a variable")
        start = time.perf_counter()
        weights = api.load(_unquoted(args.name), args.device, args.dtype, args.share)
        if not args.variable:
            return weights
        print(summary(weights, time.perf_counter() - start))  # noqa: T201
        self._shell.user_ns[args.variable] = weights
        return None

    @_one_line_errors
    @no_var_expand
    @line_magic
    def save_weights(self, line: str) -> None:
        """Keep tensors under a name, across kernel restarts: ``%save_weights NAME EXPR``.

        EXPR is evaluated here; it gives a tensor, a (nested) dict of tensors, or a module. A name that exists is replaced.

        Examples::

            %save_weights embeddings embeddings
            %save_weights probe {"w": probe.weight, "b": probe.bias}
        """
        name, expression = _first_word(line.strip())
        if not expression.strip():
            raise UsageError("%save_weights NAME EXPR: a name, and what to keep under it")
        start = time.perf_counter()
        weights = api.put(_unquoted(name), self._shell.ev(expression.strip()))
        print(summary(weights, time.perf_counter() - start, "saved"))  # noqa: T201

    @_one_line_errors
    @magic_arguments()
    @argument("name", metavar="NAME", help="The path of a LoRA: a .safetensors file, or a folder with one.")
    @argument("pipe", metavar="PIPE", help="The pipeline or model: a variable, or any expression without blanks.")
    @argument("--scale", type=float, default=1.0, metavar="S", help="What to multiply its effect by. Default: 1.")
    @argument("--adapter", default="default", metavar="A", help="Which adapter it is to be, for several at once.")
    @line_magic
    def load_lora(self, line: str) -> None:
        """Put a LoRA into a pipeline, in the place of the one that the adapter had.

        Examples::

            %load_lora ~/loras/pixel-art.safetensors pipe
            %load_lora ~/loras/sketch.safetensors pipe --scale 0.8 --adapter style
        """
        from nbcache.models.lora import load_lora

        args = parse_argstring(self.load_lora, line)
        loaded = load_lora(self._shell.ev(_unquoted(args.pipe)), _unquoted(args.name), args.scale, _unquoted(args.adapter))
        print(lora_summary(loaded))  # noqa: T201

    @_one_line_errors
    @magic_arguments()
    @argument("pipe", metavar="PIPE", help="The pipeline or model: a variable, or any expression without blanks.")
    @argument("adapter", nargs="?", metavar="A", help="The adapter to take out. Default: all that were put in by %%load_lora.")
    @line_magic
    def unload_lora(self, line: str) -> None:
        """Take LoRAs out of a pipeline.

        Examples::

            %unload_lora pipe
            %unload_lora pipe style
        """
        from nbcache.models.lora import unload_lora

        args = parse_argstring(self.unload_lora, line)
        unload_lora(self._shell.ev(_unquoted(args.pipe)), _unquoted(args.adapter) if args.adapter else None)

    @_one_line_errors
    @magic_arguments()
    @argument(
        "action",
        nargs="?",
        choices=("evict", "pin", "unpin", "free-gpu"),
        help="What to do; without it, show what is cached. free-gpu drops what no kernel uses from the GPUs, all or NAME's.",
    )
    @argument("name", nargs="?", metavar="NAME", help="The entry to do it to.")
    @line_magic
    def weights(self, line: str) -> StatusView | None:
        """Show what is cached, how large it is and who uses it; or evict, pin or unpin an entry.

        Examples::

            %weights
            %weights pin ~/models/minilm
            %weights evict embeddings
            %weights free-gpu
        """
        args = parse_argstring(self.weights, line)
        if not args.action:
            return StatusView(api.status())
        name = _unquoted(args.name or "")
        if args.action == "free-gpu":
            freed = api.free_gpu(name)
            print(f"freed {format_size(freed.freed_bytes)} of GPU memory")  # noqa: T201
            return None
        if not name:
            raise UsageError(f"%weights {args.action} NAME: which entry?")
        if args.action == "evict":
            api.evict(name)
        elif args.action == "pin":
            api.pin(name)
        else:
            api.unpin(name)
        return None

    def after_cell(self, result: ExecutionResult) -> None:
        """IPython calls this after each cell: let go of weights that it dropped; help where the GPU was full."""
        api.prepare()
        cow = sys.modules.get("nbcache.client.cow")
        if cow is not None:
            cow.sweep()
        if type(result.error_in_exec).__name__ == "OutOfMemoryError":
            with contextlib.suppress(NBCacheError):
                idle = idle_slab_bytes(api.status())
                if idle:
                    print(f"nbcache: {format_size(idle)} of GPU memory hold weights that no kernel uses: %weights free-gpu")  # noqa: T201

    @property
    def _shell(self) -> InteractiveShell:
        assert self.shell is not None
        return self.shell


def _export(change: Any) -> None:  # noqa: ANN401 - traitlets gives a bunch
    """A setting travels to the daemon, and to later sessions of this kernel, as its environment variable."""
    os.environ[f"NBCACHE_{change.name.upper()}"] = str(change.new)


def _first_word(line: str) -> tuple[str, str]:
    """The first word of a line, which quotes may hold together, and the rest."""
    quoted = line[:1] in ("'", '"') and line[0] in line[1:]
    end = line.index(line[0], 1) + 1 if quoted else len(line.partition(" ")[0])
    return line[:end], line[end:]


def _unquoted(text: str) -> str:
    """IPython splits a line at blanks and leaves the quotes that protect some of them."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def register(shell: InteractiveShell) -> None:
    """Add the magics to a shell."""
    magics = NBCacheMagics(shell)
    shell.register_magics(magics)
    configurables: list[Any] = shell.configurables
    configurables.append(magics.settings)
    shell.events.register("post_run_cell", magics.after_cell)


def unregister(shell: InteractiveShell) -> None:
    """Take them away again, without a trace."""
    manager: Any = shell.magics_manager
    registered = manager.registry.pop(NBCacheMagics.__name__, None)
    if registered is None:
        return
    shell.events.unregister("post_run_cell", registered.after_cell)
    shell.configurables.remove(registered)
    shell.configurables.remove(registered.settings)
    for magics in manager.magics.values():
        for name in [name for name, magic in magics.items() if getattr(magic, "__self__", None) is registered]:
            del magics[name]
