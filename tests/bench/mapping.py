"""How long it takes to map pinned host blocks for a GPU, by their size and by threads: ``python -m tests.bench.mapping``.

What a fill waits for beside the link. Medians of several; each way of mapping begins with no map.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from nbcache.memory.driver import Access, CudaDriver, Gpu

MIB = 1 << 20
RUNS = 5


class Blocks:
    """Pinned blocks of one size, by descriptor."""

    def __init__(self, driver: CudaDriver, gpu: Gpu, size_bytes: int, total_bytes: int) -> None:
        self.driver, self.gpu, self.size_bytes = driver, gpu, size_bytes
        self.fds = [driver.create_block(size_bytes) for _ in range(total_bytes // size_bytes)]

    def close(self) -> None:
        for fd in self.fds:
            self.driver.close(fd)

    def one_by_one(self, threads: int) -> Callable[[], None]:
        """Map each; returns what unmaps them."""

        def some(fds: Sequence[int]) -> list[Any]:
            torch.cuda.mem_get_info()  # this thread's context
            return [self.driver.map_block_on(fd, self.size_bytes, self.gpu) for fd in fds]

        with ThreadPoolExecutor(threads) as pool:
            maps = [each for found in pool.map(some, [self.fds[n::threads] for n in range(threads)]) for each in found]
        return lambda: [each.close() for each in maps] and None

    def at_once(self) -> Callable[[], None]:
        """Into one range of addresses, with one call that gives access."""
        call, handle_type = self.driver._call, self.driver._fd_handle
        handles = [call("cuMemImportFromShareableHandle", fd, handle_type) for fd in self.fds]
        total = self.size_bytes * len(self.fds)
        address = int(call("cuMemAddressReserve", total, 0, 0, 0))
        for number, handle in enumerate(handles):
            call("cuMemMap", address + number * self.size_bytes, self.size_bytes, 0, handle, 0)
            call("cuMemRelease", handle)
        call("cuMemSetAccess", address, total, [self.driver._access("DEVICE", self.gpu.ordinal, Access.READ)], 1)

        def unmap() -> None:
            call("cuMemUnmap", address, total)
            call("cuMemAddressFree", address, total)

        return unmap


def measure(way: Callable[[], Callable[[], None]]) -> tuple[float, float]:
    """Seconds to map and to unmap, medians."""
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        unmap = way()
        mapped = time.perf_counter()
        unmap()
        seconds.append((mapped - start, time.perf_counter() - mapped))
    return tuple(statistics.median(each) for each in zip(*seconds, strict=True))  # type: ignore[return-value]


def main() -> None:
    """Measure, and print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=2048)
    total_bytes = parser.parse_args().mib * MIB
    torch.zeros(1, device="cuda")
    driver = CudaDriver()
    gpu = driver.gpus()[0]
    print(f"{gpu.name}, {total_bytes / MIB:.0f} MiB: ms/GiB to map, to unmap")
    for size in (16 * MIB, 64 * MIB, 256 * MIB):
        blocks = Blocks(driver, gpu, size, total_bytes)
        ways = {f"{n} thread{'s' * (n > 1)}": partial(blocks.one_by_one, n) for n in (1, 2, 4, 8)} | {"at once": blocks.at_once}
        for name, way in ways.items():
            mapped, unmapped = (seconds * 1000 / (total_bytes / (1 << 30)) for seconds in measure(way))
            print(f"  {size // MIB:4d} MiB blocks, {name:10s} {mapped:7.2f} {unmapped:7.2f}")
        blocks.close()


if __name__ == "__main__":
    main()
