"""LoRAs beside a base that the cache holds: as stock, hot ones, memory that does not grow, a fused base that comes back.

On a real GPU (``-m gpu``), and those tests that say more than ``tests/behaviour`` over the emulated driver too.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import save_file

import nbcache
from tests.support.gpu import require_gpu
from tests.support.kernels import Interpreter
from tests.support.lora_parity import LAYOUTS
from tests.support.loras import Writer, flux
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(300)
on_gpu = pytest.mark.parametrize("over", [pytest.param("cuda", marks=pytest.mark.gpu)])
on_each = pytest.mark.parametrize("over", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])

ROOT = Path(__file__).resolve().parents[2]

KERNEL = """
import gc, os, random, warnings
import torch
warnings.simplefilter("ignore")
import nbcache
from nbcache.client.tensors import real_device
from tests.support.lora_parity import LAYOUTS, held_alike, identical, same, stock
from tests.support.loras import flux, flux_output, outputs

device = real_device(torch.device("cuda"))

def to_device(pipe):
    for name in ("transformer", "unet", "text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).to(device)
    return pipe

def is_shared(model):
    return all([torch._C._is_cow_tensor(p.data) for n, p in model.named_parameters() if "lora" not in n])

def used():
    gc.collect()
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0

def alike(pipe, other):
    # what they hold, to the bit; what they compute
    return [held_alike(pipe, other), same(outputs(pipe), outputs(other))]

def on_cached(path):
    # a transformer whose weights are the cache's
    pipe = flux(heads=16)
    pipe.transformer.load_state_dict(nbcache.load(path, device="cuda"), assign=True)
    return to_device(pipe)
"""


@pytest.fixture
def kernel(over, runtime_dir, monkeypatch):
    if over == "cuda":
        require_gpu()
    else:
        monkeypatch.setenv("NBCACHE_TEST_DRIVER", "tests.support.emulated:make")
        monkeypatch.setenv("NBCACHE_GPU_LOW_WATERMARK", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its worker processes outlive a kernel by a while
    with Interpreter() as kernel:
        kernel.run(KERNEL)
        yield kernel


@pytest.fixture
def write(tmp_path) -> Writer:
    return Writer(tmp_path)


@pytest.fixture
def base(tmp_path) -> str:
    """A FLUX transformer wide enough that most weights are adopted in place."""
    path = tmp_path / "base.safetensors"
    save_file(flux(heads=16).transformer.state_dict(), path)
    return str(path)


@pytest.fixture
def paths(write) -> list[str]:
    """LoRAs of several ranks, for the transformer; the third for fewer modules of it, and for the text encoder."""
    pipe = flux(heads=16)
    ranks = {"a": 4, "b": 8, "c": 2, "d": 4, "e": 16}
    return [write.diffusers(name, pipe, rank, only="attn" if name == "c" else "transformer") for name, rank in ranks.items()]


@on_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_the_stock_loader(kernel, write, layout):
    make, save = LAYOUTS[layout]
    again = "injected" if "control" in layout else "swapped"  # its inputs are wider than the model's
    path = save(write, "lora", make())
    kernel.run(f"make = LAYOUTS[{layout!r}][0]; pipe = to_device(make()); before = outputs(pipe); None")
    assert kernel.run(f"r = nbcache.load_lora(pipe, {path!r}); [r.how, r.found]") == ["injected", "converted"]
    assert kernel.run(f"other = stock(to_device(make()), {path!r}); alike(pipe, other)") == [True, True]
    assert kernel.run(f"r = nbcache.load_lora(pipe, {path!r}); [r.how, r.found]") == [again, "hot"]
    assert kernel.run("alike(pipe, other)") == [True, True]
    assert kernel.run("nbcache.unload_lora(pipe); identical(outputs(pipe), before)")


@on_each
def test_swaps_beside_a_base_that_stays_shared(kernel, base, paths):
    kernel.run(f"pipe = on_cached({base!r}); shared = is_shared(pipe.transformer); before = outputs(pipe); None")
    kernel.run(f"nbcache.load_lora(pipe, {paths[4]!r}); None")
    for number, path in enumerate([*paths, paths[1]]):
        kernel.run(f"nbcache.load_lora(pipe, {path!r}); other = stock(on_cached({base!r}), {path!r})")
        assert kernel.run("same(outputs(pipe), outputs(other))"), path
        assert number > 1 or kernel.run("held_alike(pipe, other)")  # the third brings modules that later ones lack
    assert kernel.run("is_shared(pipe.transformer) == shared")
    assert kernel.run("nbcache.unload_lora(pipe); identical(outputs(pipe), before)")


@on_each
def test_swaps_take_no_more_memory(kernel, base, paths):
    kernel.run(f"pipe = on_cached({base!r}); order = random.Random(5)")
    kernel.run(f"for path in {paths} * 2: nbcache.load_lora(pipe, path)")
    before = kernel.run("used()")
    kernel.run(f"for _ in range(200): nbcache.load_lora(pipe, order.choice({paths}))")
    assert kernel.run("used()") == before
    assert kernel.run(f"nbcache.load_lora(pipe, {paths[3]!r}).found") == "hot"
    assert kernel.run(f"same(outputs(pipe), outputs(stock(on_cached({base!r}), {paths[3]!r})))")


@on_each
def test_unfusing_gives_the_base_back_and_the_cache_never_saw_it(kernel, base, paths):
    kernel.run(f"pipe = on_cached({base!r}); before = outputs(pipe); nbcache.load_lora(pipe, {paths[1]!r}); None")
    kernel.run("pipe.fuse_lora(components=['transformer'])")
    assert not kernel.run("same(outputs(pipe), before)")
    with Interpreter() as second:  # another kernel on the same slab
        second.run(KERNEL)
        second.run(f"stored = flux(heads=16).transformer.state_dict(); weights = nbcache.load({base!r}, device='cuda')")
        assert second.run("[weights.hit, all([torch.equal(weights[n].cpu(), stored[n]) for n in stored])]") == [True, True]
    kernel.run("pipe.unfuse_lora(components=['transformer']); nbcache.unload_lora(pipe); None")
    assert kernel.run("identical(outputs(pipe), before)")


@on_gpu
def test_padded_and_compiled_swaps_compile_nothing_again(kernel, base, paths):
    kernel.run(f"pipe = on_cached({base!r}); pipe.enable_lora_hotswap(target_rank=16)")
    kernel.run(f"nbcache.load_lora(pipe, {paths[0]!r}); None")
    kernel.run("pipe.transformer.compile(fullgraph=True); flux_output(pipe.transformer); None")
    kernel.run("torch._dynamo.config.error_on_recompile = True")
    for path in (paths[1], paths[3], paths[4]):
        assert kernel.run(f"nbcache.load_lora(pipe, {path!r}).how") == "swapped"
        expected = f"flux_output(stock(on_cached({base!r}), {path!r}).transformer)"
        assert kernel.run(f"torch.allclose(flux_output(pipe.transformer), {expected}, rtol=1e-3, atol=1e-4)"), path


@on_gpu
@pytest.mark.parametrize(
    "offload",
    [
        "pipe.enable_sequential_cpu_offload()",
        "pipe.enable_model_cpu_offload()",
        "offload_in_groups(pipe.transformer, 'leaf_level', use_stream=True)",
        "offload_in_groups(pipe.transformer, 'block_level', use_stream=True)",
    ],
    ids=["sequential", "model", "leaves with a stream", "blocks with a stream"],
)
def test_offloaded_pipelines_take_loras_as_stock(kernel, paths, offload):
    kernel.run("from tests.support.offloading import offload_in_groups; on_gpu = torch.empty(0, device='cuda')")
    kernel.run(f"def made():\n    pipe = flux(heads=16)\n    {offload}\n    return pipe")
    kernel.run("def compute(pipe): return [flux_output(pipe.transformer, like=on_gpu).cpu()]")
    kernel.run("pipe = made(); before = compute(pipe); None")
    for path in (paths[0], paths[3], paths[1], paths[4]):
        kernel.run(f"nbcache.load_lora(pipe, {path!r}); other = stock(made(), {path!r})")
        assert kernel.run("same(compute(pipe), compute(other))"), path
    kernel.run("pipe.fuse_lora(components=['transformer']); other.fuse_lora(components=['transformer'])")
    assert kernel.run("same(compute(pipe), compute(other))")
    kernel.run("pipe.unfuse_lora(components=['transformer']); nbcache.unload_lora(pipe)")
    assert kernel.run("identical(compute(pipe), before)")


@on_each
def test_a_killed_kernel_leaves_its_hot_loras_to_the_next(kernel, base, paths):
    kernel.run(f"pipe = on_cached({base!r})\nfor path in {paths}: nbcache.load_lora(pipe, path)")
    assert leases() >= len(paths)
    kernel.kill()
    eventually(lambda: leases() == 0)
    with Interpreter() as second:
        second.run(KERNEL)
        second.run(f"pipe = on_cached({base!r})")
        assert second.run(f"r = nbcache.load_lora(pipe, {paths[4]!r}); [r.how, r.found]") == ["injected", "cached"]
        assert second.run(f"all(alike(pipe, stock(on_cached({base!r}), {paths[4]!r})))")


def leases() -> int:
    return sum(slab.leases for entry in nbcache.status().entries for slab in entry.devices)
