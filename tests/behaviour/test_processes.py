"""Leases and stagings across real processes: sharing, dying, forking, pickling, interrupting."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import re
import resource
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import nbcache
from nbcache.errors import CheckpointChanged, CheckpointInvalid, EntryNotFound, WeightsReleased
from nbcache.protocol.messages import EntryStatus
from tests.support.checkpoints import raw_checkpoint, write_checkpoint
from tests.support.kernels import Interpreter, Kernel, RemoteError
from tests.support.waiting import eventually

BIG_BYTES = 512 << 20
SOON_S = 2.0
"""The promise is a second; the rest is for a busy machine."""

LOAD = "import nbcache\nweights = nbcache.load({path!r}, device='cpu')"
INODES = "sorted({line.split()[4] for line in open('/proc/self/maps') if 'memfd:nbcache' in line})"


def big_checkpoint(path: Path, fill: bytes = b"one", size_bytes: int = BIG_BYTES) -> Path:
    """A sparse file that takes the daemon a fraction of a second to read: one tensor, with ``fill`` at some places."""
    raw_checkpoint(path, {"w": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}})
    start = path.stat().st_size
    os.truncate(path, start + size_bytes)
    with path.open("r+b") as file:
        for place in range(0, size_bytes, size_bytes // 16):
            file.seek(start + place)
            file.write(fill)
    return path


def entry_of(path: Path | str) -> EntryStatus:
    return next(entry for entry in nbcache.status().entries if entry.name == str(path))


def leases_of(path: Path | str) -> int:
    return entry_of(path).leases


def held_by(pid: int) -> list[str]:
    """The cached memory and the checkpoint files that a process has open."""
    targets = (_target(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
    return [target for target in targets if "memfd:nbcache" in target or ".safetensors" in target]


def is_connected(client: Interpreter) -> bool:
    sockets = f"/proc/{client.pid}/fd"
    return any("socket:" in _target(f"{sockets}/{fd}") for fd in os.listdir(sockets))


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""


def assert_right(path: Path) -> None:
    """Loading gives what the stock loader gives."""
    stock = load_file(path)
    with nbcache.load(str(path), device="cpu") as weights:
        assert list(weights) == list(stock)
        assert all(torch.equal(weights[name], stock[name]) for name in stock)


@contextlib.contextmanager
def ending(pids: list[int]) -> Iterator[list[int]]:
    """Kill these processes in the end: orphans that a test made on purpose."""
    try:
        yield pids
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def checkpoint(runtime_dir: Path, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors")


@pytest.fixture
def big(runtime_dir: Path, tmp_path: Path) -> Path:
    """A big checkpoint, and a daemon that is up, so that its pid is known."""
    write_checkpoint(tmp_path / "small.safetensors")
    nbcache.load(str(tmp_path / "small.safetensors"), device="cpu").release()
    nbcache.evict_all()
    return big_checkpoint(tmp_path / "big.safetensors")


class Freeze:
    """An ``on_progress`` that stops the daemon at the first news, so that a staging lasts for as long as a test wants."""

    def __init__(self, daemon_pid: int) -> None:
        self.pid = daemon_pid
        self.frozen = False

    def __call__(self, staged_bytes: int, total_bytes: int) -> None:
        if not self.frozen:
            assert staged_bytes < total_bytes
            self.frozen = True
            os.kill(self.pid, signal.SIGSTOP)
            eventually(lambda: psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


FREEZING_LOAD = """
import nbcache, os, signal
daemon = nbcache.status().pid
def freeze(staged, total):
    if not os.path.exists({marker!r}):
        os.kill(daemon, signal.SIGSTOP)
        open({marker!r}, "w").close()
weights = nbcache.load({path!r}, device="cpu", on_progress=freeze)
"""


# Sharing


def test_two_kernels_share_one_entry(checkpoint):
    with Kernel() as one, Kernel() as other:
        inodes = [kernel.run(LOAD.format(path=str(checkpoint)) + "\n" + INODES) for kernel in (one, other)]
        entry = entry_of(checkpoint)
        assert inodes[0] == inodes[1] != "[]"
        assert entry.leases == 2
        assert {lease.pid for lease in entry.used_by} == {one.pid, other.pid}
        assert len(nbcache.status().entries) == 1
    eventually(lambda: leases_of(checkpoint) == 0, SOON_S)


def test_eight_loaders_at_once_stage_once(runtime_dir, tmp_path):
    path = big_checkpoint(tmp_path / "big.safetensors", size_bytes=BIG_BYTES // 4)
    load = f"""
grant = nbcache.client.fill.acquire({str(path)!r})
(w,) = grant.manifest.tensors
area = nbcache.memory.shared.map_private(grant.fd, grant.manifest.extent_bytes)
zlib.crc32(memoryview(area)[w.place : w.place + w.nbytes])
"""  # all of a load but the torch, which would take eight processes very long to import
    with ExitStack() as stack:
        loaders = [stack.enter_context(Interpreter("nbcache.client.fill", "zlib")) for _ in range(8)]
        for loader in loaders:
            loader.begin(load)
        assert {loader.finish() for loader in loaders} == {zlib.crc32(load_file(path)["w"].numpy())}
        assert leases_of(path) == 8
        assert len({loader.run(INODES)[0] for loader in loaders}) == 1
    assert (runtime_dir / "daemon.log").read_text().count("INFO staging ") == 1
    assert_right(path)


# The end of a process


def test_killed_client_leaves_no_lease(checkpoint):
    with Interpreter() as client:
        client.run(LOAD.format(path=str(checkpoint)))
        assert leases_of(checkpoint) == 1
        client.kill()
        eventually(lambda: leases_of(checkpoint) == 0, SOON_S)
    assert_right(checkpoint)


def test_client_killed_in_the_middle_of_a_staging(big, tmp_path):
    daemon = Freeze(nbcache.status().pid)
    marker = tmp_path / "frozen"
    with Interpreter() as client:
        client.begin(FREEZING_LOAD.format(path=str(big), marker=str(marker)))
        eventually(marker.exists)
        client.kill()
        daemon.thaw()
        assert leases_of(big) == 0
        assert_right(big)
        eventually(lambda: leases_of(big) == 0, SOON_S)
    assert nbcache.status().pid == daemon.pid
    nbcache.evict(str(big))
    eventually(lambda: not held_by(daemon.pid))


FORKED_CHILDREN = {
    "fork": """
import os, time
if not os.fork():
    time.sleep(600)
    os._exit(0)
""",
    "dataloader": """
from torch.utils.data import DataLoader
from torch.utils.data._utils import worker
worker.MP_STATUS_CHECK_INTERVAL = 600  # by then its workers see that their parent is gone, and go too
batches = iter(DataLoader(range(1000), num_workers=2))
next(batches)
None
""",
    "pool": """
import multiprocess, time
pool = multiprocess.get_context("fork").Pool(2, initializer=time.sleep, initargs=(600,))
""",
}


@pytest.mark.parametrize("how", FORKED_CHILDREN)
def test_client_killed_while_its_forked_children_live_on(checkpoint, how):
    with Interpreter() as client:
        client.run(LOAD.format(path=str(checkpoint)))
        client.run(FORKED_CHILDREN[how])
        children = [child.pid for child in psutil.Process(client.pid).children()]
        with ending(children):
            assert children
            assert leases_of(checkpoint) == 1
            client.kill()
            eventually(lambda: leases_of(checkpoint) == 0, SOON_S)
            assert all(map(is_running, children))  # or nothing was shown
            assert_right(checkpoint)


def test_weights_deleted_while_forked_children_live_on(checkpoint):
    with Interpreter() as client:
        client.run(LOAD.format(path=str(checkpoint)))
        client.run(FORKED_CHILDREN["fork"])
        children = [child.pid for child in psutil.Process(client.pid).children()]
        with ending(children):
            assert leases_of(checkpoint) == 1
            client.run("del weights\n__import__('gc').collect()")
            eventually(lambda: leases_of(checkpoint) == 0, SOON_S)
            assert all(map(is_running, children))


FORKING_LATER = """
import os, time, nbcache.client.{module}
real = nbcache.client.{module}.{name}
def forking(*arguments):
    found = real(*arguments)
    if not os.fork():
        time.sleep(600)
        os._exit(0)
    return found
nbcache.client.{module}.{name} = forking
"""
"""A child is forked where another thread might fork it."""


def test_a_child_that_is_forked_while_another_thread_connects_does_not_prolong_the_lease(checkpoint):
    with Interpreter() as client:
        client.run(FORKING_LATER.format(module="session", name="_connect") + LOAD.format(path=str(checkpoint)))
        children = [child.pid for child in psutil.Process(client.pid).children()]
        with ending(children):
            assert leases_of(checkpoint) == 1
            client.run("del weights\n__import__('gc').collect()")
            eventually(lambda: leases_of(checkpoint) == 0, SOON_S)
            assert children
            assert all(map(is_running, children))


def test_a_child_that_is_forked_while_tensors_are_saved_does_not_prevent_it(runtime_dir):
    with Interpreter("torch", "nbcache") as client:
        client.run(FORKING_LATER.format(module="tensors", name="write_tensors"))
        client.begin("nbcache.put('kept', torch.arange(9))['tensor'].tolist()")
        with ending([]) as children:
            try:
                assert client.finish() == list(range(9))
            finally:
                children += [child.pid for child in psutil.Process(client.pid).children()]
            assert children
            assert all(map(is_running, children))


def test_children_that_end_do_not_end_their_parents_lease(checkpoint):
    with Interpreter() as client:
        client.run(LOAD.format(path=str(checkpoint)))
        client.run("import os\npid = os.fork()\nif not pid:\n    os._exit(0)\nos.waitpid(pid, 0)")
        assert leases_of(checkpoint) == 1
        assert client.run("sorted(weights)") == sorted(load_file(checkpoint))


# The end of the weights


def test_deleted_weights_end_the_lease_of_a_living_process(checkpoint):
    weights = nbcache.load(str(checkpoint), device="cpu")
    assert weights and leases_of(checkpoint) == 1
    del weights
    gc.collect()
    eventually(lambda: leases_of(checkpoint) == 0, SOON_S)


def test_a_tensor_that_is_kept_keeps_the_lease(checkpoint):
    weights = nbcache.load(str(checkpoint), device="cpu")
    kept = weights["layer.0"]
    view = kept[3:5].T
    del weights, kept
    gc.collect()
    assert leases_of(checkpoint) == 1
    assert torch.equal(view, load_file(checkpoint)["layer.0"][3:5].T)
    del view
    gc.collect()
    eventually(lambda: leases_of(checkpoint) == 0, SOON_S)


# Children that use weights

IN_A_CHILD = """
import json, os
def in_a_child(work):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(write, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        found = json.loads(answer.read())
    os.waitpid(pid, 0)
    return found
"""


def test_forked_child_uses_what_it_inherited(checkpoint):
    first = load_file(checkpoint)["layer.0"]
    with Interpreter() as client:
        client.run(LOAD.format(path=str(checkpoint)) + IN_A_CHILD)
        assert client.run("in_a_child(lambda: weights['layer.0'].tolist())") == first.tolist()
        assert client.run("in_a_child(lambda: weights['layer.0'].fill_(1).sum().item())") == first.numel()
        assert client.run("weights['layer.0'].tolist()") == first.tolist()
        assert leases_of(checkpoint) == 1


def test_forked_child_loads_by_itself(checkpoint):
    with Interpreter() as client:
        client.run(LOAD.format(path=str(checkpoint)) + IN_A_CHILD)
        work = f"""
def work():
    own = nbcache.load({str(checkpoint)!r}, device="cpu")
    users = {{lease.pid for entry in nbcache.status().entries for lease in entry.used_by}}
    return own.hit, own["layer.0"].tolist(), sorted(users) == sorted({{os.getpid(), os.getppid()}})
in_a_child(work)
"""
        assert client.run(work) == [True, load_file(checkpoint)["layer.0"].tolist(), True]
        eventually(lambda: leases_of(checkpoint) == 1, SOON_S)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_weights_reach_the_workers_of_a_pool(checkpoint, method):
    with Interpreter() as client:
        client.run(LOAD.format(path=str(checkpoint)))
        answer = client.run(
            f"""
import multiprocess
def work(received):
    import nbcache
    maps = [line.split()[4] for line in open("/proc/self/maps") if "memfd:nbcache" in line]
    leases = nbcache.status().entries[0].leases
    return received["layer.0"].tolist(), set(maps), leases, received.hit, received.private_bytes
with multiprocess.get_context({method!r}).Pool(1) as pool:
    values, inodes, leases, hit, private = pool.apply(work, (weights,))
    pool.close()
    pool.join()
values, inodes == set({INODES}), leases, hit, private
"""
        )
        assert answer == [load_file(checkpoint)["layer.0"].tolist(), True, 2, True, 0]
        eventually(lambda: leases_of(checkpoint) == 1, SOON_S)


def test_pickled_weights_attach_again(checkpoint):
    weights = nbcache.load(str(checkpoint), device="cpu")
    again = pickle.loads(pickle.dumps(weights))
    assert again is not weights
    assert again.name == weights.name == str(checkpoint)
    assert list(again) == list(weights)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert leases_of(checkpoint) == 2


def test_pickled_weights_attach_again_as_they_were_asked_for(checkpoint):
    weights = nbcache.load(str(checkpoint), device="cpu", dtype=torch.float16, share="private")
    again = pickle.loads(pickle.dumps(weights))
    assert all(torch.equal(again[name], weights[name]) and again[name].dtype == torch.float16 for name in weights)
    assert repr(again) == repr(weights)


def test_pickling_released_weights_fails(checkpoint):
    weights = nbcache.load(str(checkpoint), device="cpu")
    weights.release()
    with pytest.raises(WeightsReleased, match=r"model\.safetensors: these weights were released; load them again"):
        pickle.dumps(weights)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize(
    ("lose", "error"),
    [
        ("nbcache.evict_all()", "EntryNotFound: .*not cached any more"),
        ("nbcache.client.session.stop_daemon()", "DaemonUnavailable: no daemon runs"),
    ],
)
def test_who_waits_for_a_pool_hears_that_weights_were_lost_on_the_way(checkpoint, method, lose, error):
    with Interpreter("nbcache.client.session") as client:
        client.run(f"weights = nbcache.load({str(checkpoint)!r}, device='cpu', share='private')\n__import__('gc').collect()")
        eventually(lambda: leases_of(checkpoint) == 0, SOON_S)
        client.run(f"{lose}\nNone")
        with pytest.raises(RemoteError, match=error):
            client.run(
                f"""
import multiprocess
with multiprocess.get_context({method!r}).Pool(1) as pool:
    pool.apply_async(lambda received: sorted(received), (weights,)).get(30)
"""
            )


USES: dict[str, Callable[[nbcache.Weights], object]] = {
    "a tensor": lambda weights: weights["layer.0"],
    "names": list,
    "length": len,
    "attribute": lambda weights: weights.hit,
    "size": lambda weights: weights.nbytes,
    "quantized": lambda weights: weights.quant_types,
    "arrays": lambda weights: weights.cupy(),
    "dict": dict,
    "copy": copy.copy,
    "again": pickle.dumps,
}


@pytest.mark.parametrize("use", USES)
def test_using_what_was_evicted_before_it_was_unpickled_fails(checkpoint, use):
    with nbcache.load(str(checkpoint), device="cpu") as weights:
        pickled = pickle.dumps(weights)
    eventually(lambda: leases_of(checkpoint) == 0, SOON_S)
    nbcache.evict(str(checkpoint))
    with pickle.loads(pickled) as lost:
        assert isinstance(lost, nbcache.Weights)
        assert lost.key == weights.key and not lost.released
        assert repr(lost) == f"<Weights {weights.key!r}: lost>" and weights.key in lost._repr_html_()
        for _ in range(2):
            with pytest.raises(EntryNotFound, match="not cached any more"):
                USES[use](lost)


# A process that may open no more files

LOAD_AGAIN = "nbcache.load({path!r}, device='cpu')"


@pytest.mark.parametrize(
    ("what", "is_cached"),
    [(LOAD_AGAIN, True), (LOAD_AGAIN, False), ("nbcache.put('kept', torch.ones(3))", True), ("nbcache.status()", True)],
)
def test_who_may_open_no_more_files_is_told_so(checkpoint, what, is_cached):
    def forget() -> None:
        eventually(lambda: not any(entry.leases for entry in nbcache.status().entries))
        nbcache.evict_all()

    nbcache.load(str(checkpoint), device="cpu").release()
    forget()
    call = f"({what.format(path=str(checkpoint))}) and None"
    said = []
    with Interpreter("torch", "nbcache") as client:
        client.run(call)  # what is imported late is there now
        limits = resource.prlimit(client.pid, resource.RLIMIT_NOFILE)
        used = {int(name) for name in os.listdir(f"/proc/{client.pid}/fd")}
        for limit in [number for number in range(1000) if number not in used][:8]:
            if not is_cached:
                forget()
            resource.prlimit(client.pid, resource.RLIMIT_NOFILE, (limit, limits[1]))
            try:
                client.run(call)
            except RemoteError as error:
                said.append(str(error).splitlines()[-1])
            resource.prlimit(client.pid, resource.RLIMIT_NOFILE, limits)
            eventually(lambda: {int(name) for name in os.listdir(f"/proc/{client.pid}/fd")} == used)
    assert 0 < len(said) < 8
    assert all(re.match(r"nbcache\.errors\.\w+: .*[Tt]oo many open files", line) for line in said)
    assert re.search(r"DaemonUnavailable: .*, \d+ are allowed here; raise that \(ulimit -n\)", said[-1])


# A staging that is disturbed


def test_interrupted_load_returns_at_once_and_leaves_nothing(big, tmp_path):
    daemon = Freeze(nbcache.status().pid)
    marker = tmp_path / "frozen"
    with Interpreter("nbcache", "glob", "os", "torch", "zlib") as client:
        descriptors = "sorted((fd, os.readlink(fd)) for fd in glob.glob('/proc/self/fd/*') if os.path.exists(fd))"
        before = client.run(descriptors)
        client.begin(FREEZING_LOAD.format(path=str(big), marker=str(marker)))
        eventually(marker.exists)
        client.interrupt()
        with pytest.raises(RemoteError, match="KeyboardInterrupt"):
            client.finish(timeout_s=SOON_S)  # the daemon is stopped: nothing else could have ended it
        assert client.run(descriptors) == before
        assert client.run(INODES) == []
        daemon.thaw()
        assert leases_of(big) == 0
        assert client.run(f"weights = nbcache.load({str(big)!r}, device='cpu')\nzlib.crc32(weights['w'].numpy())") == (
            zlib.crc32(load_file(big)["w"].numpy())
        )
        assert leases_of(big) == 1
    assert_right(big)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-7, os.SEEK_END)
        file.write(b"another")


def replace(path: Path) -> None:
    os.replace(big_checkpoint(path.with_suffix(".new"), b"two"), path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def truncate(path: Path) -> None:
    os.truncate(path, BIG_BYTES // 2)


@pytest.mark.parametrize(
    ("change", "is_valid_after"), [(rewrite, True), (replace, True), (append, False), (truncate, False), (os.unlink, None)]
)
def test_file_that_changes_while_it_is_read_is_never_served(big, change: Callable[[Path], None], is_valid_after):
    daemon = Freeze(nbcache.status().pid)

    def change_it(staged_bytes: int, total_bytes: int) -> None:
        if not daemon.frozen:
            daemon(staged_bytes, total_bytes)
            try:
                change(big)
            finally:
                daemon.thaw()

    with pytest.raises(CheckpointChanged, match=r"big\.safetensors: .*load it again"):
        nbcache.load(str(big), device="cpu", on_progress=change_it)
    assert daemon.frozen
    assert nbcache.status().entries == ()
    eventually(lambda: not held_by(daemon.pid))
    if is_valid_after:
        assert_right(big)
    elif is_valid_after is False:
        with pytest.raises(CheckpointInvalid):
            nbcache.load(str(big), device="cpu")
    else:
        with pytest.raises(nbcache.errors.CheckpointNotFound):
            nbcache.load(str(big), device="cpu")


def test_an_older_generation_that_nobody_waits_for_goes_once_it_is_complete(big, tmp_path):
    """No name leads to it: nobody could evict it."""
    daemon = Freeze(nbcache.status().pid)
    marker, small, latest = (tmp_path / name for name in ("frozen", "small.safetensors", "latest.safetensors"))
    latest.symlink_to(big)
    with Interpreter() as one, Interpreter("nbcache.client.loading") as other:
        one.begin(FREEZING_LOAD.format(path=str(latest), marker=str(marker)))
        eventually(marker.exists)
        one.kill()
        latest.unlink()
        latest.symlink_to(small)
        other.begin(f"weights = nbcache.load({str(latest)!r}, device='cpu')\nsorted(weights)")
        eventually(lambda: is_connected(other))
        daemon.thaw()
        assert other.finish() == sorted(load_file(small))
        eventually(lambda: all(entry.host == "staged" for entry in nbcache.status().entries))
        eventually(lambda: len(nbcache.status().entries) == 1)
        assert entry_of(latest).leases == 1
        eventually(lambda: sum("memfd:nbcache:/" in target for target in held_by(daemon.pid)) == 1)


def test_everyone_who_waits_hears_of_the_change(big, tmp_path):
    daemon = Freeze(nbcache.status().pid)
    marker = tmp_path / "frozen"
    with Interpreter() as one, Interpreter("nbcache") as other:
        one.begin(FREEZING_LOAD.format(path=str(big), marker=str(marker)))
        eventually(marker.exists)
        other.begin(f"nbcache.load({str(big)!r}, device='cpu')")
        eventually(lambda: is_connected(other))
        rewrite(big)
        daemon.thaw()
        with pytest.raises(RemoteError, match="CheckpointChanged"):
            one.finish()
        with contextlib.suppress(RemoteError):  # it asked before the change, or after it: then it has the new bytes
            other.finish()
    assert_right(big)
