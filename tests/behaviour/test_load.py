"""``load``, ``put`` and the rest of the API, held against safetensors' own loader."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import json
import os
import re
import socket
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nbcache
from nbcache import errors
from nbcache.client import api
from nbcache.client.notices import SourceGone
from nbcache.protocol.messages import EntryStatus
from tests.support.checkpoints import raw_checkpoint, write_checkpoint
from tests.support.kernels import Interpreter
from tests.support.waiting import eventually

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)
if FLOAT4 is not None:  # as torch has from 2.8 on
    DTYPES |= {"F8_E8M0": torch.float8_e8m0fnu, "F4": FLOAT4}
needs_float4 = pytest.mark.skipif(FLOAT4 is None, reason="this torch has no float4")
SHAPES = ((), (1,), (7,), (3, 5), (2, 3, 4), (3, 0, 2), (1, 1, 1, 9))
EXTENT = 2 << 20
"""What a small entry takes of the limit."""


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits as a tensor of this dtype: NaNs, infinities and denormals among them."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def of_each_shape(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of several shapes; not a scalar of half a byte, which the format cannot hold."""
    shapes = SHAPES[1:] if dtype == FLOAT4 else SHAPES
    return {f"t{i}": random_tensor(dtype, shape, i) for i, shape in enumerate(shapes)}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(weights: nbcache.Weights, stock: dict[str, torch.Tensor]) -> None:
    """The same names in the same order; the same dtypes, shapes, strides and bits."""
    assert list(weights) == list(stock)
    for name, expected in stock.items():
        tensor = weights[name]
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (expected.dtype, expected.shape, expected.stride()), name
        assert bits(tensor) == bits(expected), name


def load(path: object, **options: object) -> nbcache.Weights:
    return nbcache.load(str(path), **({"device": "cpu"} | options))


def entries() -> dict[str, EntryStatus]:
    return {entry.name: entry for entry in nbcache.status().entries}


def shared_maps() -> list[range]:
    """Where this process maps cached memory."""
    with open("/proc/self/maps") as maps:
        bounds = [line.split()[0].split("-") for line in maps if "memfd:nbcache" in line]
    return [range(int(start, 16), int(end, 16)) for start, end in bounds]


def is_shared(tensor: torch.Tensor) -> bool:
    return any(tensor.data_ptr() in area for area in shared_maps())


@pytest.fixture
def checkpoint(runtime_dir: Path, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors")


@pytest.fixture
def folder(runtime_dir: Path, tmp_path: Path) -> Path:
    return tmp_path


# The same as stock


def test_every_dtype(folder):
    for name, dtype in DTYPES.items():
        path = folder / f"{name}.safetensors"
        save_file(of_each_shape(dtype), path)
        assert_same(load(path), load_file(path))
    assert len(entries()) == len(DTYPES)


def test_all_dtypes_in_one_file(folder):
    path = folder / "model.safetensors"
    tensors = {f"{name}.{i}": tensor for name, dtype in DTYPES.items() for i, tensor in of_each_shape(dtype).items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor.numel()}, path)
    assert_same(load(path), load_file(path))
    assert_same(load(path), load_file(path))  # the hit too


def test_several_empty_tensors(folder):
    path = folder / "model.safetensors"
    save_file({str(i): torch.empty(shape) for i, shape in enumerate(((0,), (3, 0), (0, 3, 2), (0, 0)))}, path)
    weights, stock = load(path), load_file(path)
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: tensor.shape for n, tensor in stock.items()}
    assert weights.nbytes == 0


def test_unaligned_offsets_in_the_file(folder):
    header, at = {"__metadata__": {"odd": "x" * 5}}, 0
    body = b""
    for i, (name, dtype) in enumerate(DTYPES.items()):
        odd, tensor = os.urandom(1 + i % 3), random_tensor(dtype, (3, 2), i)
        elements = [3, 4] if name == "F4" else [3, 2]
        header[f"odd{i}"] = {"dtype": "U8", "shape": [len(odd)], "data_offsets": [at, at + len(odd)]}
        header[name] = {"dtype": name, "shape": elements, "data_offsets": [at + len(odd), at + len(odd) + tensor.nbytes]}
        at += len(odd) + tensor.nbytes
        body += odd + bits(tensor)
    path = raw_checkpoint(folder / "odd.safetensors", header, body)
    weights = load(path)
    assert_same(weights, load_file(path))
    assert all(bits(weights[name]) == bits(random_tensor(dtype, (3, 2), i)) for i, (name, dtype) in enumerate(DTYPES.items()))


def test_tensors_are_aligned_and_stand_alone(folder):
    path = folder / "model.safetensors"
    sizes = ((), (3,), (129, 3), (0, 4), (700, 700), (1300, 1500), (3000, 1000))
    save_file({f"t{i}": random_tensor(torch.float32, shape, i) for i, shape in enumerate(sizes)}, path)
    weights = load(path)
    assert_same(weights, load_file(path))
    for tensor in weights.values():
        assert tensor.data_ptr() % 512 == 0
        assert tensor.storage_offset() == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert not tensor._is_view()
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert is_shared(tensor) == bool(tensor.numel())
    assert len({tensor.untyped_storage().data_ptr() for tensor in weights.values() if tensor.numel()}) == len(sizes) - 1


def test_twenty_thousand_tensors(folder):
    path = folder / "many.safetensors"
    values = torch.arange(20_000, dtype=torch.float32)
    save_file({f"layer.{i}.weight": values[i : i + 1].clone() for i in range(20_000)}, path)
    weights = load(path)
    assert len(weights) == 20_000
    assert all(tensor.item() == int(name.split(".")[1]) for name, tensor in weights.items())
    assert list(weights) == list(load_file(path))
    assert load(path).hit
    assert entries()[str(path)].tensors == 20_000


def test_file_without_tensors(folder):
    path = raw_checkpoint(folder / "empty.safetensors", {"__metadata__": {"a": "b"}})
    weights = load(path)
    assert dict(weights) == load_file(path) == {}
    assert weights.metadata == {"a": "b"}
    assert weights.nbytes == 0


def test_metadata(folder):
    path = folder / "model.safetensors"
    save_file({"w": torch.ones(2)}, path, metadata={"format": "pt", "näme": "välue"})
    weights = load(path)
    assert weights.metadata == {"format": "pt", "näme": "välue"}
    with pytest.raises(TypeError):
        weights.metadata["format"] = "tf"  # type: ignore[index]


def test_hit_and_progress(checkpoint):
    told = []
    first = load(checkpoint, on_progress=lambda *news: told.append(news))
    assert not first.hit
    assert told
    assert all(0 <= staged <= total == first.nbytes for staged, total in told)
    told.clear()
    assert load(checkpoint, on_progress=lambda *news: told.append(news)).hit
    assert told == []


def test_eight_threads_at_once(checkpoint):
    stock = load_file(checkpoint)
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(load, [checkpoint] * 8))
    for weights in loaded:
        assert_same(weights, stock)
    (entry,) = nbcache.status().entries
    assert entry.leases == 8


def test_staging_without_torch_survives_an_eviction_in_between(checkpoint, monkeypatch):
    """Somebody evicts between the end of ``stage``'s lease and its question for the status."""
    ask = api.status
    monkeypatch.setattr(api, "status", lambda: (nbcache.evict(str(checkpoint)), ask())[1])
    with contextlib.suppress(errors.EntryNotFound):
        entry, hit = api.stage(str(checkpoint))
        assert (entry.name, hit) == (str(checkpoint), False)


# Shards and folders


def write_shards(folder: Path, count: int) -> dict[str, torch.Tensor]:
    """``count`` shards of two tensors each, and their index. Returns what they hold, shard by shard as stock loads them."""
    folder.mkdir(exist_ok=True)
    weight_map, stock = {}, {}
    for number in range(count):
        shard = f"model-{number + 1:05}-of-{count:05}.safetensors"
        tensors = {f"b.{number}": random_tensor(torch.float32, (3, 2), number), f"a.{number}": torch.tensor(number)}
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
        stock |= load_file(folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return stock


@pytest.mark.parametrize("count", [1, 3, 300])  # 300: more files than one message can carry
def test_shards(folder, count):
    stock = write_shards(folder / "model", count)
    weights = load(folder / "model" / "model.safetensors.index.json")
    assert_same(weights, stock)
    by_folder = load(folder / "model")
    assert by_folder.hit
    assert_same(by_folder, stock)
    (entry,) = nbcache.status().entries
    assert len(entry.source) == count + 1
    assert len({entry.name, *entry.aliases}) == 2


def test_a_changed_shard_is_a_new_generation(folder):
    write_shards(folder / "model", 3)
    load(folder / "model").release()
    shard = folder / "model" / "model-00002-of-00003.safetensors"
    save_file({"b.1": torch.full((3, 2), 7.0), "a.1": torch.tensor(9)}, shard)
    again = load(folder / "model")
    assert not again.hit
    assert again["a.1"].item() == 9


def test_folder_with_one_file(folder):
    path = write_checkpoint(folder / "anything.safetensors")
    assert_same(load(folder), load_file(path))
    assert_same(load(f"{folder}/"), load_file(path))


def test_folder_prefers_the_usual_name(folder):
    path = write_checkpoint(folder / "model.safetensors")
    write_checkpoint(folder / "other.safetensors", seed=1)
    assert_same(load(folder), load_file(path))


def test_folder_with_several(folder):
    write_checkpoint(folder / "one.safetensors")
    write_checkpoint(folder / "two.safetensors")
    with pytest.raises(errors.UnsupportedFormat, match=r"several checkpoints \(one\.safetensors, two\.safetensors\); name one"):
        load(folder)


# Names, and what they lead to


def test_relative_home_and_absolute_paths_are_one_name(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    stock = load_file(checkpoint)
    for name in ("model.safetensors", "./model.safetensors", "~/model.safetensors", f"../{tmp_path.name}/model.safetensors"):
        assert_same(load(name), stock)
    (entry,) = nbcache.status().entries
    assert entry.name == str(checkpoint)
    assert entry.aliases == ()


@pytest.mark.parametrize(
    "name", ["with space", "ünïcödé 模型", "new\nline", "tab\t", "'quoted' \"twice\"", "{braces} $HOME %s", "-dash", "a" * 200]
)
def test_strange_file_names(folder, name):
    path = write_checkpoint(folder / f"{name}.safetensors")
    assert_same(load(path), load_file(path))
    assert list(entries()) == [str(path)]
    assert load(path).hit


def test_name_that_is_not_unicode(folder):
    path = os.fsdecode(os.fsencode(folder) + b"/\xff.safetensors")
    write_checkpoint(Path(path))
    with pytest.raises(errors.InvalidName, match="not valid Unicode"):
        load(path)


def test_two_names_one_entry(checkpoint, tmp_path):
    link, hard = tmp_path / "link.safetensors", tmp_path / "hard.safetensors"
    link.symlink_to(checkpoint)
    os.link(checkpoint, hard)
    stock = load_file(checkpoint)
    assert [load(path).hit for path in (checkpoint, link, hard)] == [False, True, True]
    assert_same(load(link), stock)
    (entry,) = nbcache.status().entries
    assert entry.name == str(checkpoint)
    assert set(entry.aliases) == {str(link), str(hard)}
    nbcache.evict(str(hard))
    assert nbcache.status().entries == ()


def test_a_link_that_is_turned_elsewhere(checkpoint, tmp_path):
    other = write_checkpoint(tmp_path / "other.safetensors", seed=1)
    link = tmp_path / "link.safetensors"
    link.symlink_to(checkpoint)
    load(link).release()
    link.unlink()
    link.symlink_to(other)
    assert_same(load(link), load_file(other))
    assert_same(load(checkpoint), load_file(checkpoint))


def rewrite_in_place(path: Path) -> None:
    write_checkpoint(path, seed=1)


def replace_by_rename(path: Path) -> None:
    os.replace(write_checkpoint(path.with_suffix(".new"), seed=1), path)


def rewrite_with_the_old_time(path: Path) -> None:
    before = path.stat()
    write_checkpoint(path, seed=1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [rewrite_in_place, replace_by_rename, rewrite_with_the_old_time])
def test_changed_file_is_a_new_generation(checkpoint, change):
    old_stock = {name: tensor.clone() for name, tensor in load_file(checkpoint).items()}
    old = load(checkpoint)
    change(checkpoint)
    new = load(checkpoint)
    assert not new.hit
    assert_same(new, load_file(checkpoint))
    assert_same(old, old_stock)
    assert not torch.equal(new["layer.0"], old["layer.0"])
    assert len(nbcache.status().entries) == 2  # the old one for as long as it is used
    old.release()
    eventually(lambda: len(nbcache.status().entries) == 1)
    assert load(checkpoint).hit


def test_source_that_is_gone_is_still_served(checkpoint):
    stock = {name: tensor.clone() for name, tensor in load_file(checkpoint).items()}
    load(checkpoint).release()
    checkpoint.unlink()
    with pytest.warns(SourceGone, match=r"model\.safetensors is gone; serving the cached copy") as caught:
        weights = nbcache.load(str(checkpoint), device="cpu")
    assert [warning.filename for warning in caught] == [__file__]
    assert weights.hit
    assert_same(weights, stock)


def test_source_that_came_back(checkpoint, tmp_path):
    load(checkpoint).release()
    checkpoint.rename(tmp_path / "away")
    with pytest.warns(SourceGone):
        load(checkpoint).release()
    write_checkpoint(checkpoint, seed=1)
    assert_same(load(checkpoint), load_file(checkpoint))


# What Weights are


def test_weights_are_a_read_only_mapping(checkpoint):
    weights = load(checkpoint)
    assert isinstance(weights, nbcache.Weights)
    assert "layer.0" in weights and "nothing" not in weights
    assert len(weights) == 4
    assert weights.get("nothing") is None
    assert weights["layer.0"] is weights["layer.0"]
    assert weights.nbytes == sum(tensor.nbytes for tensor in weights.values())
    assert weights.device == torch.device("cpu")
    assert weights == weights and weights != load(checkpoint)
    assert len({weights, load(checkpoint)}) == 2
    with pytest.raises(KeyError, match="nothing"):
        weights["nothing"]
    with pytest.raises(TypeError):
        weights["layer.0"] = torch.ones(1)  # type: ignore[index]
    with pytest.raises(TypeError):
        del weights["layer.0"]  # type: ignore[attr-defined]


def test_repr(checkpoint):
    weights = load(checkpoint)
    assert repr(weights) == f"<Weights '{checkpoint}': 4 tensors, 16.4 kB on cpu, cow>"
    assert repr(load(checkpoint, share="private")).endswith("on cpu, private, 16.4 kB private>")
    weights.release()
    assert repr(weights) == f"<Weights '{checkpoint}': released>"


def test_release(checkpoint):
    weights = load(checkpoint)
    weights.release()
    weights.release()
    assert weights.released
    assert entries()[str(checkpoint)].leases == 0
    for use in (lambda: weights["layer.0"], lambda: len(weights), lambda: list(weights), lambda: dict(weights)):
        with pytest.raises(errors.WeightsReleased, match="these weights were released; load them again"):
            use()


def test_release_leaves_tensors_that_are_in_use(checkpoint):
    with load(checkpoint) as weights:
        kept = weights["layer.0"]
    assert weights.released
    assert torch.equal(kept, load_file(checkpoint)["layer.0"])
    assert entries()[str(checkpoint)].leases == 1
    del kept
    assert entries()[str(checkpoint)].leases == 0


@pytest.mark.parametrize("share", ["cow", "readonly"])
def test_shared_weights_hold_nothing_of_their_own(checkpoint, share):
    weights = load(checkpoint, share=share)
    assert_same(weights, load_file(checkpoint))
    assert weights.private_bytes == 0
    assert is_shared(weights["layer.0"])


def test_private_weights_are_copies(checkpoint):
    weights = load(checkpoint, share="private")
    assert_same(weights, load_file(checkpoint))
    assert weights.private_bytes == weights.nbytes
    assert shared_maps() == []
    assert entries()[str(checkpoint)].leases == 0
    weights["layer.0"].fill_(3)
    assert_same(load(checkpoint), load_file(checkpoint))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16", "BF16", "bf16"])
def test_dtype_cast(folder, dtype):
    path = folder / "model.safetensors"
    tensors = {name: random_tensor(of, (5, 3)) for name, of in DTYPES.items() if name != "F4"}
    save_file(tensors, path)
    weights = load(path, dtype=dtype)
    stock = load_file(path)
    for name, tensor in weights.items():
        expected = stock[name].to(torch.bfloat16) if stock[name].is_floating_point() else stock[name]
        assert tensor.dtype == expected.dtype
        assert bits(tensor) == bits(expected)
        assert is_shared(tensor) == (stock[name].dtype == expected.dtype)
    assert weights.private_bytes == sum(weights[n].nbytes for n in weights if weights[n].dtype != stock[n].dtype)


@needs_float4
def test_cast_that_torch_cannot_do(folder):
    path = folder / "model.safetensors"
    save_file({"w": random_tensor(FLOAT4, (4, 4))}, path)
    with pytest.raises(errors.NBCacheError, match=r"(?i)float4|F4"):
        load(path, dtype="bfloat16")
    gc.collect()
    assert entries()[str(path)].leases == 0


def test_a_write_is_seen_here_alone(checkpoint):
    stock = load_file(checkpoint)
    weights = load(checkpoint)
    weights["layer.0"].mul_(0).add_(5)
    torch.nn.init.zeros_(weights["layer.1"])
    assert weights["layer.0"].unique().tolist() == [5]
    assert_same(load(checkpoint), stock)
    with Interpreter("nbcache") as other:
        other.run(f"weights = nbcache.load({str(checkpoint)!r}, device='cpu')")
        assert other.run("weights.hit, weights['layer.0'].tolist()") == [True, stock["layer.0"].tolist()]
        other.run("weights['layer.0'].fill_(6)\nNone")
    assert weights["layer.0"].unique().tolist() == [5]
    assert weights["layer.1"].unique().tolist() == [0]


# Options


@pytest.mark.parametrize("device", ["tpu", "meta", "mps", "cpu:x", "", object()])
def test_devices_that_do_not_exist(checkpoint, device):
    with pytest.raises(errors.InvalidOption, match="device"):
        load(checkpoint, device=device)
    with pytest.raises(errors.DaemonUnavailable):  # refused before anything was started or read
        nbcache.status()


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_cuda_without_a_gpu(checkpoint, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(errors.InvalidOption, match=r"device cuda.*sees no GPU; use device='cpu'"):
        load(checkpoint, device=device)


def test_default_device_without_a_gpu(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nbcache.load(str(checkpoint)).device == torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float99", "int8", "nn", "", 16, "q4_0"])
def test_dtypes_that_do_not_exist(checkpoint, dtype):
    with pytest.raises(errors.InvalidOption, match="dtype"):
        load(checkpoint, dtype=dtype)
    with pytest.raises(errors.DaemonUnavailable):
        nbcache.status()


@pytest.mark.parametrize("share", ["", "COW", "exclusive", None])
def test_share_modes_that_do_not_exist(checkpoint, share):
    with pytest.raises(errors.InvalidOption, match="choose one of cow, readonly, private"):
        load(checkpoint, share=share)


# put


def test_put_a_tensor(folder):
    tensor = torch.randn(3, 4)
    kept = nbcache.put("embeddings", tensor)
    assert_same(kept, {"tensor": tensor})
    assert kept["tensor"].data_ptr() != tensor.data_ptr()
    before = tensor.clone()
    tensor.zero_()
    again = load("embeddings")
    assert again.hit
    assert_same(again, {"tensor": before})
    entry = entries()["embeddings"]
    assert (entry.provenance, entry.source, entry.tensors, entry.bytes) == ("put", (), 1, 48)


def test_put_a_nested_dict(folder):
    value = OrderedDict(z=torch.ones(2), a={"x": torch.zeros(1), 3: {"y": torch.arange(3)}})
    stock = {"z": torch.ones(2), "a.x": torch.zeros(1), "a.3.y": torch.arange(3)}
    assert_same(nbcache.put("nested", value, metadata={"who": "me"}), stock)
    assert_same(load("nested"), stock)
    assert load("nested").metadata == {"who": "me"}


def test_put_a_module(folder):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    kept = nbcache.put("module", module)
    assert_same(kept, {name: tensor.detach() for name, tensor in module.state_dict().items()})
    twin = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    twin.load_state_dict(load("module"))
    given = torch.randn(2, 3)
    assert torch.equal(twin.eval()(given), module.eval()(given))


def test_put_weights(checkpoint):
    assert_same(nbcache.put("copy", load(checkpoint)), load_file(checkpoint))


def test_put_nothing(folder):
    assert dict(nbcache.put("nothing", {})) == {}
    assert dict(load("nothing")) == {}


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_put_every_dtype(folder):
    for dtype in (*DTYPES.values(), torch.complex32, torch.complex128):
        value = of_each_shape(dtype)
        assert_same(nbcache.put("kept", value), value)
        assert_same(load("kept"), value)


def test_put_tensors_that_do_not_lie_straight(folder):
    base = torch.randn(4, 6)
    turned = torch.randn(3, 2, dtype=torch.complex64)
    value = {
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "expanded": torch.randn(1, 3).expand(5, 3),
        "slice": base[1],
        "channels_last": torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "conjugate": turned.conj(),
        "negative": turned.conj().imag,
        "parameter": torch.nn.Parameter(base),
        "computed": (torch.randn(2, requires_grad=True) * 2),
        "same": base,
        "twice": base,
    }
    stock = {name: tensor.detach().resolve_conj().resolve_neg().contiguous() for name, tensor in value.items()}
    assert_same(nbcache.put("crooked", value), stock)
    assert_same(load("crooked"), stock)


def test_put_replaces(folder):
    old = nbcache.put("name", torch.zeros(3))
    new = nbcache.put("name", torch.ones(5))
    assert load("name")["tensor"].tolist() == [1] * 5
    assert old["tensor"].tolist() == [0] * 3
    assert [entry.tensors for entry in nbcache.status().entries] == [1, 1]
    del old
    eventually(lambda: len(nbcache.status().entries) == 1)
    assert new["tensor"].tolist() == [1] * 5


def test_put_lasts_without_a_lease(folder):
    nbcache.put("name", torch.ones(3)).release()
    assert entries()["name"].leases == 0
    assert load("name")["tensor"].tolist() == [1] * 3


@pytest.mark.parametrize(
    "name", ["", "a/b", "/abs", "x" * 201, " padded", "padded ", "new\nline", "nul\0", "\udcff", "\x1b[1m"]
)
def test_put_under_names_that_cannot_be(folder, name):
    nbcache.put("first", torch.ones(1))
    with pytest.raises(errors.InvalidName):
        nbcache.put(name, torch.ones(1))
    assert list(entries()) == ["first"]


def test_put_under_names_that_can_be(folder):
    for name in ("x" * 200, "with space", "ünïcödé 模型", "a.b:c*", "~", "-v"):
        nbcache.put(name, torch.ones(1))
        assert load(name)["tensor"].item() == 1
        nbcache.evict(name)
        assert entries() == {}


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


UNPUTTABLE = {
    "sparse": lambda: torch.ones(2, 2).to_sparse(),
    "meta": lambda: torch.ones(2, device="meta"),
    "quantized": quantized,
    "list": lambda: [torch.ones(2)],
    "number": lambda: 3.0,
    "none": lambda: None,
    "inner": lambda: {"a": {"b": "text"}},
    "clash": lambda: {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)},
    "f4 scalar": lambda: random_tensor(FLOAT4, ()),
}


@pytest.mark.parametrize("what", [pytest.param(what, marks=needs_float4 if "f4" in what else ()) for what in UNPUTTABLE])
def test_put_refuses(folder, what):
    nbcache.put("first", torch.ones(1))
    with pytest.raises(errors.UnsupportedFormat):
        nbcache.put("second", {"fine": torch.ones(3), "bad": UNPUTTABLE[what]()})
    assert list(entries()) == ["first"]


# evict, pin


def test_evict_what_is_in_use_names_who_uses_it(checkpoint):
    weights = load(checkpoint)
    with pytest.raises(errors.EntryInUse, match=rf"used by process {os.getpid()}\); release it there"):
        nbcache.evict(str(checkpoint))
    weights.release()
    evicted = nbcache.evict(str(checkpoint))
    assert (evicted.names, evicted.freed_bytes) == ((str(checkpoint),), EXTENT)
    assert nbcache.status().entries == ()
    assert nbcache.status().host.used_bytes == 0
    assert not load(checkpoint).hit


def test_evict_what_is_not_there(checkpoint):
    load(checkpoint).release()
    with pytest.raises(errors.EntryNotFound, match=rf"nothing-such: not cached; cached: {re.escape(str(checkpoint))}"):
        nbcache.evict("nothing-such")


def test_evict_without_a_daemon(runtime_dir):
    for ask in (nbcache.evict_all, nbcache.status, lambda: nbcache.evict("x"), lambda: nbcache.pin("x")):
        with pytest.raises(errors.DaemonUnavailable, match="no daemon runs"):
            ask()


def test_pinned_entries_are_not_evicted(checkpoint, tmp_path, monkeypatch):
    load(checkpoint).release()
    monkeypatch.chdir(tmp_path)
    nbcache.pin("model.safetensors")
    assert entries()[str(checkpoint)].pinned
    with pytest.raises(errors.EntryInUse, match="is pinned; unpin it first"):
        nbcache.evict(str(checkpoint))
    assert nbcache.evict_all().names == ()
    nbcache.unpin("./model.safetensors")
    assert not entries()[str(checkpoint)].pinned
    assert nbcache.evict_all().names == (str(checkpoint),)


@pytest.mark.parametrize("change_pin", [nbcache.pin, nbcache.unpin])
def test_pin_what_is_not_there(checkpoint, change_pin):
    load(checkpoint).release()
    with pytest.raises(errors.EntryNotFound, match="nothing-such"):
        change_pin("nothing-such")


def test_pin_follows_a_name_to_its_new_generation(checkpoint):
    load(checkpoint).release()
    nbcache.pin(str(checkpoint))
    rewrite_in_place(checkpoint)
    load(checkpoint).release()
    (entry,) = nbcache.status().entries
    assert entry.pinned


def test_evict_all_takes_what_is_idle_and_can_be_read_again(folder):
    paths = [write_checkpoint(folder / f"{name}.safetensors", seed=i) for i, name in enumerate(("idle", "used", "pinned"))]
    idle, used, pinned = (load(path) for path in paths)
    idle.release()
    pinned.release()
    nbcache.pin(str(paths[2]))
    nbcache.put("saved", torch.ones(1)).release()
    evicted = nbcache.evict_all()
    assert evicted.names == (str(paths[0]),)
    assert len(evicted.kept) == 3
    kept = " ".join(evicted.kept)
    assert f"used by process {os.getpid()}" in kept and "pinned" in kept and "saved with put" in kept
    assert list(entries()) == [str(paths[1]), str(paths[2]), "saved"]
    assert not used.released


# The limit


@pytest.fixture
def three_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Checkpoints of which the tier holds three."""
    monkeypatch.setenv("NBCACHE_HOST_LIMIT", "7MiB")
    return [write_checkpoint(folder / f"{name}.safetensors", seed=i) for i, name in enumerate("abcd")]


def test_least_recently_used_gives_way(three_fit):
    a, b, c, d = three_fit
    for path in (a, b, c, a):
        load(path).release()
    assert nbcache.status().host == nbcache.status().host.__class__(used_bytes=3 * EXTENT, limit_bytes=7 << 20)
    load(d).release()
    assert set(entries()) == {str(a), str(c), str(d)}
    assert_same(load(b), load_file(b))
    assert set(entries()) == {str(a), str(b), str(d)}


def test_saved_pinned_and_used_entries_do_not_give_way(three_fit):
    a, b, c, d = three_fit
    nbcache.put("saved", torch.ones(1)).release()
    used = load(a)
    load(b).release()
    nbcache.pin(str(b))
    before = nbcache.status().entries
    with pytest.raises(errors.HostMemoryFull) as caught:
        load(c)
    message = str(caught.value)
    assert message.startswith(f"host tier full: {c} needs 2.1 MB, 1.0 MB free of 7.3 MB; in the way: ")
    assert re.search(r"saved \(2\.1 MB, saved with put, idle ", message)
    assert f"{a} (2.1 MB, used by process {os.getpid()})" in message
    assert f"{b} (2.1 MB, pinned)" in message
    assert "evict or release one of them, or raise NBCache.host_limit (NBCACHE_HOST_LIMIT=" in message
    assert [entry.key for entry in nbcache.status().entries] == [entry.key for entry in before]
    with pytest.raises(errors.HostMemoryFull, match="host tier full: more needs"):
        nbcache.put("more", torch.ones(1))
    used.release()
    nbcache.put("more", torch.ones(1)).release()
    assert set(entries()) == {"saved", str(b), "more"}
    nbcache.unpin(str(b))
    assert_same(load(d), load_file(d))


def test_larger_than_the_limit_evicts_nobody(three_fit, folder):
    load(three_fit[0]).release()
    big = folder / "big.safetensors"
    save_file({"w": torch.zeros(12 << 20, dtype=torch.uint8)}, big)
    with pytest.raises(errors.HostMemoryFull, match=r"big\.safetensors needs 12\.6 MB, 5\.2 MB free of 7\.3 MB; raise NBCache"):
        load(big)
    with pytest.raises(errors.HostMemoryFull, match="raise NBCache"):
        nbcache.put("big", torch.zeros(12 << 20, dtype=torch.uint8))
    assert list(entries()) == [str(three_fit[0])]


# Bad inputs


W = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
BROKEN = {
    "empty file": (b"", errors.CheckpointInvalid, "too short for a header"),
    "garbage": (os.urandom(64).replace(b"\0", b"x"), errors.CheckpointInvalid, "a header of"),
    "no object": (b"\x02" + b"\0" * 7 + b"[]", errors.CheckpointInvalid, "not a JSON object"),
    "a page": (b"<!DOCTYPE html><html>not found</html>", errors.CheckpointInvalid, "a header of"),
    "header cut": (b"\x64" + b"\0" * 7 + b"{", errors.CheckpointInvalid, "truncated"),
    "body cut": ({"w": W}, errors.CheckpointInvalid, "truncated"),
    "hole": ({"w": W | {"data_offsets": [1, 5]}}, errors.CheckpointInvalid, "leaves a hole"),
    "backwards": ({"w": W | {"data_offsets": [4, 0]}}, errors.CheckpointInvalid, "offsets"),
    "overlap": ({"v": W, "w": W | {"data_offsets": [2, 6]}}, errors.CheckpointInvalid, "overlaps"),
    "size": ({"w": W | {"shape": [5]}}, errors.CheckpointInvalid, "takes 5 bytes"),
    "negative": ({"w": W | {"shape": [-4]}}, errors.CheckpointInvalid, "w"),
    "huge": ({"w": W | {"shape": [1 << 62, 1 << 62]}}, errors.CheckpointInvalid, "w"),
    "dtype": ({"w": W | {"dtype": "Q7"}}, errors.CheckpointInvalid, "unknown dtype 'Q7'"),
    "f6": ({"w": W | {"dtype": "F6_E2M3"}}, errors.UnsupportedFormat, "which torch does not have"),
    "metadata": ({"__metadata__": {"a": 1}}, errors.CheckpointInvalid, "header is not valid"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files(checkpoint, tmp_path, what):
    load(checkpoint).release()
    pid = nbcache.status().pid
    content, error, message = BROKEN[what]
    path = tmp_path / "broken.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        raw_checkpoint(path, content, b"" if what == "body cut" else b"1234")
    with pytest.raises(error, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert nbcache.status().pid == pid
    assert list(entries()) == [str(checkpoint)]
    assert load(checkpoint).hit


def test_missing_files(checkpoint, tmp_path):
    with pytest.raises(errors.CheckpointNotFound, match=r"missing\.safetensors: no such file or folder"):
        load(tmp_path / "missing.safetensors")
    with pytest.raises(errors.CheckpointNotFound, match="flux: nothing is cached under that name, and there is no such file"):
        load("flux")
    with pytest.raises(errors.CheckpointNotFound, match="no such file"):
        load(checkpoint / "below")
    assert nbcache.status().entries == ()


def test_folders_without_weights(folder):
    (folder / "empty").mkdir()
    with pytest.raises(errors.CheckpointNotFound, match="a folder without weights"):
        load(folder / "empty")
    write_checkpoint(folder / "empty" / "model-00001-of-00002.safetensors")
    with pytest.raises(errors.CheckpointIncomplete, match="holds 1 shards but no"):
        load(folder / "empty")
    assert nbcache.status().entries == ()


def test_other_kinds_of_file(folder):
    path = folder / "model.h5"
    path.write_bytes(b"x")
    with pytest.raises(errors.UnsupportedFormat, match=r"model\.h5: not a file that nbcache reads: \.safetensors, \.bin, "):
        load(path)


def test_incomplete_shards(folder):
    stock = write_shards(folder / "model", 3)
    shard = folder / "model" / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    save_file({"b.1": torch.ones(1)}, shard)
    with pytest.raises(errors.CheckpointIncomplete, match=r"promises 'a\.1' in model-00002.*1 of 6 tensors"):
        load(folder / "model")
    shard.write_bytes(whole[:-1])
    with pytest.raises(errors.CheckpointInvalid, match=r"model-00002.*truncated"):
        load(folder / "model")
    shard.unlink()
    with pytest.raises(errors.CheckpointIncomplete, match=r"shard model-00002-of-00003\.safetensors is missing"):
        load(folder / "model")
    shard.mkdir()
    with pytest.raises(errors.CheckpointUnreadable, match="a folder where a file was expected"):
        load(folder / "model")
    shard.rmdir()
    assert nbcache.status().entries == ()
    shard.write_bytes(whole)
    assert_same(load(folder / "model"), stock)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a shard index"),
        ("[]", "not a shard index"),
        ('{"weight_map": {"w": 1}}', "not a shard index"),
        ('{"weight_map": {"w": "../model.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"w": "/etc/passwd"}}', "outside its folder"),
    ],
)
def test_broken_indexes(folder, text, message):
    path = folder / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(errors.CheckpointInvalid, match=message):
        load(path)


def test_files_that_the_system_refuses(folder):
    loop = folder / "loop.safetensors"
    loop.symlink_to(loop)
    with pytest.raises(errors.CheckpointUnreadable, match=re.escape(os.strerror(errno.ELOOP))):
        load(loop)
    with pytest.raises(errors.CheckpointUnreadable, match=re.escape(os.strerror(errno.ENAMETOOLONG))):
        load(folder / ("x" * 300 + ".safetensors"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s.safetensors"))
        with pytest.raises(errors.CheckpointError, match=r"s\.safetensors"):
            load(folder / "s.safetensors")


def test_a_pipe_is_refused_at_once(folder):
    os.mkfifo(folder / "pipe.safetensors")
    with Interpreter("nbcache.client.api") as client:
        client.begin(
            f"""
try:
    nbcache.client.api.stage({str(folder / "pipe.safetensors")!r})
except nbcache.errors.CheckpointError as error:
    answer = str(error)
answer"""
        )
        assert "pipe.safetensors" in client.finish(timeout_s=5)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_names_that_cannot_be(runtime_dir, name):
    with pytest.raises(errors.InvalidName):
        load(name)


# Names that come to lead elsewhere


def test_a_link_that_is_turned_to_another_file_is_another_generation(runtime_dir, tmp_path):
    first = write_checkpoint(tmp_path / "a.safetensors", seed=1)
    second = write_checkpoint(tmp_path / "b.safetensors", seed=2)
    link = tmp_path / "latest.safetensors"
    link.symlink_to(first)
    assert_same(load(first), load_file(first))
    assert_same(load(link), load_file(first))
    link.unlink()
    link.symlink_to(second)
    assert_same(load(link), load_file(second))
    assert_same(load(first), load_file(first))


def test_a_folder_link_that_is_turned_is_another_generation(runtime_dir, tmp_path):
    folders = [tmp_path / "v1", tmp_path / "v2"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        write_checkpoint(folder / "model.safetensors", seed=seed)
    link = tmp_path / "current"
    for folder in folders:
        load(folder)
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
        assert_same(load(link), load_file(folder / "model.safetensors"))


def test_a_folder_that_gains_a_preferred_file_is_loaded_by_it(runtime_dir, tmp_path):
    write_checkpoint(tmp_path / "other.safetensors", seed=1)
    load(tmp_path)
    preferred = write_checkpoint(tmp_path / "model.safetensors", seed=2)
    assert_same(load(tmp_path), load_file(preferred))


def test_four_bit_elements_that_do_not_pair_up_are_refused(runtime_dir, tmp_path):
    path = raw_checkpoint(tmp_path / "m.safetensors", {"x": {"dtype": "F4", "shape": [2, 1], "data_offsets": [0, 1]}}, b"1")
    with pytest.raises(errors.UnsupportedFormat, match="pairs along the last dimension"):
        load(path)


def test_names_may_be_paths_and_must_be_names(checkpoint):
    assert_same(nbcache.load(checkpoint, device="cpu"), load_file(checkpoint))
    nbcache.pin(checkpoint)
    nbcache.unpin(checkpoint)
    assert nbcache.evict(checkpoint).names == (str(checkpoint),)
    for nothing in (None, 7, b"x"):
        with pytest.raises(errors.InvalidName, match="cannot be a name"):
            nbcache.load(nothing)


def test_a_copy_has_the_tensors_as_they_are_now(checkpoint):
    weights = load(checkpoint)
    weights["layer.0"].fill_(3)
    assert copy.copy(weights)["layer.0"] is weights["layer.0"]
    deep = copy.deepcopy(weights)
    weights["layer.0"].fill_(4)
    assert deep["layer.0"].unique().tolist() == [3]
    assert list(deep) == list(weights)


def test_an_integer_dtype_is_no_cast(checkpoint):
    with pytest.raises(errors.InvalidOption, match="not a floating-point dtype"):
        load(checkpoint, dtype=torch.int8)


def test_metadata_that_is_not_text_is_refused(runtime_dir):
    with pytest.raises(errors.UnsupportedFormat, match="strings to strings"):
        nbcache.put("x", torch.ones(1), metadata={"a": 1})
