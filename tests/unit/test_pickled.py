"""Torch's own files: described, they are what ``torch.load`` gives; what is refused, and why; whatever a file may hold."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from nbcache.checkpoints import pickled
from nbcache.checkpoints.content import LEFT_OUT, TEXT_LIMIT, OpenFile
from nbcache.checkpoints.unpickle import read_pickle
from nbcache.errors import CheckpointError, CheckpointInvalid, UnsupportedFormat
from nbcache.manifest import DTYPE_BITS
from tests.support.contents import assert_alike, describe_manifest, read_tensors, shared

OTHERS = [torch.float4_e2m1fn_x2, torch.complex32]
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8).view(dtype).reshape(shape)


def stock(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of ``torch.load``, flattened by this test's own few lines."""
    found: dict[str, torch.Tensor] = {}

    def walk(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[name or "tensor"] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}" if name else str(key), inner)
        elif isinstance(value, list | tuple):
            for key, inner in enumerate(value):
                walk(f"{name}.{key}" if name else str(key), inner)

    walk("", torch.load(path, weights_only=True))
    return found


def assert_as_stock(path: Path) -> dict[str, torch.Tensor]:
    found, expected = read_tensors(path), stock(path)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert_alike(found[name], tensor, name)
    assert shared(found) == shared(expected)
    return found


def save(path: Path, value: object, **options: object) -> Path:
    torch.save(value, path, **options)
    return path


# As torch.load


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, dtype):
    tensors = {str(shape): random_tensor(dtype, *shape) for shape in ((), (1,), (7,), (3, 5), (2, 3, 4), (3, 0, 2), (0,))}
    assert_as_stock(save(tmp_path / "a.pt", tensors))


def test_four_bit_floats_come_in_pairs(tmp_path):
    tensors = {"a": random_tensor(torch.float4_e2m1fn_x2, 3, 4), "b": random_tensor(torch.float4_e2m1fn_x2, 2, 2)}
    path = save(tmp_path / "a.pt", tensors)
    assert_as_stock(path)
    assert [t.shape for t in describe_manifest(path).tensors] == [(3, 8), (2, 4)]


def test_a_module_and_the_state_of_its_optimizer(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    path = save(tmp_path / "a.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3})
    found = assert_as_stock(path)
    assert "optimizer.state.0.exp_avg" in found
    metadata = describe_manifest(path).metadata
    assert metadata["epoch"] == "3"
    assert metadata["optimizer.param_groups.0.lr"] == "0.001"
    assert metadata["optimizer.param_groups.0.params"] == "[0, 1, 2, 3]"


def strided() -> dict[str, torch.Tensor]:
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    return {
        "transposed": torch.randn(4, 6).t(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "every other column": base[:, ::2],
        "a column": torch.randn(7, 3)[:, 1],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "a row of one": torch.randn(4, 6)[1:2, :3],
        "empty and turned": torch.randn(0, 4).t(),
        "a step of its own": torch.randn(9).as_strided((3, 3), (2, 1)),
        "plain": torch.randn(2, 2),
    }


@pytest.mark.parametrize("name", strided())
def test_strides_are_kept(tmp_path, name):
    assert_as_stock(save(tmp_path / "a.pt", {name: strided()[name]}))


def test_all_kinds_of_strides_together(tmp_path):
    assert_as_stock(save(tmp_path / "a.pt", strided()))


def test_tensors_that_share_memory_share_it_here(tmp_path):
    whole = torch.randn(8, 8)
    tied = torch.randn(3, 3)
    path = save(
        tmp_path / "a.pt",
        {"b": whole[2:6], "tied": tied, "a": whole, "row": whole[5], "apart": torch.randn(2), "head": tied, "t": whole.t()},
    )
    found = assert_as_stock(path)
    found["b"][3, 0] = 42
    assert found["a"][5, 0] == found["row"][0] == found["t"][0, 5] == 42
    assert found["head"] is not found["tied"]
    manifest = describe_manifest(path)
    assert manifest.nbytes == (64 + 9 + 2) * 4
    assert manifest.count == 7


def test_only_what_tensors_reach_is_read(tmp_path):
    big = torch.randn(1000)
    path = save(tmp_path / "a.pt", {"q": big[10:20], "k": big[900:910], "all of another": torch.randn(5)})
    assert_as_stock(path)
    manifest = describe_manifest(path)
    assert manifest.nbytes == (10 + 10 + 5) * 4
    assert not manifest.views


def test_without_sharing_and_strides_there_are_no_views(tmp_path):
    manifest = describe_manifest(save(tmp_path / "a.pt", torch.nn.Linear(3, 4).state_dict()))
    assert manifest.views == ()
    assert [t.name for t in manifest.tensors] == ["weight", "bias"]


def test_parameters_come_as_tensors(tmp_path):
    layer = torch.nn.Linear(2, 3)
    layer.weight.note = "kept by torch, not here"
    path = save(tmp_path / "a.pt", {"weight": layer.weight, "bias": layer.bias.detach().requires_grad_()})
    found = assert_as_stock(path)
    assert not any(tensor.requires_grad or isinstance(tensor, torch.nn.Parameter) for tensor in found.values())


def test_a_lone_tensor_and_a_list(tmp_path):
    assert list(assert_as_stock(save(tmp_path / "a.pt", torch.randn(3)))) == ["tensor"]
    assert list(assert_as_stock(save(tmp_path / "b.pt", [torch.randn(3), (torch.randn(2), 1)]))) == ["0", "1.0"]


@pytest.mark.parametrize("value", [{}, [], OrderedDict(), 3, None, "words", {"a": {"b": []}}], ids=repr)
def test_a_checkpoint_without_tensors_is_an_empty_one(tmp_path, value):
    assert_as_stock(save(tmp_path / "a.pt", value))


def test_what_is_no_tensor_is_metadata_as_text(tmp_path):
    beside = {
        "int": 3, "big": 1 << 200, "float": 0.5, "none": None, "true": True, "text": "words", "bytes": b"ab",
        "list": [1, "a", None], "size": torch.Size([2, 3]), "dtype": torch.float16,
        "device": torch.device("cuda", 1),
        "set": {1}, "complex": 1 + 2j, "counter": Counter("a"),
        "deep": {"x": {"y": 1.5}}, "empty": {}, "array": bytearray(b"ab"), 7: "seven",
        "dtypes": [torch.int8],
    }  # fmt: skip
    path = save(tmp_path / "a.pt", {"w": torch.zeros(1), **beside})
    assert_as_stock(path)
    assert describe_manifest(path).metadata == {
        "int": "3", "big": str(1 << 200), "float": "0.5", "none": "null", "true": "true", "text": "words", "bytes": "ab",
        "list": '[1, "a", null]', "size": "[2, 3]", "dtype": "torch.float16", "device": "cuda:1", "set": "[1]",
        "complex": "(1+2j)", "counter.a": "1", "deep.x.y": "1.5", "empty": "{}", "array": "ab", "7": "seven",
        "dtypes": '["torch.int8"]',
    }  # fmt: skip


def test_metadata_that_is_too_long_is_left_out_and_named(tmp_path):
    beside = {"long": "x" * (TEXT_LIMIT + 1), "many": list(range(TEXT_LIMIT + 1)), "short": "y"}
    metadata = describe_manifest(save(tmp_path / "a.pt", beside)).metadata
    assert metadata == {"short": "y", LEFT_OUT: "long, many"}


def test_a_file_saved_on_a_gpu_is_described_alike(tmp_path):
    """The device stands in the pickle alone."""
    path = save(tmp_path / "a.pt", {"a": torch.randn(3)})
    edited = rewrite(path, tmp_path / "b.pt", lambda name, text: text.replace(b"cpu", b"gpu") if name == "data.pkl" else text)
    assert torch.equal(read_tensors(edited)["a"], read_tensors(path)["a"])


def test_files_of_older_torches_lack_some_entries(tmp_path):
    """1.6 wrote a version, a pickle and storages; the byte order came with 2.1, the rest later."""
    path = save(tmp_path / "a.pt", {"a": torch.randn(3), "b": torch.randn(2)})
    old = rewrite(path, tmp_path / "b.pt", lambda name, text: text if name.startswith(("data", "version")) else None)
    assert len(zipfile.ZipFile(old).namelist()) == 4
    assert_as_stock(old)


def test_it_needs_no_torch():
    """Whoever stages weights from a shell imports none."""
    import subprocess
    import sys

    code = "from nbcache.checkpoints import pickled, gguf, arrays; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# What is refused


def refused(error: type[Exception], path: Path, pattern: str) -> None:
    with pytest.raises(error, match=pattern) as caught:
        describe_manifest(path)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)


def rewrite(source: Path, target: Path, edit=lambda name, text: text, compression=zipfile.ZIP_STORED) -> Path:
    """A torch file with its entries edited; an entry whose edit is None is left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            text = edit(name.partition("/")[2], old.read(name))
            if text is not None:
                new.writestr(name, text)
    return target


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/nbcache-was-here",)


class Custom:
    pass


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (
            {"w": torch.zeros(1), "x": Evil()},
            r"needs '(posix|nt).system', code that nbcache does not run; save the tensors alone",
        ),
        (torch.nn.Linear(2, 2), "needs 'torch.nn.modules.linear.Linear', code"),
        ({"args": Custom()}, "needs 'copy_reg._reconstructor'|needs 'tests.unit.test_pickled.Custom'"),
        ({"s": torch.eye(3).to_sparse()}, "a sparse tensor, which has no plain bytes"),
        ({"m": torch.empty(2, device="meta")}, "a tensor without data"),
        ({"c": torch.zeros(2, dtype=torch.complex64).conj()}, "lazily conjugated"),
        ({"s": torch.zeros(2).untyped_storage()}, "'s' is a storage without a tensor"),
        ({"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}, "two tensors would be called 'a.b'"),
    ],
    ids=["code", "module", "class", "sparse", "meta", "conjugated", "storage", "one name twice"],
)
def test_what_cannot_be_mapped_is_refused_with_the_reason(tmp_path, value, pattern):
    refused(UnsupportedFormat, save(tmp_path / "a.pt", value), pattern)
    assert not os.path.exists("/tmp/nbcache-was-here")


def test_the_old_format_is_refused_with_the_remedy(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.zeros(1)}, _use_new_zipfile_serialization=False)
    refused(UnsupportedFormat, path, "before 1.6.*torch.load and save it again with torch.save")


def test_a_bare_pickle_is_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": 1}))
    refused(UnsupportedFormat, tmp_path / "a.pt", "a bare pickle")


def test_another_protocol_is_refused(tmp_path):
    refused(UnsupportedFormat, save(tmp_path / "a.pt", {"a": torch.zeros(1)}, pickle_protocol=4), "pickle protocol 4")


def test_a_compressed_archive_is_refused(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.zeros(1000)})
    refused(UnsupportedFormat, rewrite(path, tmp_path / "b.pt", compression=zipfile.ZIP_DEFLATED), "compressed")


def test_a_script_is_refused(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.zeros(1)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/constants.pkl", b"")
    refused(UnsupportedFormat, path, "TorchScript")


def test_a_big_endian_file_is_refused(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.zeros(1)})
    edited = rewrite(path, tmp_path / "b.pt", lambda name, text: b"big" if name == "byteorder" else text)
    refused(UnsupportedFormat, edited, "big-endian")


@pytest.mark.parametrize("content", [b"", b"P", b"PK\3\4", b"PK\3\4" + bytes(60), b"x" * 100, b"GGUF" + bytes(20)])
def test_what_is_no_torch_file_is_invalid(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    refused(CheckpointInvalid, tmp_path / "a.pt", "not a file of torch.save|not a zip file")


def test_another_zip_file_is_invalid(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a.txt", b"words")
    refused(CheckpointInvalid, tmp_path / "a.pt", "not of torch.save: 0 entries called data.pkl")


def test_truncated_anywhere_it_is_invalid(tmp_path):
    content = save(tmp_path / "a.pt", {"a": torch.randn(50), "b": torch.randn(3, 3).t()}).read_bytes()
    for size in range(0, len(content), 7):
        (tmp_path / "b.pt").write_bytes(content[:size])
        refused(CheckpointInvalid, tmp_path / "b.pt", r"b\.pt: ")


def lying(tmp_path: Path, *edits: tuple[bytes, bytes]) -> Path:
    """A file whose pickle is edited: tensor ``a`` of 3 x 5 int32, storage key ``0``."""
    path = save(tmp_path / "a.pt", {"a": torch.zeros(3, 5, dtype=torch.int32)})

    def edit(name: str, text: bytes) -> bytes:
        if name == "data.pkl":
            for old, new in edits:
                assert text.count(old) == 1
                text = text.replace(old, new)
        return text

    return rewrite(path, tmp_path / "b.pt", edit)


LIES = {
    "more elements than the storage has": ([(b"K\x0ftq", b"K\x10tq")], "storage '0' has 60 bytes, its pickle says 64"),
    "fewer": ([(b"K\x0ftq", b"K\x0etq")], "storage '0' has 60 bytes, its pickle says 56"),
    "negative": ([(b"K\x0ftq", b"J\xff\xff\xff\xfftq")], "a storage that is none"),
    "another type": ([(b"IntStorage", b"LongStorage")], "storage '0' has 60 bytes, its pickle says 120"),
    "no such storage": ([(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009")], "no zip entry 'a/data/9'"),
    "another folder": ([(b"X\x01\x00\x00\x000", b"X\x0c\x00\x00\x00../../passwd")], "no zip entry"),
    "a larger shape": ([(b"K\x03K\x05\x86", b"K\x04K\x05\x86")], r"tensor 'a': \[4, 5\] by \[5, 1\] from 0 leaves"),
    "a negative shape": ([(b"K\x03K\x05\x86", b"J\xff\xff\xff\xffK\x05\x86")], "no counts"),
    "an immense shape": ([(b"K\x03K\x05\x86", b"\x8a\x09" + b"\xff" * 8 + b"\0" + b"K\x05\x86")], "impossible shape"),
    "a larger stride": ([(b"K\x05K\x01\x86", b"K\x06K\x01\x86")], r"\[3, 5\] by \[6, 1\] from 0 leaves"),
    "a negative stride": ([(b"K\x05K\x01\x86", b"K\x05J\xff\xff\xff\xff\x86")], "no counts"),
    "too few strides": ([(b"K\x05K\x01\x86", b"K\x05\x85")], "impossible shape"),
    "a shape of words": ([(b"K\x03K\x05\x86", b"X\x01\0\0\0aK\x05\x86")], "no counts"),
    "a shape of truths": ([(b"K\x03K\x05\x86", b"\x88K\x05\x86")], "no counts"),
}


@pytest.mark.parametrize(("edits", "pattern"), LIES.values(), ids=LIES)
def test_a_lie_about_a_tensor_is_invalid(tmp_path, edits, pattern):
    refused(CheckpointInvalid, lying(tmp_path, *edits), pattern)


def test_an_immense_view_of_one_element_takes_no_memory(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.ones(1).expand(1 << 40)})
    assert describe_manifest(path).nbytes == 4
    assert read_tensors(path)["a"].shape == (1 << 40,)


def test_zip_entries_that_overlap_are_invalid(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.zeros(100), "b": torch.ones(100)})
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"a/data/{n}") for n in (0, 1))
    content = path.read_bytes()
    at = content.rindex(b"a/data/1")
    edited = bytearray(content)
    struct.pack_into("<I", edited, at - 4, first.header_offset)
    (tmp_path / "b.pt").write_bytes(edited)
    assert second.header_offset != first.header_offset
    refused(CheckpointInvalid, tmp_path / "b.pt", "overlaps|two zip entries")


def test_two_zip_entries_of_one_name_are_invalid(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.zeros(100)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a/data/0", bytes(400))
    refused(CheckpointInvalid, path, "two zip entries of the name 'a/data/0'")


# Pickles


def unpickled(text: bytes) -> object:
    return read_pickle(text, OpenFile(-1, "p", 0))


@pytest.mark.parametrize(
    "value", [{"a": [1, (2.5, None, True), "x"]}, [[]], (), {1: -5, None: 1 << 70, 0.5: [b"\xff\0"]}], ids=repr
)
def test_plain_values_are_read_as_pickle_reads_them(value):
    expected = [b"\xff\0".decode("latin1")] if 0.5 in (value if isinstance(value, dict) else ()) else None
    found = unpickled(pickle.dumps(value, 2))
    if expected:
        assert found.pop(0.5) == expected
        value = {key: inner for key, inner in value.items() if key != 0.5}
    assert found == value


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "text",
    [
        b"", b".", b"\x80", b"\x80\x02", b"(", b"(((((", b"e.", b"}e.", b"]u.", b"(u.", b"}(K\1u.", b"R.", b"NR.",
        b"NNR.", b"NNb.", b"\x85.", b"N\x86.", b"h\0.", b"j\xff\xff\xff\xff.", b"q\0.", b"r\xff\xff\xff\xff.",
        b"X\xff\xff\xff\xff.", b"X\1\0\0\0\xff.", b"U\xff.", b"\x8a\xff.", b"G\0.", b"c", b"cos", b"cos\n", b"NQ.",
        b"(NQ.", b"Vabc\n.", b"I1\n.", b"\x95" + b"\xff" * 8 + b".", b"\x8e" + b"\xff" * 8 + b".",
        b"\x8b\xff\xff\xff\x7f.", b"}]Ns.", b"}]]s.", b"}(NNNNtNs.", b"(i__builtin__\neval\n.", b"\xff.",
        b"ctorch\nSize\n(K\1J\xff\xff\xff\xfftR.", b"ctorch\nSize\nNR.", b"ccollections\nOrderedDict\n(]tR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.", b"ctorch._utils\n_rebuild_tensor_v2\n(NK\0))\x89NtR.",
        b"ctorch\nfloat32\n)R.", b"\x82\1.", b"\x81.",
    ],
    ids=repr,
)  # fmt: skip
def test_a_broken_pickle_is_invalid_whatever_it_claims(text):
    with pytest.raises(CheckpointInvalid, match="its pickle is broken"):
        unpickled(text)


@pytest.mark.timeout(30)
def test_deep_and_dense_pickles_are_read_in_bounded_time_and_refused():
    """Nested 200 000 deep; containing itself; shared so that it unfolds to 2**60; a key that would overflow the C stack."""
    file = OpenFile(-1, "p", 0)
    deep = b"]" * 200_000 + b"a" * 199_999 + b"."
    itself = b"]q\0h\0a."
    dense = b"]" + b"q\0" + b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(60)) + b"."
    for text in (deep, itself, dense):
        with pytest.raises(CheckpointInvalid, match=r"holds more than 500000 values|nested 101 deep"):
            pickled.flatten(unpickled(text), file, pickled.Notes())
    with pytest.raises(CheckpointInvalid, match="a tuple as a key"):
        unpickled(b"})" + b"\x85" * 200_000 + b"Ns.")


@pytest.mark.timeout(30)
def test_a_text_that_is_repeated_does_not_multiply():
    """A megabyte, named a hundred thousand times, in lists and alone."""
    text = b"X\0\0\x10\0" + b"x" * (1 << 20) + b"q\0](" + b"h\0" * 100_000 + b"e."
    notes = pickled.Notes()
    found = unpickled(text)
    pickled.flatten({"a": found, "b": dict(enumerate(found))}, OpenFile(-1, "p", 0), notes)
    assert sum(map(len, notes.finish().values())) < 3 << 20


@pytest.mark.timeout(60)
def test_whatever_is_in_a_pickle_only_typed_errors_come_of_it(tmp_path):
    source = save(tmp_path / "a.pt", {"a": torch.zeros(3, 5), "b": {"c": torch.zeros(2).t(), "n": [1, "x"]}, "e": 1.5})
    with zipfile.ZipFile(source) as archive:
        text = archive.read("a/data.pkl")

    @settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.one_of(
            st.binary(max_size=60),
            st.builds(
                lambda at, new, cut: text[:at] + new + text[at + cut :],
                st.integers(0, len(text)), st.binary(max_size=4), st.integers(0, 6),
            ),
        )
    )  # fmt: skip
    def hold(content):
        with suppress(CheckpointError, UnsupportedFormat):
            pickled.flatten(unpickled(content), OpenFile(-1, "p", 0), pickled.Notes())

    hold()


@pytest.mark.timeout(60)
def test_whatever_a_file_holds_only_typed_errors_come_of_it(tmp_path):
    content = save(tmp_path / "a.pt", {"a": torch.randn(3, 5), "b": torch.randn(4, 4).t()}).read_bytes()

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(content)), st.binary(min_size=1, max_size=8), st.integers(0, 8))
    def hold(at, new, cut):
        path = tmp_path / "b.pt"
        path.write_bytes(content[:at] + new + content[at + cut :])
        with suppress(CheckpointError, UnsupportedFormat):
            manifest = describe_manifest(path)
            assert all(tensor.offset + tensor.nbytes <= path.stat().st_size for tensor in manifest.tensors)

    hold()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_torch_saves_comes_out_as_torch_loads_it(tmp_path_factory, data):
    """Tensors of any dtype, cut out of shared storages in any way."""
    dtypes = [dtype for dtype in DTYPES if dtype.itemsize]
    bases = [random_tensor(data.draw(st.sampled_from(dtypes)), data.draw(st.integers(0, 40))) for _ in range(3)]
    tensors: dict[str, torch.Tensor] = {}
    for number in range(data.draw(st.integers(1, 8))):
        base = data.draw(st.sampled_from(bases))
        rank = data.draw(st.integers(0, 3))
        shape = [data.draw(st.integers(0, 4)) for _ in range(rank)]
        strides = [data.draw(st.integers(0, 6)) for _ in range(rank)]
        reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0
        if reach <= base.numel():
            offset = data.draw(st.integers(0, base.numel() - reach))
            tensors[f"t{number}"] = base.as_strided(shape, strides, offset)
    path = tmp_path_factory.mktemp("saved") / "a.pt"
    torch.save(tensors, path)
    assert_as_stock(path)


def test_a_file_object_is_never_moved(tmp_path):
    """The descriptor is shared with the daemon: its position means nothing to anybody."""
    path = save(tmp_path / "a.pt", {"a": torch.zeros(3)})
    with open(path, "rb") as stream:
        pickled.read(OpenFile(stream.fileno(), str(path), path.stat().st_size))
        assert os.lseek(stream.fileno(), 0, io.SEEK_CUR) == 0


def test_the_dtypes_of_this_suite_are_those_of_manifests():
    assert len(DTYPES) + len(OTHERS) == len(DTYPE_BITS)
