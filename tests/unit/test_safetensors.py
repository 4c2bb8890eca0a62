"""Reading headers: what the format allows is read as the safetensors library reads it, everything else is a typed error."""

from __future__ import annotations

import json
import os
import re
import string
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from nbcache.checkpoints import safetensors
from nbcache.checkpoints.safetensors import Header, parse_header, read_header
from nbcache.errors import CheckpointError, CheckpointInvalid, CheckpointUnreadable, UnsupportedFormat
from nbcache.manifest import DTYPE_BITS
from tests.support.checkpoints import raw_checkpoint, write_checkpoint


def read(path: Path) -> Header:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd, str(path), os.fstat(fd).st_size)
    finally:
        os.close(fd)


def tensor(dtype: str, shape: list[Any], start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def f32(start: int, end: int) -> dict[str, Any]:
    return tensor("F32", [(end - start) // 4], start, end)


def ours(header: Header) -> dict[str, tuple[str, list[int]]]:
    return {t.name: (t.dtype, list(t.shape)) for t in header.tensors}


def theirs(path: Path) -> tuple[dict[str, tuple[str, list[int]]], dict[str, str]]:
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {n: (s.get_dtype(), s.get_shape()) for n, s in slices.items()}, file.metadata() or {}


# The format


def test_a_saved_file_reads_as_the_library_reads_it(tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors", sizes=((3, 5), (0, 4), (), (2, 1, 2)))
    assert ours(read(path)) == theirs(path)[0]


FORMAT_DTYPES = sorted(set(DTYPE_BITS) - safetensors.OWN_DTYPES)


@pytest.mark.parametrize("dtype", FORMAT_DTYPES)
def test_each_dtype_of_the_format_reads_as_the_library_reads_it(tmp_path, dtype):
    nbytes = DTYPE_BITS[dtype] * 6 // 8
    path = raw_checkpoint(tmp_path / "a.safetensors", {"x": tensor(dtype, [3, 2], 0, nbytes)}, bytes(nbytes))
    assert ours(read(path)) == theirs(path)[0] == {"x": (dtype, [3, 2])}


def test_offsets_count_from_the_start_of_the_file(tmp_path):
    path = raw_checkpoint(tmp_path / "a.safetensors", {"late": f32(4, 8), "early": f32(0, 4)}, b"AAAABBBB")
    found = {t.name: path.read_bytes()[t.offset : t.offset + t.nbytes] for t in read(path).tensors}
    assert found == {"early": b"AAAA", "late": b"BBBB"}


def test_tensors_come_in_file_order(tmp_path):
    header = {"c": f32(8, 12), "a": f32(0, 4), "b": f32(4, 8), "empty": tensor("F32", [0], 8, 8)}
    path = raw_checkpoint(tmp_path / "a.safetensors", header, bytes(12))
    assert [t.name for t in read(path).tensors] == ["a", "b", "empty", "c"]


def test_metadata_is_read(tmp_path):
    path = raw_checkpoint(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt", "ü": ""}, "x": f32(0, 4)}, bytes(4))
    assert read(path).metadata == theirs(path)[1] == {"format": "pt", "ü": ""}


ACCEPTED = {
    "no tensors": (b"{}", 0),
    "metadata only": (b'{"__metadata__":{"a":"b"}}', 0),
    "metadata null": (b'{"__metadata__":null,"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
    "padding": (b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}       ', 1),
    "empty name": (b'{"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
    "escaped name": (b'{"\\u00e9\\n\\u0000":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
    "unknown field": (b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":{"a":[1.5,null]}}}', 1),
    "scalar": (b'{"x":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1),
    "four-bit": (b'{"x":{"dtype":"F4","shape":[2,3],"data_offsets":[0,3]}}', 3),
    "one name twice, the last one whole": (
        b'{"x":{"dtype":"U8","shape":[9],"data_offsets":[0,9]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        1,
    ),
}


@pytest.mark.parametrize(("text", "body"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_the_library_accepts_is_read_alike(tmp_path, text, body):
    path = raw_checkpoint(tmp_path / "a.safetensors", text, bytes(body))
    header = read(path)
    assert (ours(header), header.metadata) == theirs(path)


# What breaks it

BIG = 1 << 63
BROKEN: dict[str, tuple[Any, int]] = {
    "not JSON": (b"{what", 0),
    "cut JSON": (b'{"x":{"dtype":"F32"', 0),
    "two documents": (b"{}{}", 0),
    "trailing nul": (b"{}\0", 0),
    "byte order mark": (b"\xef\xbb\xbf{}", 0),
    "an array": (b"[]", 0),
    "a string": (b'"{}"', 0),
    "no header": (b"", 0),
    "a null tensor": ({"x": None}, 0),
    "a number for a tensor": ({"x": 1}, 0),
    "no dtype": ({"x": {"shape": [1], "data_offsets": [0, 4]}}, 4),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    "no offsets": ({"x": {"dtype": "F32", "shape": [1]}}, 4),
    "one offset": ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, 4),
    "three offsets": ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4),
    "unknown dtype": ({"x": tensor("F33", [1], 0, 4)}, 4),
    "a dtype of manifests alone": ({"x": tensor("C128", [1], 0, 16)}, 16),
    "lower-case dtype": ({"x": tensor("f32", [1], 0, 4)}, 4),
    "dtype a number": ({"x": {"dtype": 32, "shape": [1], "data_offsets": [0, 4]}}, 4),
    "negative dimension": ({"x": tensor("F32", [-1], 0, 4)}, 4),
    "two negative dimensions": ({"x": tensor("F32", [-1, -1], 0, 4)}, 4),
    "negative offsets": ({"x": tensor("F32", [1], -4, 0)}, 4),
    "product over 2**63": ({"x": tensor("F32", [BIG, 2], 0, 4)}, 4),
    "product that is 0 modulo 2**64": ({"x": tensor("F32", [1 << 32, 1 << 32], 0, 0)}, 0),
    "product that overflows before its zero": ({"x": tensor("F32", [1 << 40, 1 << 40, 0], 0, 0)}, 0),
    "dimension over 2**64": ({"x": tensor("F32", [0, 1 << 64], 0, 0)}, 0),
    "dimension of a thousand digits": ({"x": tensor("F32", [0, 10**1000], 0, 0)}, 0),
    "offset over 2**64": ({"x": tensor("F32", [1], 1 << 64, (1 << 64) + 4)}, 4),
    "float dimension": ({"x": tensor("F32", [1.0], 0, 4)}, 4),
    "fractional dimension": ({"x": tensor("F32", [0.5], 0, 2)}, 2),
    "float offset": ({"x": tensor("F32", [1], 0, 4.0)}, 4),
    "string dimension": ({"x": tensor("F32", ["1"], 0, 4)}, 4),
    "true dimension": ({"x": tensor("F32", [True], 0, 4)}, 4),
    "shape not the offsets'": ({"x": tensor("F32", [2], 0, 4)}, 4),
    "half a byte": ({"x": tensor("F4", [3], 0, 2)}, 2),
    "four bits alone": ({"x": tensor("F4", [], 0, 0)}, 0),
    "reversed offsets": ({"x": tensor("F32", [1], 4, 0)}, 4),
    "overlap": ({"x": f32(0, 8), "y": f32(4, 12)}, 12),
    "one place twice": ({"x": f32(0, 4), "y": f32(0, 4)}, 4),
    "hole at the start": ({"x": f32(4, 8)}, 8),
    "hole in the middle": ({"x": f32(0, 4), "y": f32(8, 12)}, 12),
    "beyond the file": ({"x": f32(0, 4), "y": f32(4, 8)}, 7),
    "far beyond the file": ({"x": f32(0, 1 << 40)}, 4),
    "trailing bytes": ({"x": f32(0, 4)}, 5),
    "bytes and no tensors": ({}, 1),
    "metadata not strings": ({"__metadata__": {"a": 1}, "x": f32(0, 4)}, 4),
    "metadata nested": ({"__metadata__": {"a": {}}, "x": f32(0, 4)}, 4),
    "metadata an array": ({"__metadata__": [], "x": f32(0, 4)}, 4),
    "one name twice, the last one not whole": (
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        2,
    ),
    "broken text in a name": (b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "broken text in a dtype": (b'{"x":{"dtype":"\xff","shape":[1],"data_offsets":[0,4]}}', 4),
    "broken text in an unknown field": (b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"z":"\xff"}}', 4),
    "broken text in metadata": (b'{"__metadata__":{"a":"\xff"}}', 0),
    "lone surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "deep array": (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0),
    "deep object in a tensor": (b'{"x":{"dtype":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}}", 0),
    "deep array, unclosed": (b'{"x":' + b"[" * 100_000, 0),
    "deep metadata": (b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0),
}


@pytest.mark.parametrize(("header", "body"), BROKEN.values(), ids=BROKEN.keys())
def test_what_breaks_the_format_is_invalid_here_as_in_the_library(tmp_path, header, body):
    path = raw_checkpoint(tmp_path / "broken.safetensors", header, bytes(body))
    with pytest.raises(CheckpointInvalid, match=re.escape(str(path))):
        read(path)
    with pytest.raises(SafetensorError):
        theirs(path)


@pytest.mark.parametrize("dtype", sorted(safetensors.FOREIGN_DTYPES))
def test_dtypes_that_torch_lacks_are_unsupported_by_name(tmp_path, dtype):
    path = raw_checkpoint(tmp_path / "a.safetensors", {"odd": tensor(dtype, [4], 0, 3)}, bytes(3))
    with pytest.raises(UnsupportedFormat, match=f"{re.escape(str(path))}.*'odd'.*{dtype}"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x08\0\0\0\0\0\0"])
def test_a_file_too_short_for_a_header_is_invalid(tmp_path, content):
    path = tmp_path / "short.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointInvalid, match=f"{re.escape(str(path))}.*{len(content)} bytes"):
        read(path)


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(60), b"GGUF" + bytes(60), b"\x80\x02}q\0" + b"x" * 60, b"x" * 64])
def test_another_format_is_invalid(tmp_path, content):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointInvalid, match=re.escape(str(path))):
        read(path)


@pytest.mark.parametrize("length", [safetensors.MAX_HEADER_BYTES + 1, 1 << 63, (1 << 64) - 1])
def test_a_header_over_the_formats_limit_is_invalid_unread(tmp_path, length):
    path = raw_checkpoint(tmp_path / "a.safetensors", {}, length=length)
    os.truncate(path, safetensors.MAX_HEADER_BYTES + 100)  # sparse: the file would be long enough
    with pytest.raises(CheckpointInvalid, match=rf"{re.escape(str(path))}.*{length}"):
        read(path)


def test_a_header_beyond_the_file_is_invalid(tmp_path):
    path = raw_checkpoint(tmp_path / "a.safetensors", {}, length=3)
    with pytest.raises(CheckpointInvalid, match=rf"{re.escape(str(path))}.*truncated.* 3 bytes in a file of 10"):
        read(path)


def test_a_header_that_shrank_since_the_stat_is_invalid(tmp_path):
    path = raw_checkpoint(tmp_path / "a.safetensors", {}, length=100)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(CheckpointInvalid, match="2 of 100"):
            read_header(fd, str(path), 1000)
    finally:
        os.close(fd)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_PATH])
def test_a_file_that_cannot_be_read_is_unreadable(tmp_path, flags):
    path = write_checkpoint(tmp_path / "a.safetensors")
    fd = os.open(path, flags)
    try:
        with pytest.raises(CheckpointUnreadable, match=re.escape(str(path))):
            read_header(fd, str(path), path.stat().st_size)
    finally:
        os.close(fd)


@pytest.mark.timeout(10)
def test_a_shape_of_very_many_dimensions_is_invalid_quickly():
    """Multiplied out, these dimensions make a number of millions of digits; the suite's timeout is the limit here."""
    text = json.dumps({"x": tensor("F32", [1 << 62] * 300_000, 0, 4)}).encode()
    with pytest.raises(CheckpointInvalid):
        parse_header(text, "p", 4)


# Anything at all


LEAVES = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 12, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 70]),
    st.integers(-8, 64), st.none(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([*FORMAT_DTYPES, "F6_E2M3", "C128", "F33", "a"]), st.text(max_size=4),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=6
)


@st.composite
def well_formed(draw):
    """A header that follows the format, and the size of its body."""
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
    end = 0
    for name in draw(st.lists(st.text(max_size=5), unique=True, max_size=4)):
        if name != "__metadata__":
            dtype = draw(st.sampled_from(FORMAT_DTYPES))
            shape = draw(st.lists(st.integers(0, 5), max_size=3))
            bits = DTYPE_BITS[dtype]
            for dimension in shape:
                bits *= dimension
            if bits % 8:
                shape, bits = [*shape, 2], bits * 2
            header[name] = tensor(dtype, shape, end, end + bits // 8)
            end += bits // 8
    names = draw(st.permutations(list(header)))
    return {name: header[name] for name in names}, end


@st.composite
def hostile(draw):
    """The bytes of a file: a well-formed one that was changed a little, or none at all."""
    kind = draw(st.sampled_from(["values", "values", "values", "text", "text", "body", "json", "bytes"]))
    if kind == "bytes":
        return draw(st.binary(max_size=80))
    header, size = draw(well_formed())
    if kind == "json":
        header = draw(VALUES)
    if kind == "values":
        for _ in range(draw(st.integers(1, 2))):
            entries = [e for e in header.values() if isinstance(e, dict)]
            if not entries:
                continue
            entry = draw(st.sampled_from(entries))
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            place = entry.get(field)
            if isinstance(place, list) and place and draw(st.integers(0, 3)):
                place[draw(st.integers(0, len(place) - 1))] = draw(LEAVES)
            else:
                entry[field] = draw(VALUES)
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    if kind == "text":
        at = draw(st.integers(0, len(text)))
        noise = draw(st.one_of(st.binary(max_size=2), st.sampled_from(string.printable).map(str.encode)))
        text = text[:at] + noise + text[at + draw(st.integers(0, 2)) :]
    if kind == "body":
        size = max(0, size + draw(st.integers(-3, 3)))
    return struct.pack("<Q", len(text)) + text + bytes(size)


def spelled_oddly(content: bytes) -> bool:
    """Whether the two readers may differ on purpose, in either direction.

    We insist that a header starts with ``{`` and that a tensor is described by an object, as the format's text says; the
    library lets both pass. Of a key written twice within a tensor or of ``-0`` we are the more patient.
    """
    odd = False

    def pairs(found):
        nonlocal odd
        keys = [key for key, _ in found]
        odd = odd or len(keys) != len(set(keys))
        return dict(found)

    def number(digits):
        nonlocal odd
        odd = odd or digits == "-0"
        return int(digits)

    text = content[8:]
    if text[:1] in (b" ", b"\t", b"\n", b"\r"):
        return True
    with suppress(ValueError):
        found, _ = json.JSONDecoder(object_pairs_hook=pairs, parse_int=number).raw_decode(text.decode(errors="replace"))
        odd = odd or (isinstance(found, dict) and any(isinstance(value, list) for value in found.values()))
    return odd


def parity(path: Path, content: bytes) -> str:
    """Hold our reading of a file against the library's; says how it went."""
    path.write_bytes(content)
    try:
        header = read(path)
    except (CheckpointInvalid, UnsupportedFormat) as error:
        assert str(path) in str(error)
        if isinstance(error, UnsupportedFormat) or spelled_oddly(content):
            return "differs on purpose"
        with pytest.raises(SafetensorError):
            theirs(path)
        return "refused"
    if spelled_oddly(content):
        return "differs on purpose"
    assert (ours(header), header.metadata) == theirs(path)
    assert sorted(t.offset for t in header.tensors) == [t.offset for t in header.tensors]
    return "accepted"


MANY = settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))


def test_hostile_headers_raise_nothing_else_and_agree_with_the_library(tmp_path):
    seen: dict[str, int] = {}

    @MANY
    @given(hostile())
    def hold(content):
        outcome = parity(tmp_path / "hostile.safetensors", content)
        seen[outcome] = seen.get(outcome, 0) + 1

    hold()
    assert sum(seen.values()) >= 1000
    assert seen.keys() >= {"accepted", "refused"}, seen


def test_well_formed_headers_agree_with_the_library(tmp_path):
    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(well_formed())
    def hold(made):
        header, size = made
        path = raw_checkpoint(tmp_path / "fine.safetensors", header, bytes(size))
        found = read(path)
        assert (ours(found), found.metadata) == theirs(path)
        assert sum(t.nbytes for t in found.tensors) == size

    hold()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 100))
def test_parsing_any_text_raises_checkpoint_errors_alone(text, body_bytes):
    with suppress(CheckpointError, UnsupportedFormat):
        parse_header(b"{" + text, "p", body_bytes)
