"""``%load_weights``, ``%save_weights``, ``%load_lora``, ``%weights``: the Python API, typed into a cell.

Errors of nbcache become a ``UsageError``: one line, no traceback, the same words as in the API and on the command line.
"""

from __future__ import annotations

import contextlib
import gc
import keyword
import os
import sys
import time
from typing import Any

from IPython.core.error import UsageError
from IPython.core.interactiveshell import ExecutionResult, InteractiveShell
from IPython.core.magic import line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments

from nbcache import settings
from nbcache.client import api, spare
from nbcache.client.options import SHARE_MODES
from nbcache.client.weights import Weights, alive
from nbcache.config import NBCache
from nbcache.errors import EntryInUse, NBCacheError
from nbcache.jupyter.completer import MagicCompleter
from nbcache.jupyter.display import count_sharers, idle_slab_bytes, lora_summary, model_summary, summary
from nbcache.jupyter.encryption import end_if_unable
from nbcache.jupyter.learning import Learner
from nbcache.jupyter.manners import MannerlyMagics, first_word, one_line_errors, parsed, unquoted
from nbcache.jupyter.panels import StatusView
from nbcache.jupyter.release import release
from nbcache.models import api as models
from nbcache.models import hooks
from nbcache.units import format_size


@magics_class
class NBCacheMagics(MannerlyMagics):
    """The magics of one shell, and its settings: ``%config NBCache`` shows and sets them for what this kernel starts."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self.completer = MagicCompleter(shell, {name: getattr(self, name) for name in self.magics["line"]})
        self.settings = NBCache(parent=shell)
        self.settings.observe(_export, self.settings.trait_names(config=True))
        self.settings.observe(lambda change: hooks.turn(change.new), "serve_from_pretrained")
        if self.settings.serve_from_pretrained:
            hooks.enable()
        self.learner = Learner(self.settings)

    @one_line_errors
    @magic_arguments()
    @argument(
        "name",
        metavar="NAME",
        help="A saved name, an alias, a checkpoint (.safetensors, .pt, .bin, .gguf, .npz, ...), a folder, or a hub id.",
    )
    @argument("--as", dest="variable", metavar="VAR", help="Bind this variable and print a summary, instead of returning.")
    @argument("--device", help="cpu, cuda, cuda:1, ... Default: cuda where there is one, else cpu.")
    @argument("--dtype", help="Cast floating-point tensors, such as bfloat16. Default: as in the file.")
    @argument("--share", choices=SHARE_MODES, default="cow", help="How to share with the cache. Default: cow.")
    @argument("--component", default="", metavar="A,B", help="Of a pipeline, these components alone.")
    @argument("--raw", action="store_true", help="Give weights, where a folder would give a model or a pipeline.")
    @argument("--revision", default="", help="Of a hub id: the branch, tag or commit.")
    @argument("--variant", default="", help="The variant of the files, such as fp16.")
    @argument(
        "--config", default="", help="Of a single-file checkpoint: the folder or hub id of a pipeline that is built alike."
    )
    @argument("--subfolder", default="", help="The folder in NAME to load.")
    @line_magic
    def load_weights(self, line: str) -> Any:  # noqa: ANN401 - weights, a model, a pipeline
        """Load weights from the cache, reading them into it first if need be; a folder of a model gives the model.

        Examples::

            w = %load_weights model.safetensors
            %load_weights ~/models/minilm --raw --as w
            pipe = %load_weights flux-dev
        """
        args = parsed(self.load_weights, line)
        if args.variable and (not args.variable.isidentifier() or keyword.iskeyword(args.variable)):
            raise UsageError(f"--as {args.variable}: not the name of a variable")
        start = time.perf_counter()
        name = args.name
        where = {"revision": args.revision, "variant": args.variant, "subfolder": args.subfolder}
        made = None
        with self.progress(args.name) as progress:
            if args.component or args.config or models.is_model(name):
                made = models.assemble_name(
                    name,
                    args.device,
                    args.dtype,
                    args.share,
                    components=args.component,
                    raw=args.raw,
                    config=args.config,
                    on_progress=progress,
                    **where,
                )
            else:
                weights = api.load(name, args.device, args.dtype, args.share, on_progress=progress, **where)
        loaded = made.value if made else weights
        if made and not isinstance(loaded, Weights):
            self.say(model_summary(made, name), progress)
        elif progress.drawn or args.variable:
            self.say(self.summarize(loaded, time.perf_counter() - start), progress)
        if not args.variable:
            return loaded
        self.the_shell.user_ns[args.variable] = loaded
        return None

    @one_line_errors
    @no_var_expand
    @line_magic
    def save_weights(self, line: str) -> None:
        """Keep tensors under a name, across kernel restarts: ``%save_weights NAME EXPR``.

        EXPR is evaluated here; it gives a tensor, a (nested) dict of tensors, or a module. A name that exists is replaced.

        Examples::

            %save_weights embeddings embeddings
            %save_weights probe {"w": probe.weight, "b": probe.bias}
        """
        name, expression = first_word(line.strip())
        if not expression.strip():
            raise UsageError("%save_weights NAME EXPR: a name, and what to keep under it")
        start = time.perf_counter()
        weights = api.put(unquoted(name), self.the_shell.ev(expression.strip()))
        self.say(summary(weights, time.perf_counter() - start, "saved"))

    @one_line_errors
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

        args = parsed(self.load_lora, line)
        loaded = load_lora(self._value_of(args.pipe), args.name, args.scale, args.adapter)
        self.say(lora_summary(loaded))

    @one_line_errors
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

        args = parsed(self.unload_lora, line)
        unload_lora(self._value_of(args.pipe), args.adapter or None)

    @one_line_errors
    @magic_arguments()
    @argument(
        "action",
        nargs="?",
        choices=("evict", "pin", "unpin", "release", "free-gpu"),
        help="What to do; without it, show what is cached. release lets go of what this kernel holds of NAME; "
        "free-gpu drops what no kernel uses from the GPUs, all or NAME's.",
    )
    @argument("name", nargs="?", metavar="NAME", help="The entry to do it to.")
    @line_magic
    def weights(self, line: str) -> StatusView | None:
        """Show what is cached, how large it is and who uses it; or evict, pin or unpin an entry.

        Examples::

            %weights
            %weights pin ~/models/minilm
            %weights evict embeddings
            %weights release minilm
            %weights free-gpu
        """
        args = parsed(self.weights, line)
        if not args.action:
            private = {weights.key: weights.private_bytes for weights in alive()}
            return StatusView(api.status(), api.manifest, private)
        name = args.name or ""
        if args.action == "free-gpu":
            freed = api.free_gpu(name)
            self.say(f"freed {format_size(freed.freed_bytes)} of GPU memory")
            return None
        if not name:
            raise UsageError(f"%weights {args.action} NAME: which entry?")
        if args.action == "release":
            self.say(release(self.the_shell, name))
        elif args.action == "evict":
            _evict(name)
        elif args.action == "pin":
            api.pin(name)
        else:
            api.unpin(name)
        return None

    @one_line_errors
    @magic_arguments()
    @argument("state", nargs="?", choices=("on", "off"), help="Without it, show which it is.")
    @line_magic
    def nbcache(self, line: str) -> None:
        """Serve unchanged code from the cache: ``from_pretrained``, ``load_file``, ``safe_open``; ``off`` undoes it.

        Examples::

            %nbcache on
            pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")
        """
        args = parsed(self.nbcache, line)
        if args.state:
            hooks.turn(args.state == "on")
        else:
            self.say(f"nbcache is {'on' if hooks.is_enabled() else 'off'}")

    def _value_of(self, argument: str) -> object:
        """What a variable or expression is. UsageError if it is none."""
        try:
            return self.the_shell.ev(argument)
        except (NameError, SyntaxError) as error:
            raise UsageError(f"{argument}: {error.msg if isinstance(error, SyntaxError) else error}") from error

    def after_cell(self, result: ExecutionResult) -> None:
        """IPython calls this after each cell: let go of weights that it dropped; help where the GPU was full."""
        api.prepare()
        cow = sys.modules.get("nbcache.client.cow")
        if cow is not None:
            cow.sweep()
        if _ran_out_of_gpu_memory(result.error_in_exec):
            with contextlib.suppress(NBCacheError):
                idle = idle_slab_bytes(api.status()) + spare.nbytes()
                if idle:
                    print(f"nbcache: {format_size(idle)} of GPU memory hold weights that no kernel uses: %weights free-gpu")  # noqa: T201

    def summarize(self, weights: Weights, seconds: float) -> str:
        """The line about a load, with who else uses the entry."""
        sharers = 0
        with contextlib.suppress(NBCacheError):
            sharers = count_sharers(api.status(), weights.key, os.getpid())
        return summary(weights, seconds, sharers=sharers)


def _ran_out_of_gpu_memory(error: BaseException | None) -> bool:
    """Whether it was torch that ran out, be its error the cause of another or not."""
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError":
            return True
        error = error.__cause__ or error.__context__
    return False


def _evict(name: str) -> None:
    """Evict; if it is in use, once more after a garbage collection: a model that was deleted hangs in its own cycles."""
    try:
        api.evict(name)
    except EntryInUse:
        gc.collect()
        api.evict(name)


def _export(change: Any) -> None:  # noqa: ANN401 - traitlets gives a bunch
    """A setting travels to the daemon, and to later sessions of this kernel, as its environment variable."""
    if change.new is None:
        os.environ.pop(settings.variable_of(change.name), None)
    else:
        os.environ[settings.variable_of(change.name)] = settings.as_text(change.new)


def register(shell: InteractiveShell) -> None:
    """Add the magics to a shell."""
    end_if_unable(shell)
    try:
        settings.adopt()
    except NBCacheError as error:
        raise UsageError(str(error)) from error
    magics = NBCacheMagics(shell)
    magics.completer.install()
    shell.register_magics(magics)
    configurables: list[Any] = shell.configurables
    configurables.append(magics.settings)
    shell.events.register("post_run_cell", magics.after_cell)
    shell.events.register("pre_run_cell", magics.learner.before_cell)
    shell.events.register("post_run_cell", magics.learner.after_cell)


def unregister(shell: InteractiveShell) -> None:
    """Take them away again, without a trace."""
    manager: Any = shell.magics_manager
    registered = manager.registry.pop(NBCacheMagics.__name__, None)
    if registered is None:
        return
    hooks.disable()
    shell.events.unregister("post_run_cell", registered.after_cell)
    registered.completer.remove()
    shell.events.unregister("pre_run_cell", registered.learner.before_cell)
    shell.events.unregister("post_run_cell", registered.learner.after_cell)
    shell.configurables.remove(registered)
    shell.configurables.remove(registered.settings)
    for magics in manager.magics.values():
        for name in [name for name, magic in magics.items() if getattr(magic, "__self__", None) is registered]:
            del magics[name]
