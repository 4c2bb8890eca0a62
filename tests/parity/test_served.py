"""``load_file`` and ``safe_open``, served: everything about them that a program can see is as stock, or stock itself."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from safetensors.torch import save_file

import nbcache
from nbcache import errors
from nbcache.client.notices import NotServed
from nbcache.models import hooks
from nbcache.models.served import ServedFile
from tests.support.checkpoints import raw_checkpoint, write_checkpoint
from tests.support.waiting import eventually

STOCK = SimpleNamespace(open=safetensors.safe_open, load=safetensors.torch.load_file)
"""The functions themselves. A module's own names for them are replaced, as everybody's are."""

INDICES = [
    ..., (), slice(None), 0, -1, 1, None, True, 9,
    slice(1, 3), slice(None, None, 2), slice(-2, None), slice(2, 0, -1),
    (0, 1), (slice(1, 3),), (slice(None), slice(0, 2)), (..., 0), (..., slice(0, 2)), (0, 0, 0),
    [0, 1], (0, [1, 2]), np.int64(1), torch.tensor([0, 1]), torch.tensor([True, False, True, False]),
]  # fmt: skip


@pytest.fixture
def served(runtime_dir):
    with nbcache.enabled():
        yield


@pytest.fixture
def path(tmp_path):
    tensors = {
        "z": torch.arange(24.0).reshape(4, 6),
        "a": torch.arange(7, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(3, 0),
        "mask": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "author": "me"})
    return tmp_path / "model.safetensors"


def keys():
    """Of all that is cached; nothing is where there is no daemon."""
    try:
        return [entry.key for entry in nbcache.status().entries]
    except errors.DaemonUnavailable:
        return []


def leases():
    return sum(entry.leases for entry in nbcache.status().entries)


def outcome(function):
    """What a call gives, comparable: a tensor's own facts, or its error."""
    try:
        value = function()
    except Exception as error:
        return type(error), str(error)
    if isinstance(value, torch.Tensor):
        raw = value.contiguous().reshape(-1).view(torch.uint8).tolist() if value.numel() else []
        return value.dtype, value.shape, value.stride(), value.device, value.requires_grad, raw
    return value


def assert_same_file(file, stock):
    for method in ("keys", "offset_keys", "metadata"):
        assert getattr(file, method)() == getattr(stock, method)()
    for name in [*stock.keys(), "no such tensor"]:
        assert outcome(lambda name=name: file.get_tensor(name)) == outcome(lambda name=name: stock.get_tensor(name))
        part, stock_part = (outcome(lambda f=f, name=name: f.get_slice(name)) for f in (file, stock))
        if isinstance(part, tuple):
            assert part == stock_part
            continue
        assert part.get_shape() == stock_part.get_shape()
        assert part.get_dtype() == stock_part.get_dtype()
        for index in INDICES:
            found, expected = (outcome(lambda i=index, s=s: s[i]) for s in (part, stock_part))
            assert found == expected or found[0] is expected[0] in (
                IndexError,
                ValueError,
            )  # torch's own words differ, a little
    assert {name: outcome(lambda t=t: t) for name, t in file.get_tensors().items()} == {
        name: outcome(lambda t=t: t) for name, t in stock.get_tensors().items()
    }
    assert list(file.get_tensors()) == list(stock.get_tensors())


@pytest.mark.parametrize("framework", ["pt", "torch"])
def test_an_open_file_answers_as_stock_does(served, path, framework):
    for _ in ("read from disk", "cached"):
        with safetensors.safe_open(path, framework=framework) as file, STOCK.open(path, framework=framework) as stock:
            assert isinstance(file, ServedFile)
            assert_same_file(file, stock)
            part, stock_part = file.get_slice("z"), stock.get_slice("z")
        for closed in (lambda f: f.keys(), lambda f: f.get_tensor("z"), lambda f: f.get_slice("z"), lambda f: f.metadata()):
            assert outcome(lambda c=closed: c(file)) == outcome(lambda c=closed: c(stock))
        assert torch.equal(part[1:3], stock_part[1:3])
    assert len(keys()) == 1


def test_opening_and_asking_for_names_reads_nothing(served, path):
    file = safetensors.safe_open(str(path), "pt", "cpu", backend="pread")
    assert file.get_slice("z").get_shape() == [4, 6]
    with pytest.raises(errors.DaemonUnavailable):
        nbcache.status()
    file.get_slice("z")[0]
    assert len(keys()) == leases() == 1


def test_load_file_gives_what_stock_gives(served, path):
    stock = STOCK.load(path)
    for _ in ("read from disk", "cached"):
        loaded = safetensors.torch.load_file(path)
        assert type(loaded) is dict
        assert list(loaded) == list(stock)
        assert {n: outcome(lambda t=t: t) for n, t in loaded.items()} == {n: outcome(lambda t=t: t) for n, t in stock.items()}
        assert [t.untyped_storage().nbytes() for t in loaded.values()] == [t.untyped_storage().nbytes() for t in stock.values()]
        loaded.pop("z")  # as callers do
    assert len(keys()) == 1


def test_load_model_is_served(served, tmp_path):
    layer = torch.nn.Linear(4, 3)
    safetensors.torch.save_model(layer, str(tmp_path / "layer.safetensors"))
    other = torch.nn.Linear(4, 3)
    assert safetensors.torch.load_model(other, tmp_path / "layer.safetensors") == (set(), [])
    assert torch.equal(other.weight, layer.weight)
    assert len(keys()) == 1


def test_a_write_is_the_callers_own(served, path):
    first, second = safetensors.torch.load_file(path), safetensors.torch.load_file(path)
    first["z"].fill_(7)
    first["a"].data[0] = 5
    np.asarray(first["scalar"])[...] = 9
    stock = STOCK.load(path)
    for clean in (second, safetensors.torch.load_file(path)):
        assert all(torch.equal(clean[name], stock[name]) for name in stock)
    assert first["z"].unique().tolist() == [7]
    assert first["scalar"] == 9
    with safetensors.safe_open(path, "pt") as file:
        file.get_tensor("z").zero_()
        assert file.get_tensor("z").count_nonzero() == 0  # one handle, one memory: as stock
        assert torch.equal(safetensors.torch.load_file(path)["z"], stock["z"])


def test_a_parameter_can_be_trained_and_a_tensor_pickled(served, path):
    weight = torch.nn.Parameter(safetensors.torch.load_file(path)["z"])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.sum().backward()
    optimizer.step()
    assert torch.equal(weight.detach(), STOCK.load(path)["z"] - 1)
    assert torch.equal(pickle.loads(pickle.dumps(safetensors.torch.load_file(path)))["z"], STOCK.load(path)["z"])


def test_tensors_outlive_switch_and_daemon_and_hold_the_lease(runtime_dir, path):
    with nbcache.enabled():
        kept = safetensors.torch.load_file(path)["z"][1:]
        with safetensors.safe_open(path, "pt") as file:
            part = file.get_slice("z")
            view = part[...]
    assert leases() == 2
    del file, part
    gc.collect()
    assert leases() == 2
    del view
    eventually(lambda: leases() == 1)
    expected = STOCK.load(path)["z"][1:]
    assert torch.equal(kept, expected)
    from nbcache.client.session import stop_daemon

    stop_daemon()
    assert torch.equal(kept, expected)


def test_a_default_device_is_not_followed_as_stock_does_not(served, path):
    with torch.device("meta"):
        assert {tensor.device.type for tensor in safetensors.torch.load_file(path).values()} == {"cpu"}
        assert safetensors.safe_open(path, "pt").get_tensor("empty").device.type == "cpu"


def test_a_shard_comes_from_its_checkpoint_where_that_is_cached(served, tmp_path):
    shards = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for seed, shard in enumerate(shards):
        save_file({f"{name}{seed}": torch.full((3,), seed) for name in "ba"}, shard)
    index = {f"{name}{seed}": shard.name for seed, shard in enumerate(shards) for name in "ba"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    by_itself = safetensors.torch.load_file(shards[0])
    assert len(keys()) == 1
    whole = nbcache.load(tmp_path, device="cpu")
    assert len(keys()) == 2
    for shard in shards:
        with safetensors.safe_open(shard, "pt") as file, STOCK.open(shard, "pt") as stock:
            assert_same_file(file, stock)
        loaded = safetensors.torch.load_file(shard)
        assert list(loaded) == list(STOCK.load(shard))
        assert all(torch.equal(loaded[name], whole[name]) for name in loaded)
    assert len(keys()) == 2
    assert list(by_itself) == list(safetensors.torch.load_file(shards[0]))
    save_file({"c": torch.ones(1)}, shards[1])  # another generation, which the index does not know
    assert list(safetensors.torch.load_file(shards[1])) == ["c"]
    assert len(keys()) == 3


# What is not served


@pytest.mark.parametrize(
    "call",
    [
        lambda p, o, _: o(p, "np").get_tensor("z").tolist(),
        lambda p, o, _: o(p, "PT"),
        lambda p, o, _: o(p, "pt", "gibberish"),
        lambda p, o, _: o(p, "pt", torch.device("cpu")),
        lambda p, o, _: o(p, "pt", "cpu:0"),
        lambda p, o, _: o(p, "pt", "cpu", backend="punched cards"),
        lambda p, o, _: o(p, "pt", "cpu", color="red"),
        lambda p, o, _: o(p),
        lambda p, o, _: o(str(p) + ".gone", "pt"),
        lambda p, o, _: o(p.parent, "pt"),
        lambda p, _, load: load(p, color="red"),
        lambda p, _, load: load(p, "cpu", "mmap", "more"),
        lambda p, _, load: load(p, device="gibberish"),
        lambda p, _, load: load(p, device=torch.device("cpu")),
        lambda p, _, load: load(p.parent / "gone.safetensors"),
        lambda p, _, load: load(p.parent),
        lambda p, _, load: load(3),
        lambda p, _, load: load(os.fsencode(p)),
        lambda p, _, load: load(p.parent / "broken.safetensors"),
        lambda p, _, load: load(p.parent / "short.safetensors"),
        lambda p, _, load: load(p.parent / "weights.bin")["z"],
        lambda p, _, load: load("~/model.safetensors"),
        lambda p, _, load: load(p.parent / "folder.safetensors"),
    ],
)
def test_what_the_cache_does_not_serve_is_stock(served, path, call):
    raw_checkpoint(
        path.parent / "broken.safetensors", {"x": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}, b"12345678"
    )
    (path.parent / "short.safetensors").write_bytes(b"123")
    shutil.copy(path, path.parent / "weights.bin")
    (path.parent / "folder.safetensors").mkdir()
    shutil.copy(path, path.parent / "folder.safetensors" / "model.safetensors")
    found = outcome(lambda: call(path, safetensors.safe_open, safetensors.torch.load_file))
    expected = outcome(lambda: call(path, STOCK.open, STOCK.load))
    assert found == expected or (found[0] is expected[0] is TypeError)
    assert keys() == []


def test_a_missing_gpu_is_stocks_to_report(served, path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = outcome(lambda: safetensors.torch.load_file(path, device="cuda"))
    assert found == outcome(lambda: STOCK.load(path, device="cuda"))


def test_a_changed_file_is_read_again_and_an_open_one_stays_what_it_was(served, path):
    safetensors.torch.load_file(path)
    opened = safetensors.safe_open(path, "pt")
    write_checkpoint(path.with_name("new.safetensors")).replace(path)
    assert list(safetensors.torch.load_file(path)) == list(STOCK.load(path))
    assert opened.get_tensor("z").tolist() == torch.arange(24.0).reshape(4, 6).tolist()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        safetensors.torch.load_file(path)


def test_a_file_without_room_is_read_as_ever_with_one_warning(runtime_dir, tmp_path, path, monkeypatch):
    monkeypatch.setenv("NBCACHE_HOST_LIMIT", "4MB")
    large = write_checkpoint(tmp_path / "large.safetensors", sizes=((2000, 1000),))
    with nbcache.enabled():
        with pytest.warns(NotServed, match=r"large\.safetensors: this file is read as ever: host tier full"):
            loaded = safetensors.torch.load_file(large)
        assert torch.equal(loaded["layer.0"], STOCK.load(large)["layer.0"])
        with safetensors.safe_open(large, "pt") as file:
            assert torch.equal(file.get_tensor("layer.0"), loaded["layer.0"])
            part = file.get_slice("layer.0")
        assert torch.equal(part[:5], loaded["layer.0"][:5])
        safetensors.torch.load_file(path)
        assert len(keys()) == 1


def test_without_a_daemon_everything_is_stock_after_one_warning(tmp_path, path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NBCACHE_RUNTIME_DIR", str(tmp_path / "file"))
    nbcache.enable()
    try:
        for _ in ("off", "on again"):
            nbcache.enable()
            with pytest.warns(NotServed, match="until nbcache is turned on again"):
                loaded = safetensors.torch.load_file(path)
            assert torch.equal(loaded["z"], STOCK.load(path)["z"])
            with safetensors.safe_open(path, "pt") as file:
                assert type(file) is STOCK.open
            assert hooks.is_enabled()
    finally:
        nbcache.disable()


def test_a_daemon_that_goes_while_a_file_is_open(runtime_dir, tmp_path, path, monkeypatch):
    with nbcache.enabled():
        file = safetensors.safe_open(path, "pt")
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("NBCACHE_RUNTIME_DIR", str(tmp_path / "file"))
        with pytest.warns(NotServed):
            assert torch.equal(file.get_tensor("z"), STOCK.load(path)["z"])
        part = file.get_slice("z")
        file.__exit__(None, None, None)
        assert torch.equal(part[1:], STOCK.load(path)["z"][1:])
