"""The whole path to a GPU, over the emulated driver: real daemon, real kernels, CPU tensors standing for device ones.

What torch does on a real GPU (copy-on-write, streams) is tested in tests/gpu.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nbcache
from tests.support.checkpoints import write_checkpoint
from tests.support.kernels import WITH_SAME, Interpreter, RemoteError
from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path):
    return write_checkpoint(tmp_path / "model.safetensors", sizes=((3000, 1000), (7,), (), (3, 0), (5000, 700), (64, 64)))


def slabs():
    return [(slab.uuid, slab.dtype, slab.state, slab.leases) for entry in nbcache.status().entries for slab in entry.devices]


def entry():
    (only,) = nbcache.status().entries
    return only


@pytest.mark.parametrize("share", ["cow", "readonly", "private"])
def test_a_gpu_load_equals_a_stock_load(kernel, path, share):
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share={share!r})")
    assert kernel.run(f"same(w, {str(path)!r})")
    assert kernel.run("w.hit") is False
    assert entry().host_kind == "pinned"
    assert [slab[2] for slab in slabs()] == ["resident"]


def test_the_second_kernel_maps_what_the_first_filled(kernel, path):
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
    kernel.kill()
    eventually(lambda: slabs()[0][3] == 0)
    with Interpreter() as second:
        second.run(WITH_SAME)
        second.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
        assert second.run("w.hit") is True
        assert second.run(f"same(w, {str(path)!r})")
        assert slabs()[0][3] == 1


def test_the_lease_on_a_slab_ends_with_its_last_tensor(kernel, path):
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly'); kept = w['layer.0']; del w; gc.collect()")
    assert slabs()[0][3] == 1
    kernel.run("del kept; gc.collect()")
    eventually(lambda: slabs()[0][3] == 0)


def test_private_weights_hold_no_lease(kernel, path):
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='private'); gc.collect()")
    assert kernel.run("w.private_bytes == w.nbytes")
    eventually(lambda: [slab[3] for slab in slabs()] == [0])


SLOW_TO_UNMAP = """
import threading
from tests.support.emulated import EmulatedMap
gate, closing = threading.Event(), EmulatedMap.close
EmulatedMap.close = lambda self: (gate.wait(60), closing(self))[1]
def leases():
    return [slab.leases for entry in nbcache.status().entries for slab in entry.devices]
"""


def test_private_weights_are_there_before_their_slab_is_unmapped(kernel, path):
    """Whoever asks the daemon next, in that process, waits for it."""
    kernel.run(SLOW_TO_UNMAP)
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='private')")
    assert kernel.run(f"same(w, {str(path)!r}), 'nbcache-end' in [each.name for each in threading.enumerate()]") == [True, True]
    assert slabs()[0][3] == 1
    kernel.run("threading.Timer(0.3, gate.set).start()")
    assert kernel.run("leases(), gate.is_set()") == [[0], True]
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='private'); freed = nbcache.free_gpu()")
    assert kernel.run("leases(), w.hit") == [[], True]


def test_a_cast_has_a_slab_of_its_own_and_the_files_own_dtype_has_not(kernel, path):
    load = f"nbcache.load({str(path)!r}, device='cuda', share='readonly', dtype="
    assert kernel.run(f"same({load}'bfloat16'), {str(path)!r}, torch.bfloat16)")
    assert kernel.run(f"same({load}torch.float32), {str(path)!r}, torch.float32)")
    assert sorted(slab[1] for slab in slabs()) == ["", "BF16"]


@pytest.mark.parametrize("dtype", ["", "dtype=torch.bfloat16"])
def test_an_entry_of_several_blocks_of_which_the_last_is_padding(kernel, tmp_path, dtype):
    """Four segments of 20 MiB, of which the last holds 1.5 MiB, in blocks of 64 and 16 MiB."""
    path = write_checkpoint(tmp_path / "m.safetensors", sizes=(*((19, 1 << 17),) * 6, (3, 1 << 17)))
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly', {dtype})")
    assert kernel.run(f"same(w, {str(path)!r}, {dtype})")
    assert kernel.run("w.hit") is False
    assert nbcache.status().host.used_bytes >= 80 << 20
    assert [slab[2] for slab in slabs()] == ["resident"]


def test_each_gpu_has_a_slab_of_its_own(kernel, path):
    for number in range(2):
        kernel.run(f"w{number} = nbcache.load({str(path)!r}, device='cuda:{number}', share='readonly')")
    assert sorted(slab[0] for slab in slabs()) == ["GPU-emulated-0", "GPU-emulated-1"]
    assert [device.slab_bytes > 0 for device in nbcache.status().devices] == [True, True]


def test_a_gpu_that_does_not_exist_is_an_error(kernel, path):
    with pytest.raises(RemoteError, match=r"InvalidOption: device cuda:7: there are 2 GPUs"):
        kernel.run(f"nbcache.load({str(path)!r}, device='cuda:7')")


@pytest.mark.parametrize("order", [("cpu", "cuda"), ("cuda", "cpu")])
def test_host_copies_of_both_kinds_are_made_from_each_other(kernel, path, order):
    """The file is read once: it may be gone before the second copy is made."""
    for number, device in enumerate(order):
        if number:
            path.rename(path.with_suffix(".moved"))
        kernel.run(
            "with warnings.catch_warnings():\n"
            "    warnings.simplefilter('ignore')\n"
            f"    w{number} = nbcache.load({str(path)!r}, device={device!r}, share='readonly')"
        )
        assert kernel.run(f"same(w{number}, {str(path if not number else path.with_suffix('.moved'))!r})")
    assert entry().host_kind == "both"


def test_a_saved_entry_goes_to_the_gpu(kernel):
    kernel.run("nbcache.put('kept', {'a': torch.arange(5), 'b': torch.ones(2, 2)}).release()")
    assert kernel.run("nbcache.load('kept', device='cuda', share='readonly')['a'].tolist()") == [0, 1, 2, 3, 4]


def test_free_gpu_drops_idle_slabs_alone_and_the_next_load_fills_from_the_host(kernel, path, tmp_path):
    other = write_checkpoint(tmp_path / "other.safetensors", seed=1)
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
    kernel.run(f"nbcache.load({str(other)!r}, device='cuda', share='readonly'); gc.collect()")
    freed = nbcache.free_gpu()
    assert freed.names == (str(other),)
    assert [slab[3] for slab in slabs()] == [1]
    kernel.run(f"del w; gc.collect(); v = nbcache.load({str(other)!r}, device='cuda', share='readonly')")
    assert kernel.run(f"same(v, {str(other)!r})")


def test_idle_slabs_give_way_when_another_does_not_fit(emulated, monkeypatch, tmp_path):
    monkeypatch.setenv("NBCACHE_TEST_GPU_BYTES", str(50 << 20))
    paths = [write_checkpoint(tmp_path / f"{n}.safetensors", seed=n, sizes=((2500, 2000),)) for n in range(3)]
    with Interpreter() as kernel:
        kernel.run(WITH_SAME)
        for path in paths[:2]:
            kernel.run(f"nbcache.load({str(path)!r}, device='cuda', share='readonly'); gc.collect()")
        assert len(slabs()) == 2
        kernel.run(f"w = nbcache.load({str(paths[2])!r}, device='cuda', share='readonly')")
        assert kernel.run(f"same(w, {str(paths[2])!r})")
        resident = {e.name: len(e.devices) for e in nbcache.status().entries}
        assert resident == {str(paths[0]): 0, str(paths[1]): 1, str(paths[2]): 1}


def test_a_full_gpu_says_who_holds_what(emulated, monkeypatch, tmp_path):
    monkeypatch.setenv("NBCACHE_TEST_GPU_BYTES", str(50 << 20))
    paths = [write_checkpoint(tmp_path / f"{n}.safetensors", seed=n, sizes=((2500, 2000),)) for n in range(3)]
    with Interpreter() as kernel:
        kernel.run(WITH_SAME)
        for number, path in enumerate(paths[:2]):
            kernel.run(f"w{number} = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
        with pytest.raises(RemoteError, match=rf"DeviceMemoryFull: GPU GPU-emulated-0 full: .*used by process {kernel.pid}"):
            kernel.run(f"nbcache.load({str(paths[2])!r}, device='cuda', share='readonly')")
        assert len(slabs()) == 2


def test_gpu_keep_zero_drops_a_slab_with_its_last_lease(emulated, monkeypatch, path):
    monkeypatch.setenv("NBCACHE_GPU_KEEP_S", "0")
    with Interpreter() as kernel:
        kernel.run(WITH_SAME)
        kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
        assert len(slabs()) == 1
        kernel.run("del w; gc.collect()")
        eventually(lambda: not slabs())


def test_a_low_gpu_loses_its_idle_slabs(emulated, monkeypatch, path):
    monkeypatch.setenv("NBCACHE_GPU_LOW_WATERMARK", "2TB")
    with Interpreter() as kernel:
        kernel.run(WITH_SAME)
        kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
        assert len(slabs()) == 1
        kernel.run("del w; gc.collect()")
        eventually(lambda: not slabs(), timeout_s=15)


@pytest.mark.parametrize("failure", ["export", "import"])
def test_where_memory_cannot_be_shared_weights_are_copied_with_one_warning(kernel, path, failures, failure):
    failures.write_text(json.dumps([failure]))
    kernel.run("caught = warnings.catch_warnings(record=True); log = caught.__enter__(); warnings.simplefilter('always')")
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
    assert kernel.run(f"same(w, {str(path)!r})")
    assert kernel.run("[str(w.message) for w in log if w.category.__name__ == 'NoSharedGpuMemory']") == [
        f"no shared GPU memory: emulated: {failure} refused; copying to cuda"
    ]
    assert all(slab[2] != "filling" for slab in slabs())


def test_a_copy_that_fails_half_way_leaves_no_slab_and_the_next_load_is_right(kernel, path, failures):
    failures.write_text(json.dumps(["copy:1"]))
    kernel.run(f"warnings.simplefilter('ignore'); w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
    assert kernel.run(f"same(w, {str(path)!r})")
    eventually(lambda: not slabs())
    failures.unlink()
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
    assert kernel.run(f"same(w, {str(path)!r})")
    assert [slab[2] for slab in slabs()] == ["resident"]


STOP_BEFORE_COMMIT = """
from nbcache.client.session import Session
from nbcache.protocol import messages as m
real_send = Session.send
def send(self, message, descriptors=()):
    if isinstance(message, m.Commit):
        import time
        time.sleep(600)
    real_send(self, message, descriptors)
Session.send = send
"""


def test_a_filler_that_dies_is_replaced_by_who_waits(emulated, path):
    """I2, I3: two kernels want one slab; the first is killed while it fills; the second takes over."""
    with Interpreter() as first, Interpreter() as second:
        for kernel in (first, second):
            kernel.run(WITH_SAME)
        first.run(STOP_BEFORE_COMMIT)
        first.begin(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
        eventually(lambda: _running() and [slab[2] for slab in slabs()] == ["filling"])
        second.begin(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
        eventually(lambda: _waits(second.pid))
        assert [slab[2] for slab in slabs()] == ["filling"]
        first.kill()
        second.finish()
        assert second.run("w.hit") is False
        assert second.run(f"same(w, {str(path)!r})")
        assert [(slab[2], slab[3]) for slab in slabs()] == [("resident", 1)]


def _running() -> bool:
    try:
        nbcache.status()
    except nbcache.NBCacheError:
        return False
    return True


def _waits(pid: int) -> bool:
    """Whether a process has a socket open: its connection, for it has no other."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since the listing
            if "socket" in os.readlink(f"/proc/{pid}/fd/{fd}"):
                return True
    return False


def test_eight_kernels_fill_one_slab(emulated, path, runtime_dir):
    kernels = [Interpreter() for _ in range(4)]
    try:
        for kernel in kernels:
            kernel.__enter__()
            kernel.begin(WITH_SAME)
        for kernel in kernels:
            kernel.finish()
            kernel.begin(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
        for kernel in kernels:
            kernel.finish()
            assert kernel.run(f"same(w, {str(path)!r})")
        assert [(slab[2], slab[3]) for slab in slabs()] == [("resident", len(kernels))]
        assert (runtime_dir / "daemon.log").read_text().count("staging ") == 1
    finally:
        for kernel in kernels:
            kernel.close()


def test_kernels_keep_their_slab_when_the_daemon_is_killed(kernel, path):
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
    os.kill(nbcache.status().pid, signal.SIGKILL)
    assert kernel.run(f"same(w, {str(path)!r})")
    kernel.run(f"v = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
    assert kernel.run(f"same(v, {str(path)!r}) and not v.hit")


def test_a_file_that_is_truncated_while_it_is_read_leaves_nothing(kernel, path):
    kernel.run(
        "import nbcache.client.fill as fill\n"
        "original = fill.describe\n"
        "def describe(checkpoint):\n"
        "    found = original(checkpoint)\n"
        f"    os.truncate({str(path)!r}, 5000)\n"
        "    return found\n"
        "fill.describe = describe"
    )
    with pytest.raises(RemoteError, match="CheckpointChanged"):
        kernel.run(f"nbcache.load({str(path)!r}, device='cuda', share='readonly')")
    assert nbcache.status().entries == ()


def test_weights_pickled_to_a_spawned_worker_attach_to_the_same_slab(kernel, path, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("def total(w):\n    return {n: t.double().sum().item() for n, t in w.items()}, w.hit\n")
    kernel.run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import worker, multiprocess")
    kernel.run(f"os.environ['PYTHONPATH'] += os.pathsep + {str(tmp_path)!r}")
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda:0', share='readonly')")
    pool = (
        "pool = multiprocess.get_context('spawn').Pool(1); answer = pool.apply(worker.total, (w,)); pool.close(); pool.join()"
    )
    totals, hit = kernel.run(pool + "\nanswer")
    stock = load_file(path)
    assert hit
    assert totals == {name: tensor.double().sum().item() for name, tensor in stock.items()}
    eventually(lambda: [slab[3] for slab in slabs()] == [1])


def test_a_forked_child_neither_ends_nor_prolongs_the_lease(kernel, path):
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
    child = kernel.run("child = os.fork()\nif not child:\n    del w; gc.collect(); import time; time.sleep(600)\nchild")
    try:
        assert [slab[3] for slab in slabs()] == [1]
        kernel.kill()
        eventually(lambda: [slab[3] for slab in slabs()] == [0])
    finally:
        os.kill(child, signal.SIGKILL)


def test_loading_warm_on_the_command_line_makes_the_pinned_copy(emulated, path):
    from nbcache.client import api

    status, hit = api.stage(str(path))
    assert (status.host_kind, hit) == ("pinned", False)
    assert api.stage(str(path))[1] is True


def test_all_dtypes_reach_the_gpu(kernel, tmp_path):
    names = [
        "bfloat16", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "bool", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    ]  # fmt: skip
    names += ["float8_e8m0fnu"] if hasattr(torch, "float8_e8m0fnu") else []
    tensors = {name: torch.randint(0, 2, (5, 8), dtype=torch.uint8).to(getattr(torch, name)) for name in names}
    save_file(tensors, tmp_path / "all.safetensors")
    kernel.run(f"w = nbcache.load({str(tmp_path / 'all.safetensors')!r}, device='cuda', share='readonly')")
    raw = f"s = load_file({str(tmp_path / 'all.safetensors')!r})"
    kernel.run(raw)
    assert kernel.run(
        "all(w[n].dtype == s[n].dtype and torch.equal(w[n].view(torch.uint8), s[n].view(torch.uint8)) for n in s)"
    )
