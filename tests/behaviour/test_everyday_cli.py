"""What makes the command line good to live with: aliases, completion, options that say where they come from, top."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import nbcache
from nbcache.protocol import messages as m
from nbcache.top import Speeds, render_frame
from tests.behaviour.test_cli import SCRIPT, cli
from tests.support.checkpoints import raw_checkpoint, write_checkpoint
from tests.support.waiting import eventually


@pytest.fixture
def checkpoint(runtime_dir: Path, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors")


def complete(*words: str) -> list[str]:
    """What bash would offer for the last of these words."""
    environment = {"_NBCACHE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


def test_aliases(checkpoint):
    assert cli("alias", "list") == "no aliases"
    assert cli("alias", "add", "mini", str(checkpoint)) == f"mini is {checkpoint}"
    assert cli("alias", "list") == f"mini  {checkpoint}"
    assert json.loads(cli("alias", "list", "--json")) == {"mini": str(checkpoint)}
    cli("alias", "remove", "mini")
    assert cli("alias", "list") == "no aliases"
    assert "no such alias" in cli("alias", "remove", "mini", code=1)
    assert "has no slash" in cli("alias", "add", "a/b", str(checkpoint), code=1)


def test_completion_in_a_shell(checkpoint, tmp_path):
    assert complete("nbcache", "ev") == ["evict"]
    assert complete("nbcache", "evict", "") == []  # no daemon runs, and none is started
    assert complete("nbcache", "load", f"{tmp_path}/mod") == [str(checkpoint)]
    assert not (tmp_path / "runtime").exists()
    cli("alias", "add", "mini", str(checkpoint))
    assert complete("nbcache", "load", "mi") == ["mini", "minilm"]  # the second is built in
    cli("load", str(checkpoint))
    assert complete("nbcache", "pin", str(tmp_path)) == [str(checkpoint)]
    assert complete("nbcache", "alias", "remove", "") == ["mini"]


def test_completion_can_be_installed(runtime_dir):
    assert "--install-completion" in cli("--help")


def test_config(runtime_dir, tmp_path):
    (tmp_path / "jupyter_nbcache_config.py").write_text("c.NBCache.host_limit = '2GB'")
    where = {"JUPYTER_CONFIG_DIR": str(tmp_path)}
    table = {each["option"]: each for each in json.loads(cli("config", "--json", "--NBCache.gpu_keep_s=7", **where))}
    assert table["gpu_keep_s"]["value"] == 7.0
    assert table["host_limit"]["source"] == str(tmp_path / "jupyter_nbcache_config.py")
    assert re.search(r"host_limit +2GB +/.*config.py$", cli("config", **where), re.MULTILINE)
    path = write_checkpoint(tmp_path / "m.safetensors")
    cli("load", str(path), **where)
    assert nbcache.status().host.limit_bytes == 2 * 10**9  # the daemon heard of it
    assert "the daemon that runs" not in cli("config", **where)
    assert "the daemon that runs was started with host_limit = 2GB; `nbcache restart`" in cli("config")
    changed = {each["option"]: each["daemon"] for each in json.loads(cli("config", "--json", "--NBCache.gpu_keep_s=7"))}
    assert {option: was for option, was in changed.items() if was is not None} == {"gpu_keep_s": "600.0", "host_limit": "2GB"}
    cli("restart")
    assert "the daemon that runs" not in cli("config")
    assert nbcache.status().host.limit_bytes > 2 * 10**9
    assert "did you mean host_limit?" in cli("status", "--NBCache.host_limt=1G", code=1)
    assert "did you mean NBCACHE_GPU_KEEP_S?" in cli("config", code=1, NBCACHE_GPU_KEP_S="3")


def test_top_once(checkpoint):
    assert "no daemon runs" in cli("top", "--once")
    weights = nbcache.load(str(checkpoint), device="cpu")
    text = cli("top")  # stdout is no terminal: one look
    assert "host" in text and "2.1 MB of " in text
    assert "model.safetensors" in text and "4 tensors" in text and "in use" in text
    assert f"pid {os.getpid()}" in text
    assert weights


def test_top_in_a_terminal(runtime_dir, tmp_path):
    """It redraws what it shows while a load goes on, with the load's bar, and ends at Ctrl-C."""
    size = 256 << 20
    path = raw_checkpoint(tmp_path / "big.safetensors", {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    os.truncate(path, path.stat().st_size + size)
    with Terminal("top", "--interval", "0.1") as terminal:
        terminal.expect("no daemon runs")
        cli("load", str(path))
        terminal.expect("big.safetensors")
        terminal.expect("268 MB of ")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(10) == 0


def test_help(runtime_dir):
    """Topics are listed, a page is Markdown in a pipe and laid out on a terminal, and a typo is answered with the nearest."""
    assert "  models      whole models" in cli("help")
    assert "nbcache help" in cli("--help")
    assert cli("help", "models").startswith("# Whole models")
    assert cli("help", "modles", code=1).strip() == "no topic 'modles'; did you mean models?"
    assert complete("nbcache", "help", "mo") == ["models"]
    assert not runtime_dir.exists()
    with Terminal("help", "models") as terminal:
        terminal.expect("nbcache help names")  # its last words
        assert "Whole models" in terminal.text and "•" in terminal.text and "# Whole models" not in terminal.text
        assert terminal.process.wait(10) == 0


class Terminal:
    """A command in a pseudo-terminal of 120 columns."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self.text = ""

    def __enter__(self) -> Terminal:
        self._fd, child = pty.openpty()
        environment = {**os.environ, "COLUMNS": "120", "LINES": "40", "TERM": "xterm"}
        command = [sys.executable, "-m", "nbcache", *self._arguments]
        self.process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment)
        os.close(child)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    def expect(self, words: str, timeout_s: float = 30.0) -> None:
        """Read on until these words have been shown."""
        deadline = time.monotonic() + timeout_s
        start = len(self.text)
        while words not in self.text[start:]:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, self.text[-2000:]
            self.text += os.read(self._fd, 1 << 16).decode(errors="replace")


def staging(staged: int) -> m.Status:
    entry = m.EntryStatus("a", (), "file", (), 100, 1, "staging", "shared", (), 0, False, 0.0, "k", (), staged)
    return m.Status("1", 1, 1, 1.0, m.HostStatus(0, 1), (), (entry,))


def test_speed_is_bytes_between_two_looks():
    speeds = Speeds()
    assert speeds.measure(staging(10), 1.0) == {}
    assert speeds.measure(staging(60), 3.0) == {"k": 25.0}
    assert speeds.measure(staging(60), 4.0) == {"k": 0.0}


def test_the_status_tells_how_far_a_load_is(runtime_dir, tmp_path):
    size = 256 << 20
    path = raw_checkpoint(tmp_path / "big.safetensors", {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    os.truncate(path, path.stat().st_size + size)
    seen: list[int] = []
    loader = subprocess.Popen([sys.executable, "-m", "nbcache", "load", str(path)], stdout=subprocess.DEVNULL)
    try:

        def look() -> bool:
            try:
                entries = nbcache.status().entries
            except nbcache.NBCacheError:
                return False
            seen.extend(entry.staged_bytes for entry in entries if entry.host == "staging")
            return bool(entries) and entries[0].host == "staged"

        eventually(look, 30)
    finally:
        loader.wait(30)
    assert seen == sorted(seen)
    assert all(0 <= staged <= size for staged in seen)


def test_a_frame_of_top_has_tiers_loads_and_notebooks():
    lease = m.Lease(7, "/home/me/a.ipynb")
    slab = m.DeviceResidence("GPU-1", "", "resident", 1)
    loading = m.EntryStatus(
        "/models/sdxl/unet", (), "file", (), 4 * 10**9, 9, "staging", "pinned", (), 0, False, 0.1, "k", (), 10**9
    )
    used = m.EntryStatus(
        "/models/flux-dev/t", (), "file", (), 2 * 10**9, 9, "staged", "pinned", (slab,), 1, True, 5.0, "u", (lease,)
    )
    filling = m.EntryStatus(
        "/models/sd3/t", (), "file", (), 3 * 10**9, 9, "staged", "pinned",
        (m.DeviceResidence("GPU-1", "", "filling", 0),), 1, False, 0.1, "f", (), 0,
    )  # fmt: skip
    gpu = m.DeviceStatus("GPU-1", "H100", 2 * 10**9, 85 * 10**9)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(
        render_frame(
            m.Status("1", 1, 9, 60.0, m.HostStatus(6 * 10**9, 64 * 10**9), (gpu,), (loading, used, filling)), {"k": 5e8}
        )
    )
    text = console.export_text()
    for words in (
        "6.0 GB of 64.0 GB", "2.0 GB of 85.0 GB, H100", "1.0 GB of 4.0 GB", "0.50 GB/s", "6.0 s left", "me/a.ipynb", "pid 7",
        "host, gpu 0, pinned", "filling gpu 0",
    ):  # fmt: skip
        assert words in text
