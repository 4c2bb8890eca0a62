"""The public functions. Magics and command line are skins of these."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from nbcache.checkpoints import names as catalogue
from nbcache.checkpoints.folders import FolderKind, PipelineIndex, component_names, kind_of, read_pipeline
from nbcache.client import spare
from nbcache.client.fill import Grant, Wish, acquire, meaning_of, put_bytes, spellings
from nbcache.client.notices import NoSharedGpuMemory, notify
from nbcache.client.options import Options, Share
from nbcache.client.session import ProgressCallback, Session, expect
from nbcache.client.weights import Weights
from nbcache.errors import DriverError, EntryInUse, EntryNotFound, InvalidOption, UnsupportedFormat
from nbcache.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest
from nbcache.memory import driver
from nbcache.memory.shared import read_sealed
from nbcache.protocol import messages as m
from nbcache.protocol.wire import close_all

if TYPE_CHECKING:
    import torch


def prepare() -> None:
    """Import now what the first load would, where torch is there already: 2 ms, and 20 ms more with a GPU. Starts nothing."""
    if "torch" in sys.modules:
        import nbcache.client.loading  # noqa: F401

        driver.preload()


prepare()


def load(
    name: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    share: Share = "cow",
    on_progress: ProgressCallback | None = None,
    *,
    revision: str = "",
    variant: str = "",
    subfolder: str = "",
) -> Weights:
    """The tensors of a checkpoint or a saved entry, from the cache; read into it first if need be.

    Parameters
    ----------
    name : the name of a saved entry; an alias; the path of a checkpoint: a ``.safetensors`` file; one of ``torch.save``
        (``.pt``, ``.pth``, ``.bin``, ``.ckpt``: as ``torch.load`` gives it, nested names joined by dots, what is no tensor in
        ``metadata``); ``.gguf`` (quantized tensors as bytes, see :attr:`Weights.quant_types`); ``.npy``, ``.npz``; the index of
        a sharded one (``*.safetensors.index.json``, ``*.bin.index.json``); or a folder that holds one of them; or a repository
        of the hub, which is downloaded if it is not in the hub's cache
    device : where to; None means cuda where there is one, else cpu
    dtype : what floating-point tensors are cast to (a private copy of each that differs); None leaves the file's own
    share : ``cow``: shared with the cache, a write is seen by this process alone; ``readonly``: the same on a CPU; ``private``:
        an ordinary copy
    on_progress : called with staged and total bytes while files are read
    revision, variant, subfolder : of a repository, which branch, tag or commit; of it or a folder, which variant of the
        weights (such as ``fp16``), which folder in it

    Raises
    ------
    CheckpointError, HubError and their kinds, UnsupportedFormat, PackageMissing, HostMemoryFull, DeviceMemoryFull, InvalidName,
    InvalidOption, DaemonError: see :mod:`nbcache.errors`. Nothing stays behind after any of them.
    """
    from nbcache.client.loading import load_name

    options = Options(device, dtype, share)
    options.check()
    if revision or variant or subfolder:
        name = catalogue.find_weights(meaning_of(name)[0], revision, subfolder, variant)
    return Weights(load_name(name, options, on_progress), options)


def put(name: str, value: object, metadata: Mapping[str, str] | None = None) -> Weights:
    """Keep tensors under a name, across kernel restarts, until they are evicted by that name or the daemon stops.

    ``value`` is a tensor, a (nested) mapping of tensors, whose names are joined by dots, or a module (its ``state_dict``). An
    entry of the same name is replaced; who still uses that keeps it. Returns the kept tensors, on the CPU.

    Raises UnsupportedFormat for values without plain bytes, InvalidName (an alias of one's own is none), HostMemoryFull,
    DaemonError.
    """
    from nbcache.client import tensors as edge
    from nbcache.client.loading import over_host

    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise UnsupportedFormat("metadata: strings to strings only, as in a safetensors header")
    tensors = edge.flatten(value)
    manifest = edge.plan_put(tensors, metadata or {})
    grant = put_bytes(name, manifest, lambda area: edge.write_tensors(tensors, manifest, area))
    device = edge.resolve_device("cpu")
    return Weights(over_host(grant, device, None, private=False), Options(device="cpu"))


_status_decoder = msgspec.json.Decoder(m.Status)


def status() -> m.Status:
    """What is cached where and used by whom. DaemonUnavailable if no daemon runs."""
    with Session.open(start=False) as session:
        return query(session)


def query(session: Session) -> m.Status:
    """What :func:`status` gives, over a session that is there."""
    _, descriptors = expect(session.request(m.Query()), m.Document)
    try:
        return _status_decoder.decode(read_sealed(descriptors[0], MAX_MANIFEST_BYTES))
    finally:
        close_all(descriptors)


def manifest(key: str) -> Manifest:
    """The tensors of an entry, by its key, without using it. EntryNotFound, DaemonUnavailable."""
    with Session.open(start=False) as session:
        _, descriptors = expect(session.request(m.Query(key)), m.Document)
        try:
            return decode_manifest(read_sealed(descriptors[0], MAX_MANIFEST_BYTES))
        finally:
            close_all(descriptors)


def evict(name: str | os.PathLike[str]) -> m.Evicted:
    """Drop an entry that nobody uses. EntryNotFound; EntryInUse, with who uses it; DaemonUnavailable."""

    def one(names: tuple[str, ...]) -> m.Evicted:
        spare.let_go(names)
        return _evict(m.Evict(names))

    return _each(name, one)


def evict_all() -> m.Evicted:
    """Drop every idle entry that can be read from its files again; saved ones go only by name. DaemonUnavailable."""
    spare.let_go()
    return _evict(m.Evict(everything=True))


def _evict(message: m.Evict) -> m.Evicted:
    with Session.open(start=False) as session:
        return expect(session.request(message), m.Evicted)[0]


def free_gpu(name: str | os.PathLike[str] = "") -> m.Evicted:
    """Drop the slabs that nobody uses, all or one entry's; host copies stay. EntryNotFound, DaemonUnavailable."""
    return _each(name, _free_gpu) if name else _free_gpu(())


def _free_gpu(names: tuple[str, ...]) -> m.Evicted:
    spare.let_go(names or None)
    with Session.open(start=False) as session:
        return expect(session.request(m.FreeGpu(names)), m.Evicted)[0]


def pin(name: str | os.PathLike[str]) -> None:
    """Keep an entry however full the tier gets. EntryNotFound, DaemonUnavailable."""
    _pin(name, True)


def unpin(name: str | os.PathLike[str]) -> None:
    """Let policy evict an entry again. EntryNotFound, DaemonUnavailable."""
    _pin(name, False)


def _pin(name: str | os.PathLike[str], pinned: bool) -> None:
    def one(names: tuple[str, ...]) -> m.Evicted:
        with Session.open(start=False) as session:
            expect(session.request(m.Pin(names, pinned)), m.Done)
        return m.Evicted((), 0)

    _each(name, one)


def _each(name: str | os.PathLike[str], act: Callable[[tuple[str, ...]], m.Evicted]) -> m.Evicted:
    """Do it to each entry that a name means: those of a pipeline's components, else one. EntryNotFound if there is none."""
    spoken = spellings(name)
    first, *others = catalogue.members_of(spoken[-1])
    done: list[m.Evicted] = []
    refused: EntryNotFound | EntryInUse | None = None
    for names in ((*spoken[:-1], *first), *others):
        try:
            done.append(act(names))
        except EntryNotFound as error:
            refused = refused or error
        except EntryInUse as error:
            refused = error
    if refused and (not done or isinstance(refused, EntryInUse)):
        raise refused
    return m.Evicted(
        tuple(name for each in done for name in each.names),
        sum(each.freed_bytes for each in done),
        tuple(name for each in done for name in each.kept),
    )


def stage_all(
    name: str,
    pinned: bool = False,
    on_progress: ProgressCallback | None = None,
    *,
    components: str | Sequence[str] = (),
    revision: str = "",
    variant: str = "",
    subfolder: str = "",
) -> list[tuple[m.EntryStatus, bool]]:
    """As :func:`stage`, for each checkpoint that a name means: those of a pipeline's components (or of these), else one.

    The other options are those of :func:`load`. InvalidOption for a component that the pipeline lacks, or that has no weights.
    """
    chosen = component_names(components)
    text, meaning = meaning_of(name)
    is_special = bool(revision or variant or subfolder)
    path = catalogue.find(text, revision, subfolder, variant) if meaning.repo_id or is_special else meaning.path
    kind = kind_of(path)
    if kind is FolderKind.PIPELINE:
        homes = _chosen_homes(read_pipeline(path), chosen)
        return [stage(catalogue.weights_of(home, variant), pinned, on_progress) for home in homes]
    if chosen:
        raise InvalidOption(f"{name}: holds {kind.value}, not a pipeline: it has no components to choose from")
    return [stage(catalogue.weights_of(path, variant) if is_special else name, pinned, on_progress)]


def _chosen_homes(index: PipelineIndex, names: Sequence[str]) -> list[str]:
    """The folders with weights of a pipeline's components, of all or of these."""
    index.check_names(names)
    there = index.model_homes()
    chosen = [os.path.join(index.folder, name) for name in names]
    for name, home in zip(names, chosen, strict=True):
        if home not in there:
            raise InvalidOption(f"component {name!r}: {home} has no weights to cache")
    return chosen or there


def stage(name: str, pinned: bool = False, on_progress: ProgressCallback | None = None) -> tuple[m.EntryStatus, bool]:
    """Read a checkpoint into the cache without using it, and without torch. Returns its status, and whether it was a hit.

    Raises as :func:`load`.
    """
    try:
        grant = acquire(name, Wish(warm=True), on_progress)
    except DriverError as error:
        notify(NoSharedGpuMemory, f"no shared GPU memory: {error}; kept in shared host memory")
        grant = acquire(name, Wish(), on_progress)
    assert isinstance(grant, Grant)
    try:
        if pinned:
            expect(grant.session.request(m.Pin((grant.key,), True)), m.Done)
    finally:
        grant.close()
    for entry in status().entries:
        if entry.key == grant.key:
            return entry, grant.hit
    raise EntryNotFound(f"{name}: was cached, and evicted again at once")
