"""Unchanged programs on a real GPU: transformers' and diffusers' own ``device_map``, safetensors' own ``device``.

Run on a GPU host: ``make gpu``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import nbcache
from tests.support.gpu import require_gpu
from tests.support.kernels import Interpreter

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import torch
from safetensors.torch import load_file
from pathlib import Path
from tests.support import tiny
import nbcache
torch.zeros(1, device="cuda")
root = Path(ROOT)

def facts(model):
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tiny.describe(tensor.detach().clone().cpu()) + [str(tensor.device)] for name, tensor in named}

def llama(**options):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(root / "llama", device_map="cuda", **options)

def flux(**options):
    from diffusers import FluxTransformer2DModel
    return FluxTransformer2DModel.from_pretrained(root / "flux" / "transformer", device_map="cuda", **options)

def shared(model):
    return [torch._C._is_cow_tensor(parameter) for parameter in model.parameters()]
"""
CASES = ("llama()", "llama(dtype=torch.bfloat16)", "flux()", "flux(torch_dtype=torch.bfloat16)")


@pytest.fixture(scope="session", autouse=True)
def gpu():
    require_gpu()


@pytest.fixture
def environment(runtime_dir, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TQDM_DISABLE", "1")


def slabs(folder: Path) -> list[tuple[str, str]]:
    entries = [entry for entry in nbcache.status().entries if entry.source[0].startswith(str(folder))]
    return [(slab.dtype, slab.state) for entry in entries for slab in entry.devices]


def test_models_that_go_to_the_gpu_by_device_map(environment, tmp_path):
    prelude = PRELUDE.replace("ROOT", repr(str(tmp_path)))
    with Interpreter() as stock:
        stock.begin(f"{prelude}\ntiny.make_llama(root / 'llama'), tiny.make_flux(root / 'flux')\nNone")
        stock.finish(timeout_s=200)
        expected = {case: stock.run(f"facts({case})") for case in CASES}
    for _ in ("first", "second"):
        with Interpreter() as served:
            served.begin(f"{prelude}\nnbcache.enable()")
            served.finish(timeout_s=200)
            for case in CASES:
                assert served.run(f"model = {case}\nfacts(model)") == expected[case], case
                assert all(served.run("shared(model)")), case  # the slab's own memory, nothing private
    assert sorted(slabs(tmp_path / "llama")) == [("", "resident")] * 2 + [("BF16", "resident")] * 2  # two shards
    assert sorted(slabs(tmp_path / "flux" / "transformer")) == [("", "resident"), ("BF16", "resident")]


def test_load_file_onto_the_gpu(environment, tmp_path):
    with Interpreter() as served:
        served.begin(f"{PRELUDE.replace('ROOT', repr(str(tmp_path)))}\ntiny.make_gpt2(root / 'gpt2')\nNone")
        served.finish(timeout_s=200)
        served.run("path = root / 'gpt2' / 'model.safetensors'\nstock = load_file(path, device='cuda')\nnbcache.enable()")
        served.run("mine = load_file(path, device='cuda')")
        assert served.run("list(mine) == list(stock) and all(torch.equal(mine[n], stock[n]) for n in stock)")
        assert served.run("all(torch._C._is_cow_tensor(tensor) for tensor in mine.values())")
        served.run("mine['transformer.wpe.weight'].zero_(); None")
        assert served.run(
            "torch.equal(load_file(path, device='cuda')['transformer.wpe.weight'], stock['transformer.wpe.weight'])"
        )
    assert slabs(tmp_path / "gpt2") == [("", "resident")]
