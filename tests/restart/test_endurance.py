"""Restarts in a row: processes, descriptors and the zygote's memory do not grow."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import pytest

from tests.support.kernels import Kernel
from tests.support.waiting import eventually
from tests.support.zygotes import is_forked, zygote

SETTLING = 5
"""Restarts until a zygote has touched what it will."""
GROWTH_BYTES = 8 << 20
DESCRIPTORS = "import os; len(os.listdir('/proc/self/fd'))"


@dataclass(frozen=True)
class Cost:
    """What a zygote holds, with one kernel and one process waiting."""

    processes: int
    descriptors: int
    memory_bytes: int

    @classmethod
    def now(cls) -> Cost:
        process = psutil.Process(zygote().pid)
        eventually(lambda: len(process.children()) == 2)
        return cls(len(process.children(recursive=True)), process.num_fds(), process.memory_info().rss)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("restarts", [25, pytest.param(100, marks=pytest.mark.long)])
def test_nothing_grows(warm, specs, tmp_path, restarts):
    pid = zygote().pid
    with Kernel("nbcache", specs) as kernel:
        for _ in range(SETTLING):
            kernel.restart()
        before, kernels = Cost.now(), set()
        inside = int(kernel.run(DESCRIPTORS))
        for _ in range(restarts):
            kernel.restart()
            kernels.add(int(kernel.run("import os, torch; torch.ones(1 << 20).sum(); os.getpid()")))
        assert is_forked(kernel)
        after = Cost.now()
        assert int(kernel.run(DESCRIPTORS)) < inside + 5  # clients come and go; what a kernel leaves to the next would add up
    assert zygote().pid == pid
    assert len(kernels) == restarts
    assert after.processes == before.processes
    eventually(lambda: psutil.Process(pid).num_fds() <= before.descriptors)  # that of our own question goes a moment later
    assert after.memory_bytes < before.memory_bytes + GROWTH_BYTES
    assert not any(psutil.pid_exists(each) for each in kernels)
