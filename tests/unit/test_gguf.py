"""GGUF files, written by the gguf package: described, they are what its reader gives; what is refused; whatever they hold."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path

import gguf
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings

from nbcache.checkpoints.content import LEFT_OUT
from nbcache.checkpoints.gguf import TYPES
from nbcache.errors import CheckpointError, CheckpointIncomplete, CheckpointInvalid, UnsupportedFormat
from nbcache.manifest import BLOCKS, DTYPE_BITS, nbytes_of, stored_shape
from tests.support.contents import describe_manifest, read_tensors
from tests.support.gguf import raw_gguf, string, write_gguf


def test_the_tables_are_those_of_the_gguf_package():
    """Numbers and names, elements and bytes of each type; a type that is new there is one to add here."""
    ours = BLOCKS | {name: (1, DTYPE_BITS[name] // 8) for name in TYPES.values() if name not in BLOCKS}
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        assert (TYPES[kind.value], ours[kind.name]) == (kind.name, sizes)
    assert set(ours) == set(TYPES.values())


def test_every_type_comes_as_the_reader_gives_it(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    found = read_tensors(path)
    reader = gguf.GGUFReader(path)
    assert list(found) == [tensor.name for tensor in reader.tensors]
    assert len(found) >= 30
    for tensor in reader.tensors:
        ours = found[tensor.name]
        assert ours.view(torch.uint8).numpy().tobytes() == tensor.data.tobytes(), tensor.name
        if tensor.tensor_type.name in BLOCKS:
            assert (ours.dtype, tuple(ours.shape)) == (torch.uint8, tensor.data.shape), tensor.name
        else:
            assert tuple(ours.shape) == tuple(reversed(tensor.shape.tolist())), tensor.name


def test_the_manifest_carries_type_and_shape_of_what_is_quantized(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", np.zeros((4, 2, 288), np.uint8), raw_dtype=Kind.Q4_K)
    finish(writer)
    (tensor,) = describe_manifest(tmp_path / "a.gguf").tensors
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == ("Q4_K", (4, 2, 512), 4 * 2 * 288)
    assert stored_shape(tensor.dtype, tensor.shape) == (4, 2, 288)
    assert nbytes_of("Q4_K", (4, 2, 511)) is None
    assert nbytes_of("Q4_K", ()) is None
    assert nbytes_of("Q4_K", (0, 512)) == 0


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_metadata_is_text_and_vocabularies_are_left_out(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.epsilon", 0.5)
    writer.add_bool("a.yes", True)
    writer.add_string("general.name", "tiny")
    writer.add_array("a.short", [1, 2, 3])
    writer.add_array("a.words", ["x", "y"])
    writer.add_array("tokenizer.ggml.tokens", [f"token{n}" for n in range(1000)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 1000)
    writer.add_string("tokenizer.chat_template", "x" * 100_000)
    writer.add_tensor("w", np.zeros(4, np.float32))
    finish(writer)
    assert describe_manifest(tmp_path / "a.gguf").metadata == {
        "general.architecture": "flux", "a.count": "7", "a.epsilon": "0.5", "a.yes": "true", "general.name": "tiny",
        "a.short": "[1, 2, 3]", "a.words": '["x", "y"]',
        LEFT_OUT: "tokenizer.ggml.tokens, tokenizer.ggml.scores, tokenizer.chat_template",
    }  # fmt: skip


def test_another_alignment_is_kept_to(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("a", np.ones(3, np.float32))
    writer.add_tensor("b", np.full(5, 2, np.float32))
    finish(writer)
    found = read_tensors(tmp_path / "a.gguf")
    assert found["b"].tolist() == [2.0] * 5
    assert all(tensor.offset % 256 == 0 for tensor in describe_manifest(tmp_path / "a.gguf").tensors)


def test_parts_are_one_checkpoint_named_by_the_first(tmp_path):
    for number in (1, 2, 3):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number:05}-of-00003.gguf", "llama")
        writer.add_tensor(f"t{number}", np.full(4, number, np.float32))
        finish(writer)
    first = tmp_path / "m-00001-of-00003.gguf"
    for name in (first, tmp_path):
        found = read_tensors(name)
        assert {name: tensor[0].item() for name, tensor in found.items()} == {"t1": 1, "t2": 2, "t3": 3}
    assert list(read_tensors(tmp_path / "m-00002-of-00003.gguf")) == ["t2"]
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    refused(CheckpointIncomplete, first, r"one of its 3 parts is missing: .*m-00003-of-00003.gguf")


# What is refused


def refused(error: type[Exception], path: Path, pattern: str) -> None:
    with pytest.raises(error, match=pattern) as caught:
        describe_manifest(path)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)


TENSOR = string("w") + struct.pack("<I2QIQ", 2, 4, 2, 0, 0)
"""2 x 4 float32 at the start of the body."""
BODY = bytes(32)


def test_a_file_made_by_hand_is_fine_to_begin_with(tmp_path):
    path = raw_gguf(tmp_path / "a.gguf", tensors=[TENSOR], body=BODY)
    assert describe_manifest(path).tensors[0].shape == (2, 4)


def info(name: str = "w", shape: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


BIG = (1 << 64) - 1
BROKEN = {
    "nothing": ({"magic": b""}, CheckpointInvalid, "not GGUF"),
    "another magic": ({"magic": b"GGML"}, CheckpointInvalid, "not GGUF: it starts with b'GGML'"),
    "version 1": ({"version": 1}, UnsupportedFormat, "GGUF version 1; versions 2 and 3"),
    "version 4": ({"version": 4}, UnsupportedFormat, "GGUF version 4"),
    "big-endian": ({"version": 3 << 24}, UnsupportedFormat, "big-endian"),
    "more tensors than bytes": ({"count": BIG}, CheckpointInvalid, "its header needs"),
    "two tensors too many": ({"count": 3, "body": b""}, CheckpointInvalid, "its header needs"),
    "more metadata than bytes": ({"pairs": BIG}, CheckpointInvalid, "its header needs"),
    "an immense name": ({"tensors": [struct.pack("<Q", BIG) + bytes(40)]}, CheckpointInvalid, f"a name of {BIG} bytes"),
    "a name that is no text": ({"tensors": [info().replace(b"w", b"\xff")]}, CheckpointInvalid, "not UTF-8"),
    "many dimensions": ({"tensors": [string("w") + struct.pack("<I", 1 << 30) + bytes(64)]}, CheckpointInvalid, "dimensions"),
    "an immense shape": ({"tensors": [info(shape=(1 << 40, 1 << 40))]}, CheckpointInvalid, "is too large"),
    "half a block": ({"tensors": [info(shape=(100, 2), kind=12)]}, CheckpointInvalid, r"Q4_K\[2, 100\].*blocks of 256"),
    "an unknown type": ({"tensors": [info(kind=4)]}, UnsupportedFormat, "'w' has ggml's type 4"),
    "beyond the file": ({"tensors": [info(offset=32)]}, CheckpointInvalid, r"'w'.*leaves the file"),
    "far beyond the file": ({"tensors": [info(offset=BIG & ~31)]}, CheckpointInvalid, "leaves the file"),
    "a larger shape": ({"tensors": [info(shape=(4, 3))]}, CheckpointInvalid, r"F32\[3, 4\], 48 bytes"),
    "not aligned": ({"tensors": [info(offset=4)], "body": bytes(64)}, CheckpointInvalid, "not aligned to 32"),
    "one name twice": ({"tensors": [info(), info(offset=32)], "body": bytes(64)}, CheckpointInvalid, "two tensors of one name"),
    "overlap": ({"tensors": [info(), info("v")]}, CheckpointInvalid, "'w' and 'v' overlap|'v' and 'w' overlap"),
    "an unknown kind": ({"metadata": [key("k", 13, b"")]}, CheckpointInvalid, "unknown kind 13"),
    "an immense text": ({"metadata": [key("k", 8, struct.pack("<Q", BIG))]}, CheckpointInvalid, "its header needs"),
    "an immense array": ({"metadata": [key("k", 9, struct.pack("<IQ", 4, BIG))]}, CheckpointInvalid, "its header needs"),
    "immense texts": ({"metadata": [key("k", 9, struct.pack("<IQ", 8, BIG))]}, CheckpointInvalid, "its header needs"),
    "deep arrays": ({"metadata": [key("k", 9, struct.pack("<IQ", 9, 1) * 50)]}, CheckpointInvalid, "unknown kind 9"),
    "an array of nothing known": ({"metadata": [key("k", 9, struct.pack("<IQ", 77, 1))]}, CheckpointInvalid, "unknown kind 77"),
    "one key twice": ({"metadata": [key("k", 0, b"\1")] * 2}, CheckpointInvalid, "'k' is there twice"),
    "no alignment": ({"metadata": [key("general.alignment", 4, bytes(4))]}, CheckpointInvalid, "alignment of 0"),
    "an odd alignment": ({"metadata": [key("general.alignment", 4, b"\x21\0\0\0")]}, CheckpointInvalid, "alignment of 33"),
    "a worded alignment": ({"metadata": [key("general.alignment", 8, string("32"))]}, CheckpointInvalid, "no power of two"),
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("parts", "error", "pattern"), BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_format_is_refused(tmp_path, parts, error, pattern):
    refused(error, raw_gguf(tmp_path / "a.gguf", **({"tensors": [info()], "body": BODY} | parts)), pattern)


def test_truncated_anywhere_it_is_invalid(tmp_path):
    content = write_gguf(tmp_path / "a.gguf").read_bytes()
    end = max(tensor.offset + tensor.nbytes for tensor in describe_manifest(tmp_path / "a.gguf").tensors)
    for size in [*range(0, 3000, 97), *range(len(content) - 100, end)]:
        (tmp_path / "b.gguf").write_bytes(content[:size])
        refused(CheckpointInvalid, tmp_path / "b.gguf", "truncated|not GGUF")


@pytest.mark.timeout(20)
def test_a_header_of_gigabytes_is_refused_unread(tmp_path):
    """Sparse: the file is long enough for the array of empty texts that it claims to hold."""
    path = raw_gguf(tmp_path / "a.gguf", metadata=[key("k", 9, struct.pack("<IQ", 8, 1 << 31))])
    os.truncate(path, 1 << 35)
    refused(CheckpointInvalid, path, "its header needs")


@pytest.mark.timeout(60)
def test_whatever_a_file_holds_only_typed_errors_come_of_it(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("a.words", ["x", "y"])
    writer.add_float32("a.epsilon", 0.5)
    writer.add_tensor("w", np.zeros((2, 288), np.uint8), raw_dtype=Kind.Q4_K)
    writer.add_tensor("v", np.zeros((3, 5), np.float16))
    finish(writer)
    content = (tmp_path / "a.gguf").read_bytes()

    @settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 400), st.binary(min_size=1, max_size=8), st.integers(0, 8))
    def hold(at, new, cut):
        path = tmp_path / "b.gguf"
        path.write_bytes(content[:at] + new + content[at + cut :])
        with suppress(CheckpointError, UnsupportedFormat):
            manifest = describe_manifest(path)
            assert all(tensor.offset + tensor.nbytes <= path.stat().st_size for tensor in manifest.tensors)

    hold()
