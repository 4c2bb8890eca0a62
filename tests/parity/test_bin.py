"""Models whose weights are files of ``torch.save``, as the libraries wrote them before safetensors: as stock loads them."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

import nbcache
from tests.parity.harness import COPIED, differences, library_noise, load_stock, outside_the_cache, portrait, run, seen
from tests.support.kernels import Interpreter
from tests.support.models import SUBJECTS

pytestmark = pytest.mark.timeout(300)  # a process that imports diffusers, on a busy machine

DTYPE = torch.float32
CASES = {"bert-tied": 1, "gpt2": 1, "t5": 1, "llama": 2, "llama-tied": 2, "wan-transformer": 1, "sd": 1}
"""Each with the number of files that a model is in. Of shards of a diffusers model that are no safetensors stock finds none."""


def in_files_of_torch(folder: Path, model: torch.nn.Module, count: int) -> None:
    """Put files of ``torch.save`` in the place of a model's safetensors. What is tied is in them twice, and shares memory."""
    (old,) = folder.glob("*.safetensors")
    stem = "diffusion_pytorch_model" if old.name.startswith("diffusion") else "pytorch_model"
    old.unlink()
    state = model.state_dict()
    places = list(dict.fromkeys(tensor.data_ptr() for tensor in state.values()))
    if count == 1:
        torch.save(state, folder / f"{stem}.bin")
        return
    weight_map = {name: f"{stem}-{places.index(t.data_ptr()) % count + 1:05}-of-{count:05}.bin" for name, t in state.items()}
    for shard in set(weight_map.values()):
        torch.save({name: tensor for name, tensor in state.items() if weight_map[name] == shard}, folder / shard)
    (folder / f"{stem}.bin.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bin")
    for name, count in CASES.items():
        subject, folder = SUBJECTS[name], root / name
        with library_noise():
            subject.write(folder)
        loaded = load_stock(folder, subject, DTYPE)
        parts = {folder / name: part for name, part in loaded.components.items()} if subject.pipeline else {folder: loaded}
        for path, model in parts.items():
            if isinstance(model, torch.nn.Module):
                in_files_of_torch(path, model, count)
    assert not list(root.rglob("*.safetensors"))
    return root


@pytest.mark.parametrize("name", CASES)
def test_a_cached_load_equals_a_stock_load(runtime_dir, folders, name):
    stock = load_stock(folders / name, SUBJECTS[name], DTYPE)
    expected, output = portrait(stock), run(SUBJECTS[name], stock)
    for hit in (False, True):
        there, computed, was_hit = seen(name, str(folders / name))
        assert list(differences(expected, there)) == []
        assert (computed, was_hit) == (output, hit)
    assert outside_the_cache(nbcache.load_model(folders / name, device="cpu")) in ([], COPIED.get(name))
    gc.collect()


def test_a_restarted_process_finds_the_same(runtime_dir, folders):
    for name in CASES:
        nbcache.load_model(folders / name, device="cpu")
    with Interpreter() as restarted:
        restarted.run("from tests.parity.harness import seen")
        for name in CASES:
            stock = load_stock(folders / name, SUBJECTS[name], DTYPE)
            there, output, hit = restarted.run(f"seen({name!r}, {str(folders / name)!r})")
            assert list(differences(json.loads(json.dumps(portrait(stock))), there)) == [], name
            assert (output, hit) == (run(SUBJECTS[name], stock), True), name
