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
from nbcache.bench.commands import app as bench
from nbcache.checkpoints import aliases
from nbcache.client import api
from nbcache.client.session import Session, stop_daemon
from nbcache.config import NBCache
from nbcache.errors import InvalidOption, NBCacheError
from nbcache.guide import topics
from nbcache.jupyter.commands import app as kernelspec
from nbcache.jupyter.display import render_settings, render_status, short_name
from nbcache.jupyter.progress import Progress, find_screen
from nbcache.output import AsJson, print_page, print_result
from nbcache.units import format_duration, format_size, parse_size

app = typer.Typer(
    name="nbcache",
    help="Keep model weights alive across kernel restarts.",
    no_args_is_help=True,
    epilog="nbcache help shows what there is to read.",
    pretty_exceptions_enable=False,
)
app.add_typer(kernelspec, name="kernelspec")
app.add_typer(bench, name="bench")


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
    print_result(document if as_json else render_status(document))


@app.command()
def load(
    name: Annotated[
        str,
        typer.Argument(
            help="An alias, a checkpoint (.safetensors, .pt, .bin, .gguf, .npz, ...), a shard index, a folder, or a hub id.",
            autocompletion=completion.loadable,
        ),
    ],
    component: Annotated[str, typer.Option("--component", metavar="A,B", help="Of a pipeline, these components alone.")] = "",
    revision: Annotated[str, typer.Option("--revision", help="Of a hub id: the branch, tag or commit.")] = "",
    variant: Annotated[str, typer.Option("--variant", help="The variant of the files, such as fp16.")] = "",
    subfolder: Annotated[str, typer.Option("--subfolder", help="The folder in NAME to load.")] = "",
    pin: Annotated[bool, typer.Option("--pin", help="Keep it, however full the tier gets.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read a checkpoint into the cache, so that the first notebook finds it there."""
    start = time.perf_counter()
    with Progress(short_name(name), find_screen(sys.stderr)) as progress:
        staged = api.stage_all(
            name,
            pinned=pin,
            on_progress=progress,
            components=component,
            revision=revision,
            variant=variant,
            subfolder=subfolder,
        )
    progress.finish("")
    seconds = time.perf_counter() - start
    if as_json:
        found = [msgspec.structs.asdict(entry) | {"seconds": round(seconds, 6), "hit": hit} for entry, hit in staged]
        print_result(found[0] if len(found) == 1 else found)
        return
    read = [entry.bytes for entry, hit in staged if not hit]
    taken = f"read in {format_duration(seconds)} ({format_size(int(sum(read) / seconds))}/s)"
    for entry, hit in staged:
        how = "was cached" if hit else "read" if len(read) > 1 else taken
        print_result(f"{short_name(entry.name)}: {entry.tensors} tensors, {format_size(entry.bytes)}, {how}")
    if len(read) > 1:
        print_result(f"{len(read)} checkpoints, {format_size(sum(read))}, {taken}")


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
        print_result({"evicted": evicted.names, "freed_bytes": evicted.freed_bytes, "kept": evicted.kept})
        return
    print_result(f"evicted {', '.join(map(short_name, evicted.names)) or 'nothing'} ({format_size(evicted.freed_bytes)})")
    if evicted.kept:
        print_result(f"kept {', '.join(evicted.kept)}")


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
    print_result(f"started: process {api.status().pid}, nbcache {__version__}")


def _stop() -> None:
    lost = _saved_entries()
    pid = stop_daemon()
    if not pid:
        print_result("no daemon runs")
        return
    print_result(f"stopped: process {pid}" + (f"; gone with it: {', '.join(lost)}" if lost else ""))


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
    found = settings.in_force(context.obj or (), _started_with())
    print_result(found if as_json else render_settings(found))


def _started_with() -> dict[str, str]:
    """The options of the daemon that runs; none if it does not, or does not answer soon."""
    with contextlib.suppress(NBCacheError), Session.open(start=False, reply_timeout_s=completion.PATIENCE_S) as session:
        return api.query(session).settings
    return {}


@app.command("help")
def show_help(
    topic: Annotated[str, typer.Argument(help="What about; without it, all topics.", autocompletion=topics.names_from)] = "",
) -> None:
    """Read about a topic: names, formats, models, sharing, restarts, options, errors, and more."""
    print_page(topics.find(topic).page()) if topic else print_result(topics.listing())


alias = typer.Typer(help="Short names for what you load.", no_args_is_help=True)
app.add_typer(alias, name="alias")


@alias.command("add")
def alias_add(
    name: Annotated[str, typer.Argument(help="The short name.")],
    target: Annotated[str, typer.Argument(metavar="PATH", help="What it stands for.", autocompletion=completion.paths)],
) -> None:
    """Let NAME stand for PATH, wherever a name is asked for."""
    aliases.add(name, target)
    print_result(f"{name} is {aliases.listing()[name]}")


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
    print_result(
        table if as_json else "\n".join(f"{name.ljust(width)}  {table[name]}" for name in sorted(table)) or "no aliases"
    )


@app.command()
def doctor(
    part: Annotated[str, typer.Argument(help="Only this: machine, daemon, jupyter or gpu.")] = "",
    as_json: AsJson = False,
) -> None:
    """Look at machine, GPU, daemon and Jupyter: what works, what does not, what to do about it. Exits 1 if loads would fail."""
    from nbcache.doctor.checkup import examine
    from nbcache.doctor.findings import render_report

    report = examine(part)
    print_result(report if as_json else render_report(report))
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
