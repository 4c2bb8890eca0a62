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
    "model offload, in float16": lambda pipe: pipe.to(torch.float16).enable_model_cpu_offload(device="cpu"),
}


def moved(pipe, action):
    """Two images after the action, and the hooks that it left."""
    with library_noise():
        ACTIONS[action](pipe)
        images = [run(FLUX, pipe), run(FLUX, pipe)]
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return images, [
        f"{n}.{m}" for n, part in models.items() for m, module in part.named_modules() if hasattr(module, "_hf_hook")
    ]


@pytest.mark.parametrize("action", ACTIONS)
def test_moving_is_as_stock_and_leaves_the_cache_as_it_was(load, folder, action):
    stock, loaded = load_stock(folder, FLUX, torch.bfloat16), load()
    before = bytes_in_the_cache(folder)
    images, hooked = moved(stock, action)
    assert moved(loaded, action) == (images, hooked)
    assert bool(hooked) is ("offload" in action)
    assert list(differences(portrait(stock), portrait(loaded))) == []
    assert same(before, bytes_in_the_cache(folder))
    again = load()
    assert run(FLUX, again) == run(FLUX, load_stock(folder, FLUX, torch.bfloat16))
    del stock, loaded, again
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


MOVING = """
from tests.behaviour.test_model_devices import moved

def moving(folder, action):
    stock = load_stock(Path(folder), subject, torch.bfloat16)
    made = assemble_name(folder, device="cuda", share="readonly")
    if moved(stock, action) != moved(made.value, action):
        return ["the images, or the hooks"]
    return list(differences(portrait(stock), portrait(made.value)))

def slabs_as_files(folder):
    parts = [Path(folder, part) for part in ("transformer", "vae", "text_encoder", "text_encoder_2")]
    files = {file: nbcache.load(part, device="cuda", share="readonly") for part in parts for file in part.glob("*.safetensors")}
    return all(torch.equal(slab[n], t) for file, slab in files.items() for n, t in load_file(file).items())
"""


def test_moving_writes_to_no_slab(runtime_dir, folder, monkeypatch):
    """Over the emulated GPU. A write to a slab that is mapped read-only would end the process."""
    monkeypatch.setenv("PYTHONPATH", ".")
    monkeypatch.setenv("NBCACHE_TEST_DRIVER", "tests.support.emulated:make")
    monkeypatch.setenv("NBCACHE_GPU_LOW_WATERMARK", "0")
    with Interpreter() as kernel:
        kernel.run(KERNEL + MOVING + "from safetensors.torch import load_file")
        for action in ACTIONS:
            assert kernel.run(f"moving({str(folder)!r}, {action!r})") == [], action
            assert kernel.run(f"slabs_as_files({str(folder)!r})"), action
        with pytest.raises(AssertionError, match="ended, status -11"):  # so it would be seen
            kernel.run(f"assemble_name({str(folder)!r}, 'cuda', share='readonly').value.transformer.proj_out.bias.data.zero_()")
    slabs = [slab.state for entry in nbcache.status().entries for slab in entry.devices]
    assert slabs == ["resident"] * 4


def test_a_pipeline_is_staged_from_a_shell_and_then_hit(runtime_dir, folder):
    command = [sys.executable, "-m", "nbcache", "load", str(folder), "--json"]
    staged = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert sorted(Path(entry["name"]).name for entry in staged) == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert not any(entry["hit"] for entry in staged)
    assert assemble_name(folder, device="cpu").tally.hit
    gc.collect()
    nbcache.evict(folder / "vae")
    *parts, last = subprocess.run(command[:-1], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [part.rpartition(", ")[2].partition(" in ")[0] for part in (*parts, last)] == ["was cached"] * 3 + ["read"]
    nbcache.evict(folder)
    *parts, last = subprocess.run(command[:-1], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [part.rpartition(", ")[2] for part in parts] == ["read"] * 4
    assert last.startswith("4 checkpoints, ")
    assert ", read in " in last
