"""The contract of a GPU driver, held against each implementation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from nbcache.errors import DeviceMemoryFull, DriverError
from nbcache.memory.arena import Arena, block_sizes
from nbcache.memory.driver import GRANULARITY_BYTES, Access, cpu_view
from tests.support.gpu import cuda_bench, emulated_bench

SIZE = 2 * GRANULARITY_BYTES


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.alone])])
def bench(request):
    return cuda_bench() if request.param == "cuda" else emulated_bench()


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def slab(bench, stack, access=Access.WRITE, size=SIZE):
    fd = bench.driver.create_slab(bench.gpu.uuid, size)
    stack.callback(bench.driver.close, fd)
    mapped = bench.driver.map_slab(fd, size, bench.gpu, access)
    stack.callback(mapped.close)
    return fd, mapped


def block(bench, stack, payload, size=SIZE):
    fd = bench.driver.create_block(size)
    stack.callback(bench.driver.close, fd)
    host = bench.driver.map_block(fd, size)
    stack.callback(host.close)
    cpu_view(host)[: len(payload)] = payload
    return fd


def filled(bench, stack, payload):
    """A slab, to which a block that begins with the payload has been copied: its descriptor, and its map for writing."""
    mapped = bench.driver.map_block_on(block(bench, stack, payload), SIZE, bench.gpu)
    stack.callback(mapped.close)
    fd, target = slab(bench, stack)
    bench.driver.copy(target.address, mapped.address, SIZE, bench.stream)
    bench.synchronize()
    return fd, target


def test_gpus_are_named_by_uuid(bench):
    gpus = bench.driver.gpus()
    assert [gpu.ordinal for gpu in gpus] == list(range(len(gpus)))
    assert len({gpu.uuid for gpu in gpus}) == len(gpus)
    assert all(gpu.uuid.startswith(("GPU-", "MIG-")) and gpu.name and gpu.total_bytes > 0 for gpu in gpus)


def test_bytes_go_from_the_cpu_through_a_block_to_a_slab(bench, stack):
    payload = os.urandom(SIZE)
    _, target = filled(bench, stack, payload)
    assert bench.read(target, SIZE) == payload


def test_a_second_map_of_a_slab_sees_the_same_bytes(bench, stack):
    payload = os.urandom(1000)
    fd, _ = filled(bench, stack, payload)
    second = bench.driver.map_slab(fd, SIZE, bench.gpu, Access.READ)
    stack.callback(second.close)
    assert bench.read(second, 1000) == payload


def test_what_was_written_is_read_through_a_map_that_is_protected_afterwards(bench, stack):
    payload = os.urandom(SIZE)
    _, target = filled(bench, stack, payload)
    target.protect()
    assert bench.read(target, SIZE) == payload


def test_a_map_outlives_the_descriptor(bench, stack):
    fd = bench.driver.create_slab(bench.gpu.uuid, SIZE)
    mapped = bench.driver.map_slab(fd, SIZE, bench.gpu, Access.WRITE)
    stack.callback(mapped.close)
    bench.driver.close(fd)
    source = bench.driver.map_block_on(block(bench, stack, b"alive"), SIZE, bench.gpu)
    stack.callback(source.close)
    bench.driver.copy(mapped.address, source.address, SIZE, bench.stream)
    assert bench.read(mapped, 5) == b"alive"


def test_descriptors_are_close_on_exec(bench, stack):
    fd, _ = slab(bench, stack)
    assert not os.get_inheritable(fd)
    assert not os.get_inheritable(block(bench, stack, b""))


def test_a_slab_that_does_not_fit_is_refused_and_takes_nothing(bench):
    before = bench.driver.free_bytes(bench.gpu.uuid)
    too_much = -(-2 * bench.gpu.total_bytes // GRANULARITY_BYTES) * GRANULARITY_BYTES
    with pytest.raises(DeviceMemoryFull):
        bench.driver.create_slab(bench.gpu.uuid, too_much)
    assert bench.driver.free_bytes(bench.gpu.uuid) == before


def test_closing_a_slab_gives_its_memory_back(bench):
    before = bench.driver.free_bytes(bench.gpu.uuid)
    fd = bench.driver.create_slab(bench.gpu.uuid, SIZE)
    assert bench.driver.free_bytes(bench.gpu.uuid) <= before - SIZE
    bench.driver.close(fd)
    assert bench.driver.free_bytes(bench.gpu.uuid) == before


def test_where_an_allocation_ends(bench, stack):
    _, mapped = slab(bench, stack)
    start, end = bench.driver.allocation(mapped.address)
    assert start <= mapped.address < end <= mapped.address + SIZE


def test_mapping_more_than_there_is_is_refused(bench, stack):
    fd, _ = slab(bench, stack)
    with pytest.raises(DriverError):
        bench.driver.map_slab(fd, 2 * SIZE, bench.gpu, Access.READ)


def test_mapping_what_is_no_memory_is_refused(bench):
    reading, writing = os.pipe()
    try:
        with pytest.raises(DriverError):
            bench.driver.map_slab(reading, SIZE, bench.gpu, Access.READ)
    finally:
        os.close(reading)
        os.close(writing)


def test_what_is_exported_can_be_taken_in_and_what_is_no_memory_cannot(bench, stack):
    fd, _ = slab(bench, stack)
    bench.driver.check_import(fd)
    bench.driver.check_import(block(bench, stack, b""))
    reading, writing = os.pipe()
    try:
        with pytest.raises(DriverError):
            bench.driver.check_import(reading)
    finally:
        os.close(reading)
        os.close(writing)


def test_a_gpu_that_is_not_there_is_refused(bench):
    with pytest.raises(DriverError, match="GPU-nowhere"):
        bench.driver.free_bytes("GPU-nowhere")


def test_unmapping_twice_does_nothing(bench):
    fd = bench.driver.create_slab(bench.gpu.uuid, SIZE)
    mapped = bench.driver.map_slab(fd, SIZE, bench.gpu, Access.READ)
    mapped.close()
    mapped.close()
    bench.driver.close(fd)


def test_an_arena_serves_arrays_over_exportable_blocks(bench):
    acquired = Arena(bench.driver, getattr(bench.driver, "open_arrays", None)).acquire(SIZE)
    try:
        view = acquired.view()
        view[:4] = b"abcd"
        assert bytes(memoryview(acquired.array)[:4]) == b"abcd"
        again = bench.driver.map_block(acquired.fd, SIZE)
        assert bytes(cpu_view(again)[:4]) == b"abcd"
        again.close()
        del view
    finally:
        acquired.close()


@pytest.mark.parametrize(("extent", "sizes"), [(10, [10]), (16, [16]), (17, [16, 1]), (48, [16, 16, 16])])
def test_an_extent_is_cut_into_blocks(extent, sizes):
    assert block_sizes(extent, 16) == tuple(sizes)


WRITE_THROUGH_A_READ_MAP = """
import ctypes
from tests.support.gpu import emulated_bench
from nbcache.memory.driver import Access
bench = emulated_bench()
fd = bench.driver.create_slab(bench.gpu.uuid, 4096)
{mapping}
ctypes.memset(mapped.address, 1, 1)
"""
READ_MAPS = [
    "mapped = bench.driver.map_slab(fd, 4096, bench.gpu, Access.READ)",
    "mapped = bench.driver.map_slab(fd, 4096, bench.gpu, Access.WRITE); mapped.protect()",
]


@pytest.mark.parametrize("mapping", READ_MAPS, ids=["mapped to be read", "protected"])
def test_the_emulation_faults_on_a_write_through_a_read_map(mapping):
    code = WRITE_THROUGH_A_READ_MAP.format(mapping=mapping)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert ended.returncode == -signal.SIGSEGV
