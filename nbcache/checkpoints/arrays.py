"""NumPy's files: one array (``.npy``), or a zip file of them (``.npz``), uncompressed.

Array ``x.npy`` of an ``.npz`` is called ``x``, as in ``numpy.load``; a lone array is called ``array``. What lies column by
column (Fortran order) stays so. Source: the description of the format in ``numpy.lib.format``. Needs no NumPy.
"""

from __future__ import annotations

import ast
import struct
from dataclasses import dataclass

from nbcache.checkpoints import archive
from nbcache.checkpoints.archive import read_directory
from nbcache.checkpoints.content import Content, OpenFile
from nbcache.errors import UnsupportedFormat
from nbcache.manifest import Extent, View, nbytes_of, row_strides

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 10_000
"""NumPy's own limit."""

DTYPES = {
    "b1": "BOOL", "u1": "U8", "i1": "I8", "u2": "U16", "i2": "I16", "u4": "U32", "i4": "I32", "u8": "U64", "i8": "I64",
    "f2": "F16", "f4": "F32", "f8": "F64", "c8": "C64", "c16": "C128",
}  # fmt: skip
"""A manifest's dtype by NumPy's, byte order left out."""


@dataclass(frozen=True)
class _Array:
    """One array: its bytes start at ``offset`` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    by_columns: bool
    offset: int
    nbytes: int


def read_array(file: OpenFile) -> Content:
    """Describe an ``.npy`` file. CheckpointInvalid if it breaks the format, UnsupportedFormat if it holds no plain numbers."""
    return _content([_array(file, "array", 0, file.size_bytes)])


def read_archive(file: OpenFile) -> Content:
    """Describe an ``.npz`` file. As :func:`read_array`; UnsupportedFormat too if it is compressed, or holds other things."""
    if file.read(0, min(4, file.size_bytes)) not in (archive.MAGIC, b"PK\x05\x06"):
        raise file.invalid("not an .npz file: no zip file")
    arrays = []
    for name, entry in read_directory(file).items():
        if not name.endswith(".npy"):
            raise UnsupportedFormat(f"{file.path}: entry {name!r} is not an array")
        if not entry.stored:
            raise UnsupportedFormat(
                f"{file.path}: array {name!r} is compressed, and cannot be mapped; save it again with numpy.savez, "
                "not savez_compressed"
            )
        arrays.append(_array(file, name.removesuffix(".npy"), entry.offset, entry.nbytes))
    return _content(arrays)


def _content(arrays: list[_Array]) -> Content:
    extents = [Extent(a.name, a.dtype, a.shape, 0, a.offset, a.nbytes, 0) for a in arrays]
    views = [
        View(array.name, number, number, array.shape, tuple(reversed(row_strides(array.shape[::-1]))), 0)
        for number, array in enumerate(arrays)
        if array.by_columns
    ]
    return Content(tuple(extents), {}, tuple(views))


def _array(file: OpenFile, name: str, offset: int, size_bytes: int) -> _Array:
    """The array whose header starts at ``offset``, in a file or entry of that size."""
    start = file.read(offset, min(12, size_bytes))
    if not start.startswith(MAGIC) or len(start) < 10:
        raise file.invalid(f"array {name!r}: no .npy header")
    version = (start[6], start[7])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise UnsupportedFormat(f"{file.path}: array {name!r}: .npy version {version[0]}.{version[1]}")
    form = struct.Struct("<H" if version == (1, 0) else "<I")
    if len(start) < 8 + form.size:
        raise file.invalid(f"array {name!r}: no .npy header")
    (header_bytes,) = form.unpack_from(start, 8)
    begin = 8 + form.size
    if header_bytes > MAX_HEADER_BYTES or begin + header_bytes > size_bytes:
        raise file.invalid(
            f"array {name!r}: a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES}, of {size_bytes} in all"
        )
    descr, by_columns, shape = _header(file, name, file.read(offset + begin, header_bytes))
    dtype = _dtype(file, name, descr)
    nbytes = nbytes_of(dtype, shape)
    left = size_bytes - begin - header_bytes
    if nbytes is None or nbytes > left:
        raise file.invalid(f"array {name!r}: {dtype}{list(shape)} does not fit into {left} bytes; truncated?")
    columns = by_columns and nbytes > 0 and sum(size > 1 for size in shape) > 1
    return _Array(name, dtype, shape, columns, offset + begin + header_bytes, nbytes)


def _header(file: OpenFile, name: str, text: bytes) -> tuple[object, bool, tuple[int, ...]]:
    try:
        header = ast.literal_eval(text.decode().strip())
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise file.invalid(f"array {name!r}: its header is not one: {type(error).__name__}") from error
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise file.invalid(f"array {name!r}: its header is not one")
    order, shape = header["fortran_order"], header["shape"]
    if not isinstance(order, bool) or not isinstance(shape, tuple):
        raise file.invalid(f"array {name!r}: its header is not one")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise file.invalid(f"array {name!r}: an impossible shape")
    return header["descr"], order, shape


def _dtype(file: OpenFile, name: str, descr: object) -> str:
    if not isinstance(descr, str) or descr[1:] not in DTYPES:
        raise UnsupportedFormat(
            f"{file.path}: array {name!r} has dtype {str(descr)[:100]}, which is no plain number of torch's"
        )
    if descr[0] == ">" and descr[2:] != "1":
        raise UnsupportedFormat(f"{file.path}: array {name!r} is big-endian; save it again as array.astype('<{descr[1:]}')")
    if descr[0] not in "<|>=":
        raise file.invalid(f"array {name!r}: dtype {descr[:100]!r}")
    return DTYPES[descr[1:]]
