"""The daemon as a process: started once, nobody's child, replaced when it dies, refused when it cannot be."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
from safetensors.torch import load_file

import nbcache
from nbcache.client.session import Session, stop_daemon
from nbcache.config import RuntimePaths
from nbcache.errors import DaemonUnavailable, DaemonUnresponsive, NBCacheError, VersionMismatch
from nbcache.protocol import messages as m
from tests.support.checkpoints import write_checkpoint
from tests.support.kernels import Interpreter
from tests.support.waiting import eventually

START = "nbcache.client.session.Session.open().close()\nnbcache.status().pid"


def start_daemon() -> psutil.Process:
    Session.open().close()
    return psutil.Process(nbcache.status().pid)


def kill(daemon: psutil.Process) -> None:
    """SIGKILL, and wait until all of it is gone: its last thread closes the socket, maybe after it counts as a zombie."""
    pidfd = os.pidfd_open(daemon.pid)
    try:
        daemon.kill()
        assert select.select([pidfd], [], [], 10)[0]
    finally:
        os.close(pidfd)


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``nbcache serve`` in a process of its own, ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nbcache", "serve", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stderr is not None
            assert "serving on" in process.stderr.readline()
            yield process
        finally:
            process.kill()


@pytest.fixture
def checkpoint(runtime_dir: Path, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors")


def is_right(path: Path, weights: nbcache.Weights) -> bool:
    return all(torch.equal(weights[name], tensor) for name, tensor in load_file(path).items())


# Starting


def test_eight_starters_make_one_daemon(runtime_dir):
    with ExitStack() as stack:
        starters = [stack.enter_context(Interpreter("nbcache.client.session")) for _ in range(8)]
        for starter in starters:
            starter.begin(START)
        pids = {starter.finish() for starter in starters}
    assert len(pids) == 1
    assert (runtime_dir / "daemon.log").read_text().count("serving on") == 1
    assert [p.pid for p in psutil.process_iter() if "nbcache.daemon" in _cmdline(p) and _is_of(p, runtime_dir)] == list(pids)


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _is_of(process: psutil.Process, runtime_dir: Path) -> bool:
    try:
        return process.environ().get("NBCACHE_RUNTIME_DIR") == str(runtime_dir)
    except psutil.Error:
        return False


def test_daemon_is_its_own_process(checkpoint, runtime_dir, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with Interpreter("nbcache.client.session", group=True) as starter:
        pid = starter.run(START)
        daemon = psutil.Process(pid)
        assert starter.pid not in [parent.pid for parent in daemon.parents()]
        assert daemon.parent() is None or daemon.parent().pid != os.getpid()
        assert os.getsid(pid) not in (os.getsid(0), os.getsid(starter.pid))
        assert os.getpgid(pid) not in (os.getpgid(0), os.getpgid(starter.pid))
        assert daemon.cwd() == "/"
        assert daemon.terminal() is None
        assert "CUDA_VISIBLE_DEVICES" not in daemon.environ()
        os.killpg(starter.pid, signal.SIGKILL)
        starter.process.wait()
    with nbcache.load(str(checkpoint), device="cpu") as weights:
        assert is_right(checkpoint, weights)
    assert nbcache.status().pid == pid


def test_daemon_holds_no_descriptor_of_its_starter(runtime_dir, tmp_path):
    with (tmp_path / "mine").open("w") as mine:
        os.set_inheritable(mine.fileno(), True)
        daemon = start_daemon()
        targets = set()
        for fd in os.listdir(f"/proc/{daemon.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # a connection that just ended
                targets.add(os.readlink(f"/proc/{daemon.pid}/fd/{fd}"))
    assert str(tmp_path / "mine") not in targets
    assert not any(target.startswith("pipe:") for target in targets)


def test_what_it_leaves_on_disk_is_private(runtime_dir):
    old_umask = os.umask(0)
    try:
        start_daemon()
    finally:
        os.umask(old_umask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in runtime_dir.iterdir()}
    assert stat.S_IMODE(runtime_dir.stat().st_mode) == 0o700
    assert modes["daemon.sock"] == 0o600
    assert modes["daemon.lock"] == 0o600


def test_a_directory_that_was_there_keeps_its_mode_and_the_socket_is_private(runtime_dir):
    runtime_dir.mkdir(mode=0o755)
    start_daemon()
    assert stat.S_IMODE(runtime_dir.stat().st_mode) == 0o755
    assert stat.S_IMODE((runtime_dir / "daemon.sock").stat().st_mode) == 0o600


def test_long_runtime_path(checkpoint, tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    monkeypatch.setenv("NBCACHE_RUNTIME_DIR", str(deep))
    assert len(str(deep / "daemon.sock")) > 107
    try:
        with nbcache.load(str(checkpoint), device="cpu") as weights:
            assert is_right(checkpoint, weights)
    finally:
        assert stop_daemon()


def test_idle_daemon_is_small_and_knows_no_torch(checkpoint):
    nbcache.load(str(checkpoint), device="cpu").release()
    daemon = psutil.Process(nbcache.status().pid)
    assert daemon.memory_info().rss <= 120 << 20
    assert "torch" not in Path(f"/proc/{daemon.pid}/maps").read_text()


# Ending


def test_sigterm_ends_it_cleanly(checkpoint, runtime_dir):
    weights = nbcache.load(str(checkpoint), device="cpu")
    daemon = psutil.Process(nbcache.status().pid)
    daemon.terminate()
    eventually(lambda: not is_running(daemon))
    assert not (runtime_dir / "daemon.sock").exists()
    log = (runtime_dir / "daemon.log").read_text()
    assert log.splitlines()[-1].endswith("stopped")
    assert "Traceback" not in log
    assert is_right(checkpoint, weights)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signalled_server_exits_with_0(runtime_dir, number):
    with serving() as process:
        process.send_signal(number)
        assert process.wait(10) == 0
        assert not (runtime_dir / "daemon.sock").exists()
        assert "Traceback" not in process.stderr.read()


def test_killed_daemon_leaves_tensors_and_a_new_one_starts(checkpoint, runtime_dir):
    weights = nbcache.load(str(checkpoint), device="cpu")
    first = psutil.Process(nbcache.status().pid)
    kill(first)
    assert (runtime_dir / "daemon.sock").exists()  # stale, and so is the lock file
    assert is_right(checkpoint, weights)
    weights["layer.0"].fill_(1)
    again = nbcache.load(str(checkpoint), device="cpu")
    assert not again.hit
    assert is_right(checkpoint, again)
    assert nbcache.status().pid != first.pid
    assert weights["layer.0"].min() == 1


def test_stopping_where_nothing_runs(runtime_dir):
    assert stop_daemon() == 0
    daemon = start_daemon()
    assert stop_daemon() == daemon.pid
    assert not is_running(daemon)
    assert stop_daemon() == 0


def test_stale_socket_counts_as_no_daemon(runtime_dir):
    kill(start_daemon())
    with pytest.raises(DaemonUnavailable, match=r"no daemon runs .*the first load starts one"):
        nbcache.status()
    assert stop_daemon() == 0


def test_second_server_is_refused(checkpoint):
    with nbcache.load(str(checkpoint), device="cpu") as weights:
        pid = nbcache.status().pid
        second = subprocess.run([sys.executable, "-m", "nbcache", "serve"], capture_output=True, text=True, timeout=30)
        assert second.returncode == 1
        assert second.stderr.count("\n") == 1
        assert "another daemon holds" in second.stderr
        assert nbcache.status().pid == pid
        assert nbcache.status().entries[0].leases == 1
        assert is_right(checkpoint, weights)


# Not answering, or answering strangely


@contextlib.contextmanager
def pretender(path: Path, answers: list[bytes]) -> Iterator[None]:
    """Something else on the daemon's socket: it answers one connection with these packets."""
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1 << 16)
                for packet in answers:
                    peer.send(packet)
                peer.recv(1 << 16)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            thread.join(10)
            path.unlink()
            assert not thread.is_alive()


def test_daemon_of_another_version(checkpoint, runtime_dir):
    welcome = msgspec.json.encode(m.Welcome(999, "9.9", 1))
    with (
        pretender(runtime_dir / "daemon.sock", [welcome]),
        pytest.raises(VersionMismatch, match=r"nbcache 9\.9 \(protocol 999\).*\(protocol \d+\); run `nbcache restart`"),
    ):
        nbcache.load(str(checkpoint), device="cpu")


def test_daemon_that_talks_nonsense(checkpoint, runtime_dir):
    with (
        pretender(runtime_dir / "daemon.sock", [b"\xff\x00 nonsense"]),
        pytest.raises(nbcache.errors.ProtocolError, match="not a message"),
    ):
        nbcache.load(str(checkpoint), device="cpu")


def test_client_of_another_version_is_told_and_dropped(runtime_dir):
    start_daemon()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(10)
        sock.connect(str(runtime_dir / "daemon.sock"))
        sock.send(msgspec.json.encode(m.Hello(999, "9.9")))
        welcome = msgspec.json.decode(sock.recv(1 << 16), type=m.Welcome)
        assert welcome.protocol == m.PROTOCOL_VERSION
        assert sock.recv(1 << 16) == b""


def test_hung_daemon(checkpoint, monkeypatch):
    monkeypatch.setenv("NBCACHE_REPLY_TIMEOUT_S", "0.3")
    daemon = start_daemon()
    daemon.suspend()
    try:
        with pytest.raises(DaemonUnresponsive, match=r"no answer from the daemon for 0\.3 s; `nbcache stop` ends it"):
            nbcache.load(str(checkpoint), device="cpu")
        with pytest.raises(DaemonUnresponsive):
            nbcache.status()
    finally:
        daemon.resume()
    with nbcache.load(str(checkpoint), device="cpu") as weights:
        assert is_right(checkpoint, weights)


def test_stopping_a_hung_daemon_kills_it(checkpoint):
    daemon = start_daemon()
    daemon.suspend()
    assert stop_daemon(timeout_s=0.3) == daemon.pid
    assert not is_running(daemon)
    with nbcache.load(str(checkpoint), device="cpu") as weights:
        assert is_right(checkpoint, weights)


def test_a_silent_stranger_costs_nobody_anything(checkpoint, runtime_dir):
    start_daemon()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(str(runtime_dir / "daemon.sock"))
        with nbcache.load(str(checkpoint), device="cpu") as weights:
            assert is_right(checkpoint, weights)


# The runtime directory


def test_vanished_runtime_directory_comes_back(checkpoint, runtime_dir):
    weights = nbcache.load(str(checkpoint), device="cpu")
    pid = nbcache.status().pid
    shutil.rmtree(runtime_dir)
    eventually((runtime_dir / "daemon.sock").exists, timeout_s=15)
    assert nbcache.status().pid == pid
    assert nbcache.status().entries[0].leases == 1
    assert stat.S_IMODE(runtime_dir.stat().st_mode) == 0o700
    assert nbcache.load(str(checkpoint), device="cpu").hit
    assert is_right(checkpoint, weights)


def test_daemon_that_was_replaced_serves_to_the_end_and_leaves(checkpoint, runtime_dir):
    weights = nbcache.load(str(checkpoint), device="cpu")
    old = psutil.Process(nbcache.status().pid)
    shutil.rmtree(runtime_dir)
    new = start_daemon()
    assert new.pid != old.pid
    assert is_running(old)
    assert is_right(checkpoint, weights)
    weights.release()
    eventually(lambda: not is_running(old), timeout_s=15)
    assert nbcache.status().pid == new.pid


def test_runtime_directory_that_is_a_file(checkpoint, runtime_dir):
    runtime_dir.write_text("in the way")
    with pytest.raises(DaemonUnavailable, match=rf"{re.escape(str(runtime_dir))}: .*set NBCACHE_RUNTIME_DIR"):
        nbcache.load(str(checkpoint), device="cpu")


def test_runtime_directory_below_a_file(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("NBCACHE_RUNTIME_DIR", str(checkpoint / "below"))
    with pytest.raises(DaemonUnavailable, match="Not a directory; set NBCACHE_RUNTIME_DIR"):
        nbcache.load(str(checkpoint), device="cpu")


def test_runtime_directory_where_nobody_may_write(checkpoint, monkeypatch):
    """/proc/self/fd is ours, is private, and takes no files, not even from root."""
    monkeypatch.setenv("NBCACHE_RUNTIME_DIR", "/proc/self/fd")
    with pytest.raises(DaemonUnavailable, match="/proc/self/fd"):
        nbcache.load(str(checkpoint), device="cpu")


def test_runtime_directory_of_somebody_else(checkpoint, runtime_dir, monkeypatch):
    runtime_dir.mkdir()
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(DaemonUnavailable, match=rf"belongs to user {owner}, not to you \({owner + 1}\)"):
        nbcache.load(str(checkpoint), device="cpu")


# Failing to start


def test_daemon_that_cannot_start_names_its_log(checkpoint, runtime_dir, tmp_path, monkeypatch):
    sabotage = tmp_path / "sabotage"
    sabotage.mkdir()
    (sabotage / "msgspec.py").write_text("raise ImportError('sabotaged')")
    monkeypatch.setenv("PYTHONPATH", str(sabotage))
    log = runtime_dir / "daemon.log"
    with pytest.raises(DaemonUnavailable, match=rf"the daemon did not start: .*see {re.escape(str(log))}"):
        nbcache.load(str(checkpoint), device="cpu")
    assert "ImportError: sabotaged" in log.read_text()
    monkeypatch.delenv("PYTHONPATH")
    with nbcache.load(str(checkpoint), device="cpu") as weights:
        assert is_right(checkpoint, weights)


def test_daemon_that_starts_too_slowly(checkpoint, runtime_dir, tmp_path, monkeypatch):
    sabotage = tmp_path / "sabotage"
    sabotage.mkdir()
    (sabotage / "msgspec.py").write_text("import time\ntime.sleep(6)\nraise ImportError('sabotaged')")
    monkeypatch.setenv("PYTHONPATH", str(sabotage))
    monkeypatch.setenv("NBCACHE_START_TIMEOUT_S", "0.5")
    start = time.monotonic()
    with pytest.raises(DaemonUnavailable, match=r"it took too long; see .*daemon\.log"):
        nbcache.load(str(checkpoint), device="cpu")
    assert time.monotonic() - start < 4


STOP_ONCE_LOCKED = """
import fcntl, os, signal
flock = fcntl.flock
def flock_and_stop(fd, how):
    flock(fd, how)
    if os.readlink(f"/proc/self/fd/{fd}").endswith("daemon.lock"):
        os.kill(os.getpid(), signal.SIGSTOP)
fcntl.flock = flock_and_stop
"""


@contextlib.contextmanager
def daemon_whose_starter_was_killed(runtime_dir: Path, folder: Path) -> Iterator[psutil.Process]:
    """One that holds the lock, serves nobody yet, and is stopped there."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(STOP_ONCE_LOCKED)
    with Interpreter("nbcache.client.session", PYTHONPATH=str(folder)) as starter:
        starter.begin(START)
        (pid,) = eventually(lambda: [p.pid for p in psutil.process_iter() if _is_stopped(p) and _is_of(p, runtime_dir)])
        starter.kill()
    daemon = psutil.Process(pid)
    try:
        yield daemon
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            daemon.kill()


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def test_a_daemon_whose_starter_was_killed_is_waited_for(checkpoint, runtime_dir, tmp_path):
    log = runtime_dir / "daemon.log"
    orphan = daemon_whose_starter_was_killed(runtime_dir, tmp_path / "stop")
    with orphan as daemon, Interpreter("nbcache.client.session") as other:
        other.begin(START)
        eventually(lambda: "another daemon holds" in log.read_text())
        daemon.resume()
        assert other.finish() == daemon.pid
        lines = [line for line in log.read_text().splitlines() if "another daemon holds" in line]
        assert "Traceback" not in log.read_text()
        assert len(lines) == 1 and "INFO" in lines[0]
        with nbcache.load(str(checkpoint), device="cpu") as weights:
            assert is_right(checkpoint, weights)


def test_a_daemon_that_leaves_instead_of_serving_is_replaced(checkpoint, runtime_dir, tmp_path):
    orphan = daemon_whose_starter_was_killed(runtime_dir, tmp_path / "stop")
    with orphan as daemon, Interpreter("nbcache.client.session") as other:
        other.begin(START)
        eventually(lambda: "another daemon holds" in (runtime_dir / "daemon.log").read_text())
        kill(daemon)
        assert other.finish() not in (daemon.pid, 0)
        with nbcache.load(str(checkpoint), device="cpu") as weights:
            assert is_right(checkpoint, weights)


def test_a_daemon_that_lives_and_never_serves(checkpoint, runtime_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("NBCACHE_START_TIMEOUT_S", "2")
    with (
        daemon_whose_starter_was_killed(runtime_dir, tmp_path / "stop"),
        pytest.raises(DaemonUnavailable, match=r"another daemon holds .*daemon\.lock.* does not serve"),
    ):
        nbcache.load(str(checkpoint), device="cpu")


def test_log_that_cannot_be_written(checkpoint, runtime_dir):
    log = runtime_dir / "daemon.log"
    log.mkdir(parents=True)
    with pytest.raises(DaemonUnavailable, match=rf"cannot start a daemon: .*{re.escape(str(log))}"):
        nbcache.load(str(checkpoint), device="cpu")


def test_somebody_else_who_starts_one_forever(checkpoint, runtime_dir, monkeypatch):
    monkeypatch.setenv("NBCACHE_START_TIMEOUT_S", "0.3")
    runtime_dir.mkdir()
    with (runtime_dir / "start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DaemonUnavailable, match=r"another process has been starting a daemon.*start\.lock is locked"):
            nbcache.load(str(checkpoint), device="cpu")


@pytest.mark.parametrize("name", ["NBCACHE_HOST_LIMIT", "NBCACHE_REPLY_TIMEOUT_S", "NBCACHE_START_TIMEOUT_S"])
def test_nonsense_in_the_environment(checkpoint, monkeypatch, name):
    monkeypatch.setenv(name, "lots")
    with pytest.raises(NBCacheError, match="'lots' is not a "):
        nbcache.load(str(checkpoint), device="cpu")


def test_log_rotates(runtime_dir):
    paths = RuntimePaths.of_user()
    runtime_dir.mkdir(mode=0o700)
    paths.log.write_text("old line\n" * (1 << 17))
    start_daemon()
    assert "serving on" in paths.log.read_text()
    assert paths.log.stat().st_size < 1 << 20
    assert (runtime_dir / "daemon.log.1").read_text().startswith("old line\n")
