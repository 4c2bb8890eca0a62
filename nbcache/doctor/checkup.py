"""All checks, in the order in which a load depends on them. Starts no daemon, makes no GPU context, changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

from nbcache import __version__
from nbcache.config import NBCache, RuntimePaths, available_memory_bytes
from nbcache.doctor import companion, gpus, jupyter, machine
from nbcache.doctor.findings import Finding, Report
from nbcache.doctor.probes import ask_driver, ask_torch
from nbcache.errors import NBCacheError


def examine() -> Report:
    """Look at everything. Takes as long as importing torch does, which a child does meanwhile."""
    return Report.of(__version__, _findings())


def _findings() -> Iterator[Finding]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    daemons_environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    with ExitStack() as stack:
        torch = stack.enter_context(ask_torch(os.environ))
        driver = stack.enter_context(ask_driver(os.environ))
        daemons = stack.enter_context(ask_driver(daemons_environment)) if visible is not None else None
        config, paths = NBCache(), RuntimePaths.of_user()
        yield machine.check_interpreter()
        yield machine.check_system_calls()
        yield from machine.check_memory(config)
        wanted = _wanted_bytes(config)
        yield from machine.check_overcommit(wanted)
        yield from machine.check_limits(wanted)
        yield companion.check_directory(paths)
        yield from companion.check_daemon(paths, wanted)
        yield jupyter.check_packages()
        yield from jupyter.check_kernelspec()
        hardware, seen = gpus.Hardware.find(), driver.answer()
        yield gpus.judge_torch(torch.answer(), hardware)
        yield from gpus.judge_driver(seen, hardware, emulated=bool(os.environ.get("NBCACHE_TEST_DRIVER")))
        yield from gpus.judge_visibility(seen, daemons.answer() if daemons else None, visible or "")


def _wanted_bytes(config: NBCache) -> int:
    """How large an entry may become."""
    try:
        return config.host_limit_bytes()
    except NBCacheError:  # check_memory says so
        return available_memory_bytes() // 2
