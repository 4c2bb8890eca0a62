"""The command line: ``nbcache``, or ``python -m nbcache``.

A skin of the API. Prints results on stdout and errors as one line on stderr; exits 0 when it worked, 1 when it did not, 2 when
it was called wrongly. ``--json`` prints one document for scripts. Never imports torch unless the command needs tensors.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import typer

from nbcache import __version__, completion, settings
from nbcache.checkpoints import aliases
from nbcache.client import api
from nbcache.client.session import Session, stop_daemon
from nbcache.config import NBCache
from nbcache.errors import InvalidOption, NBCacheError
from nbcache.jupyter.display import render_settings, render_status, short_name
from nbcache.jupyter.progress import Progress, find_screen
from nbcache.units import format_duration, format_size, parse_size

app = typer.Typer(
    name="nbcache",
    help="Keep model weights alive across kernel restarts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"nbcache {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(host_limit: Annotated[str, typer.Option(help="Most host memory for entries, such as 48G.")] = "") -> None:
    """Run the daemon here, in the foreground, until Ctrl-C. Loads start one by themselves; this is for service units."""
    from nbcache.daemon.lifecycle import serve_foreground

    if host_limit:
        try:
            parse_size(host_limit)
        except InvalidOption as error:
            raise typer.BadParameter(f"--host-limit: {error}") from error
    serve_foreground(NBCache(host_limit=host_limit) if host_limit else NBCache())


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show what is cached where, and who uses it."""
    document = api.status()
    _print(document if as_json else render_status(document))


@app.command()
def load(
    name: Annotated[
        str,
        typer.Argument(
            help="An alias, a checkpoint (.safetensors, .pt, .bin, .gguf, .npz, ...), a shard index, a folder, or a hub id.",
            autocompletion=completion.loadable,
        ),
    ],
    pin: Annotated[bool, typer.Option("--pin", help="Keep it, however full the tier gets.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read a checkpoint into the cache, so that the first notebook finds it there."""
    start = time.perf_counter()
    with Progress(short_name(name), find_screen(sys.stderr)) as progress:
        staged = api.stage_all(name, pinned=pin, on_progress=progress)
    progress.finish("")
    seconds = time.perf_counter() - start
    if as_json:
        found = [msgspec.structs.asdict(entry) | {"seconds": round(seconds, 6), "hit": hit} for entry, hit in staged]
        _print(found[0] if len(found) == 1 else found)
        return
    rate = format_size(int(sum(entry.bytes for entry, hit in staged if not hit) / seconds))
    for entry, hit in staged:
        how = "was cached" if hit else f"read in {format_duration(seconds)} ({rate}/s)"
        _print(f"{short_name(entry.name)}: {entry.tensors} tensors, {format_size(entry.bytes)}, {how}")


@app.command()
def evict(
    name: Annotated[str, typer.Argument(help="The entry to drop.", autocompletion=completion.cached)] = "",
    everything: Annotated[bool, typer.Option("--all", help="Every idle entry that can be read again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Drop an entry from the cache, or all that are idle; saved ones go only by name."""
    if bool(name) is everything:
        raise typer.BadParameter("name an entry, or give --all")
    evicted = api.evict_all() if everything else api.evict(name)
    if as_json:
        _print({"evicted": evicted.names, "freed_bytes": evicted.freed_bytes, "kept": evicted.kept})
        return
    _print(f"evicted {', '.join(map(short_name, evicted.names)) or 'nothing'} ({format_size(evicted.freed_bytes)})")
    if evicted.kept:
        _print(f"kept {', '.join(evicted.kept)}")


@app.command()
def pin(name: Annotated[str, typer.Argument(help="The entry to keep.", autocompletion=completion.cached)]) -> None:
    """Keep an entry, however full the tier gets."""
    api.pin(name)


@app.command()
def unpin(name: Annotated[str, typer.Argument(help="The entry to let go.", autocompletion=completion.cached)]) -> None:
    """Let an entry give way again."""
    api.unpin(name)


@app.command()
def stop() -> None:
    """End the daemon. Kernels keep the tensors they hold; saved entries are gone."""
    _stop()


@app.command()
def restart() -> None:
    """End the daemon and start a new one, empty, of this version."""
    _stop()
    Session.open().close()
    _print(f"started: process {api.status().pid}, nbcache {__version__}")


def _stop() -> None:
    lost = _saved_entries()
    pid = stop_daemon()
    if not pid:
        _print("no daemon runs")
        return
    _print(f"stopped: process {pid}" + (f"; gone with it: {', '.join(lost)}" if lost else ""))


def _saved_entries() -> list[str]:
    try:
        return [f"{e.name} ({format_size(e.bytes)})" for e in api.status().entries if e.provenance == "put"]
    except NBCacheError:  # hung, or of another version: it is to be stopped all the same
        return []


@app.command()
def top(
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
) -> None:
    """Watch the tiers, loads with their speed, and who uses what, until Ctrl-C."""
    from nbcache.top import run_top

    run_top(interval, once)


@app.command("config")
def show_config(context: typer.Context, as_json: AsJson = False) -> None:
    """Show the options in force, and what set each: a file of Jupyter's config path, the environment, a flag."""
    found = settings.in_force(context.obj or ())
    _print(found if as_json else render_settings(found))


alias = typer.Typer(help="Short names for what you load.", no_args_is_help=True)
app.add_typer(alias, name="alias")


@alias.command("add")
def alias_add(
    name: Annotated[str, typer.Argument(help="The short name.")],
    target: Annotated[str, typer.Argument(metavar="PATH", help="What it stands for.", autocompletion=completion.paths)],
) -> None:
    """Let NAME stand for PATH, wherever a name is asked for."""
    aliases.add(name, target)
    _print(f"{name} is {aliases.listing()[name]}")


@alias.command("remove")
def alias_remove(
    name: Annotated[str, typer.Argument(help="The short name.", autocompletion=completion.aliases_of)],
) -> None:
    """Forget NAME. What was loaded by it stays cached."""
    aliases.remove(name)


@alias.command("list")
def alias_list(as_json: AsJson = False) -> None:
    """Show your aliases."""
    table = aliases.listing()
    width = max(map(len, table), default=0)
    _print(table if as_json else "\n".join(f"{name.ljust(width)}  {table[name]}" for name in sorted(table)) or "no aliases")


@app.command()
def doctor(
    part: Annotated[str, typer.Argument(help="Only this: machine, daemon, jupyter or gpu.")] = "",
    as_json: AsJson = False,
) -> None:
    """Look at machine, GPU, daemon and Jupyter: what works, what does not, what to do about it. Exits 1 if loads would fail."""
    from nbcache.doctor.checkup import examine
    from nbcache.doctor.findings import render_report

    report = examine(part)
    _print(report if as_json else render_report(report))
    if not report.healthy:
        raise typer.Exit(1)


@app.command()
def demo(
    checkpoint: Annotated[Path | None, typer.Option(help="Your own checkpoint instead of MiniLM.")] = None,
) -> None:
    """Load real weights in a real kernel, restart it, load again; show that the result is the same, and the times."""
    from nbcache.demo import run_demo

    if not run_demo(str(checkpoint) if checkpoint else None):
        raise typer.Exit(1)


kernelspec = typer.Typer(help="The kernel whose restarts skip the imports, for Jupyter.", no_args_is_help=True)
app.add_typer(kernelspec, name="kernelspec")


@kernelspec.command("install")
def kernelspec_install(
    name: Annotated[str, typer.Option(help="What the kernelspec is called.")] = "nbcache",
    display_name: Annotated[str, typer.Option(help="What people see; by default Python 3 (nbcache).")] = "",
    sys_prefix: Annotated[bool, typer.Option("--sys-prefix", help="For servers of this environment alone.")] = False,
    prefix: Annotated[str, typer.Option(help="For servers of the environment with this prefix.")] = "",
    as_json: AsJson = False,
) -> None:
    """Install the kernel of this interpreter, for the user's Jupyter servers of whichever environment."""
    from nbcache.jupyter.kernelspec import install

    folder = install(name, display_name, prefix or (sys.prefix if sys_prefix else None))
    _print({"name": name, "folder": folder} if as_json else f"installed {name} in {folder}")


@kernelspec.command("remove")
def kernelspec_remove(
    name: Annotated[str, typer.Option(help="What the kernelspec is called.")] = "nbcache", as_json: AsJson = False
) -> None:
    """Remove the kernel, and end the processes that wait to become one."""
    from nbcache.jupyter.kernelspec import remove

    folder = remove(name)
    _print({"name": name, "folder": folder} if as_json else f"removed {name} from {folder}")


bench = typer.Typer(help="Measure on this machine, beside a floor or a rival in the same run.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("attach")
def bench_attach(
    checkpoint: Annotated[
        str, typer.Argument(help="Your own checkpoint; without it, synthetic ones of 104 to 20 000 tensors.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Time from the call to usable tensors when the entry is cached, beside safetensors' load_file."""
    from nbcache.bench.host import measure_attach, render_attach

    results = measure_attach(checkpoint or None)
    _print(results if as_json else render_attach(results))


@bench.command("stage")
def bench_stage(
    size: Annotated[str, typer.Option(help="How much to read.")] = "4GiB",
    directory: Annotated[str, typer.Option(help="Where to put the file.")] = "",
    as_json: AsJson = False,
) -> None:
    """Reading a file into the cache from a hot page cache, beside plain parallel preadv."""
    from nbcache.bench.host import measure_stage, render_stage

    result = measure_stage(parse_size(size), directory=directory or None)
    _print(result if as_json else render_stage(result))


@bench.command("gpu")
def bench_gpu(
    checkpoint: Annotated[str, typer.Argument(help="Your own checkpoint: a file, an index or a folder.")] = "",
    flux: Annotated[bool, typer.Option("--flux", help="Write one of FLUX.1's shape (23.8 GB) to TMPDIR for it.")] = False,
    loras: Annotated[bool, typer.Option("--loras", help="LoRA-sized files as well (up to 2 GB, in TMPDIR).")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Other loaders as well, those that are installed.")] = False,
    cold: Annotated[bool, typer.Option(help="Drop the files from the page cache, and measure the disk too.")] = True,
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes for each kind of load.")] = 3,
    save: Annotated[Path | None, typer.Option(help="Also write the JSON document to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Loads onto the GPU, cold and hot, from pinned memory and from the slab, beside the bandwidth of link and disk."""
    from nbcache.bench.flux import temporary_flux
    from nbcache.bench.gpu import measure_gpu
    from nbcache.bench.tables import render_gpu

    if bool(checkpoint) is flux:
        raise typer.BadParameter("name a checkpoint, or give --flux")
    with temporary_flux() if flux else contextlib.nullcontext(checkpoint) as path:
        result = measure_gpu(path, runs, cold, peers, loras, on_step=_print_step)
    if save:
        save.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    _print(result if as_json else render_gpu(result))


@bench.command("models")
def bench_models(
    folder: Annotated[
        str, typer.Argument(help="A pipeline's folder; without it, one of FLUX.1's shape is written to TMPDIR.")
    ] = "",
    small: Annotated[bool, typer.Option("--small", help="Write a toy one instead (13 MB).")] = False,
    stock: Annotated[bool, typer.Option(help="The library's own load as well.")] = True,
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes.")] = 5,
    as_json: AsJson = False,
) -> None:
    """A whole pipeline onto the GPU, as after a restart: the time beyond imports, and where it goes."""
    from nbcache.bench.models import measure_models, render_models
    from nbcache.bench.pipeline import temporary_pipeline

    with contextlib.nullcontext(folder) if folder else temporary_pipeline(small) as path:
        result = measure_models(path, runs, stock, on_step=_print_step)
    _print(result if as_json else render_models(result))


@bench.command("restart")
def bench_restart(
    checkpoint: Annotated[str, typer.Option(help="Your own: a file, an index or a folder. Default: the demo's MiniLM.")] = "",
    flux: Annotated[bool, typer.Option("--flux", help="Write one of FLUX.1's shape (23.8 GB) to TMPDIR for it.")] = False,
    device: Annotated[str, typer.Option(help="Where the first cell loads to.")] = "cpu",
    imports: Annotated[
        list[str] | None, typer.Option("--imports", help="What the first cell imports beside torch; several times for several.")
    ] = None,
    client: Annotated[str, typer.Option(help="manager: jupyter_client's; rest: a Jupyter server's.")] = "manager",
    runs: Annotated[int, typer.Option(min=1, help="Restarts of each kernel with each first cell.")] = 10,
    save: Annotated[Path | None, typer.Option(help="Also write the JSON document to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """From the request to restart to the first cell that has used the weights, a stock kernel beside ours."""
    from nbcache.bench.flux import temporary_flux
    from nbcache.bench.restart import CLIENTS, default_checkpoint, default_imports, measure_restart, render_restart

    if client not in CLIENTS or (checkpoint and flux):
        raise typer.BadParameter(f"--client is one of {', '.join(CLIENTS)}; --checkpoint or --flux, not both")
    with temporary_flux() if flux else contextlib.nullcontext(checkpoint or default_checkpoint()) as path:
        result = measure_restart(path, device, imports or default_imports(), client, runs, on_step=_print_step)
    if save:
        save.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    _print(result if as_json else render_restart(result))


@bench.command("lora")
def bench_lora(
    runs: Annotated[int, typer.Option(min=1, help="Swaps of each kind.")] = 7,
    swaps: Annotated[int, typer.Option(min=1, help="Random swaps, after which nothing may have grown.")] = 200,
    save: Annotated[Path | None, typer.Option(help="Also write the JSON document to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """LoRAs into a live pipeline of FLUX's shape (24 GB of GPU memory), beside diffusers' own loader and hotswap."""
    from nbcache.bench.lora import measure_lora
    from nbcache.bench.tables import render_lora

    result = measure_lora(runs=runs, swaps=swaps, on_step=_print_step)
    if save:
        save.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    _print(result if as_json else render_lora(result))


def _print_step(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _print(result: object) -> None:
    text = result if isinstance(result, str) else msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    print(text)  # noqa: T201


def _fail(message: str, code: int) -> NoReturn:
    print(f"nbcache: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"nbcache: {' '.join(str(message).split())}", file=sys.stderr)  # noqa: T201


_CLICK_EXCEPTION: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
"""Of whichever click this typer was built on; newer ones carry their own."""


def _take_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Take ``--NBCache.option=value`` out, wherever it stands, and what the configuration files say in."""
    rest, flagged = [], []
    for argument in arguments:
        if argument.startswith(f"--{settings.SECTION}."):
            flagged.append(settings.set_flag(argument.removeprefix("--")))
        else:
            rest.append(argument)
    if "doctor" not in rest and not os.environ.get("_NBCACHE_COMPLETE"):  # doctor tells what is wrong with them
        settings.adopt()
    return rest, flagged


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line. Exits; never returns."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        rest, flagged = _take_flags(sys.argv[1:] if arguments is None else arguments)
        result = app(rest, standalone_mode=False, obj=flagged)
        sys.stdout.flush()
    except NBCacheError as error:
        _fail(f"{error}{completion.suggest(error)}", 1)
    except _CLICK_EXCEPTION as error:
        _fail(f"{error.format_message()} (see nbcache --help)", 2)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        _fail(str(error), 1)
    sys.exit(result if isinstance(result, int) else 0)
