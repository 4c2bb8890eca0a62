"""NumPy's files: described, they are what ``numpy.load`` gives; what is refused, and why; whatever they hold."""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from nbcache.errors import CheckpointError, CheckpointInvalid, UnsupportedFormat
from tests.support.contents import assert_alike, describe_manifest, read_tensors

DTYPES = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "c16"]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (3, 0, 2), (1, 9)]


def arrays(dtype: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {f"t{n}": np.asarray(random.integers(0, 2, shape) * 1.5).astype(dtype) for n, shape in enumerate(SHAPES)}


def assert_as_stock(found: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        stock = torch.from_numpy(array.copy(order="K"))  # of an empty one, NumPy's strides mean nothing
        assert_alike(found[name], stock if array.size else torch.empty(array.shape, dtype=stock.dtype), name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_in_an_archive_and_alone(tmp_path, dtype):
    made = arrays(dtype)
    np.savez(tmp_path / "a.npz", **made)
    assert_as_stock(read_tensors(tmp_path / "a.npz"), dict(np.load(tmp_path / "a.npz")))
    for array in made.values():
        np.save(tmp_path / "b.npy", array)
        assert_as_stock(read_tensors(tmp_path / "b.npy"), {"array": np.load(tmp_path / "b.npy")})


def test_columns_stay_columns(tmp_path):
    made = {
        "rows": np.arange(6.0).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
        "c": np.ones((3, 1)),
    }
    np.savez(tmp_path / "a.npz", **made)
    assert_as_stock(read_tensors(tmp_path / "a.npz"), dict(np.load(tmp_path / "a.npz")))
    np.save(tmp_path / "b.npy", made["columns"])
    assert read_tensors(tmp_path / "b.npy")["array"].stride() == (1, 2, 6)


def test_names_are_those_of_numpy(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros(1), **{"a/b": np.ones(2), "c.d": np.ones(3)})
    assert list(read_tensors(tmp_path / "a.npz")) == list(np.load(tmp_path / "a.npz"))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header(tmp_path, version):
    with open(tmp_path / "a.npy", "wb") as stream:
        np.lib.format.write_array(stream, np.arange(5, dtype=np.int16), version)
    assert read_tensors(tmp_path / "a.npy")["array"].tolist() == [0, 1, 2, 3, 4]


def test_an_empty_archive_is_an_empty_checkpoint(tmp_path):
    np.savez(tmp_path / "a.npz")
    assert read_tensors(tmp_path / "a.npz") == {}


def test_of_several_arrays_in_one_file_the_first_is_read_as_numpy_does(tmp_path):
    with open(tmp_path / "a.npy", "wb") as stream:
        np.save(stream, np.arange(3))
        np.save(stream, np.arange(9))
    assert_as_stock(read_tensors(tmp_path / "a.npy"), {"array": np.load(tmp_path / "a.npy")})


# What is refused


def refused(error: type[Exception], path: Path, pattern: str) -> None:
    with pytest.raises(error, match=pattern) as caught:
        describe_manifest(path)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)


def test_a_compressed_archive_is_refused_with_the_remedy(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(1000))
    refused(UnsupportedFormat, tmp_path / "a.npz", "'x.npy' is compressed.*numpy.savez, not savez_compressed")


@pytest.mark.parametrize(
    ("array", "pattern"),
    [
        (np.array([{}, 1], dtype=object), r"dtype \|O, which is no plain number"),
        (np.array(["a", "bc"]), r"dtype <U2"),
        (np.array([b"a"]), r"dtype \|S1"),
        (np.array(["2020-01-01"], dtype="M8[D]"), r"dtype <M8\[D\]"),
        (np.zeros(2, dtype=[("x", "f4"), ("y", "i2")]), r"dtype \[\('x'"),
        (np.zeros(2, dtype="V2"), r"dtype \|V2"),
        (np.zeros(2, dtype=">f4"), r"big-endian; save it again as array.astype\('<f4'\)"),
        (np.zeros(2, dtype=np.longdouble), "dtype <f16"),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, np.ndarray) else "",
)
def test_what_torch_has_no_numbers_for_is_refused(tmp_path, array, pattern):
    np.save(tmp_path / "a.npy", array)
    refused(UnsupportedFormat, tmp_path / "a.npy", pattern)
    np.savez(tmp_path / "b.npz", x=array)
    refused(UnsupportedFormat, tmp_path / "b.npz", f"'x' .*{pattern}")


def test_other_things_in_an_archive_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(2))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("readme.txt", b"words")
    refused(UnsupportedFormat, tmp_path / "a.npz", "'readme.txt' is not an array")


def npy(header: str | bytes, body: bytes = b"", version: bytes = b"\1\0", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text) if length is None else length) + text + body


def header(descr: str = "'<f4'", order: str = "False", shape: str = "(3,)", more: str = "") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}{more}}}\n"


BROKEN = {
    "nothing": (b"", "no .npy header"),
    "a little": (b"\x93NUMPY\1\0", "no .npy header"),
    "a length cut short": (b"\x93NUMPY\2\0\x10\0", "no .npy header"),
    "another magic": (b"x" * 100, "no .npy header"),
    "a header beyond the file": (npy(header(), length=9000), "a header of 9000 bytes"),
    "an immense header": (npy(header() + " " * 20_000), "a header of"),
    "no text": (npy(b"\xff" * 20), "its header is not one"),
    "no literal": (npy("{'descr': open('x')}"), "its header is not one"),
    "a call": (npy(header(shape="__import__('os').system('touch /tmp/nbcache-was-here')")), "its header is not one"),
    "no dict": (npy("[1]"), "its header is not one"),
    "a key too few": (npy("{'descr': '<f4'}"), "its header is not one"),
    "a key too many": (npy(header(more=", 'x': 1"), bytes(12)), "its header is not one"),
    "unhashable keys": (npy("{[]: 1}"), "its header is not one"),
    "deep": (npy("(" * 5000 + ")" * 4999), "its header is not one"),
    "order a word": (npy(header(order="'C'"), bytes(12)), "its header is not one"),
    "shape a list": (npy(header(shape="[3]"), bytes(12)), "its header is not one"),
    "shape a number": (npy(header(shape="(3.0,)"), bytes(12)), "impossible shape"),
    "shape a truth": (npy(header(shape="(True,)"), bytes(12)), "impossible shape"),
    "negative shape": (npy(header(shape="(-3,)"), bytes(12)), "impossible shape"),
    "immense shape": (npy(header(shape=f"({1 << 40}, {1 << 40})"), bytes(12)), "does not fit into 12 bytes"),
    "a shape that is 0 modulo 2**64": (npy(header(shape=f"({1 << 32}, {1 << 32})"), bytes(12)), "does not fit"),
    "truncated": (npy(header(), bytes(11)), r"F32\[3\] does not fit into 11 bytes; truncated"),
    "an odd byte order": (npy(header(descr="'?f4'"), bytes(12)), "dtype '.f4'"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("content", "pattern"), BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_format_is_invalid(tmp_path, content, pattern):
    (tmp_path / "a.npy").write_bytes(content)
    refused(CheckpointInvalid, tmp_path / "a.npy", pattern)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", content)
    refused(CheckpointInvalid, tmp_path / "b.npz", pattern)
    assert not os.path.exists("/tmp/nbcache-was-here")


def test_another_version_is_refused(tmp_path):
    (tmp_path / "a.npy").write_bytes(npy(header(), bytes(12), version=b"\4\0"))
    refused(UnsupportedFormat, tmp_path / "a.npy", re.escape(".npy version 4.0"))


@pytest.mark.parametrize("content", [b"", b"x", b"PK\3\4", b"\x93NUMPY" + bytes(100)])
def test_what_is_no_archive_is_invalid(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    refused(CheckpointInvalid, tmp_path / "a.npz", "not an .npz file|not a zip file")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_whatever_a_file_holds_only_typed_errors_come_of_it(tmp_path, suffix):
    stream = io.BytesIO()
    if suffix == ".npy":
        np.save(stream, np.asfortranarray(np.ones((3, 4))))
    else:
        np.savez(stream, a=np.ones((3, 4)), b=np.asfortranarray(np.ones((2, 2))))
    content = stream.getvalue()

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(content)), st.binary(min_size=1, max_size=6), st.integers(0, 6))
    def hold(at, new, cut):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content[:at] + new + content[at + cut :])
        with suppress(CheckpointError, UnsupportedFormat):
            manifest = describe_manifest(path)
            assert all(tensor.offset + tensor.nbytes <= path.stat().st_size for tensor in manifest.tensors)

    hold()
