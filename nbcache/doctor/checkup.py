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
from nbcache.errors import InvalidOption, NBCacheError
from nbcache.typos import did_you_mean

PARTS = ("machine", "daemon", "jupyter", "gpu")


def examine(part: str = "") -> Report:
    """Look at everything, or at one of the PARTS. Takes as long as importing torch does, which a child does meanwhile."""
    if part and part not in PARTS:
        raise InvalidOption(f"{part!r}: doctor knows {', '.join(PARTS)}{did_you_mean(part, PARTS)}")
    return Report.of(__version__, _findings((part,) if part else PARTS))


def _findings(parts: tuple[str, ...]) -> Iterator[Finding]:
    with ExitStack() as stack:
        asked = _Asked(stack) if "gpu" in parts else None
        config = NBCache()
        wanted = _wanted_bytes(config)
        if "machine" in parts:
            yield machine.check_interpreter()
            yield machine.check_settings()
            yield machine.check_system_calls()
            yield from machine.check_memory(config)
            yield from machine.check_overcommit(wanted)
            yield from machine.check_limits(wanted)
        if "daemon" in parts:
            paths = RuntimePaths.of_user()
            yield companion.check_directory(paths)
            yield from companion.check_daemon(paths, wanted)
        if "jupyter" in parts:
            yield jupyter.check_packages()
            yield from jupyter.check_kernelspec()
        if asked:
            yield from asked.findings()


class _Asked:
    """Torch and the driver, asked in processes that the stack ends; the driver also as the daemon will see it."""

    def __init__(self, stack: ExitStack) -> None:
        self._visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        daemons = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        self._torch = stack.enter_context(ask_torch(os.environ))
        self._driver = stack.enter_context(ask_driver(os.environ))
        self._daemons = stack.enter_context(ask_driver(daemons)) if self._visible is not None else None

    def findings(self) -> Iterator[Finding]:
        """What their answers mean."""
        hardware, seen = gpus.Hardware.find(), self._driver.answer()
        yield gpus.judge_torch(self._torch.answer(), hardware)
        yield from gpus.judge_driver(seen, hardware, emulated=bool(os.environ.get("NBCACHE_TEST_DRIVER")))
        yield from gpus.judge_visibility(seen, self._daemons.answer() if self._daemons else None, self._visible or "")


def _wanted_bytes(config: NBCache) -> int:
    """How large an entry may become."""
    try:
        return config.host_limit_bytes()
    except NBCacheError:  # check_memory says so
        return available_memory_bytes() // 2
