"""The command line: ``nbcache``, or ``python -m nbcache``.

A skin of the API. Prints results on stdout and errors as one line on stderr; exits 0 when it worked, 1 when it did not, 2 when
it was called wrongly. ``--json`` prints one document for scripts. Never imports torch unless the command needs tensors.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import typer

from nbcache import __version__
from nbcache.client import api
from nbcache.client.session import Session, stop_daemon
from nbcache.config import NBCache
from nbcache.errors import InvalidOption, NBCacheError
from nbcache.jupyter.display import render_status, short_name
from nbcache.units import format_duration, format_size, parse_size

app = typer.Typer(
    name="nbcache",
    help="Keep model weights alive across kernel restarts.",
    no_args_is_help=True,
    add_completion=False,
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
    name: Annotated[str, typer.Argument(help="A .safetensors file, a shard index, or a folder that holds either.")],
    pin: Annotated[bool, typer.Option("--pin", help="Keep it, however full the tier gets.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read a checkpoint into the cache, so that the first notebook finds it there."""
    start = time.perf_counter()
    entry, hit = api.stage(name, pinned=pin)
    seconds = time.perf_counter() - start
    if as_json:
        _print(msgspec.structs.asdict(entry) | {"seconds": round(seconds, 6), "hit": hit})
    else:
        how = "was cached" if hit else f"read in {format_duration(seconds)} ({format_size(int(entry.bytes / seconds))}/s)"
        _print(f"{short_name(entry.name)}: {entry.tensors} tensors, {format_size(entry.bytes)}, {how}")


@app.command()
def evict(
    name: Annotated[str, typer.Argument(help="The entry to drop.")] = "",
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
def pin(name: Annotated[str, typer.Argument(help="The entry to keep.")]) -> None:
    """Keep an entry, however full the tier gets."""
    api.pin(name)


@app.command()
def unpin(name: Annotated[str, typer.Argument(help="The entry to let go.")]) -> None:
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
def demo(
    checkpoint: Annotated[Path | None, typer.Option(help="Your own checkpoint instead of MiniLM.")] = None,
) -> None:
    """Load real weights in a real kernel, restart it, load again; show that the result is the same, and the times."""
    from nbcache.demo import run_demo

    if not run_demo(str(checkpoint) if checkpoint else None):
        raise typer.Exit(1)


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


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line. Exits; never returns."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        result = app(arguments, standalone_mode=False)
        sys.stdout.flush()
    except NBCacheError as error:
        _fail(str(error), 1)
    except _CLICK_EXCEPTION as error:
        _fail(f"{error.format_message()} (see nbcache --help)", 2)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        _fail(str(error), 1)
    sys.exit(result if isinstance(result, int) else 0)
