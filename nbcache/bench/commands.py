"""``nbcache bench``: the benchmarks as commands. Imports each when it is asked for, as most need torch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from nbcache.output import AsJson, print_result, steps_from_now
from nbcache.units import parse_size

Save = Annotated[
    Path | None, typer.Option(help="Also write the JSON document to this file, the one so far after each measurement.")
]

app = typer.Typer(help="Measure on this machine, beside a floor or a rival in the same run.", no_args_is_help=True)


@app.command("attach")
def attach(
    checkpoint: Annotated[
        str, typer.Argument(help="Your own checkpoint; without it, synthetic ones of 104 to 20 000 tensors.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Time from the call to usable tensors when the entry is cached, beside safetensors' load_file."""
    from nbcache.bench.host import measure_attach, render_attach

    results = measure_attach(checkpoint or None)
    print_result(results if as_json else render_attach(results))


@app.command("stage")
def stage(
    size: Annotated[str, typer.Option(help="How much to read.")] = "4GiB",
    directory: Annotated[str, typer.Option(help="Where to put the file.")] = "",
    as_json: AsJson = False,
) -> None:
    """Reading a file into the cache from a hot page cache, beside plain parallel preadv."""
    from nbcache.bench.host import measure_stage, render_stage

    result = measure_stage(parse_size(size), directory=directory or None)
    print_result(result if as_json else render_stage(result))


@app.command("gpu")
def gpu(
    checkpoint: Annotated[str, typer.Argument(help="Your own checkpoint: a file, an index or a folder.")] = "",
    flux: Annotated[bool, typer.Option("--flux", help="Write one of FLUX.1's shape (23.8 GB) to TMPDIR for it.")] = False,
    loras: Annotated[bool, typer.Option("--loras", help="LoRA-sized files as well (up to 2 GB, in TMPDIR).")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Other loaders as well, those that are installed.")] = False,
    cold: Annotated[bool, typer.Option(help="Drop the files from the page cache, and measure the disk too.")] = True,
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes for each kind of load.")] = 3,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Loads onto the GPU, cold and hot, from pinned memory and from the slab, beside the bandwidth of link and disk."""
    from nbcache.bench.flux import temporary_flux
    from nbcache.bench.gpu import GpuReport, measure_gpu
    from nbcache.bench.saving import Results
    from nbcache.bench.tables import render_gpu

    if bool(checkpoint) is flux:
        raise typer.BadParameter("name a checkpoint, or give --flux")
    results: Results[GpuReport] = Results(save)
    with results.shown(render_gpu, as_json), temporary_flux() if flux else contextlib.nullcontext(checkpoint) as path:
        measure_gpu(path, runs, cold, peers, loras, on_step=steps_from_now(), on_report=results.keep)


@app.command("models")
def models(
    folder: Annotated[
        str, typer.Argument(help="A pipeline's folder; without it, one of FLUX.1's shape is written to TMPDIR.")
    ] = "",
    small: Annotated[bool, typer.Option("--small", help="Write a toy one instead (13 MB).")] = False,
    keep: Annotated[str, typer.Option(help="Write it to this folder, and keep it; one that is there is used.")] = "",
    stock: Annotated[bool, typer.Option(help="The library's own load as well.")] = True,
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes.")] = 5,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """A whole pipeline onto the GPU, as after a restart: the time beyond imports, and where it goes."""
    from nbcache.bench.models import ModelReport, check_room, measure_models, render_models
    from nbcache.bench.pipeline import FULL_BYTES, pipeline_folder
    from nbcache.bench.saving import Results

    if folder and (keep or small):
        raise typer.BadParameter("name a folder, or have one written with --keep or --small")
    results: Results[ModelReport] = Results(save)
    on_step = steps_from_now()
    with results.shown(render_models, as_json), contextlib.ExitStack() as stack:
        if not folder:
            check_room(0 if small else FULL_BYTES)
            folder = stack.enter_context(pipeline_folder(small, keep, on_step))
        measure_models(folder, runs, stock, on_step, results.keep)


@app.command("restart")
def restart(
    checkpoint: Annotated[str, typer.Option(help="Your own: a file, an index or a folder. Default: the demo's MiniLM.")] = "",
    flux: Annotated[bool, typer.Option("--flux", help="Write one of FLUX.1's shape (23.8 GB) to TMPDIR for it.")] = False,
    device: Annotated[str, typer.Option(help="Where the first cell loads to.")] = "cpu",
    imports: Annotated[
        list[str] | None, typer.Option("--imports", help="What the first cell imports beside torch; several times for several.")
    ] = None,
    client: Annotated[str, typer.Option(help="manager: jupyter_client's; rest: a Jupyter server's.")] = "manager",
    runs: Annotated[int, typer.Option(min=1, help="Restarts of each kernel with each first cell.")] = 10,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """From the request to restart to the first cell that has used the weights, a stock kernel beside ours."""
    from nbcache.bench.flux import flux_shapes, nbytes_of_shapes, temporary_flux
    from nbcache.bench.restart import CLIENTS, check_room, default_checkpoint, default_imports, measure_restart
    from nbcache.bench.restart_report import RestartReport, render_restart
    from nbcache.bench.saving import Results

    if client not in CLIENTS or (checkpoint and flux):
        raise typer.BadParameter(f"--client is one of {', '.join(CLIENTS)}; --checkpoint or --flux, not both")
    results: Results[RestartReport] = Results(save)
    on_step = steps_from_now()
    with results.shown(render_restart, as_json), contextlib.ExitStack() as stack:
        if flux:
            check_room(nbytes_of_shapes(flux_shapes()), device)
            checkpoint = stack.enter_context(temporary_flux())
        chosen = checkpoint or default_checkpoint()
        measure_restart(chosen, device, imports or default_imports(), client, runs, on_step, results.keep)


@app.command("lora")
def lora(
    runs: Annotated[int, typer.Option(min=1, help="Swaps of each kind.")] = 7,
    swaps: Annotated[int, typer.Option(min=1, help="Random swaps, after which nothing may have grown.")] = 200,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """LoRAs into a live pipeline of FLUX's shape (24 GB of GPU memory), beside diffusers' own loader and hotswap."""
    from nbcache.bench.lora import measure_lora
    from nbcache.bench.lora_report import LoraReport, render_lora
    from nbcache.bench.saving import Results

    results: Results[LoraReport] = Results(save)
    with results.shown(render_lora, as_json):
        measure_lora(runs=runs, swaps=swaps, on_step=steps_from_now(), on_report=results.keep)
