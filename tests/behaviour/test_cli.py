"""The command line in processes of its own: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nbcache
from nbcache.protocol.messages import PROTOCOL_VERSION
from tests.support.checkpoints import write_checkpoint

ENTRY_KEYS = {
    "name",
    "aliases",
    "provenance",
    "source",
    "bytes",
    "tensors",
    "host",
    "host_kind",
    "devices",
    "leases",
    "pinned",
    "last_used_s",
    "key",
    "used_by",
    "staged_bytes",
}
SCRIPT = Path(sys.executable).with_name("nbcache")


def cli(*arguments: str, code: int = 0, **environment: str) -> str:
    """Run the command, expect this exit status and no word on the other stream; returns what it printed (code 0) or said."""
    done = subprocess.run(
        [sys.executable, "-m", "nbcache", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "200", **environment},
    )
    assert done.returncode == code, done.stderr
    if code:
        assert done.stdout == ""
        assert done.stderr.startswith("nbcache: ")
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr
        return done.stderr.removeprefix("nbcache: ").strip()
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.fixture
def checkpoint(runtime_dir: Path, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors")


def test_version(runtime_dir):
    assert cli("--version") == f"nbcache {nbcache.__version__}"
    script = subprocess.run([str(SCRIPT), "--version"], capture_output=True, text=True, check=True)
    assert script.stdout.strip() == f"nbcache {nbcache.__version__}"
    assert not runtime_dir.exists()  # it started nothing


def test_help_names_every_command(runtime_dir):
    text = cli("--help")
    assert all(command in text for command in ("load", "status", "evict", "stop", "restart", "serve"))
    assert all(option in cli("load", "--help") for option in ("name", "--pin", "--json"))


def test_load(checkpoint):
    first, second = (json.loads(cli("load", str(checkpoint), "--json")) for _ in range(2))
    for answer, hit in ((first, False), (second, True)):
        assert set(answer) == ENTRY_KEYS | {"seconds", "hit"}
        assert answer["hit"] is hit
        assert answer["seconds"] > 0
        assert answer["name"] == str(checkpoint)
        assert (answer["tensors"], answer["bytes"]) == (4, 16416)
        assert (answer["provenance"], answer["host"], answer["pinned"]) == ("file", "staged", False)
        assert answer["source"] == [str(checkpoint)]
    weights = nbcache.load(str(checkpoint), device="cpu")
    assert weights.hit
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(checkpoint).items())


def test_load_in_words(checkpoint):
    assert "4 tensors, 16.4 kB, read in " in cli("load", str(checkpoint))
    assert cli("load", str(checkpoint)).endswith("model.safetensors: 4 tensors, 16.4 kB, was cached")


def test_load_and_pin(checkpoint):
    assert json.loads(cli("load", "--pin", str(checkpoint), "--json"))["pinned"] is True
    (entry,) = nbcache.status().entries
    assert (entry.pinned, entry.leases) == (True, 0)
    assert "is pinned; unpin it first" in cli("evict", str(checkpoint), code=1)


def test_load_needs_no_torch(checkpoint, tmp_path):
    sabotage = tmp_path / "sabotage"
    (sabotage / "torch").mkdir(parents=True)
    (sabotage / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')")
    trap = {"PYTHONPATH": str(sabotage)}
    probe = subprocess.run([sys.executable, "-c", "import torch"], env={**os.environ, **trap}, capture_output=True, text=True)
    assert "torch was imported" in probe.stderr  # the trap works
    assert json.loads(cli("load", str(checkpoint), "--json", **trap))["hit"] is False
    for arguments in (("status",), ("evict", "--all"), ("restart",), ("stop",)):
        cli(*arguments, **trap)


def test_status(checkpoint):
    weights = nbcache.load(str(checkpoint), device="cpu")
    nbcache.put("saved", torch.ones(3)).release()
    document = json.loads(cli("status", "--json"))
    assert set(document) == {"version", "protocol", "pid", "uptime_s", "host", "devices", "entries", "settings"}
    assert (document["version"], document["protocol"]) == (nbcache.__version__, PROTOCOL_VERSION)
    assert document["pid"] == nbcache.status().pid
    assert document["uptime_s"] >= 0
    assert set(document["host"]) == {"used_bytes", "limit_bytes"}
    assert document["host"]["used_bytes"] == 4 << 20
    assert document["devices"] == []
    assert [set(entry) for entry in document["entries"]] == [ENTRY_KEYS] * 2
    used, saved = document["entries"]
    assert (used["name"], used["leases"], used["provenance"]) == (str(checkpoint), 1, "file")
    assert used["used_by"] == [{"pid": os.getpid(), "label": ""}]
    assert (saved["name"], saved["leases"], saved["provenance"], saved["source"]) == ("saved", 0, "put", [])
    assert weights


def test_status_in_words(checkpoint):
    cli("load", str(checkpoint))
    weights = nbcache.put("saved", torch.ones(3))
    head, columns, first, second = cli("status").splitlines()
    assert head.startswith("host tier: 4.2 MB of ") and head.endswith(f" used █{'░' * 23}; daemon {nbcache.status().pid}")
    assert columns.split() == ["name", "size", "tensors", "where", "used", "by", "idle"]
    assert checkpoint.name in first and "16.4 kB" in first
    assert second.startswith("saved") and f"pid {os.getpid()}" in second
    assert weights


def test_evict(checkpoint, tmp_path):
    other = write_checkpoint(tmp_path / "other.safetensors", seed=1)
    for path in (checkpoint, other):
        cli("load", str(path))
    nbcache.put("saved", torch.ones(3)).release()
    assert "model.safetensors (2.1 MB)" in cli("evict", str(checkpoint))
    answer = json.loads(cli("evict", "--all", "--json"))
    assert set(answer) == {"evicted", "freed_bytes", "kept"}
    assert (answer["evicted"], answer["freed_bytes"]) == ([str(other)], 2 << 20)
    assert len(answer["kept"]) == 1 and answer["kept"][0].startswith("saved (")
    assert "evicted nothing" in cli("evict", "--all")
    answer = json.loads(cli("evict", "saved", "--json"))
    assert answer == {"evicted": ["saved"], "freed_bytes": 2 << 20, "kept": []}
    assert nbcache.status().entries == ()


def test_evict_what_is_in_use(checkpoint):
    with nbcache.load(str(checkpoint), device="cpu"):
        assert f"used by process {os.getpid()}" in cli("evict", str(checkpoint), code=1)
        assert len(nbcache.status().entries) == 1


def test_stop_and_restart(checkpoint):
    assert cli("stop") == "no daemon runs"
    cli("load", str(checkpoint))
    first = nbcache.status().pid
    nbcache.put("saved", torch.ones(3)).release()
    stopped, started = cli("restart").splitlines()
    assert stopped.startswith(f"stopped: process {first}; gone with it: saved (")
    second = nbcache.status().pid
    assert started == f"started: process {second}, nbcache {nbcache.__version__}"
    assert second != first
    assert nbcache.status().entries == ()
    assert cli("stop") == f"stopped: process {second}"
    assert "no daemon runs" in cli("status", code=1)


def test_serve_until_interrupted(checkpoint, runtime_dir):
    server = subprocess.Popen(
        [sys.executable, "-m", "nbcache", "serve", "--host-limit", "1GiB"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with server:
        try:
            assert "serving on" in server.stderr.readline()
            document = json.loads(cli("status", "--json"))
            assert (document["pid"], document["host"]["limit_bytes"]) == (server.pid, 1 << 30)
            cli("load", str(checkpoint))
            server.send_signal(signal.SIGINT)
            assert server.wait(10) == 0
        finally:
            server.kill()
        assert server.stdout.read() == ""
        assert "Traceback" not in server.stderr.read()
    assert not (runtime_dir / "daemon.sock").exists()


ERRORS = {
    "status without a daemon": (("status",), 1, "no daemon runs"),
    "evict without a daemon": (("evict", "x"), 1, "no daemon runs"),
    "missing": (("load", "/nix.safetensors"), 1, "/nix.safetensors: no such file or folder"),
    "missing name": (("load", "flux"), 1, "flux: nothing is cached under that name"),
    "empty name": (("load", ""), 1, "cannot be a name"),
    "lines in a name": (("load", "/a\nb"), 1, "/a b: no such file"),
    "no name": (("load",), 2, "(see nbcache --help)"),
    "no such option": (("load", "--fast", "x"), 2, "--fast"),
    "no such command": (("fly",), 2, "fly"),
    "too many names": (("load", "a", "b"), 2, "b"),
    "evict what": (("evict",), 2, "name an entry, or give --all"),
    "evict both": (("evict", "x", "--all"), 2, "name an entry, or give --all"),
    "limit": (("serve", "--host-limit", "lots"), 2, "'lots' is not a size"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_one_line(runtime_dir, what):
    arguments, code, message = ERRORS[what]
    assert message in cli(*arguments, code=code)


def test_broken_checkpoint_is_one_line(checkpoint, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(checkpoint.read_bytes()[:-1])
    assert "broken.safetensors: truncated" in cli("load", str(broken), code=1)
    assert "in use" not in cli("status")


def test_nonsense_in_the_environment_is_one_line(checkpoint):
    for name in ("NBCACHE_HOST_LIMIT", "NBCACHE_REPLY_TIMEOUT_S"):
        assert "'lots' is not a " in cli("load", str(checkpoint), code=1, **{name: "lots"})
        cli("stop")


def test_output_that_nobody_reads(checkpoint):
    cli("load", str(checkpoint))
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "nbcache", "status"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""
