"""``nbcache kernelspec install`` and ``remove``, as a user types them, and what is told of a kernelspec's state."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ipykernel.kernelspec import get_kernel_dict
from ipykernel.kernelspec import install as install_stock
from jupyter_client.kernelspec import KernelSpecManager

from nbcache.errors import KernelSpecError
from nbcache.jupyter.kernelspec import DISPLAY_NAME, examine, install, remove
from tests.support.kernels import REPOSITORY, Kernel
from tests.support.waiting import eventually
from tests.support.zygotes import is_forked, processes_of, start_zygote, zygote_environment


@pytest.fixture
def data_dir(runtime_dir, tmp_path, monkeypatch) -> Path:
    """The user's Jupyter folder, for the test alone."""
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def nbcache(*arguments: str, code: int = 0) -> str:
    run = subprocess.run([sys.executable, "-m", "nbcache", *arguments], capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    return run.stdout if not code else run.stderr


def test_installed_used_and_removed(data_dir, tmp_path):
    said = nbcache("kernelspec", "install", "--name", "mine", "--display-name", "Mine")
    folder = data_dir / "kernels" / "mine"
    assert said.strip() == f"installed mine in {folder}"
    assert {path.name for path in folder.iterdir()} == {"kernel.json", "logo-32x32.png", "logo-64x64.png", "logo-svg.svg"}
    document = json.loads((folder / "kernel.json").read_text())
    assert document["argv"][0] == sys.executable
    assert document["display_name"] == "Mine"
    assert document["metadata"] == {**get_kernel_dict()["metadata"], "debugger": True}
    assert document["metadata"]["supported_encryption"] == ["curve"]
    state = next(spec for spec in examine().specs if spec.name == "mine")
    assert (state.folder, state.problem) == (str(folder), "")
    assert nbcache("kernelspec", "install", "--user", "--name", "mine").startswith(f"installed mine in {folder}")  # again
    assert "one of --user" in nbcache("kernelspec", "install", "--user", "--sys-prefix", code=2)
    with Kernel("mine", PATH="/usr/bin:/bin", VIRTUAL_ENV="/elsewhere") as kernel:  # a server of another environment
        assert kernel.run("import sys; sys.executable") == repr(sys.executable)
        assert kernel.try_run("%weights").error.startswith("UsageError: no daemon runs")
    assert nbcache("kernelspec", "remove", "--name", "mine").strip() == f"removed mine from {folder}"
    assert not folder.exists()
    assert "no kernelspec is called mine" in nbcache("kernelspec", "remove", "--name", "mine", code=1)


def test_a_debugger_sees_as_much_as_in_a_kernel_that_ipykernel_installs(tmp_path, monkeypatch):
    stock = json.loads(Path(install_stock(prefix=str(tmp_path)), "kernel.json").read_text())["argv"]
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    with zygote_environment(tmp_path, NBCACHE_PRELOAD=""):
        ours = json.loads(Path(install("mine"), "kernel.json").read_text())["argv"]
        assert [word for word in ours if word.startswith("-X")] == [word for word in stock if word.startswith("-X")]
        start_zygote(tmp_path / "data" / "kernels", "mine")
        with Kernel("mine") as kernel:
            assert is_forked(kernel)
            assert kernel.run("import posixpath; posixpath.__spec__.origin == posixpath.__file__") == "True"
            assert kernel.run("import sys; sys._xoptions") == "{'frozen_modules': 'off'}"


def test_the_default_name_and_a_prefix(data_dir, tmp_path):
    document = json.loads(nbcache("kernelspec", "install", "--prefix", str(tmp_path / "env"), "--json"))
    folder = tmp_path / "env" / "share" / "jupyter" / "kernels" / "nbcache"
    assert document == {"name": "nbcache", "folder": str(folder)}
    assert json.loads((folder / "kernel.json").read_text())["display_name"] == DISPLAY_NAME


def test_the_one_that_was_installed_is_removed(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "env" / "share" / "jupyter"))  # goes before the user's own
    nbcache("kernelspec", "install", "--name", "mine", "--prefix", str(tmp_path / "env"))
    nbcache("kernelspec", "install", "--name", "mine")
    users, environments = data_dir / "kernels" / "mine", tmp_path / "env" / "share" / "jupyter" / "kernels" / "mine"
    said = nbcache("kernelspec", "remove", "--name", "mine")
    assert said.strip() == f"removed mine from {users}; there is another in {environments}"
    assert not users.exists()
    said = nbcache("kernelspec", "remove", "--name", "mine", "--user", code=1)
    assert f"no kernelspec there is called mine; there is one in {environments}" in said
    document = json.loads(nbcache("kernelspec", "remove", "--name", "mine", "--prefix", str(tmp_path / "env"), "--json"))
    assert document == {"name": "mine", "folder": str(environments), "other": None}
    assert not environments.exists()
    install("mine", prefix=str(tmp_path / "env"))
    assert remove("mine") == (str(environments), None)  # the only one there is


def test_another_kernels_name_is_left_alone(data_dir, tmp_path):
    theirs = data_dir / "kernels" / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "kernel.json").write_text('{"argv": ["sh"], "display_name": "T", "language": "sh"}')
    with pytest.raises(KernelSpecError, match="another kernel's name"):
        install("theirs")
    with pytest.raises(KernelSpecError, match="another kernel's"):
        remove("theirs")
    assert KernelSpecManager().get_kernel_spec("theirs").argv == ["sh"]
    hidden = tmp_path / "env" / "share" / "jupyter" / "kernels" / "hidden"  # where this process finds none
    shutil.copytree(theirs, hidden)
    with pytest.raises(KernelSpecError, match="another kernel's name"):
        install("hidden", prefix=str(tmp_path / "env"))


@pytest.mark.parametrize("name", ["with space", "sl/ash", ""])
def test_names_that_cannot_be(data_dir, name):
    with pytest.raises(KernelSpecError):
        install(name)


def test_a_folder_that_cannot_be_written(data_dir, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KernelSpecError, match="cannot write"):
        install(prefix=str(tmp_path / "file"))


def test_an_interpreter_that_is_gone_is_told(data_dir):
    folder = Path(install("mine"))
    document = json.loads((folder / "kernel.json").read_text())
    document["argv"][0] = "/gone/bin/python"
    (folder / "kernel.json").write_text(json.dumps(document))
    state = next(spec for spec in examine().specs if spec.name == "mine")
    assert "no interpreter /gone/bin/python" in state.problem
    shutil.rmtree(folder)


def test_what_is_examined_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    with zygote_environment(tmp_path, NBCACHE_PRELOAD=""):
        install("mine")
        state = start_zygote(tmp_path / "data" / "kernels", "mine")
        assert state.executable == sys.executable
        assert state.kernels == 0
        assert state.preloaded["torch"] > 0
        assert state.files > 500
        with Kernel("mine") as kernel:
            assert is_forked(kernel)
            assert examine().zygotes[0].kernels == 1
            said = nbcache("doctor", "jupyter")
            assert f"process {state.pid} of {sys.executable}, 1 kernel, " in said
            assert re.search(r"imported ahead: torch [\d.]+ m?s", said)
        remove("mine")  # ends what waits, too
        eventually(lambda: not processes_of(tmp_path))
    assert os.environ.get("NBCACHE_PRELOAD") is None


@pytest.mark.parametrize("text", ['{"argv": null}', '{"argv": 5}', "[]", "5", "no json", '{"argv": []}'])
def test_what_is_no_kernelspec_is_anothers(data_dir, tmp_path, monkeypatch, text):
    for folder in (data_dir / "kernels" / "nbcache", tmp_path / "elsewhere" / "kernels" / "odd"):
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(text)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "elsewhere"))
    assert not {"nbcache", "odd"} & {spec.name for spec in examine().specs if spec.folder.startswith(str(tmp_path))}
    for name in ("nbcache", "odd"):
        for act in (install, remove):
            with pytest.raises(KernelSpecError, match="another kernel's"):
                act(name)
