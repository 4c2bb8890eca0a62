"""Proof that a forked process is as good as a fresh one, and what makes it so: seeds, and a GPU context of its own.

One parallel operation of torch leaves a thread pool that hangs in every process forked later, and a GPU driver that was
initialised before a fork is no use after it. So a zygote computes nothing, and a child that it forks for the purpose computes
both, before any kernel is forked. The only module of this part that uses torch, and only where it was imported already.
"""

from __future__ import annotations

import ctypes
import os
import random
import select
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from nbcache.jupyter.preload import NVML_CHECK
from nbcache.jupyter.traces import reseed_generators

PROBE_TIMEOUT_S = 60.0
NOT_AFTER_A_FORK = 3
"""``CUDA_ERROR_NOT_INITIALIZED``: how the driver's initialisation fails in a child of a process that did it."""


def fork() -> int:
    """``os.fork``, without Python's warning about the threads of OpenBLAS, which mends itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def probe() -> str:
    """Have a forked child compute, on the CPU and on a GPU if there is one; what is wrong with that, or nothing."""
    reading, writing = os.pipe()
    pid = fork()
    if not pid:
        _prove(writing)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], PROBE_TIMEOUT_S)
        answer = os.read(reading, 4096).decode(errors="replace") if ready else "a forked child hangs"
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    return "" if answer == "well" else answer or f"a forked child ends with status {status}"


def _prove(writing: int) -> NoReturn:
    """In the child: compute, and say so."""
    try:
        answer = _compute()
    except BaseException as error:  # noqa: BLE001 - told to the parent
        answer = f"{type(error).__name__}: {error}"
    os.write(writing, answer.encode(errors="replace")[:4000])
    os._exit(0)


def _compute() -> str:
    os.environ.pop(NVML_CHECK, None)
    if "torch" not in sys.modules:
        return "well"
    import torch

    ones: Any = torch.ones(1 << 21)
    if float((ones + ones).sum()) != 2.0 * (1 << 21):
        return "a parallel sum is wrong in a forked child"
    square = torch.ones(256, 256)
    if float((square @ square)[0, 0]) != 256.0:
        return "a product is wrong in a forked child"
    if (torch.cuda._is_in_bad_fork() and torch.cuda.device_count()) or _driver_status() == NOT_AFTER_A_FORK:
        return "the GPU was initialised before the fork"
    if not torch.cuda.is_available():
        return "well"
    try:
        good = float(torch.ones(8, device="cuda").sum()) == 8.0
    except RuntimeError as error:
        return str(error) if "fork" in str(error) else "well"  # a GPU that is full or forbidden is so for any kernel
    return "well" if good else "a sum on the GPU is wrong in a forked child"


def _driver_status() -> int:
    """What comes of initialising the GPU driver; 0 where there is none."""
    try:
        return int(ctypes.CDLL("libcuda.so.1").cuInit(0))
    except (OSError, AttributeError):
        return 0


def reseed(find: Callable[[str], Any]) -> None:
    """Give a forked process random numbers of its own, as fresh ones have: ``random``'s, NumPy's global generator, torch's.

    ``find`` gives a module, if it was imported.
    """
    random.seed()
    reseed_generators(find)
    if (numpy := find("numpy.random")) is not None:
        numpy.seed()
    if (torch := find("torch")) is not None:
        torch.default_generator.seed()  # a GPU's generator is made, and seeded, when the GPU is first used


def start_gpu_context() -> None:
    """Make a context on the GPU that torch would use first, where there is one."""
    if "torch" not in sys.modules:
        return
    import torch

    os.environ.pop(NVML_CHECK, None)
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
