"""LoRAs by way of the GPU tier, over the emulated driver: what stays hot, what leaves, what is never written to."""

from __future__ import annotations

from pathlib import Path

import pytest

import nbcache
import nbcache.client.tensors  # here, where no driver is emulated yet: it looks once
from tests.support.kernels import Interpreter
from tests.support.loras import Writer, flux

ROOT = Path(__file__).resolve().parents[2]

KERNEL = """
import gc, json, warnings
import torch
warnings.simplefilter("ignore")
import nbcache
from safetensors.torch import load_file
from nbcache.models.lora_cache import hot
from tests.support.loras import flux, outputs

def stock(path):
    pipe = flux()
    pipe.load_lora_weights(load_file(path), adapter_name="default")
    return pipe

def alike(one, other):
    mine, theirs = one.transformer.state_dict(), other.transformer.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

pipe = flux()
"""


@pytest.fixture
def kernel(runtime_dir, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("NBCACHE_TEST_DRIVER", "tests.support.emulated:make")
    monkeypatch.setenv("NBCACHE_GPU_LOW_WATERMARK", "0")
    monkeypatch.setenv("NBCACHE_LORA_GPU_LIMIT", "100kB")
    with Interpreter() as kernel:
        kernel.run(KERNEL)
        yield kernel


@pytest.fixture
def paths(tmp_path) -> list[str]:
    """Three LoRAs of 36, 36 and 73 kB."""
    write = Writer(tmp_path)
    return [write.diffusers(name, flux(), rank, only="transformer") for name, rank in (("a", 4), ("b", 4), ("c", 8))]


def slabs() -> dict[str, tuple[str, int]]:
    """State and leases of each entry's slab, by the first letter of its name."""
    return {entry.name[0]: (slab.state, slab.leases) for entry in nbcache.status().entries for slab in entry.devices}


def test_the_last_used_stay_hot_within_the_limit(kernel, paths):
    a, b, c = map(repr, paths)

    def loaded(path: str) -> object:
        return kernel.run(f"r = nbcache.load_lora(pipe, {path})\n[r.how, r.found, alike(pipe, stock({path}))]")

    assert loaded(a) == ["injected", "converted", True]
    assert loaded(b) == ["swapped", "converted", True]
    assert loaded(a) == ["swapped", "hot", True]
    assert slabs() == {"a": ("resident", 1), "b": ("resident", 1)}
    assert loaded(c) == ["swapped", "converted", True]  # 73 kB: neither of the others fits beside it
    assert slabs() == {"c": ("resident", 1)}
    assert loaded(b) == ["swapped", "cached", True]
    assert slabs() == {"b": ("resident", 1)}
    assert {entry.host for entry in nbcache.status().entries} == {"staged"}
    kernel.run("hot().clear()")
    assert slabs() == {}
    assert kernel.run(f"alike(pipe, stock({b}))")  # what the pipeline holds is its own


def test_what_is_written_into_the_pipeline_reaches_no_slab(kernel, paths):
    a, b, _ = map(repr, paths)
    kernel.run(f"nbcache.load_lora(pipe, {a}); nbcache.load_lora(pipe, {b}); None")
    kernel.run("with torch.no_grad():\n    for n, p in pipe.transformer.named_parameters():\n        if 'lora' in n: p.zero_()")
    kernel.run(f"pipe.load_lora_weights(load_file({a}), adapter_name='default', hotswap=True)")
    assert kernel.run(f"[nbcache.load_lora(pipe, {b}).found, alike(pipe, stock({b}))]") == ["hot", True]
    assert kernel.run(f"two = flux(); [nbcache.load_lora(two, {a}).found, alike(two, stock({a}))]") == ["hot", True]


def test_many_swaps_take_one_arena(kernel, paths):
    run = f"""
import random
from nbcache.models.lora import host_of, rack_of
order = random.Random(1)
for path in {paths}: nbcache.load_lora(pipe, path)
(part,) = rack_of(host_of(pipe)).adapters["default"].plan.parts
size, block = part.arena.size_bytes, part.arena._block.data_ptr()
for _ in range(60): nbcache.load_lora(pipe, order.choice({paths}))
places = [p.data_ptr() for n, p in pipe.transformer.named_parameters() if "lora" in n]
[part.arena.size_bytes == size, all(block <= place < block + size for place in places)]
"""
    assert kernel.run(run) == [True, True]


@pytest.fixture
def tight(runtime_dir, monkeypatch):
    """A kernel on a GPU with room for two of the three LoRAs, of 4 MB each in slabs, and a limit that would allow all."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("NBCACHE_TEST_DRIVER", "tests.support.emulated:make")
    monkeypatch.setenv("NBCACHE_TEST_GPU_BYTES", str(9 << 20))
    monkeypatch.setenv("NBCACHE_GPU_LOW_WATERMARK", "0")
    with Interpreter() as kernel:
        kernel.run(KERNEL)
        yield kernel


def test_hot_loras_give_way_to_one_that_does_not_fit(tight, tmp_path):
    write = Writer(tmp_path)
    paths = [write.diffusers(name, flux(), 300, only="transformer") for name in "abc"]
    for path in [*paths, paths[0], paths[1]]:
        assert tight.run(f"nbcache.load_lora(pipe, {path!r})\nalike(pipe, stock({path!r}))")
    assert set(slabs()) == {"a", "b"}


MODEL = """
from safetensors.torch import save_file
def model(path):
    save_file({f"w{number}": torch.ones(1 << 17) for number in range(14)}, path)
    return path
"""


def test_hot_loras_give_way_to_a_model_and_to_who_frees_the_gpu(tight, tmp_path):
    lora = Writer(tmp_path).diffusers("a", flux(), 300, only="transformer")
    model = str(tmp_path / "model.safetensors")
    tight.run(MODEL)
    hot = f"nbcache.load_lora(pipe, {lora!r}); nbcache.unload_lora(pipe); None"
    tight.run(hot)
    assert slabs()["a"] == ("resident", 1)
    assert tight.run(f"w = nbcache.load(model({model!r}), device='cuda'); len(w)") == 14
    assert set(slabs()) == {"/"}  # the model, by its path
    tight.run("del w; gc.collect()")
    for action in ("free_gpu()", "free_gpu(name)", "evict(name)", "evict_all()"):
        tight.run(hot)
        tight.run("name = next(entry.name for entry in nbcache.status().entries if entry.name[0] == 'a')")
        assert tight.run(f"from nbcache.client import api; api.{action}.freed_bytes > 0"), action
        assert "a" not in slabs(), action
