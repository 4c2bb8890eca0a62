"""The kernelspec: shipped in the wheel, found by Jupyter, and a kernel of it knows the magics without being told."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import ipykernel
import pytest
from jupyter_client.kernelspec import KernelSpecManager, find_kernel_specs

from nbcache.jupyter import encryption
from tests.support.checkpoints import write_checkpoint
from tests.support.kernels import Kernel
from tests.support.zygotes import is_forked, zygote, zygote_environment

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "kernelspec"
FILES = {"kernel.json", "logo-32x32.png", "logo-64x64.png", "logo-svg.svg"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(REPOSITORY)], check=True, capture_output=True)
    (path,) = folder.glob("nbcache-*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_wheel_ships_the_kernelspec(wheel):
    prefix = "data/share/jupyter/kernels/nbcache/"
    shipped = {name.partition(prefix)[2]: wheel.read(name) for name in wheel.namelist() if prefix in name}
    assert shipped == {path.name: path.read_bytes() for path in SOURCE.iterdir()}
    assert shipped.keys() == FILES


def test_wheel_ships_the_protocol_the_types_and_the_pages_of_help(wheel):
    pages = {f"nbcache/guide/{path.name}" for path in (REPOSITORY / "nbcache" / "guide").glob("*.md")}
    assert len(pages) > 5
    assert {"nbcache/protocol/PROTOCOL.md", "nbcache/py.typed", *pages} <= set(wheel.namelist())


def test_jupyter_finds_it_as_installed():
    folder = Path(find_kernel_specs()["nbcache"])
    assert folder.is_relative_to(sys.prefix)
    assert {path.name for path in folder.iterdir()} == FILES
    spec = KernelSpecManager().get_kernel_spec("nbcache")
    assert spec.to_dict() | json.loads((SOURCE / "kernel.json").read_text()) == spec.to_dict()
    assert spec.metadata["debugger"] is True


@pytest.mark.parametrize("side", [32, 64])
def test_logos_have_the_size_they_are_named_for(side):
    head = (SOURCE / f"logo-{side}x{side}.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", head[16:24]) == (side, side)


def test_a_kernel_of_it_knows_the_magics(runtime_dir, tmp_path):
    path = write_checkpoint(tmp_path / "model.safetensors")
    with Kernel("nbcache") as kernel:
        assert kernel.try_run("%weights").error.startswith("UsageError: no daemon runs")
        assert "4 tensors" in kernel.run(f"%load_weights {path} --device cpu --as loaded")
        assert "model.safetensors" in kernel.run("%weights")
        kernel.restart()
        assert "(cached, " in kernel.run(f"%load_weights {path} --device cpu --as loaded")


def test_a_kernel_of_it_encrypts_where_that_is_required(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "specs" / "nbcache")
    with zygote_environment(tmp_path, NBCACHE_PRELOAD=""):
        kernel = Kernel("nbcache", tmp_path / "specs")
        if not hasattr(kernel._kernel, "transport_encryption") or ipykernel.version_info[:2] < encryption.FIRST_ABLE:
            kernel.close()
            pytest.skip(f"neither ipykernel {ipykernel.__version__} nor its client encrypts, or one of them does not")
        kernel._kernel.transport_encryption = "required"
        with kernel:
            for is_second in (False, True):
                assert is_forked(kernel) is is_second
                connection = json.loads(Path(kernel._kernel.connection_file).read_text())
                assert connection["curve_secretkey"]
                look = "get_ipython().kernel.parent.shell_socket.getsockopt(__import__('zmq').CURVE_SERVER)"
                assert kernel.run(look) == "1"
                zygote()
                kernel.restart()


@pytest.mark.parametrize(
    ("version", "connection", "ends"),
    [
        ((7, 2, 0), '{"curve_secretkey": "k"}', True),
        ((7, 2, 0), '{"key": "k"}', False),
        ((7, 2, 0), "no json", False),
        ((7, 3, 0), '{"curve_secretkey": "k"}', False),
    ],
)
def test_a_kernel_that_has_no_use_for_keys_ends_and_says_why(tmp_path, monkeypatch, version, connection, ends):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(ipykernel._version, "version_info", version)
    (tmp_path / "k.json").write_text(connection)
    encryption.end_if_unable(SimpleNamespace())
    encryption.end_if_unable(
        SimpleNamespace(kernel=SimpleNamespace(parent=SimpleNamespace(abs_connection_file=str(tmp_path / "k.json"))))
    )
    assert ended == [1] * ends


def test_a_kernel_without_it_does_not(runtime_dir):
    with Kernel("python3") as kernel:
        assert "not found" in kernel.try_run("%weights").error
