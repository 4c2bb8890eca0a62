"""Host blocks stay mapped in a kernel from load to load, and no longer than the daemon has them. Over the emulated driver."""

from __future__ import annotations

import os
import signal

import pytest

import nbcache
from tests.support.checkpoints import write_checkpoint
from tests.support.waiting import eventually

COUNTING = """
import contextlib
import nbcache.errors
from nbcache.client import blocks
from nbcache.client.device import find_device

blocks.LINGER_S = 0
driver = find_device(torch.device("cuda"))._driver
stock, mapped = driver.map_block_on, []

def map_block_on(fd, size_bytes, gpu):
    mapped.append(size_bytes)
    return stock(fd, size_bytes, gpu)

driver.map_block_on = map_block_on

def kept():
    return len(blocks.mapped_blocks()._kept)

def again(path, **options):
    with contextlib.suppress(nbcache.errors.DaemonUnavailable):
        nbcache.free_gpu()
    return nbcache.load(path, device="cuda", **{"share": "readonly", **options})
"""
SIZES = (*((19, 1 << 17),) * 6, (3, 1 << 17))
"""Four segments of 20 MiB in blocks of 64 and 16 MiB."""


@pytest.fixture
def kernel(kernel):
    kernel.run(COUNTING)
    return kernel


@pytest.fixture
def path(tmp_path):
    return write_checkpoint(tmp_path / "model.safetensors", sizes=SIZES)


def host_maps(kernel) -> int:
    """How many maps of blocks of host copies a kernel has."""
    with open(f"/proc/{kernel.pid}/maps") as maps:
        return sum("memfd:nbcache" in line for line in maps)


def loaded(kernel, path, **options) -> None:
    """Load it, compare it with the file, and let go of it; then its blocks are kept."""
    dtype = "torch.bfloat16" if options else "None"
    kernel.run(f"w = again({str(path)!r}, **{options!r})")
    assert kernel.run(f"same(w, {str(path)!r}, {dtype})")
    assert kernel.run("w.hit") is False
    kernel.run("w.release(); del w; gc.collect()")
    eventually(lambda: kernel.run("kept()") == 1)


def test_blocks_are_mapped_once_for_many_loads(kernel, path):
    for _ in range(3):
        loaded(kernel, path)
    loaded(kernel, path, dtype="bfloat16")
    loaded(kernel, path, share="private", dtype="bfloat16")
    assert kernel.run("mapped") == [64 << 20, 16 << 20]


def test_what_the_daemon_evicts_is_unmapped_at_once_and_read_anew(kernel, path):
    loaded(kernel, path)
    assert host_maps(kernel) == 2
    nbcache.free_gpu()
    nbcache.evict(str(path))
    eventually(lambda: host_maps(kernel) == 0)
    loaded(kernel, path)
    assert kernel.run("len(mapped)") == 4


def test_what_is_kept_mapped_gives_way_to_another_entry(request, path, tmp_path, monkeypatch):
    """It is no lease: the daemon may have the memory for another entry, whose bytes nobody sees in place of the first's."""
    monkeypatch.setenv("NBCACHE_HOST_LIMIT", str(100 << 20))  # for the daemon that the kernel starts
    kernel = request.getfixturevalue("kernel")
    other = write_checkpoint(tmp_path / "other.safetensors", sizes=SIZES, seed=1)
    for _ in range(2):
        loaded(kernel, path)
        loaded(kernel, other)
    eventually(lambda: host_maps(kernel) == 2)
    assert [entry.name for entry in nbcache.status().entries if entry.host == "staged"] == [str(other)]


def test_a_file_that_changed_is_not_taken_for_what_is_mapped(kernel, path):
    loaded(kernel, path)
    write_checkpoint(path, sizes=SIZES, seed=2)
    kernel.run(f"w = again({str(path)!r})")
    assert kernel.run(f"same(w, {str(path)!r})")


def test_after_the_death_of_the_daemon_nothing_is_mapped_and_loads_are_right(kernel, path):
    loaded(kernel, path)
    os.kill(nbcache.status().pid, signal.SIGKILL)
    eventually(lambda: host_maps(kernel) == 0)
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda', share='readonly')")
    assert kernel.run(f"same(w, {str(path)!r})")


def test_a_kernel_that_keeps_blocks_does_not_keep_the_daemon_from_evicting_all(kernel, path):
    loaded(kernel, path)
    nbcache.free_gpu()
    assert nbcache.status().entries[0].leases == 0
    nbcache.evict_all()
    assert nbcache.status().entries == ()
    eventually(lambda: host_maps(kernel) == 0)


def test_a_forked_child_maps_its_own(kernel, path):
    """And ends neither its parent's maps nor the watch."""
    loaded(kernel, path)
    child = "import os; pid = os.fork()\nif pid == 0:\n    os._exit(kept())"
    kernel.run(child)
    assert kernel.run("os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])") == 0
    loaded(kernel, path)
    assert kernel.run("len(mapped)") == 2


def test_two_gpus_map_their_own(kernel, path):
    loaded(kernel, path)
    kernel.run(f"w = nbcache.load({str(path)!r}, device='cuda:1', share='readonly')")
    assert kernel.run("len(mapped)") == 4
