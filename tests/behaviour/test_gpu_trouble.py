"""What goes wrong on the way to a GPU: memory that runs out, entries that go meanwhile, memory that cannot be shared.

Over the emulated driver; what needs no daemon is held against the client's own parts.
"""

from __future__ import annotations

import json
import socket
import sys

import pytest
import torch

import nbcache
from nbcache.client import api, device, loading, spare
from nbcache.client import tensors as edge
from nbcache.client.fill import Grant
from nbcache.client.notices import NoSharedGpuMemory
from nbcache.client.options import Loaded, Options
from nbcache.client.session import Session
from nbcache.client.slabs import SlabMap
from nbcache.client.weights import Weights
from nbcache.errors import DeviceMemoryFull, HostMemoryFull, InvalidOption, PackageMissing, UnsupportedFormat
from nbcache.manifest import Extent, Manifest, place_tensors
from nbcache.memory.driver import Access
from nbcache.protocol import messages as m
from nbcache.protocol.wire import Channel, client_messages, daemon_messages
from tests.support.checkpoints import write_checkpoint
from tests.support.emulated import EmulatedDriver, EmulatedViews
from tests.support.kernels import Interpreter


@pytest.fixture
def path(tmp_path):
    return write_checkpoint(tmp_path / "model.safetensors")


# Without a daemon: what the client's parts leave behind


class Line:
    """A session that is never asked anything."""

    closed = False

    def close(self):
        self.closed = True


class WatchedDriver(EmulatedDriver):
    """Keeps what it mapped."""

    def __init__(self):
        super().__init__()
        self.maps = []

    def map_slab(self, *arguments):
        self.maps.append(super().map_slab(*arguments))
        return self.maps[-1]


def manifest_of(dtype: str) -> Manifest:
    return place_tensors([Extent("a", dtype, (2, 4), 0, 0, 8 * (4 if dtype == "F4" else 32) // 8, 0)], (), {})


@pytest.fixture
def driver():
    return WatchedDriver()


@pytest.fixture
def granted(driver):
    """Makes a grant of a slab."""

    def make(manifest: Manifest) -> Grant:
        fd = driver.create_slab(driver.gpus()[0].uuid, manifest.extent_bytes)
        return Grant(Line(), "k", "model", "file", True, manifest, fd)

    return make


def gpu_with(driver, views) -> device.Device:
    return device.Device(driver, driver.gpus()[0], torch.device("cpu"), views)


@pytest.mark.parametrize("share", ["cow", "private"])
def test_tensors_that_cannot_be_made_keep_no_slab_mapped(driver, granted, share):
    """Though the traceback lives, as a notebook's does."""

    class Full(EmulatedViews):
        def cow(self, *_):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        private = cow

    grant = granted(manifest_of("F32"))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        gpu_with(driver, Full()).load(lambda _: grant, None, share, None)
    assert caught.tb is not None
    assert [mapped.address for mapped in driver.maps] == [0]
    assert grant.session.closed
    assert grant.fd == -1


FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)


@pytest.mark.skipif(FLOAT4 is None, reason="this torch lacks float4")
@pytest.mark.parametrize(("stored", "wanted"), [("F32", FLOAT4), ("F4", torch.bfloat16)])
def test_a_cast_from_or_to_float4_is_refused_as_on_the_cpu_and_leaves_nothing(driver, granted, stored, wanted):
    manifest = manifest_of(stored)
    grant = granted(manifest)
    with pytest.raises(UnsupportedFormat) as caught:
        gpu_with(driver, EmulatedViews()).load(lambda _: grant, wanted, "readonly", None)
    assert grant.session.closed
    assert grant.fd == -1
    own = torch.zeros(8, dtype=torch.uint8).view(edge.TORCH_DTYPES[stored])
    with pytest.raises(UnsupportedFormat) as on_cpu:
        edge.convert({"a": own}, torch.device("cpu"), wanted, copy=False)
    assert str(caught.value) == str(on_cpu.value)


def test_cupy_arrays_without_cupy_name_the_package(driver, monkeypatch):
    manifest = manifest_of("F32")
    fd = driver.create_slab(driver.gpus()[0].uuid, manifest.extent_bytes)
    mapped = driver.map_slab(fd, manifest.extent_bytes, driver.gpus()[0], Access.READ)
    slab = SlabMap(mapped, Line(), lambda: None, manifest, 0)
    monkeypatch.setitem(sys.modules, "cupy", None)
    try:
        with pytest.raises(PackageMissing, match=r"pip install 'nbcache\[cuda13\]'"):
            slab.cupy_arrays()
    finally:
        slab.end()
        driver.close(fd)


@pytest.mark.parametrize(("where", "remedy"), [("cuda:0", "share='readonly'"), ("cpu", "device='cuda'")])
def test_weights_without_a_slab_say_how_to_get_one(where, remedy):
    loaded = Loaded({}, "k", "model", torch.device(where), manifest_of("F32"), 0, True)
    with pytest.raises(InvalidOption, match=rf"model: on {where}, without a slab; load it with {remedy}"):
        Weights(loaded, Options(where, None, "private")).cupy()


def test_a_sign_of_life_is_no_progress():
    """While another process fills there is nothing staged to tell: a user's callback may divide by the total."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    daemon, session, shares = Channel(theirs, client_messages), Session(Channel(ours, daemon_messages), 10), []
    with session:
        for message in (m.Welcome(m.PROTOCOL_VERSION, "1", 1), m.Progress(0, 0), m.Progress(1, 4), m.Progress(0, 0), m.Done()):
            daemon.send(message)
        assert isinstance(session.receive(lambda staged, total: shares.append(staged / total))[0], m.Done)
    daemon.close()
    assert shares == [0.25]


# Memory that runs out


class Spares:
    """Keeps so many things that may go."""

    nbytes = 0

    def __init__(self, count):
        self.count = count

    def let_go(self, names=None):
        return False

    def let_go_oldest(self):
        self.count -= 1
        return self.count >= 0


@pytest.fixture
def keeping(monkeypatch, runtime_dir):
    """Has this process keep so many spare things, and its loads to a GPU end with this error."""

    def keep(count, error):
        class Full:
            def load(self, *_):
                raise error

        spares = Spares(count)
        monkeypatch.setattr(edge, "EMULATED", True)
        monkeypatch.setattr(loading, "find_device", lambda _: Full())
        monkeypatch.setattr(spare, "_keepers", [spares])
        return spares

    return keep


def test_torchs_own_out_of_memory_is_told_as_device_memory_full(keeping):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nException raised from malloc")
    spares = keeping(2, error)
    with pytest.raises(DeviceMemoryFull) as caught:
        nbcache.load("model", device="cuda")
    assert spares.count == -1
    assert str(caught.value) == (
        "model: torch has no room for it on cuda (CUDA out of memory. Tried to allocate 2.00 GiB.); free the slabs that nobody "
        "uses (%weights free-gpu, nbcache free-gpu), or tensors of this process, and load it again"
    )
    assert caught.value.__cause__ is error
    assert error.__traceback__ is None  # or what was made before would live as long as this error


def test_nothing_on_the_gpu_is_let_go_for_host_memory(keeping):
    spares = keeping(1, HostMemoryFull("model: the system gives no 67108864 bytes of pinned memory"))
    with pytest.raises(HostMemoryFull, match="no 67108864 bytes of pinned memory"):
        nbcache.load("model", device="cuda")
    assert spares.count == 1


FULL_ONCE = """
from nbcache.client import spare
from tests.support.emulated import EmulatedViews

class Spares:
    nbytes = 0
    kept = [nbcache.load({other!r}, device='cuda', share='readonly')]
    def let_go(self, names=None):
        return False
    def let_go_oldest(self):
        return bool(self.kept) and (self.kept.pop().release() or True)

spare.register(Spares())
real = EmulatedViews.{step}

def full_once(self, *arguments):
    EmulatedViews.{step} = real
    raise torch.OutOfMemoryError('CUDA out of memory.')

EmulatedViews.{step} = full_once
"""


@pytest.mark.parametrize(("step", "options"), [("private", "share='private'"), ("empty", "dtype=torch.bfloat16")])
def test_when_torch_runs_out_of_memory_what_is_spare_goes_and_its_slab(kernel, path, tmp_path, step, options):
    other = write_checkpoint(tmp_path / "other.safetensors", seed=1)
    kernel.run(FULL_ONCE.format(other=str(other), step=step))
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', {options})")
    assert kernel.run(f"same(w, {str(path)!r}, {'torch.bfloat16' if step == 'empty' else 'torch.float32'})")
    assert {entry.name: len(entry.devices) for entry in nbcache.status().entries} == {str(path): 1, str(other): 0}


# What goes meanwhile, and what cannot be shared


EVICT_WHEN_OFFERED = """
from nbcache.client import loading
real = loading.acquire

def acquire(*arguments):
    found = real(*arguments)
    loading.acquire = real
    print(nbcache.evict_all())
    return found

loading.acquire = acquire
"""


def test_an_entry_that_is_evicted_between_offer_and_fill_is_read_again(kernel, path):
    api.stage(str(path))
    kernel.run(EVICT_WHEN_OFFERED)
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly', dtype=torch.bfloat16)")
    assert kernel.run(f"same(w, {str(path)!r}, torch.bfloat16)")
    assert kernel.run("loading.acquire is real")


def test_loading_warm_where_memory_cannot_be_shared_keeps_a_shared_copy_with_one_warning(emulated, path, failures):
    failures.write_text(json.dumps(["export"]))
    with pytest.warns(NoSharedGpuMemory, match="no shared GPU memory: emulated: export refused; kept in shared") as caught:
        status, hit = api.stage(str(path))
    assert (status.host_kind, hit, len(caught)) == ("shared", False, 1)
    with pytest.warns(NoSharedGpuMemory):
        assert api.stage(str(path))[1] is True


def test_a_dtype_that_is_the_files_own_needs_no_other_slab_and_no_file(emulated, tmp_path, monkeypatch):
    """There is room for one host copy, so the first file's has gone when the second is there; its slab is resident."""
    monkeypatch.setenv("NBCACHE_HOST_LIMIT", "30MB")
    one, two = (write_checkpoint(tmp_path / f"{name}.safetensors", seed, ((2000, 2500),)) for seed, name in enumerate("ab"))
    with Interpreter() as kernel:
        kernel.run("import nbcache, warnings; warnings.simplefilter('ignore')")
        kernel.run(f"held = [nbcache.load(path, device='cuda', share='readonly') for path in ({str(one)!r}, {str(two)!r})]")
        one.unlink()
        kernel.run(f"again = nbcache.load({str(one)!r}, device='cuda', share='readonly', dtype='float32')")
        assert kernel.run("again.hit") is True
        assert [[slab.dtype for slab in entry.devices] for entry in nbcache.status().entries] == [[""], [""]]


def test_what_is_copied_from_host_memory_is_not_said_to_be_read(kernel, path):
    read, copied = (f"nbcache.load({str(path)!r}, device='cuda', share='readonly')" for _ in range(2))
    assert kernel.run(f"w = {read}\n[w.hit, w.read]") == [False, True]
    kernel.run("w.release()")
    assert nbcache.free_gpu().names
    assert kernel.run(f"w = {copied}\n[w.hit, w.read]") == [False, False]
    assert kernel.run(f"v = {copied}\n[v.hit, v.read]") == [True, False]
    assert kernel.run("import nbcache.jupyter.display as d; d.summary(w, 1.0)").endswith("(copied from host memory)")
