"""What only a GPU can show of the other formats: views over copy-on-write storages, CuPy arrays of them, quantized bytes.

Run on a GPU host: ``make gpu``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support.gpu import require_gpu
from tests.support.kernels import Interpreter

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]

KERNEL = """
import gc, torch, nbcache
torch.zeros(1, device="cuda")
is_cow = torch._C._is_cow_tensor

def same(weights, path):
    stock = torch.load(path, weights_only=True, map_location="cuda")
    assert list(weights) == list(stock)
    for name, tensor in stock.items():
        mine = weights[name]
        for what in ("dtype", "shape", "device"):
            assert getattr(mine, what) == getattr(tensor, what), (name, what)
        assert mine.stride() == tensor.stride(), name
        assert torch.equal(mine, tensor), name
    return True
"""


@pytest.fixture(scope="session", autouse=True)
def gpu():
    require_gpu()


@pytest.fixture
def kernel(runtime_dir, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with Interpreter() as kernel:
        kernel.run(KERNEL)
        yield kernel


@pytest.fixture
def path(tmp_path):
    whole, tied = torch.randn(3000, 1000), torch.randn(64, 64)
    tensors = {
        "embed": tied,
        "head": tied,
        "turned": whole.t(),
        "part": whole[10:20],
        "alone": torch.arange(5),
        "none": torch.ones(3, 0),
    }
    torch.save(tensors, tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("share", ["cow", "readonly", "private"])
def test_a_torch_file_equals_a_stock_load(kernel, path, share):
    for _ in range(2):
        kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share={share!r})")
        assert kernel.run(f"same(w, {str(path)!r})")
    assert kernel.run("w.hit")


def test_a_write_moves_what_shares_memory_and_nothing_else(kernel, path):
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda')")
    assert kernel.run("all(is_cow(t) for t in w.values() if t.numel())")
    kernel.run("w['head'].zero_(); None")
    assert kernel.run("[n for n, t in w.items() if t.numel() and not is_cow(t)]") == ["embed", "head"]
    assert kernel.run("w['embed'].any().item()") is False
    kernel.run("del w; gc.collect()")
    assert kernel.run(f"same(nbcache.load({str(path)!r}, device='cuda'), {str(path)!r})")


def test_cupy_arrays_have_the_same_strides(kernel, path):
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly'); arrays = w.cupy()")
    kernel.run(
        "for name, tensor in w.items():\n"
        "    array = arrays[name]\n"
        "    assert array.shape == tuple(tensor.shape), name\n"
        "    assert not tensor.numel() or array.strides == tuple(s * tensor.itemsize for s in tensor.stride()), name\n"
        "    assert array.tolist() == tensor.cpu().tolist(), name"
    )


def test_a_cast_keeps_strides(kernel, path):
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', dtype='bfloat16')")
    assert kernel.run("(w['turned'].stride(), str(w['turned'].dtype), str(w['alone'].dtype))") == [
        [1, 1000], "torch.bfloat16", "torch.int64",
    ]  # fmt: skip


def test_quantized_bytes_and_what_is_computed_of_them(kernel, tmp_path):
    pytest.importorskip("gguf", reason="the gguf package is not installed here")
    from gguf import GGMLQuantizationType as Kind

    from tests.support.gguf import write_gguf

    path = write_gguf(tmp_path / "model.gguf", (Kind.Q4_0, Kind.Q8_0, Kind.BF16, Kind.F32))
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda'); c = nbcache.load({str(path)!r}, device='cpu')")
    assert kernel.run("all(torch.equal(w[n].cpu(), c[n]) for n in c)")
    assert kernel.run("w.quant_types") == {"Q4_0": "Q4_0", "Q8_0": "Q8_0"}
    kernel.run("d, e = w.dequantize(), c.dequantize()")
    assert kernel.run("all(d[n].is_cuda and torch.equal(d[n].cpu(), e[n]) for n in e)")
    assert kernel.run("all(is_cow(t) for t in w.values())")
