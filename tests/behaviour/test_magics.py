"""The magics in real kernels, restarted for real."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import nbcache
from tests.support.checkpoints import raw_checkpoint, write_checkpoint
from tests.support.kernels import REPOSITORY, Kernel, Outcome
from tests.support.waiting import eventually

DIGEST = """
import hashlib, torch
hashlib.sha256(b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in w.values())).hexdigest()
"""
LEASES = "import nbcache\nsum(entry.leases for entry in nbcache.status().entries)"


@pytest.fixture
def checkpoint(runtime_dir: Path, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors")


def assert_usage_error(outcome: Outcome, *words: str) -> None:
    """One line, on the error stream, and no traceback."""
    assert outcome.traceback == ""
    assert outcome.error.startswith("UsageError: ")
    assert outcome.stderr.count("\n") == 1
    assert outcome.stderr.startswith("UsageError: ")
    for word in words:
        assert word in outcome.stderr


def test_load_weights(checkpoint, tmp_path):
    spaced = tmp_path / "a folder" / "it's.safetensors"
    spaced.parent.mkdir()
    write_checkpoint(spaced, seed=1)
    expected = load_file(checkpoint)["layer.0"].tolist()
    with Kernel() as kernel:
        assert kernel.run("%load_ext nbcache") == ""
        assert kernel.run(f"w = %load_weights {checkpoint}") == ""
        assert json.loads(kernel.run("print(w['layer.0'].tolist())")) == expected
        assert kernel.run(f"%load_weights {checkpoint}") == f"<Weights '{checkpoint}': 4 tensors, 16.4 kB on cpu, cow>"

        line = kernel.run(f"%load_weights {checkpoint} --as v")
        assert line.startswith(f"{tmp_path.name}/model.safetensors: 4 tensors, 16.4 kB on cpu in ")
        assert line.endswith(" ms (cached, 0 B private)")
        assert kernel.run("v.hit") == "True"

        line = kernel.run(f"%load_weights {checkpoint} --device cpu --share private --dtype bfloat16 --as p")
        assert line.endswith("kB private)")
        assert kernel.run("p['layer.0'].dtype, p.private_bytes == p.nbytes") == "(torch.bfloat16, True)"

        kernel.run(f"path = {str(spaced)!r}")
        assert kernel.run(f'u = %load_weights "{spaced}"\nlen(u)') == "4"
        assert kernel.run('u = %load_weights "{path}"\nlen(u)') == "4"
        assert kernel.run("u.name") == repr(str(spaced))
        assert kernel.run("%cd -q " + str(tmp_path) + "\nr = %load_weights model.safetensors\nr.hit") == "True"


def test_errors_are_one_line(checkpoint):
    with Kernel() as kernel:
        kernel.run("%load_ext nbcache")
        kernel.run(f"%load_weights {checkpoint} --as w")
        assert_usage_error(kernel.try_run("%load_weights /nix.safetensors"), "/nix.safetensors: no such file or folder")
        assert_usage_error(kernel.try_run("%load_weights flux"), "flux: nothing is cached under that name")
        assert_usage_error(kernel.try_run("%load_weights"), "NAME")
        assert_usage_error(kernel.try_run(f"%load_weights {checkpoint} --share all"), "all")
        assert_usage_error(kernel.try_run(f"%load_weights {checkpoint} --device tpu"), "device 'tpu'")
        assert_usage_error(kernel.try_run(f"%load_weights {checkpoint} --dtype int3"), "dtype 'int3'")
        assert_usage_error(kernel.try_run(f"%load_weights {checkpoint} --as 1x"), "1x: not the name of a variable")
        assert_usage_error(kernel.try_run("%save_weights name"), "NAME EXPR")
        assert_usage_error(kernel.try_run("%save_weights name 3"), "int; nbcache keeps a tensor")
        assert_usage_error(kernel.try_run("%save_weights a/b w"), "cannot name a saved entry")
        kernel.run("from nbcache.checkpoints import aliases; aliases.add('mine', 'org/repo')")
        assert_usage_error(kernel.try_run("%save_weights mine w"), "nbcache alias remove mine")
        assert_usage_error(kernel.try_run(f"%weights evict {checkpoint}"), f"used by process {kernel.pid}")
        assert_usage_error(kernel.try_run("%weights evict"), "which entry?")
        assert_usage_error(kernel.try_run("%weights pin nothing"), "nothing: not cached")
        assert_usage_error(kernel.try_run("%weights burn x"), "burn")
        assert "NameError" in kernel.try_run("%save_weights name nobody").traceback  # the user's own error is shown whole
        assert kernel.run("w['layer.0'].shape") == "torch.Size([64, 64])"
        assert_usage_error(kernel.try_run(f"%load_weights {checkpoint} --as class"), "class: not the name of a variable")
    assert all(entry.leases == 0 for entry in nbcache.status().entries)


def test_weights(checkpoint):
    with Kernel(JPY_SESSION_NAME="/home/me/notebook.ipynb") as kernel:
        kernel.run("%load_ext nbcache")
        assert_usage_error(kernel.try_run("%weights"), "no daemon runs")
        kernel.run(f"%load_weights {checkpoint} --as w")
        head, columns, row = kernel.run("%weights").splitlines()
        assert head.startswith("host tier: 2.1 MB of ")
        assert columns.split() == ["name", "size", "tensors", "where", "used", "by", "idle"]
        assert "model.safetensors" in row and "16.4 kB" in row and "me/notebook.ipynb" in row
        assert kernel.run(f"%weights pin {checkpoint}") == ""
        assert kernel.run("del w\n%weights").endswith("pinned")
        assert_usage_error(kernel.try_run(f'%weights evict "{checkpoint}"'), "is pinned")
        kernel.run(f"%weights unpin {checkpoint}")
        kernel.run(f'%weights evict "{checkpoint}"')
        assert kernel.run("%weights").endswith("nothing cached")
        assert kernel.run("status = %weights\nstatus.status.entries") == "()"


def test_save_weights_across_a_restart_and_a_kill(checkpoint):
    with Kernel() as kernel:
        kernel.run("%load_ext nbcache\nimport torch\nt = torch.arange(6.).reshape(2, 3)")
        assert kernel.run("%save_weights one t").startswith("one: 1 tensor, 24 B on cpu in ")
        assert kernel.run('%save_weights nested {"a": {"x": t, "y": t.T}, "z": t[0]}').endswith("(saved)")
        kernel.run("torch.manual_seed(0)\nmodel = torch.nn.Linear(3, 2)\n%save_weights model model")
        kernel.run('%save_weights "quoted" t.sum()')
        kernel.run(f"w = %load_weights {checkpoint}")
        weight, digest = kernel.run("model.weight.tolist()"), kernel.run(DIGEST)
        first = kernel.pid
        kernel.restart()
        assert kernel.pid != first
        assert kernel.try_run("w").error.startswith("NameError")
        for _ in range(2):
            kernel.run(f"%load_ext nbcache\nw = %load_weights {checkpoint}")
            assert kernel.run("w.hit") == "True"
            assert kernel.run(DIGEST) == digest
            assert kernel.run("o = %load_weights one\no['tensor'].tolist()") == "[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]"
            assert kernel.run("n = %load_weights nested\nlist(n), n['a.y'].tolist()") == (
                "(['a.x', 'a.y', 'z'], [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])"
            )
            assert kernel.run("m = %load_weights model\nm['weight'].tolist()") == weight
            assert kernel.run("q = %load_weights quoted\nq['tensor'].item()") == "15.0"
            kernel.kill()
            eventually(lambda: sum(entry.leases for entry in nbcache.status().entries) == 0, 2)
            kernel.restart()
        kernel.run("%load_ext nbcache\nimport torch\n%save_weights one torch.ones(1)")
        assert kernel.run("o = %load_weights one\no['tensor'].tolist()") == "[1.0]"


def test_cell_outputs_hold_the_lease_until_they_are_cleared(checkpoint):
    with Kernel() as kernel:
        kernel.run(f"%load_ext nbcache\n%load_weights {checkpoint}")
        assert kernel.run(LEASES) == "1"
        kernel.run("%reset -f")
        assert kernel.run(LEASES) == "0"


def test_unload_leaves_nothing_behind(checkpoint):
    left = (
        "ip = get_ipython()\n"
        "[name for names in ip.magics_manager.magics.values() for name in names if name.endswith('weights')], "
        "[name for name in ip.magics_manager.registry if 'NBCache' in name], "
        "len([known for known in ip.configurables if 'NBCache' in type(known).__name__])"
    )
    with Kernel() as kernel:
        assert kernel.run(left) == "([], [], 0)"
        kernel.run("%load_ext nbcache")
        loaded = kernel.run(left)
        assert loaded == "(['load_weights', 'save_weights', 'weights'], ['NBCacheMagics'], 2)"
        kernel.run("%unload_ext nbcache")
        assert kernel.run(left) == "([], [], 0)"
        assert_usage_error(kernel.try_run(f"%load_weights {checkpoint}"), "`%load_weights` not found")
        kernel.run("%load_ext nbcache")
        assert kernel.run(f"w = %load_weights {checkpoint}\nlen(w)") == "4"
        kernel.run("%reload_ext nbcache")
        assert kernel.run(f"w = %load_weights {checkpoint}\nlen(w)") == "4"
        assert kernel.run(left) == loaded


def test_help(runtime_dir):
    with Kernel() as kernel:
        kernel.run("%load_ext nbcache")
        for magic, words in {
            "load_weights": ("NAME", "--as VAR", "--device", "--dtype", "--share", "Load weights from the cache"),
            "save_weights": ("NAME EXPR", "Keep tensors under a name"),
            "weights": ("evict", "pin", "unpin", "Show what is cached"),
        }.items():
            (page,) = kernel.try_run(f"%{magic}?").pages
            assert all(word in page for word in words), page
    assert not runtime_dir.exists()


def test_the_kernelspec_that_the_wheel_brings(checkpoint):
    with Kernel("kernelspec", REPOSITORY) as kernel:
        assert kernel.run(f"w = %load_weights {checkpoint}\nlen(w)") == "4"
        kernel.restart()
        assert kernel.run(f"w = %load_weights {checkpoint}\nw.hit") == "True"


def test_interrupted_load(runtime_dir, checkpoint, tmp_path):
    size = 512 << 20
    big = raw_checkpoint(tmp_path / "big.safetensors", {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    os.truncate(big, big.stat().st_size + size)
    nbcache.load(str(checkpoint), device="cpu").release()
    daemon = psutil.Process(nbcache.status().pid)
    with Kernel() as kernel:
        kernel.run("%load_ext nbcache\nimport torch, nbcache.client.api")
        sockets = len(psutil.Process(kernel.pid).net_connections("unix"))
        daemon.suspend()
        try:
            cell = kernel.begin(f"w = %load_weights {big}")
            eventually(lambda: len(psutil.Process(kernel.pid).net_connections("unix")) > sockets)
            kernel.interrupt()
            outcome = kernel.finish(cell, timeout_s=5)  # long before the load's own timeout
            assert outcome.error.startswith("KeyboardInterrupt")
            assert len(psutil.Process(kernel.pid).net_connections("unix")) == sockets
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        assert kernel.run(LEASES) == "0"
        assert kernel.run(f"w = %load_weights {big}\nlen(w['w']), w['w'][-1].item()") == f"({size}, 0)"
        assert torch.equal(nbcache.load(str(big), device="cpu")["w"][:100], torch.zeros(100, dtype=torch.uint8))


def test_loras_by_magic(runtime_dir, tmp_path):
    from tests.support.loras import Writer, flux

    write = Writer(tmp_path)
    write.diffusers("first", flux(), only="transformer")
    write.diffusers("second", flux(), rank=8, only="transformer")
    wrong = write.diffusers("wrong", flux(heads=4), only="transformer")
    with Kernel() as kernel:
        kernel.run(f"%load_ext nbcache\n%cd -q {tmp_path}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})")
        kernel.run("from tests.support.loras import flux\npipe = flux()")
        line = kernel.run("%load_lora first.safetensors pipe")
        assert line.startswith("first.safetensors: 20 modules of rank 4, ")
        assert ", injected as adapter default in " in line
        assert line.endswith("(converted)")
        line = kernel.run("%load_lora 'second.safetensors' pipe --scale 0.5")
        assert ": 20 modules of rank 8, " in line
        assert ", swapped as adapter default at 0.5 in " in line
        kernel.run("%load_lora first.safetensors pipe --adapter more")
        assert kernel.run("pipe.get_active_adapters()") == "['default', 'more']"
        kernel.run("%unload_lora pipe more")
        assert kernel.run("pipe.get_active_adapters()") == "['default']"
        kernel.run("%unload_lora pipe")
        assert kernel.run("pipe.get_list_adapters()") == "{}"
        assert_usage_error(kernel.try_run(f"%load_lora {wrong} pipe"), "wrong.safetensors", "the pipeline is as it was")
        assert_usage_error(kernel.try_run("%unload_lora pipe more"), "no adapter 'more'", "loaded: none")
        assert_usage_error(kernel.try_run("%load_lora first.safetensors nopipe"), "'nopipe' is not defined")
        assert_usage_error(kernel.try_run("%unload_lora pipe("), "pipe(: ")
        assert_usage_error(kernel.try_run("%load_lora missing.safetensors pipe"), "no such file")
