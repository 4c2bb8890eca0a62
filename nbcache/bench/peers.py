"""Other loaders of safetensors files, on the same files: what a user would use instead.

Each peer opens with its public API, imports and all, and hands back the call that is timed. It runs in a fresh process with a
context, the page cache hot. One that is not installed is listed as such; one that fails is listed with its error.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from nbcache.bench import kernel
from nbcache.bench.disk import cached_share, read_plainly, size_of
from nbcache.bench.isolation import run_fresh, time_call
from nbcache.errors import BenchmarkFailed, NBCacheError
from nbcache.units import format_size

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]
    Opener = Callable[[Sequence[str], str, ExitStack], Callable[[], Tensors] | None]

TIMEOUT_S = 180.0


class Peer(msgspec.Struct, frozen=True):
    """One loader's loads, each the first of a fresh process, page cache hot, context ready. Seconds; medians over runs."""

    name: str
    version: str
    """Empty if it is not installed."""
    runs_s: tuple[float, ...] = ()
    median_s: float | None = None
    per_s: float | None = None
    """Bytes per second."""
    ratio: float | None = None
    """To the time that the link needs for the same bytes."""
    cached: float | None = None
    """Which part of the files was in the page cache, at worst."""
    remark: str = ""
    """Why there are no figures, or what is wrong with them."""

    @property
    def sound(self) -> bool:
        """Whether it loaded, and loaded the right bytes."""
        return self.median_s is not None and not self.remark


@dataclass(frozen=True)
class Rival:
    """How to use a loader. ``convert`` writes a file of the loader's own format, where it has one."""

    name: str
    distribution: str
    open: Opener
    convert: Callable[[Sequence[str], str], None] | None = None


def _open_mmap(files: Sequence[str], device: str, stack: ExitStack) -> Callable[[], Tensors]:
    from safetensors.torch import load_file

    return lambda: {name: tensor for path in files for name, tensor in load_file(path, device=device).items()}


def _open_pread(files: Sequence[str], device: str, stack: ExitStack) -> Callable[[], Tensors] | None:
    import inspect

    from safetensors.torch import load_file

    if "backend" not in inspect.signature(load_file).parameters:
        return None
    return lambda: {name: tensor for path in files for name, tensor in load_file(path, device=device, backend="pread").items()}


def _open_over_cpu(files: Sequence[str], device: str, stack: ExitStack) -> Callable[[], Tensors]:
    from safetensors.torch import load_file

    return lambda: {name: tensor.to(device) for path in files for name, tensor in load_file(path).items()}


def _open_prefetch(files: Sequence[str], device: str, stack: ExitStack) -> Callable[[], Tensors] | None:
    from safetensors import safe_open

    if not hasattr(safe_open, "prefetch"):
        return None

    def load() -> Tensors:
        opened = [stack.enter_context(safe_open(path, framework="pt", device=device)) for path in files]
        loaders = [stack.enter_context(file.prefetch()) for file in opened]
        return {name: tensor for loader in loaders for name, tensor in loader}

    return load


def _open_instanttensor(files: Sequence[str], device: str, stack: ExitStack) -> Callable[[], Tensors]:
    from instanttensor import BackendPolicy, safe_open

    def load() -> Tensors:
        with safe_open(list(files), framework="pt", device=device, backend=BackendPolicy.BUFFERED) as file:
            return dict(file.tensors())

    return load


def _open_fastsafetensors(files: Sequence[str], device: str, stack: ExitStack) -> Callable[[], Tensors]:
    from fastsafetensors import fastsafe_open

    def load() -> Tensors:
        file = stack.enter_context(fastsafe_open(list(files), framework="pt", device=device, nogds=True))
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping

    return load


def _open_runai(files: Sequence[str], device: str, stack: ExitStack) -> Callable[[], Tensors]:
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Tensors:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(list(files), device=device)
            return dict(streamer.get_tensors())

    return load


def _open_flashpack(files: Sequence[str], device: str, stack: ExitStack) -> Callable[[], Tensors]:
    from flashpack.deserialization import iterate_from_flash_tensor, read_flashpack_file

    def load() -> Tensors:
        storage, metadata = read_flashpack_file(files[0], device=device)
        return dict(iterate_from_flash_tensor(storage, metadata))

    return load


def _convert_flashpack(files: Sequence[str], target: str) -> None:
    from flashpack import pack_to_file
    from safetensors.torch import load_file

    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    pack_to_file(tensors, target, target_dtype=None)


RIVALS = (
    Rival("safetensors load_file to the GPU", "safetensors", _open_mmap),
    Rival("safetensors load_file, pread", "safetensors", _open_pread),
    Rival("safetensors load_file, then .to()", "safetensors", _open_over_cpu),
    Rival("safetensors prefetch", "safetensors", _open_prefetch),
    Rival("InstantTensor, buffered", "instanttensor", _open_instanttensor),
    Rival("fastsafetensors, without GDS", "fastsafetensors", _open_fastsafetensors),
    Rival("runai-model-streamer", "runai-model-streamer", _open_runai),
    Rival("flashpack, own format", "flashpack", _open_flashpack, _convert_flashpack),
)


def measure_peers(
    files: Sequence[str],
    runs: int,
    link_per_s: float,
    rivals: Sequence[Rival] = RIVALS,
    on_step: Callable[[str], None] = lambda _: None,
) -> tuple[Peer, ...]:
    """Run every rival that is installed, one after the other, on ``files``."""
    found = []
    for rival in rivals:
        peer = _measure(rival, tuple(files), runs, link_per_s)
        on_step(f"{peer.name}: {peer.remark or peer.runs_s}")
        found.append(peer)
    return tuple(found)


def _measure(rival: Rival, files: tuple[str, ...], runs: int, link_per_s: float) -> Peer:
    try:
        version = importlib.metadata.version(rival.distribution)
    except importlib.metadata.PackageNotFoundError:
        return Peer(rival.name, "", remark="not installed")
    try:
        with ExitStack() as stack:
            own = _converted(rival, files, stack) if rival.convert else files
            timed = [_run(rival, own, files, number == 0) for number in range(runs)]
    except (NBCacheError, OSError) as error:
        return Peer(rival.name, version, remark=_one_line(error))
    times = tuple(run.seconds for run in timed if run.seconds is not None)
    if not times:
        return Peer(rival.name, version, remark=f"not offered by version {version}")
    median, size = statistics.median(times), size_of(files)
    return Peer(
        name=rival.name,
        version=version,
        runs_s=times,
        median_s=median,
        per_s=size / median,
        ratio=median * link_per_s / size,
        cached=min(run.cached for run in timed),
        remark=next((run.remark for run in timed if run.remark), ""),
    )


class _Run(msgspec.Struct, frozen=True):
    """``seconds`` is None if the installed version does not offer this way of loading."""

    seconds: float | None
    remark: str
    cached: float = 0.0


def _run(rival: Rival, own: tuple[str, ...], files: tuple[str, ...], check: bool) -> _Run:
    read_plainly(own)
    cached = cached_share(own)
    run = run_fresh(partial(_time, rival.open, own, files if check else ()), TIMEOUT_S)
    return msgspec.structs.replace(run, cached=cached)


def _time(opener: Opener, own: tuple[str, ...], files: tuple[str, ...]) -> _Run:
    """In the fresh process: open, load under the clock, and hold the result against ``files``, if any."""
    kernel.start_context()
    with ExitStack() as stack:
        load = opener(own, kernel.physical_device(), stack)
        if load is None:
            return _Run(None, "")
        tensors: Tensors = {}

        def work() -> None:
            tensors.update(load())
            kernel.synchronize()

        seconds = time_call(work)
        remark = _verdict(tensors, files) if files else ""
        tensors.clear()
        return _Run(seconds, remark)


def _verdict(tensors: Tensors, files: tuple[str, ...]) -> str:
    try:
        compared = kernel.compare(tensors, files)
    except ImportError:
        return ""
    return "" if compared.equal else f"wrong bytes in {', '.join(compared.differing)}"


def _converted(rival: Rival, files: tuple[str, ...], stack: ExitStack) -> tuple[str, ...]:
    """The checkpoint in the rival's own format, in a temporary folder that ``stack`` removes."""
    assert rival.convert is not None
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nbcache-bench-"))
    nbytes = size_of(files)
    if shutil.disk_usage(folder).free < nbytes * 1.02:
        raise BenchmarkFailed(f"{folder} has no room for {format_size(nbytes)} more; set TMPDIR to a folder that has")
    target = os.path.join(folder, "checkpoint")
    run_fresh(partial(rival.convert, files, target))
    return (target,)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
