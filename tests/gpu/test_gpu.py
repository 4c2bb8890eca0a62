"""What only a GPU can show: torch's tensors over slabs, copy-on-write, faults, memory shared by real kernels.

Run on a GPU host: ``make gpu``.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nbcache
from tests.support.gpu import require_gpu
from tests.support.kernels import Interpreter, Kernel, RemoteError
from tests.support.waiting import eventually

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]

KERNEL = """
import gc, os, torch, warnings, ctypes, json
import nbcache
from nbcache.client.notices import NoSharedGpuMemory
from safetensors.torch import load_file
torch.zeros(1, device="cuda")
warnings.simplefilter("error", NoSharedGpuMemory)  # an ordinary copy would be the same
is_cow = torch._C._is_cow_tensor

def raw(t):
    return t.contiguous().reshape(-1).view(torch.uint8)

def same(weights, path):
    stock = load_file(path, device="cuda")
    assert list(weights) == list(stock)
    for name, tensor in stock.items():
        mine = weights[name]
        for what in ("dtype", "shape", "device"):
            assert getattr(mine, what) == getattr(tensor, what), (name, what)
        assert mine.stride() == tensor.stride(), name
        assert torch.equal(raw(mine), raw(tensor)), name
    return True
"""

DTYPES = [
    "bfloat16", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "bool", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def gpu():
    require_gpu()


@pytest.fixture
def environment(runtime_dir, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its worker processes outlive a kernel by a while
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def kernel(environment):
    with Interpreter() as kernel:
        kernel.run(KERNEL)
        yield kernel


def write(path: Path, shapes, dtype=torch.bfloat16, seed=0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    save_file({f"t{i:05d}": torch.randn(s, generator=generator).to(dtype) for i, s in enumerate(shapes)}, path)
    return path


@pytest.fixture
def path(tmp_path):
    """Tensors of each class of the layout, and of no size and no dimension."""
    return write(tmp_path / "m.safetensors", [(), (3, 0), (1,), (7, 5), (600, 1000), (3000, 1000), (2000, 2000), (4000, 3000)])


def load(path, share="cow", **options):
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"nbcache.load({str(path)!r}, device='cuda', share={share!r}{given})"


def leases():
    return [(slab.state, slab.leases) for entry in nbcache.status().entries for slab in entry.devices]


@pytest.mark.parametrize("share", ["cow", "readonly", "private"])
def test_every_dtype_equals_a_stock_load(kernel, tmp_path, share):
    file = tmp_path / "all.safetensors"
    generator = torch.Generator().manual_seed(1)
    sources = {name: torch.randint(0, 2, (33, 8), generator=generator, dtype=torch.uint8) for name in DTYPES}
    save_file({name: source.to(getattr(torch, name)) for name, source in sources.items()}, file)
    kernel.run(f"w = {load(file, share)}")
    assert kernel.run(f"same(w, {str(file)!r})")


@pytest.mark.parametrize("share", ["cow", "readonly", "private"])
def test_every_size_equals_a_stock_load_and_is_aligned(kernel, path, share):
    kernel.run(f"w = {load(path, share)}")
    assert kernel.run(f"same(w, {str(path)!r})")
    if share != "cow":  # asking a copy-on-write tensor for its address makes it private
        assert kernel.run("all(t.data_ptr() % 512 == 0 for t in w.values())")


@pytest.mark.parametrize("share", ["cow", "readonly", "private"])
def test_tensors_that_fill_their_segments_to_the_last_byte(kernel, tmp_path, share):
    """Torch's segments may lie side by side, and no copy may cross from one to the next."""
    sizes = [(512, 1024)] * 7 + [(256,)] * 9000 + [(10, 1024, 1024)] * 3 + [(20, 512, 1024)]
    path = write(tmp_path / "m.safetensors", sizes)
    kernel.run(f"w = {load(path, share)}")
    assert kernel.run(f"same(w, {str(path)!r})")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_cast_of_several_blocks(kernel, tmp_path, dtype):
    """Blocks of 64, 90 and 6 MiB, of which the last is padding."""
    path = write(tmp_path / "m.safetensors", [(19, 1 << 18)] * 14 + [(3, 1 << 18)])
    kernel.run(f"w = {load(path, 'readonly', dtype=dtype)}")
    assert kernel.run(f"all(torch.equal(w[n], t.to(w[n].dtype).cuda()) for n, t in load_file({str(path)!r}).items())")


def without_slab() -> bool:
    nbcache.free_gpu()
    return leases() == []


def test_host_blocks_stay_mapped_from_load_to_load_until_the_daemon_frees_them(kernel, tmp_path):
    """And what they hold is copied right each time, cast or not, and freed with the daemon's copy: no pinned memory stays."""
    file = write(tmp_path / "m.safetensors", [(3000, 5000)] * 9)
    kernel.run("from nbcache.client import blocks; from nbcache.client.device import find_device")
    kernel.run(
        "driver = find_device(torch.device('cuda'))._driver; stock = driver.map_block_on; mapped = []\n"
        "driver.map_block_on = lambda *given: mapped.append(given) or stock(*given)\n"
        "def kept(): return len(blocks.mapped_blocks()._kept)"
    )
    for share in ("readonly", "cow", "private", "readonly"):
        kernel.run(f"w = {load(file, share)}")
        assert kernel.run(f"same(w, {str(file)!r})")
        kernel.run("del w; gc.collect(); torch.cuda.synchronize()")
        eventually(lambda: kernel.run("kept()") == 1)
        eventually(without_slab)
    kernel.run(f"w = {load(file, 'readonly', dtype='float16')}")
    assert kernel.run(f"all(torch.equal(w[n], t.half()) for n, t in load_file({str(file)!r}, device='cuda').items())")
    assert kernel.run("len(mapped)") == 3
    kernel.run("del w; gc.collect()")
    eventually(lambda: kernel.run("kept()") == 1)
    eventually(without_slab)
    nbcache.evict(str(file))
    eventually(lambda: kernel.run("kept()") == 0)
    kernel.run(f"w = {load(file)}")
    assert kernel.run(f"same(w, {str(file)!r})")


@pytest.mark.parametrize("share", ["cow", "readonly", "private"])
def test_threads_that_never_used_the_gpu_fill_and_attach(kernel, path, share):
    kernel.run("import threading\nwarnings.simplefilter('error')\nfound = []")
    for number in (1, 2):
        kernel.run(
            f"thread = threading.Thread(target=lambda: found.append({load(path, share)})); thread.start(); thread.join()"
        )
        assert kernel.run("len(found)") == number, "see the thread's traceback"
        assert kernel.run(f"same(found[-1], {str(path)!r})")


SHAPES = {
    "sdxl": [
        (320, 320, 3, 3),
        (320,),
        (640, 640),
        (640,),
        (1280, 640, 1, 1),
        (1280, 1280),
        (1280,),
        (10240, 1280),
        (5120, 1280),
    ]
    * 160,
    "llama": [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (4096,), (4096,)] * 6,
    "lora": [(16, 3072), (3072, 16), (16, 12288)] * 330,
}


@pytest.mark.parametrize("kind", SHAPES)
def test_models_of_many_shapes_are_adopted_in_place(kernel, tmp_path, kind):
    file = write(tmp_path / "m.safetensors", SHAPES[kind])
    kernel.run(f"w = {load(file)}")
    assert kernel.run("w.private_bytes") == 0
    assert kernel.run("sum(map(is_cow, w.values()))") == len(SHAPES[kind])
    assert kernel.run(f"same(w, {str(file)!r})")
    assert kernel.run("sum(map(is_cow, w.values()))") == len(SHAPES[kind])


def test_a_write_is_seen_by_its_kernel_alone(kernel, path):
    with Interpreter() as other:
        other.run(KERNEL)
        for each in (kernel, other):
            each.run(f"w = {load(path)}")
        kernel.run("w['t00007'].add_(1); torch.cuda.synchronize()")
        assert kernel.run("[n for n, t in w.items() if t.numel() and not is_cow(t)]") == ["t00007"]
        assert kernel.run(f"bool((w['t00007'] - load_file({str(path)!r}, device='cuda')['t00007']).abs().mean() > 0.5)")
        assert other.run(f"same(w, {str(path)!r})")
        assert kernel.run(f"same({load(path)}, {str(path)!r})")


def test_a_raw_write_to_a_read_only_tensor_is_an_error_and_changes_nothing(kernel, path):
    for writer in ("who filled it", "who attached"):
        with Interpreter() as other:
            other.run(KERNEL)
            other.run(f"w = {load(path, 'readonly')}")
            assert other.run("w.hit") is (writer == "who attached")
            with pytest.raises(RemoteError, match=r"CUDA error|AcceleratorError"):
                other.run("w['t00007'].fill_(0); torch.cuda.synchronize()")
            other.kill()
    kernel.run(f"w = {load(path, 'readonly')}")
    assert kernel.run(f"same(w, {str(path)!r})")


def test_the_last_write_to_a_tensor_of_dropped_weights_does_not_reach_the_slab(kernel, path):
    """The base outlives its clones: the last reference to a copy-on-write storage writes in place."""
    kernel.run(f"kept = {load(path)}['t00007']; gc.collect()")
    kernel.run("kept.add_(1); torch.cuda.synchronize()")
    assert kernel.run(f"same({load(path)}, {str(path)!r})")


@pytest.mark.parametrize("share", ["cow", "readonly"])
def test_the_lease_ends_with_the_last_tensor(kernel, path, share):
    kernel.run(f"w = {load(path, share)}; kept = w['t00007']; del w; gc.collect()")
    assert leases() == [("resident", 1)]
    kernel.run("del kept; gc.collect()")
    eventually(lambda: leases() == [("resident", 0)])
    assert kernel.run("torch.cuda.memory_allocated() < 1 << 20")


def test_private_weights_hold_no_lease(kernel, path):
    kernel.run(f"w = {load(path, 'private')}; gc.collect()")
    eventually(lambda: leases() == [("resident", 0)])
    assert kernel.run("w.private_bytes == w.nbytes")


@pytest.mark.alone
def test_two_kernels_hold_the_weights_once(kernel, tmp_path):
    file = write(tmp_path / "m.safetensors", [(8192, 8192)] * 8)  # 1.07 GB
    used = "torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]"
    with Interpreter() as other:
        other.run(KERNEL)
        before = kernel.run(used)
        for each in (kernel, other):
            each.run(f"w = {load(file)}; torch.cuda.synchronize()")
        grown = kernel.run(used) - before
    assert grown < 1.1 * 8 * 8192 * 8192 * 2


def test_a_cast_on_the_way_equals_a_cast_afterwards(kernel, path):
    kernel.run(f"w = {load(path, 'readonly', dtype='float16')}; s = load_file({str(path)!r}, device='cuda')")
    assert kernel.run("all(torch.equal(w[n], s[n].half()) for n in s)")


def test_cupy_and_dlpack_views_leave_tensors_shared(kernel, path):
    kernel.run(f"import cupy; w = {load(path)}; arrays = w.cupy(); s = load_file({str(path)!r})")
    shown = "bytes(cupy.asnumpy(arrays['t00006']).tobytes()) == s['t00006'].view(torch.uint16).numpy().tobytes()"
    assert kernel.run(shown)
    assert kernel.run("all(is_cow(t) for t in w.values() if t.numel())")
    kernel.run("d = torch.from_dlpack(w['t00006'])")
    assert kernel.run("torch.equal(d.cpu(), s['t00006'])")
    assert kernel.run("[n for n, t in w.items() if t.numel() and not is_cow(t)]") == ["t00006"]


MODEL = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(2048, 4096), torch.nn.Linear(4096, 2048)
    def forward(self, x):
        return self.b(torch.nn.functional.gelu(self.a(x)))

def net(state):
    with torch.device("meta"):
        made = Net()
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False)

x = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(3))
"""


@pytest.fixture
def net(kernel, tmp_path):
    file = tmp_path / "net.safetensors"
    generator = torch.Generator().manual_seed(5)
    shapes = {"a.weight": (4096, 2048), "a.bias": (4096,), "b.weight": (2048, 4096), "b.bias": (2048,)}
    save_file({n: torch.randn(s, generator=generator).mul_(0.02).bfloat16() for n, s in shapes.items()}, file)
    kernel.run(MODEL)
    kernel.run(f"stock = net(load_file({str(file)!r}, device='cuda'))(x)")
    return file


@pytest.mark.parametrize("share", ["cow", "readonly"])
def test_a_model_computes_what_it_computes_on_stock_weights(kernel, net, share):
    kernel.run(f"w = {load(net, share)}; m = net(w)")
    assert kernel.run("torch.equal(m(x), stock)")
    if share == "cow":
        assert kernel.run("all(map(is_cow, w.values()))")


@pytest.mark.parametrize("share", ["cow", "readonly"])
def test_a_cuda_graph_runs_on_shared_weights(kernel, net, share):
    kernel.run(f"w = {load(net, share)}; m = net(w); g = torch.cuda.CUDAGraph(); y = m(x)")
    kernel.run("with torch.cuda.graph(g):\n    y = m(x)")
    assert kernel.run("(g.replay(), torch.cuda.synchronize(), torch.equal(y, stock))[2]")
    if share == "cow":
        assert kernel.run("all(map(is_cow, w.values()))")


@pytest.mark.parametrize("share", ["cow", "readonly"])
def test_a_compiled_model_runs_on_shared_weights(kernel, net, share):
    kernel.run(f"w = {load(net, share)}; m = torch.compile(net(w))")
    assert kernel.run("bool(torch.allclose(m(x), stock, atol=1e-2, rtol=1e-2))")


def test_a_flux_transformer_computes_the_same_and_stays_shared(kernel, tmp_path):
    kernel.run(
        "from diffusers import FluxTransformer2DModel as F\n"
        "torch.manual_seed(0)\n"
        "config = dict(patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128,\n"
        "    num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True)\n"
        "stock = F(**config).to('cuda', torch.bfloat16).eval()\n"
        "from safetensors.torch import save_file\n"
        f"save_file(stock.state_dict(), {str(tmp_path / 'f.safetensors')!r})\n"
        "g = torch.Generator('cuda').manual_seed(1)\n"
        "r = lambda *s: torch.randn(*s, device='cuda', dtype=torch.bfloat16, generator=g)\n"
        "inputs = dict(hidden_states=r(1, 64, 64), encoder_hidden_states=r(1, 32, 4096), pooled_projections=r(1, 768),\n"
        "    timestep=torch.tensor([0.5], device='cuda', dtype=torch.bfloat16), img_ids=r(64, 3), txt_ids=r(32, 3),\n"
        "    guidance=torch.tensor([3.5], device='cuda', dtype=torch.bfloat16))\n"
        "with torch.no_grad():\n    expected = stock(**inputs).sample\n"
        f"w = {load(tmp_path / 'f.safetensors')}\n"
        "with torch.device('meta'):\n    mine = F(**config)\n"
        "mine.load_state_dict(w, strict=True, assign=True); mine.eval()\n"
        "with torch.no_grad():\n    got = mine(**inputs).sample"
    )
    assert kernel.run("torch.equal(got, expected)")
    private = kernel.run("[(n, list(t.shape)) for n, t in w.items() if t.nbytes > 100_000 and not is_cow(t)]")
    assert private == []


def test_a_training_step_runs_on_private_weights(kernel, net):
    kernel.run(f"m = net({load(net, 'private')}).requires_grad_(True); o = torch.optim.SGD(m.parameters(), lr=0.1)")
    kernel.run("m(x).square().mean().backward(); o.step(); torch.cuda.synchronize()")
    assert kernel.run(f"same({load(net)}, {str(net)!r})")


def test_killing_a_kernel_while_it_fills_leaves_nothing_wrong(kernel, tmp_path):
    file = write(tmp_path / "m.safetensors", [(8192, 8192)] * 12)  # three blocks
    kernel.run(
        "import nbcache.client.device as device, signal\n"
        "original = device.Device._blocks\n"
        "def blocks(self, *rest):\n"
        "    for number, block in enumerate(original(self, *rest)):\n"
        "        if number == 2:\n            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield block\n"
        "device.Device._blocks = blocks"
    )
    with pytest.raises((AssertionError, RemoteError)):
        kernel.run(f"w = {load(file)}")
    eventually(lambda: leases() == [])
    with Interpreter() as other:
        other.run(KERNEL)
        other.run(f"w = {load(file)}")
        assert other.run(f"same(w, {str(file)!r})")


def test_a_killed_kernel_leaves_a_right_slab(kernel, path):
    kernel.run(f"w = {load(path)}")
    kernel.begin("while True:\n    w['t00007'] @ w['t00007'].T")
    kernel.kill()
    eventually(lambda: leases() == [("resident", 0)])
    with Interpreter() as other:
        other.run(KERNEL)
        other.run(f"w = {load(path)}")
        assert other.run("w.hit")
        assert other.run(f"same(w, {str(path)!r})")


def test_kernels_compute_on_when_the_daemon_is_killed(kernel, path):
    kernel.run(f"w = {load(path)}")
    os.kill(nbcache.status().pid, signal.SIGKILL)
    assert kernel.run(f"same(w, {str(path)!r})")
    kernel.run(f"v = {load(path)}")
    assert kernel.run(f"not v.hit and same(v, {str(path)!r}) and same(w, {str(path)!r})")


def test_a_dataloader_and_a_pool_neither_break_nor_prolong_a_lease(kernel, path, tmp_path):
    kernel.run(f"w = {load(path)}")
    (tmp_path / "worker.py").write_text("def total(w):\n    return w.hit, float(w['t00007'].float().sum())\n")
    kernel.run("d = torch.utils.data.DataLoader(torch.arange(8), num_workers=2); seen = [int(i) for i in d]")
    assert kernel.run("seen") == list(range(8))
    kernel.run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import worker, multiprocess")
    kernel.run(f"os.environ['PYTHONPATH'] = {str(tmp_path)!r} + os.pathsep + os.environ['PYTHONPATH']")
    kernel.run("p = multiprocess.get_context('spawn').Pool(1); answer = p.apply(worker.total, (w,)); p.close(); p.join()")
    assert kernel.run("answer == (True, float(w['t00007'].float().sum()))")
    kernel.run("del w; gc.collect()")
    eventually(lambda: leases() == [("resident", 0)])


def test_a_kernel_without_a_visible_gpu_loads_to_the_cpu(environment, path):
    with Interpreter(CUDA_VISIBLE_DEVICES="") as kernel:
        kernel.run("import nbcache, torch\nfrom safetensors.torch import load_file")
        kernel.run(f"w = nbcache.load({str(path)!r}); s = load_file({str(path)!r})")
        assert kernel.run("str(w.device)") == "cpu"
        assert kernel.run("all(torch.equal(w[n], s[n]) for n in s)")


def test_a_gpu_named_by_uuid_is_the_same_slab(kernel, path):
    kernel.run(f"w = {load(path)}")
    (uuid,) = [slab.uuid for entry in nbcache.status().entries for slab in entry.devices]
    with Interpreter(CUDA_VISIBLE_DEVICES=uuid) as other:
        other.run(KERNEL)
        other.run(f"w = {load(path)}")
        assert other.run("w.hit")
    assert len(leases()) == 1


@pytest.mark.alone
def test_a_slab_that_cannot_fit_says_who_holds_what(kernel, tmp_path):
    file = write(tmp_path / "m.safetensors", [(8192, 8192)] * 8)
    kernel.run("free = torch.cuda.mem_get_info()[0]; hog = torch.empty(free - (600 << 20), dtype=torch.uint8, device='cuda')")
    with pytest.raises(RemoteError, match=r"DeviceMemoryFull: GPU GPU-\S+ full: .* needs 1\.1 GB"):
        kernel.run(f"w = {load(file)}")
    assert leases() == []


@pytest.mark.alone
def test_an_idle_slab_gives_way_to_a_load_that_does_not_fit(kernel, tmp_path):
    files = [write(tmp_path / f"{n}.safetensors", [(8192, 8192)] * 8, seed=n) for n in range(2)]
    kernel.run(f"w = {load(files[0])}; del w; gc.collect()")
    kernel.run("free = torch.cuda.mem_get_info()[0]; hog = torch.empty(free - (600 << 20), dtype=torch.uint8, device='cuda')")
    kernel.run(f"w = {load(files[1])}")
    assert [e.name for e in nbcache.status().entries if e.devices] == [str(files[1])]


def test_the_daemon_has_no_context(kernel, path):
    kernel.run(f"w = {load(path)}")
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    pids = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    assert nbcache.status().pid not in pids
    assert "libtorch" not in Path(f"/proc/{nbcache.status().pid}/maps").read_text()


@pytest.mark.alone
def test_a_full_gpu_in_a_cell_gets_a_hint(environment, path):
    with Kernel() as kernel:
        kernel.run("import torch\n%load_ext nbcache")
        kernel.run(f"%load_weights {path} --device cuda --as w\ndel w")
        outcome = kernel.try_run("x = torch.empty(1 << 50, dtype=torch.uint8, device='cuda')")
        assert "OutOfMemoryError" in outcome.error
        assert "%weights free-gpu" in outcome.stdout
        assert "freed" in kernel.run("%weights free-gpu")
        assert leases() == []
