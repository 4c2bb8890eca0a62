"""The detector that every test relies on, shown a leak of each kind."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbcache.client.api import status
from nbcache.client.session import Session, stop_daemon
from nbcache.memory.shared import map_private, seal_bytes
from tests.support import leaks
from tests.support.leaks import Snapshot, leaked

Leak = Callable[[ExitStack], str]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector waits for things to go away; these do not go."""
    monkeypatch.setattr(leaks, "PATIENCE_S", 0.2)


@pytest.fixture
def tidy() -> Iterator[ExitStack]:
    """Cleans up what a test leaked on purpose, after the detector saw it."""
    with ExitStack() as stack:
        yield stack


def leak_file(tidy: ExitStack) -> str:
    fd = os.open(os.devnull, os.O_RDONLY)
    tidy.callback(os.close, fd)
    return f"descriptor {fd} -> /dev/null"


def leak_pipe(tidy: ExitStack) -> str:
    for fd in os.pipe():
        tidy.callback(os.close, fd)
    return r"descriptor \d+ -> pipe:"


def leak_socket(tidy: ExitStack) -> str:
    sock = tidy.enter_context(socket.socket(socket.AF_UNIX))
    return rf"descriptor {sock.fileno()} -> socket:"


def leak_memfd(tidy: ExitStack) -> str:
    tidy.callback(os.close, seal_bytes("leaked", b"bytes"))
    return r"descriptor \d+ -> /memfd:nbcache:leaked"


def leak_pidfd(tidy: ExitStack) -> str:
    fd = os.pidfd_open(os.getpid())
    tidy.callback(os.close, fd)
    return rf"descriptor {fd} -> .*pidfd"


def leak_map(tidy: ExitStack) -> str:
    """A map alone: its descriptor is closed, Python keeps a duplicate of it in the map, and the memory stays mapped."""
    fd = seal_bytes("mapped", b"bytes")
    area = map_private(fd, 5)
    os.close(fd)
    tidy.callback(area.close)
    return r"map [0-9a-f]+-[0-9a-f]+ /memfd:nbcache:mapped"


def leak_child(tidy: ExitStack) -> str:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    tidy.callback(child.wait)
    assert child.stdin is not None
    tidy.callback(child.stdin.close)
    return rf"process {child.pid} .*input\(\)"


def leak_grandchild(tidy: ExitStack) -> str:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    tidy.callback(child.wait)
    assert child.stdin is not None
    assert child.stdout is not None
    tidy.callback(child.stdout.close)
    tidy.callback(child.stdin.close)
    assert child.stdout.readline() == b"1\n"
    return r"process \d+ .*print\(1, flush=True\); input\(\)$"


LEAKS: list[Leak] = [leak_file, leak_pipe, leak_socket, leak_memfd, leak_pidfd, leak_map, leak_child, leak_grandchild]


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_seen_and_named_until_it_is_gone(tmp_path: Path, tidy: ExitStack, leak: Leak) -> None:
    before = Snapshot.take(str(tmp_path))
    expected = leak(tidy)
    found = leaked(before, str(tmp_path))
    assert any(re.search(expected, line) for line in found), found
    tidy.close()
    assert leaked(before, str(tmp_path)) == []


def test_a_daemon_left_running_is_seen(tmp_path: Path, tidy: ExitStack, runtime_dir: Path) -> None:
    """It is nobody's child: only its environment tells whose it is."""
    before = Snapshot.take(str(tmp_path))
    Session.open().close()
    tidy.callback(stop_daemon)
    pid = status().pid
    found = leaked(before, str(tmp_path))
    assert any(re.search(rf"daemon {pid} .*nbcache.daemon", line) for line in found), found
    assert leaked(before, str(tmp_path / "another")) == []
    tidy.close()
    assert leaked(before, str(tmp_path)) == []


def test_a_session_left_open_is_seen(tmp_path: Path, runtime_dir: Path) -> None:
    Session.open().close()
    before = Snapshot.take(str(tmp_path))
    session = Session.open()
    assert any("socket:" in line for line in leaked(before, str(tmp_path)))
    session.close()
    assert leaked(before, str(tmp_path)) == []


def test_what_goes_a_moment_later_is_no_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "PATIENCE_S", 10.0)
    before = Snapshot.take(str(tmp_path))
    fd = os.open(os.devnull, os.O_RDONLY)
    real, looks = Snapshot.take, iter(range(100))

    def take(root: str) -> Snapshot:
        if next(looks) == 2:
            os.close(fd)
        return real(root)

    monkeypatch.setattr(Snapshot, "take", take)
    assert leaked(before, str(tmp_path)) == []
    assert next(looks) == 3


def test_what_was_there_before_is_no_leak(tmp_path: Path, tidy: ExitStack) -> None:
    leak_file(tidy)
    leak_child(tidy)
    assert leaked(Snapshot.take(str(tmp_path)), str(tmp_path)) == []


def test_the_fixture_itself_fails_a_leaking_test(tmp_path: Path) -> None:
    """A whole run of pytest over two tests, one of which leaks; the fixture must tell them apart."""
    (tmp_path / "conftest.py").write_text(
        "from tests.support import leaks\nleaks.PATIENCE_S = 0.2\nfrom tests.conftest import no_leaks, runtime_dir\n"
    )
    (tmp_path / "test_them.py").write_text(
        "import os\ndef test_clean():\n    pass\ndef test_leaking():\n    os.open(os.devnull, os.O_RDONLY)\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 1, done.stdout
    assert "2 passed, 1 error" in done.stdout
    assert "left behind:" in done.stdout
    assert "-> /dev/null" in done.stdout
