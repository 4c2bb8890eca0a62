"""Torch's own files (``.pt``, ``.pth``, ``.bin``, ``.ckpt``): a zip file of a pickle and one stored entry a storage.

The tensors come out as ``torch.load`` gives them: same names in the same order, values, shapes and strides; tensors that share
memory in the file share it here. Nested dicts and lists are flattened, names joined by dots; numbers and strings beside the
tensors become metadata. What a state dict is not comes out plain: parameters as tensors, without gradients or attributes. Only
the parts of a storage that tensors lie in are read. Nothing is inflated and no code is run.

Source: ``torch/serialization.py`` (``_save``, ``_load``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nbcache.checkpoints import archive
from nbcache.checkpoints.archive import Entry, read_directory
from nbcache.checkpoints.content import TEXT_LIMIT, Content, Notes, OpenFile
from nbcache.checkpoints.rebuilds import REMEDY, Global, Storage, Tensor
from nbcache.checkpoints.unpickle import read_pickle
from nbcache.errors import UnsupportedFormat
from nbcache.manifest import Extent, View, item_bytes, nbytes_of, reach_of, row_strides

MAX_PICKLE_BYTES = 256 << 20
MAX_NODES = 500_000
"""Values that are looked at, those of plain lists counting a sixteenth; by sharing, a short pickle can describe any number."""
MAX_DEPTH = 100
MAX_NAME = 1000

_LEGACY = (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", b"\x80\x04\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19")
_AGAIN = "load it with torch.load and save it again with torch.save"


def read(file: OpenFile) -> Content:
    """Describe a torch file.

    CheckpointInvalid for content that breaks the format; UnsupportedFormat, with the reason, for the format before torch 1.6,
    compressed or TorchScript archives, big-endian ones, pickles that need code and tensors without plain bytes.
    """
    if file.read(0, min(4, file.size_bytes)) != archive.MAGIC:
        _refuse(file)
    entries = read_directory(file)
    root = _root(file, entries)
    order = entries.get(f"{root}/byteorder")
    if order is not None and file.read(order.offset, min(order.nbytes, 16)) != b"little":
        raise UnsupportedFormat(f"{file.path}: saved on a big-endian machine; {_AGAIN} on a little-endian one")
    pickle = _stored(file, entries, f"{root}/data.pkl")
    if pickle.nbytes > MAX_PICKLE_BYTES:
        raise file.invalid(f"a pickle of {pickle.nbytes} bytes, at most {MAX_PICKLE_BYTES} are read")
    notes = Notes()
    tensors = flatten(read_pickle(file.read(pickle.offset, pickle.nbytes), file), file, notes)
    extents, views = _Layout(file, entries, root).lay(tensors)
    return Content(extents, notes.finish(), views)


def _refuse(file: OpenFile) -> None:
    start = file.read(0, min(16, file.size_bytes))
    if start.startswith(_LEGACY):
        raise UnsupportedFormat(f"{file.path}: in torch's format from before 1.6, which is no zip file; {_AGAIN}")
    if start.startswith((b"\x80", b"(", b"c")):
        raise UnsupportedFormat(f"{file.path}: a bare pickle, not a file of torch.save; {REMEDY}")
    raise file.invalid(f"not a file of torch.save: no zip file ({file.size_bytes} bytes, starting with {start[:8]!r})")


def _root(file: OpenFile, entries: Mapping[str, Entry]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise file.invalid(f"a zip file, but not of torch.save: {len(roots)} entries called data.pkl, expected 1")
    if f"{roots[0]}/constants.pkl" in entries:
        raise UnsupportedFormat(f"{file.path}: a TorchScript archive, which is code; {REMEDY}")
    return roots[0]


def _stored(file: OpenFile, entries: Mapping[str, Entry], name: str) -> Entry:
    entry = entries.get(name)
    if entry is None:
        raise file.invalid(f"has no zip entry {name!r}")
    if not entry.stored:
        raise UnsupportedFormat(f"{file.path}: zip entry {name!r} is compressed or encrypted; {_AGAIN}")
    return entry


def flatten(value: object, file: OpenFile, notes: Notes) -> dict[str, Tensor]:
    """The tensors of an unpickled object by their dotted names, in order; a lone one is ``tensor``. The rest goes to ``notes``.

    CheckpointInvalid for what contains itself or is too large; UnsupportedFormat for a storage that is in no tensor, or two
    tensors of one name.
    """
    tensors: dict[str, Tensor] = {}
    waiting: list[tuple[str, object, int]] = [("", value, 0)]
    nodes = 0
    while waiting:
        name, node, depth = waiting.pop()
        nodes += 1 + (len(node) // 16 if isinstance(node, list | tuple) else 0)
        if nodes > MAX_NODES:
            raise file.invalid(f"holds more than {MAX_NODES} values")
        if depth > MAX_DEPTH or len(name) > MAX_NAME:
            raise file.invalid(
                f"{name[:100]!r}...: nested {depth} deep, at most {MAX_DEPTH}, in names of {MAX_NAME} characters"
            )
        if isinstance(node, Tensor):
            name = name or "tensor"
            if name in tensors:
                raise UnsupportedFormat(f"{file.path}: two tensors would be called {name!r}")
            tensors[name] = node
        elif isinstance(node, dict) and node:
            waiting += [(_join(name, key), child, depth + 1) for key, child in reversed(node.items())]
        elif isinstance(node, list | tuple) and not _SCALARS.issuperset(map(type, node)):
            waiting += [(_join(name, at), node[at], depth + 1) for at in reversed(range(len(node)))]
        elif isinstance(node, Storage):
            raise UnsupportedFormat(f"{file.path}: {name!r} is a storage without a tensor; {REMEDY}")
        else:
            _note(notes, name or "value", node)
    return tensors


_SCALARS = frozenset({str, int, float, bool, Global, type(None)})


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _note(notes: Notes, name: str, node: object) -> None:
    """Keep a number, a string or a list of them: JSON, but for a string alone."""
    if isinstance(node, str | Global):
        notes.add(name, node if isinstance(node, str) else node.name)
    elif isinstance(node, list | tuple) and sum(len(i) if isinstance(i, str) else 1 for i in node) > TEXT_LIMIT:
        notes.leave_out(name)
    else:
        notes.add(name, json.dumps(node, default=lambda leaf: leaf.name))


@dataclass(frozen=True)
class _Piece:
    """A tensor and the part of its storage that it reaches: bytes ``start`` to ``end``."""

    number: int
    name: str
    tensor: Tensor
    start: int
    end: int

    @property
    def by_rows(self) -> bool:
        """Whether it lies row by row, as an extent does."""
        return self.tensor.strides == row_strides(self.tensor.shape)


@dataclass(frozen=True)
class _Group:
    """Pieces of one storage that share bytes, in the order of their numbers; together bytes ``start`` to ``end``."""

    pieces: tuple[_Piece, ...]
    start: int
    end: int

    @classmethod
    def of(cls, pieces: list[_Piece]) -> _Group:
        """The group of these."""
        ordered = tuple(sorted(pieces, key=lambda piece: piece.number))
        return cls(ordered, min(piece.start for piece in pieces), max(piece.end for piece in pieces))

    @property
    def is_tensor(self) -> bool:
        """Whether it is a single tensor that lies row by row."""
        return len(self.pieces) == 1 and self.pieces[0].by_rows


class _Layout:
    """Where the storages lie in the file."""

    def __init__(self, file: OpenFile, entries: Mapping[str, Entry], root: str) -> None:
        self._file = file
        self._entries = entries
        self._root = root
        self._storages: dict[str, tuple[Storage, Entry]] = {}

    def lay(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[Extent, ...], tuple[View, ...]]:
        """The extents below the tensors, and the views if there need be any."""
        storages: dict[tuple[str, str], list[_Piece]] = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            storages.setdefault((tensor.storage.key, tensor.dtype), []).append(self._piece(number, name, tensor))
        groups = [group for pieces in storages.values() for group in _overlapping(pieces)]
        groups.sort(key=lambda group: group.pieces[0].number)
        extents = tuple(self._extent(group) for group in groups)
        views = [_view(piece, at, group) for at, group in enumerate(groups) if not group.is_tensor for piece in group.pieces]
        return extents, tuple(sorted(views, key=lambda view: view.number))

    def _piece(self, number: int, name: str, tensor: Tensor) -> _Piece:
        size, entry = item_bytes(tensor.dtype), self._find(tensor.storage)
        if 0 in tensor.shape:
            return _Piece(number, name, tensor, 0, 0)
        reach = reach_of(tensor.shape, tensor.strides, tensor.offset)
        if reach is None or reach * size > entry.nbytes:
            raise self._file.invalid(
                f"tensor {name!r}: {list(tensor.shape)} by {list(tensor.strides)} from {tensor.offset} leaves its storage of "
                f"{entry.nbytes} bytes"
            )
        return _Piece(number, name, tensor, tensor.offset * size, reach * size)

    def _find(self, storage: Storage) -> Entry:
        known = self._storages.get(storage.key)
        if known is None:
            entry = _stored(self._file, self._entries, f"{self._root}/data/{storage.key}")
            if entry.nbytes != storage.nbytes:
                raise self._file.invalid(f"storage {storage.key!r} has {entry.nbytes} bytes, its pickle says {storage.nbytes}")
            known = self._storages[storage.key] = (storage, entry)
        if known[0] != storage:
            raise self._file.invalid(f"storage {storage.key!r} is described in two ways")
        return known[1]

    def _extent(self, group: _Group) -> Extent:
        first = group.pieces[0]
        dtype, shape = first.tensor.dtype, first.tensor.shape
        if not group.is_tensor and group.end:
            shape = ((group.end - group.start) // item_bytes(dtype),)
        if dtype == "F4" and shape:
            shape = (*shape[:-1], shape[-1] * 2)  # the manifest counts single values, torch pairs
        nbytes = nbytes_of(dtype, shape)
        if nbytes is None:
            raise UnsupportedFormat(f"{self._file.path}: tensor {first.name!r}: {dtype}{list(shape)}")
        return Extent(first.name, dtype, shape, 0, self._find(first.tensor.storage).offset + group.start, nbytes, 0)


def _view(piece: _Piece, extent: int, group: _Group) -> View:
    tensor = piece.tensor
    offset = (piece.start - group.start) // item_bytes(tensor.dtype)
    return View(piece.name, piece.number, extent, tensor.shape, tensor.strides, offset)


def _overlapping(pieces: list[_Piece]) -> Iterator[_Group]:
    yield from (_Group.of([piece]) for piece in pieces if not piece.end)
    group: list[_Piece] = []
    end = 0
    for piece in sorted((piece for piece in pieces if piece.end), key=lambda p: p.start):
        if group and piece.start >= end:
            yield _Group.of(group)
            group = []
        group.append(piece)
        end = max(end, piece.end)
    if group:
        yield _Group.of(group)
