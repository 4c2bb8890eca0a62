"""How long it takes to map pinned host blocks for a GPU: ``python -m tests.bench.mapping [--mib N]``.

What a fill waits for beside the link. Blocks of several sizes, made by this process or, as in earnest, by another that has no
context; mapped for the first time or once more; alone, while the link is busy, while another thread of this interpreter is, and
while both are. Prints, for each, the median milliseconds of one block, and of the one call of the driver's that takes longest.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch

from nbcache.memory.driver import CudaDriver, Gpu, Mapped

MIB = 1 << 20
SIZES = (16 * MIB, 32 * MIB, 64 * MIB, 256 * MIB)
ROUNDS = 3
FDS_PER_MESSAGE = 200
SLOWEST = "cuMemSetAccess"


class TimedDriver(CudaDriver):
    """The driver, and how long each of its slowest calls took."""

    def __init__(self) -> None:
        super().__init__()
        self.slowest_ms: list[float] = []

    def _call(self, function: str, *arguments: object) -> Any:
        start = time.perf_counter()
        try:
            return super()._call(function, *arguments)
        finally:
            if function == SLOWEST:
                self.slowest_ms.append((time.perf_counter() - start) * 1000)


def blocks_of(driver: CudaDriver, size_bytes: int, count: int) -> tuple[list[int], list[Mapped]]:
    """Blocks by descriptor, and their maps for the CPU, as the daemon has them."""
    fds = [driver.create_block(size_bytes) for _ in range(count)]
    return fds, [driver.map_block(fd, size_bytes) for fd in fds]


@contextlib.contextmanager
def own_blocks(size_bytes: int, count: int) -> Iterator[list[int]]:
    """Blocks that this process made."""
    driver = CudaDriver()
    fds, maps = blocks_of(driver, size_bytes, count)
    yield fds
    for mapped, fd in zip(maps, fds, strict=True):
        mapped.close()
        driver.close(fd)


@contextlib.contextmanager
def foreign_blocks(size_bytes: int, count: int) -> Iterator[list[int]]:
    """Blocks that a process without a context made."""
    driver = CudaDriver()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        command = [sys.executable, "-m", "tests.bench.mapping", "--serve", str(there.fileno()), str(size_bytes), str(count)]
        maker = subprocess.Popen(command, pass_fds=[there.fileno()])
        there.close()
        fds = []
        while len(fds) < count:
            said, received, _, _ = socket.recv_fds(here, 1, FDS_PER_MESSAGE)
            assert said, "who makes the blocks has ended"
            fds += received
        yield fds
        for fd in fds:
            driver.close(fd)
    maker.wait()


def serve(peer_fd: int, size_bytes: int, count: int) -> None:
    """Make blocks for the other end of a socket, and keep them until that closes."""
    fds, _ = blocks_of(CudaDriver(), size_bytes, count)
    with socket.socket(fileno=peer_fd) as peer:
        for at in range(0, count, FDS_PER_MESSAGE):
            socket.send_fds(peer, [b"."], fds[at : at + FDS_PER_MESSAGE])
        peer.recv(1)


@contextlib.contextmanager
def busy_link() -> Iterator[None]:
    """Copies to the GPU that outlast what is measured meanwhile."""
    host = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    for _ in range(100):  # half a second, at 50 GB/s
        device.copy_(host, non_blocking=True)
    yield
    assert not torch.cuda.current_stream().query(), "the link was idle before the end"
    torch.cuda.synchronize()


@contextlib.contextmanager
def busy_interpreter() -> Iterator[None]:
    """A thread that makes views, which keeps the interpreter busy."""
    stop, whole = threading.Event(), torch.empty(MIB, device="cuda")

    def work() -> None:
        while not stop.is_set():
            for number in range(100):
                whole.as_strided((16, 64), (64, 1), number * 1024)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)


def map_each(driver: TimedDriver, gpu: Gpu, fds: list[int], size_bytes: int) -> tuple[float, float]:
    """Milliseconds to map one block, medians: in all, and in the slowest call."""
    driver.slowest_ms.clear()
    took, maps = [], []
    for fd in fds:
        start = time.perf_counter()
        maps.append(driver.map_block_on(fd, size_bytes, gpu))
        took.append((time.perf_counter() - start) * 1000)
    for mapped in maps:
        mapped.close()
    return statistics.median(took), statistics.median(driver.slowest_ms)


def main() -> None:
    """Measure, and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=640, help="of blocks, of each size")
    parser.add_argument("--serve", nargs=3, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve)
        return
    torch.zeros(1, device="cuda")
    driver = TimedDriver()
    gpu = driver.gpus()[0]
    around: dict[str, tuple[Any, ...]] = {
        "alone": (), "busy link": (busy_link,), "busy interpreter": (busy_interpreter,),
        "both busy": (busy_link, busy_interpreter),
    }  # fmt: skip
    print(f"{gpu.name}: ms to map a block ({SLOWEST} alone), in the order of the rounds")
    for size in SIZES:
        count = max(2, given.mib * MIB // size)
        for whose, making in {"own": own_blocks, "another's": foreign_blocks}.items():
            with making(size, count) as fds:
                for case, conditions in around.items():
                    found = []
                    for _ in range(ROUNDS):
                        with ExitStack() as stack:
                            for condition in conditions:
                                stack.enter_context(condition())
                            found.append(map_each(driver, gpu, fds, size))
                    shown = "  ".join(f"{ms:6.3f} ({slowest:.3f})" for ms, slowest in found)
                    print(f"  {size // MIB:4d} MiB x {count:<3d} {whose:10s} {case:17s} {shown}", flush=True)


if __name__ == "__main__":
    main()
