"""From names to files: what is chosen, what is refused and in which words, and what makes two names one key."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nbcache.checkpoints.catalog import MAX_INDEX_BYTES, Checkpoint, describe, locate, resolve
from nbcache.config import SocketAddress
from nbcache.errors import (
    CheckpointChanged,
    CheckpointError,
    CheckpointIncomplete,
    CheckpointInvalid,
    CheckpointNotFound,
    CheckpointUnreadable,
    UnsupportedFormat,
)
from nbcache.manifest import Manifest
from tests.support.checkpoints import raw_checkpoint, write_checkpoint


def describe_manifest(name: Path | str) -> Manifest:
    description = describe(resolve(str(name)))
    description.close()
    return description.manifest


def refused(error: type[Exception], name: Path | str, pattern: str | None = None, blamed: Path | str | None = None) -> None:
    """Resolving or describing this raises this error, and its message names the file to blame."""
    with pytest.raises(error, match=pattern) as caught:
        describe_manifest(name)
    assert type(caught.value) is error
    assert str(blamed or name) in str(caught.value)


def write_sharded(folder: Path, stem: str = "model", shards: int = 2) -> Path:
    """A checkpoint of ``shards`` shards with an index; tensor ``t<i>`` is in shard ``i``."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number in range(shards):
        shard = f"{stem}-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({f"t{number}": torch.full((4,), float(number))}, folder / shard, metadata={"format": "pt"})
        weight_map[f"t{number}"] = shard
    return write_index(folder / f"{stem}.safetensors.index.json", weight_map)


def write_index(path: Path, weight_map: object) -> Path:
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


# What is found


def test_a_file_is_one_member_under_the_absolute_path(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    for spelling in (str(path), "a.safetensors", "./a.safetensors", f"../{tmp_path.name}/a.safetensors"):
        checkpoint = resolve(spelling)
        assert [member.path for member in checkpoint.members] == [str(path)]
        assert checkpoint.name == str(path)


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "a.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/a.safetensors").name == str(tmp_path / "a.safetensors")


def test_an_index_is_the_first_member_and_its_shards_follow(tmp_path):
    index = write_sharded(tmp_path, shards=3)
    manifest = describe_manifest(index)
    assert [os.path.basename(member.path) for member in manifest.members] == [
        "model.safetensors.index.json", *(f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)),
    ]  # fmt: skip
    assert [(t.name, t.file) for t in manifest.tensors] == [("t0", 1), ("t1", 2), ("t2", 3)]
    assert manifest.metadata == {"format": "pt"}
    manifest.check()


def test_every_tensor_of_a_manifest_lies_where_its_file_has_it(tmp_path):
    index = write_sharded(tmp_path)
    description = describe(resolve(str(index)))
    try:
        for number, tensor in enumerate(description.manifest.tensors):
            got = os.pread(description.files[tensor.file], tensor.nbytes, tensor.offset)
            assert got == torch.full((4,), float(number)).numpy().tobytes()
    finally:
        description.close()


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["anything.safetensors"], "anything.safetensors"),
        (["model.safetensors", "other.safetensors"], "model.safetensors"),
        (["diffusion_pytorch_model.safetensors", "x.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
        (["a.safetensors", "b.txt", "c.bin"], "a.safetensors"),
        (["a.safetensors", "a-00001-of-00002.safetensors"], "a.safetensors"),
    ],
)
def test_a_folder_stands_for_its_one_or_preferred_checkpoint(tmp_path, names, chosen):
    for name in names:
        write_checkpoint(tmp_path / name)
    assert [member.path for member in resolve(str(tmp_path)).members] == [str(tmp_path / chosen)]


def test_a_folder_with_an_index_stands_for_all_its_shards(tmp_path):
    write_sharded(tmp_path)
    assert len(resolve(str(tmp_path)).members) == 3
    assert resolve(str(tmp_path)).key == resolve(str(tmp_path / "model.safetensors.index.json")).key


# What is refused


def test_a_missing_file_is_not_found(tmp_path):
    refused(CheckpointNotFound, tmp_path / "none.safetensors")
    refused(CheckpointNotFound, tmp_path / "no" / "such" / "folder")
    refused(CheckpointNotFound, tmp_path / "none.safetensors.index.json")
    refused(CheckpointNotFound, write_checkpoint(tmp_path / "a.safetensors") / "below")


def test_a_dangling_link_is_not_found(tmp_path):
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "gone")
    refused(CheckpointNotFound, tmp_path / "a.safetensors")


def test_a_circle_of_links_is_unreadable(tmp_path):
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "a.safetensors")
    refused(CheckpointUnreadable, tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "nul\0.safetensors"])
def test_a_name_that_no_file_can_have_is_a_typed_error(tmp_path, name):
    with pytest.raises(CheckpointError):
        resolve(str(tmp_path / name))


def test_a_folder_without_weights_is_not_found(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(CheckpointNotFound, tmp_path, "without weights")


def test_a_folder_with_several_checkpoints_asks_which(tmp_path):
    write_checkpoint(tmp_path / "a.safetensors")
    write_checkpoint(tmp_path / "b.safetensors")
    refused(UnsupportedFormat, tmp_path, re.escape("a.safetensors, b.safetensors"))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["pytorch_model.bin", "training_args.bin", "optimizer.bin", "other.pt"], "pytorch_model.bin"),
        (["only.bin"], "only.bin"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], "pytorch_model.bin.index.json"),
        (["diffusion_pytorch_model.bin", "x.bin"], "diffusion_pytorch_model.bin"),
        (["a-Q4_K.gguf", "a.npz"], "a-Q4_K.gguf"),
        (["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], "a-00001-of-00002.gguf"),
        (["pytorch_model.bin", "a.gguf"], "pytorch_model.bin"),
        (["anything.safetensors", "pytorch_model.bin"], "anything.safetensors"),
        (["model.safetensors", "model.safetensors.index.json"], "model.safetensors"),  # as transformers does
        (
            ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"],
            "diffusion_pytorch_model.safetensors.index.json",  # as diffusers does
        ),
    ],
)
def test_a_folder_is_asked_for_one_format_after_the_other(tmp_path, names, chosen):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert locate(str(tmp_path)) == str(tmp_path / chosen)


@pytest.mark.parametrize(
    ("names", "error", "pattern"),
    [
        (["a.gguf", "b.gguf"], UnsupportedFormat, r"several checkpoints \(a\.gguf, b\.gguf\)"),
        (["a.bin", "b.bin"], UnsupportedFormat, r"several checkpoints \(a\.bin, b\.bin\)"),
        (["a-00002-of-00002.gguf"], CheckpointIncomplete, "1 shards but no first part"),
        (["pytorch_model-00001-of-00002.bin"], CheckpointIncomplete, r"1 shards but no \*\.bin\.index\.json"),
        (["training_args.bin", "a.npz", "a.pt"], CheckpointNotFound, "without weights"),
    ],
)
def test_a_folder_that_leaves_open_what_to_load_says_so(tmp_path, names, error, pattern):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    refused(error, tmp_path, pattern)


def test_shards_without_an_index_are_incomplete(tmp_path):
    write_sharded(tmp_path).unlink()
    refused(CheckpointIncomplete, tmp_path, "2 shards but no")


@pytest.mark.parametrize("name", ["weights", "safetensors", "gguf", "weights.h5", "weights.onnx", "model.pt.zip"])
def test_another_kind_of_file_is_unsupported(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    refused(UnsupportedFormat, tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(100), b"\xff" * 100])
def test_a_file_that_only_claims_to_be_safetensors_is_invalid(tmp_path, content):
    path = tmp_path / "claims.safetensors"
    path.write_bytes(content)
    refused(CheckpointInvalid, path)


def test_a_folder_named_like_a_file_is_taken_for_a_folder(tmp_path):
    folder = tmp_path / "x.safetensors"
    folder.mkdir()
    refused(CheckpointNotFound, folder, "without weights")
    refused(CheckpointUnreadable, tmp_path, "folder where a file", blamed=folder)


def test_a_broken_shard_is_named(tmp_path):
    index = write_sharded(tmp_path)
    shard = raw_checkpoint(tmp_path / "model-00002-of-00002.safetensors", {}, b"surplus")
    refused(CheckpointInvalid, index, blamed=shard)


def test_a_missing_shard_is_incomplete(tmp_path):
    index = write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(CheckpointIncomplete, index, "model-00002-of-00002.safetensors is missing")


def test_a_tensor_that_its_shard_lacks_is_incomplete(tmp_path):
    index = write_sharded(tmp_path)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    write_index(index, {"t0": names[0], "t1": names[1], "t2": names[1]})
    refused(CheckpointIncomplete, index, "'t2' in model-00002-of-00002.*1 of 3")
    write_index(index, {"t0": names[1], "t1": names[0]})
    refused(CheckpointIncomplete, index, "2 of 2")


def test_one_tensor_in_two_shards_is_invalid(tmp_path):
    index = write_sharded(tmp_path)
    write_checkpoint(tmp_path / "model-00001-of-00002.safetensors", sizes=((2,),))
    write_checkpoint(tmp_path / "model-00002-of-00002.safetensors", sizes=((2,),))
    write_index(index, {"layer.0": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"})
    refused(CheckpointInvalid, index, "same name")


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "sub/../../a.safetensors", ".."])
def test_a_shard_outside_the_folder_is_invalid(tmp_path, shard):
    write_checkpoint(tmp_path / "a.safetensors")
    (tmp_path / "folder").mkdir()
    index = write_index(tmp_path / "folder" / "model.safetensors.index.json", {"layer.0": shard})
    refused(CheckpointInvalid, index, "outside")


@pytest.mark.parametrize("shard", ["", ".", "nul\0"])
def test_a_shard_that_is_no_file_is_unreadable(tmp_path, shard):
    index = write_index(tmp_path / "model.safetensors.index.json", {"layer.0": shard})
    with pytest.raises(CheckpointUnreadable, match=re.escape(str(tmp_path))):
        describe_manifest(index)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"{}", b'{"weight_map":null}', b'{"weight_map":[]}', b'{"weight_map":{"a":1}}', b"\xff\xfe",
        b'{"weight_map":{"a":"\xff"}}', b'{"weight_map":{"a":"\\ud800"}}', b"[" * 200_000, b'{"weight_map":' * 100_000,
        b'{"weight_map":{"a":' + b"[" * 200_000,
    ],
)  # fmt: skip
def test_an_index_that_is_none_is_invalid(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    refused(CheckpointInvalid, index)


def test_an_index_over_the_limit_is_invalid_unread(tmp_path):
    index = write_sharded(tmp_path)
    os.truncate(index, MAX_INDEX_BYTES + 1)
    refused(CheckpointInvalid, index, str(MAX_INDEX_BYTES))


# Files that are no files


@pytest.fixture
def odd_file(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Paths of things that are there and are no regular files, by kind."""
    fifo, link, listening = tmp_path / "fifo.safetensors", tmp_path / "null.safetensors", tmp_path / "sock.safetensors"
    os.mkfifo(fifo)
    link.symlink_to(os.devnull)
    with socket.socket(socket.AF_UNIX) as sock:
        with SocketAddress(listening) as address:
            sock.bind(address)
        yield {"fifo": str(fifo), "null": str(link), "socket": str(listening)}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["fifo", "null", "socket"])
def test_what_is_no_regular_file_is_refused_without_waiting_for_it(odd_file, kind):
    with pytest.raises(CheckpointError, match=re.escape(odd_file[kind])):
        describe_manifest(odd_file[kind])


@pytest.mark.timeout(10)
def test_an_index_or_a_shard_that_is_a_fifo_is_refused_without_waiting_for_it(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    os.mkfifo(index)
    refused(CheckpointUnreadable, index)
    index.unlink()
    write_sharded(tmp_path)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    refused(CheckpointUnreadable, index, blamed=shard)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/proc/self/mem", "/"])
def test_system_files_are_refused(device):
    with pytest.raises((UnsupportedFormat, CheckpointError)):
        resolve(device)


@contextmanager
def as_somebody_else() -> Iterator[Path]:
    """A folder that anyone may enter, and no privileges that go beyond a file's mode."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        yield folder
    finally:
        if root and os.geteuid() != 0:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def drop_privileges() -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)


def test_a_file_without_permission_is_unreadable():
    with as_somebody_else() as folder:
        path = write_checkpoint(folder / "secret.safetensors")
        path.chmod(0)
        drop_privileges()
        refused(CheckpointUnreadable, path, "Permission denied")


def test_a_folder_without_permission_is_unreadable():
    with as_somebody_else() as folder:
        path = write_checkpoint(folder / "secret.safetensors")
        folder.chmod(0)
        drop_privileges()
        refused(CheckpointUnreadable, folder, "Permission denied")
        refused(CheckpointUnreadable, path, "Permission denied")


def test_an_index_without_permission_is_unreadable():
    with as_somebody_else() as folder:
        index = write_sharded(folder)
        index.chmod(0)
        drop_privileges()
        refused(CheckpointUnreadable, index, "Permission denied")


# Between resolving and describing


def test_a_file_that_changed_since_it_was_resolved_is_changed(tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors")
    checkpoint = resolve(str(path))
    write_checkpoint(path, sizes=((5,),))
    with pytest.raises(CheckpointChanged, match=re.escape(str(path))):
        describe(checkpoint)


def test_a_file_that_went_away_since_it_was_resolved_is_changed(tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors")
    checkpoint = resolve(str(path))
    path.unlink()
    with pytest.raises(CheckpointChanged, match=re.escape(str(path))):
        describe(checkpoint)


def test_a_failing_description_closes_the_files_it_had_opened(tmp_path):
    index = write_sharded(tmp_path)
    raw_checkpoint(tmp_path / "model-00002-of-00002.safetensors", b"no")
    before = os.listdir("/proc/self/fd")
    refused(CheckpointInvalid, index, blamed=tmp_path / "model-00002-of-00002.safetensors")
    assert os.listdir("/proc/self/fd") == before


def test_a_description_holds_the_files_that_were_read_open_whatever_their_names_mean_now(tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors", seed=1)
    first = path.read_bytes()
    description = describe(resolve(str(path)))
    try:
        os.rename(write_checkpoint(tmp_path / "b.safetensors", seed=2), path)
        (fd,) = description.files
        assert os.pread(fd, len(first), 0) == first
        assert not os.get_inheritable(fd)
    finally:
        description.close()


# Keys


def key(path: Path) -> str:
    return resolve(str(path)).key


def test_two_names_of_one_file_are_one_key(tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors")
    (tmp_path / "hard.safetensors").hardlink_to(path)
    (tmp_path / "soft.safetensors").symlink_to(path)
    assert key(path) == key(tmp_path / "hard.safetensors") == key(tmp_path / "soft.safetensors")


def test_a_copy_is_another_key(tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors")
    assert key(Path(shutil.copy2(path, tmp_path / "b.safetensors"))) != key(path)


def test_a_changed_file_is_another_key(tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors", seed=1)
    seen = {key(path)}
    os.utime(path, ns=(0, 1))
    seen.add(key(path))
    with path.open("r+b") as file:  # the same size and, put back, the same mtime
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    os.utime(path, ns=(0, 1))
    seen.add(key(path))
    os.rename(write_checkpoint(tmp_path / "b.safetensors", seed=2), path)
    seen.add(key(path))
    assert len(seen) == 4


def test_a_changed_index_or_shard_is_another_key(tmp_path):
    index = write_sharded(tmp_path)
    seen = {key(index)}
    os.utime(index, ns=(0, 1))
    seen.add(key(index))
    os.utime(tmp_path / "model-00001-of-00002.safetensors", ns=(0, 1))
    seen.add(key(index))
    assert len(seen) == 3


def hub(folder: Path, name: str, blob: str, content: bytes) -> Path:
    """A file as the Hugging Face cache keeps it: a link in a snapshot to a blob named by its hash."""
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "snapshots" / "rev").mkdir(parents=True, exist_ok=True)
    (folder / "blobs" / blob).write_bytes(content)
    link = folder / "snapshots" / "rev" / name
    link.symlink_to(f"../../blobs/{blob}")
    return link


def test_a_hub_blob_is_keyed_by_its_hash_wherever_it_is(tmp_path):
    content = write_checkpoint(tmp_path / "a.safetensors").read_bytes()
    one = hub(tmp_path / "one", "model.safetensors", "a" * 64, content)
    two = hub(tmp_path / "two", "renamed.safetensors", "a" * 64, content)
    other = hub(tmp_path / "three", "model.safetensors", "b" * 64, content)
    assert key(one) == key(two)
    assert key(one) != key(other)
    assert resolve(str(one)).members[0].blob == "a" * 64


@pytest.mark.parametrize("blob", ["a" * 39, "a" * 63, "A" * 64, "a" * 64 + ".incomplete"])
def test_a_blob_whose_name_is_no_hash_is_keyed_by_its_stat(tmp_path, blob):
    content = write_checkpoint(tmp_path / "a.safetensors").read_bytes()
    assert resolve(str(hub(tmp_path / "one", "model.safetensors", blob, content))).members[0].blob == ""


def test_a_file_named_like_a_hash_outside_a_hub_cache_is_keyed_by_its_stat(tmp_path):
    target = write_checkpoint(tmp_path / ("a" * 64))
    (tmp_path / "a.safetensors").symlink_to(target)
    assert resolve(str(tmp_path / "a.safetensors")).members[0].blob == ""


def test_a_checkpoint_without_an_index_promises_nothing(tmp_path):
    assert resolve(str(write_checkpoint(tmp_path / "a.safetensors"))).index is None
    assert isinstance(resolve(str(tmp_path)), Checkpoint)
