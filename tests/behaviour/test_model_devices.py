"""A loaded model that is moved, cast, offloaded, saved, trained, is as stock and corrupts nothing."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch

import nbcache
from nbcache.models.api import assemble_name
from tests.parity.harness import differences, library_noise, load_stock, portrait, run
from tests.support.kernels import Interpreter
from tests.support.models import SUBJECTS

FLUX = SUBJECTS["flux"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "flux"
    FLUX.write(path)
    return path


@pytest.fixture
def load(runtime_dir, folder):
    return lambda **options: nbcache.load_model(folder, device="cpu", **options)


def bytes_in_the_cache(folder):
    """What the cache holds for a folder now, as another client sees it."""
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    return {
        f"{part}/{name}": tensor.clone() for part in parts for name, tensor in nbcache.load(folder / part, device="cpu").items()
    }


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


ACTIONS = {
    "to cpu": lambda pipe: pipe.to("cpu"),
    "to float32": lambda pipe: pipe.to(torch.float32),
    "to cpu, float16": lambda pipe: pipe.to("cpu", torch.float16),
    # What enable_sequential_cpu_offload does to each model; with a CPU as the device the libraries fail at T5, stock too.
    "sequential offload": lambda pipe: accelerate.cpu_offload(pipe.transformer, torch.device("cpu")),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_moving_is_as_stock_and_leaves_the_cache_as_it_was(load, folder, action):
    stock, loaded = load_stock(folder, FLUX, torch.bfloat16), load()
    before = bytes_in_the_cache(folder)
    outcomes = []
    for pipe in (stock, loaded):
        with library_noise():
            try:
                ACTIONS[action](pipe)
                outcomes.append(run(FLUX, pipe))
            except (RuntimeError, ValueError) as error:  # a machine without a GPU: then both say so
                outcomes.append([type(error).__name__, str(error)])
    assert outcomes[0] == outcomes[1]
    if "offload" not in action:
        assert list(differences(portrait(stock), portrait(loaded))) == []
    assert same(before, bytes_in_the_cache(folder))
    del pipe, stock, loaded
    gc.collect()


def test_training_a_model_changes_it_alone(load, folder):
    transformer = load(components="transformer")
    before = bytes_in_the_cache(folder)
    optimizer = torch.optim.SGD(transformer.parameters(), lr=1.0)
    transformer.proj_out(torch.ones(1, transformer.proj_out.in_features, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert not torch.equal(transformer.proj_out.weight, before["transformer/proj_out.weight"])
    assert same(before, bytes_in_the_cache(folder))
    again = load(components="transformer")
    assert torch.equal(again.proj_out.weight, before["transformer/proj_out.weight"])


def test_a_pipeline_can_be_saved_and_loaded_again(load, folder, tmp_path):
    with library_noise():
        load().save_pretrained(tmp_path / "copy")
    copy = nbcache.load_model(tmp_path / "copy", device="cpu")
    assert list(differences(portrait(load()), portrait(copy))) == []


def test_components_alone_and_raw(load, folder):
    transformer = load(components=["transformer"])
    assert type(transformer).__name__ == "FluxTransformer2DModel"
    two = load(components="vae, scheduler")
    assert [type(part).__name__ for part in two.values()] == ["AutoencoderKL", "FlowMatchEulerDiscreteScheduler"]
    raw = load(raw=True)
    assert sorted(raw) == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert all(isinstance(weights, nbcache.Weights) for weights in raw.values())
    assert torch.equal(raw["vae"]["decoder.conv_in.bias"], two["vae"].decoder.conv_in.bias)
    given = load(vae=two["vae"], text_encoder=None)
    assert given.vae is two["vae"]
    assert given.text_encoder is None


def test_dtypes_by_component(load):
    pipe = load(torch_dtype={"default": torch.float16, "vae": "float32"})
    assert {name: getattr(pipe, name).dtype for name in ("transformer", "vae", "text_encoder")} == {
        "transformer": torch.float16,
        "vae": torch.float32,
        "text_encoder": torch.float16,
    }
    assert load(dtype="auto").transformer.dtype == torch.bfloat16


KERNEL = """
import gc, torch, nbcache
from nbcache.models.api import assemble_name
from tests.parity.harness import differences, load_stock, portrait, run
from tests.support.models import SUBJECTS
from pathlib import Path
subject = SUBJECTS["flux"]

def differing(folder, share, dtype=None):
    stock = load_stock(Path(folder), subject, dtype or torch.bfloat16)
    made = assemble_name(folder, device="cuda", share=share, dtype=dtype)
    found = list(differences(portrait(stock), portrait(made.value)))
    if run(subject, stock) != run(subject, made.value):
        found.append("the image")
    return found, made.tally.hit
"""


def test_over_an_emulated_gpu(runtime_dir, folder, monkeypatch):
    """The path of a GPU load, slabs and all; the tensors themselves are on the CPU, which stands for the GPU."""
    monkeypatch.setenv("PYTHONPATH", ".")
    monkeypatch.setenv("NBCACHE_TEST_DRIVER", "tests.support.emulated:make")
    monkeypatch.setenv("NBCACHE_GPU_LOW_WATERMARK", "0")
    with Interpreter() as kernel:
        kernel.run(KERNEL)
        assert kernel.run(f"differing({str(folder)!r}, 'cow')") == [[], False]
        assert kernel.run(f"differing({str(folder)!r}, 'readonly')") == [[], True]
        assert kernel.run(f"differing({str(folder)!r}, 'private', torch.float16)")[0] == []
    slabs = [(slab.dtype, slab.state) for entry in nbcache.status().entries for slab in entry.devices]
    assert slabs.count(("", "resident")) == 4
    assert ("F16", "resident") in slabs


def test_a_pipeline_is_staged_from_a_shell_and_then_hit(runtime_dir, folder):
    command = [sys.executable, "-m", "nbcache", "load", str(folder), "--json"]
    staged = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert sorted(Path(entry["name"]).name for entry in staged) == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert not any(entry["hit"] for entry in staged)
    assert assemble_name(folder, device="cpu").tally.hit
