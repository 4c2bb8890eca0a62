"""Forked kernels on a GPU: a context of their own, memory that is free again, a context made ahead.

Run on a GPU host: ``make gpu``.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import psutil
import pytest
import torch

from nbcache.client.session import stop_daemon
from nbcache.memory.driver import CudaDriver
from tests.support.gpu import require_gpu
from tests.support.kernels import Kernel
from tests.support.waiting import eventually
from tests.support.zygotes import is_forked, kernel_pid, start_zygote, write_specs, zygote, zygote_environment

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = "import torch\nsquare = torch.ones(512, 512, device='cuda')\nfloat((square @ square)[0, 0])"
MIB = 1 << 20


@pytest.fixture(scope="session", autouse=True)
def gpu():
    require_gpu()


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A zygote's surroundings; it preloads what is installed of the libraries that ask for a GPU when they are imported."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    with zygote_environment(tmp_path, NBCACHE_PRELOAD="cupy,accelerate,transformers,peft,diffusers"):
        yield
        stop_daemon()


@pytest.fixture
def specs(tmp_path):
    return write_specs(tmp_path / "specs")


def free_bytes() -> int:
    driver = CudaDriver()
    return driver.free_bytes(driver.gpus()[0].uuid)


@pytest.mark.alone
@pytest.mark.timeout(600)
@pytest.mark.parametrize("restarts", [10, pytest.param(100, marks=pytest.mark.long)])
def test_a_zygote_holds_no_gpu_memory_and_a_forked_kernel_has_a_gpu(environment, specs, restarts):
    before = free_bytes()
    start_zygote(specs)
    eventually(lambda: free_bytes() > before - 16 * MIB, 30)  # the probe's context is gone
    with Kernel("nbcache", specs) as kernel:
        assert is_forked(kernel)
        assert kernel.run(PRODUCT) == "512.0"
        for _ in range(restarts):
            kernel.restart()
            assert is_forked(kernel)
            assert kernel.run(PRODUCT) == "512.0"
    eventually(lambda: free_bytes() > before - 16 * MIB, 30)


@pytest.mark.alone
def test_gpu_memory_is_free_again_before_the_next_kernel_needs_it(environment, specs):
    start_zygote(specs)
    total = torch.cuda.get_device_properties(0).total_memory
    with Kernel("nbcache", specs) as kernel:
        for _ in range(3):
            assert is_forked(kernel)
            kernel.run(f"import torch; kept = torch.empty({int(total * 0.6)}, dtype=torch.uint8, device='cuda'); kept.fill_(1)")
            kernel.run("torch.cuda.synchronize()")
            kernel.restart()  # twice as much would not fit


def test_weights_stay_on_the_gpu_across_restarts(environment, specs, tmp_path):
    from safetensors.torch import save_file

    save_file({f"t{i}": torch.full((512, 512), float(i)) for i in range(20)}, tmp_path / "m.safetensors")
    load = f"import nbcache; w = nbcache.load({str(tmp_path / 'm.safetensors')!r}, device='cuda'); w.hit, float(w['t7'].mean())"
    start_zygote(specs)
    with Kernel("nbcache", specs) as kernel:
        assert kernel.run(load) == "(False, 7.0)"
        for _ in range(3):
            kernel.restart()
            assert is_forked(kernel)
            assert kernel.run(load) == "(True, 7.0)"
            assert kernel.run("w.private_bytes") == "0"


def test_the_gpus_that_a_kernel_is_to_see(environment, specs):
    start_zygote(specs)
    with Kernel("nbcache", specs, CUDA_VISIBLE_DEVICES="") as kernel:
        assert is_forked(kernel)
        assert kernel.run("import torch; torch.cuda.is_available(), torch.cuda.device_count()") == "(False, 0)"
    with Kernel("nbcache", specs, CUDA_VISIBLE_DEVICES="0") as kernel:
        assert is_forked(kernel)
        assert kernel.run("import torch; torch.cuda.device_count()") == "1"
        assert kernel.run(PRODUCT) == "512.0"


@pytest.mark.alone
@pytest.mark.parametrize("by", ["the environment", "a file"])
def test_standby_has_a_context_already_and_gives_way_to_other_gpus(environment, specs, monkeypatch, tmp_path, by):
    if by == "a file":
        monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "config"))
        (tmp_path / "config").mkdir()
        (tmp_path / "config" / "jupyter_nbcache_config.py").write_text("c.NBCache.standby = 'cuda'")
    else:
        monkeypatch.setenv("NBCACHE_STANDBY", "cuda")
    start_zygote(specs)
    before = free_bytes()
    waiting = psutil.Process(zygote().pid).children()[0].pid
    eventually(lambda: free_bytes() < before + 1 and _has_gpu_open(waiting), 60)
    with Kernel("nbcache", specs) as kernel:
        assert kernel_pid(kernel) == waiting
        assert kernel.run("import torch; torch.cuda.is_initialized()") == "True"
        assert kernel.run(PRODUCT) == "512.0"
    zygote()
    with Kernel("nbcache", specs, CUDA_VISIBLE_DEVICES="0") as kernel:
        assert is_forked(kernel)
        assert kernel.run("import torch; torch.cuda.is_initialized()") == "False"
        assert kernel.run(PRODUCT) == "512.0"


def _has_gpu_open(pid: int) -> bool:
    """Whether a process has a GPU's device file open, which a context needs."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if re.match(r"/dev/nvidia\d", str(link.readlink())):
                return True
    return False


def answers(specs: Path, code: str) -> set[str]:
    """What a forked kernel and an ordinary one say, each before and after a restart."""
    start_zygote(specs)
    found = set()
    for spec in ("nbcache", "stock"):
        with Kernel(spec, specs) as kernel:
            for _ in range(2):
                assert is_forked(kernel) is (spec == "nbcache")
                found.add(kernel.run(code))
                kernel.restart()
    return found


def test_a_forked_kernel_computes_what_an_ordinary_one_does(environment, specs):
    code = "import torch\ntorch.manual_seed(3)\nx = torch.randn(2048, 2048, device='cuda')\n(x @ x).double().sum().item()"
    assert len(answers(specs, code)) == 1


def test_a_forked_kernel_asks_nvml_as_an_ordinary_one_does(environment, specs):
    """The zygote has started NVML, whose thread no fork has."""
    code = (
        "import pynvml\npynvml.nvmlInit()\nhandle = pynvml.nvmlDeviceGetHandleByIndex(0)\n"
        "pynvml.nvmlDeviceGetMemoryInfo(handle).total, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetCount()"
    )
    assert len(answers(specs, code)) == 1
