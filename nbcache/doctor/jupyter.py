"""What Jupyter needs to find: the packages of a kernel, the kernelspec, and what makes its restarts quick."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from jupyter_core.paths import jupyter_data_dir

from nbcache import settings
from nbcache.config import NBCache
from nbcache.doctor.findings import Finding, broken, ok, warning
from nbcache.errors import InvalidOption
from nbcache.jupyter import handover
from nbcache.units import format_duration

if TYPE_CHECKING:
    from nbcache.jupyter.kernelspec import KernelState, SpecState

KERNELSPEC = "nbcache"
PACKAGES = ("ipython", "ipykernel", "jupyter-client")


def check_packages() -> Finding:
    """The packages that the magics and the kernel are made of."""
    versions, missing = [], []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return broken("Jupyter", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return ok("Jupyter", ", ".join(versions))


def check_kernelspec() -> Iterator[Finding]:
    """The kernelspecs that start our launcher, the zygotes that fork their kernels, and what those import ahead."""
    try:
        from nbcache.jupyter.kernelspec import examine
    except ImportError:
        return  # check_packages says so
    state = examine()
    if not state.specs:
        seen = f"no kernel {KERNELSPEC!r}; other kernels need `%load_ext nbcache`, and restart with all their imports"
        yield warning("kernelspec", seen, "`nbcache kernelspec install`")
    yield from map(_judge_spec, state.specs)
    yield from _judge_zygotes(state)
    yield _judge_learning(state)


def _judge_spec(spec: SpecState) -> Finding:
    subject = "kernelspec" if spec.name == KERNELSPEC else f"kernelspec {spec.name}"
    program = spec.argv[0]
    if spec.problem:
        return warning(subject, f"{spec.folder}: {spec.problem.partition(';')[0]}", _reinstall(spec))
    if os.path.isabs(program) and not _is_this(program):
        return ok(subject, f"{spec.folder}, which starts {program}: another environment than this")
    return ok(subject, spec.folder)


def _reinstall(spec: SpecState) -> str:
    """Where it is, or else the broken one would go before the new one."""
    name = "" if spec.name == KERNELSPEC else f" --name {spec.name}"
    if _is_below(spec.folder, jupyter_data_dir()):
        return f"`nbcache kernelspec install{name}`"
    if _is_below(spec.folder, sys.prefix):
        return f"`nbcache kernelspec install{name} --sys-prefix`"
    prefix, kernels, _ = spec.folder.partition("/share/jupyter/kernels/")
    if kernels:
        return f"`nbcache kernelspec install{name} --prefix {shlex.quote(prefix)}`"
    return f"`nbcache kernelspec remove{name}`, then `nbcache kernelspec install{name}`"


def _is_below(path: str, folder: str) -> bool:
    return os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)


def _judge_zygotes(state: KernelState) -> Iterator[Finding]:
    for zygote in state.zygotes:
        kernels = f"{zygote.kernels} kernel{'s' if zygote.kernels != 1 else ''}"
        waits = "one process waits" if zygote.ready else "no process waits yet"
        seen = f"process {zygote.pid} of {zygote.executable}, {kernels}, {waits}; imported ahead: {_seconds(zygote.preloaded)}"
        yield ok("zygote" if len(state.zygotes) == 1 else f"zygote {zygote.pid}", seen)
    for number, failure in enumerate(state.failures, 1):
        again = "name other modules in NBCache.preload, or none; kernels start the ordinary way until then"
        yield warning(f"zygote failure {number}", failure, again)
    if not (state.zygotes or state.failures) and _options().zygote_idle_s > 0:
        name = handover.means_ordinary()
        yield ok("zygote", f"none runs while {name} is set as it is" if name else "none runs; the first kernel starts one")


def _judge_learning(state: KernelState) -> Finding:
    config = _options()
    if config.zygote_idle_s <= 0:
        return ok("imports ahead", "switched off (NBCache.zygote_idle_s is 0)")
    if config.preload is not None:
        packages = {name.partition(".")[0] for name in config.preload}
        named = {name: reason for name, reason in state.broken.items() if name.partition(".")[0] in packages}
        names = ", ".join(config.preload) or "nothing beside torch"
        return ok("imports ahead", f"as NBCache.preload names: {names}{_left_out(named)}")
    left_out = _left_out(state.broken)
    return ok("imports ahead", f"torch, and as learned: {_seconds(state.learned) or 'nothing yet'}{left_out}")


def _left_out(broken: Mapping[str, str]) -> str:
    return "".join(f"; left out: {name} ({reason})" for name, reason in broken.items())


def _options() -> NBCache:
    """Those in force, the configuration files' too, as far as these can be read."""
    try:
        return settings.configured()
    except InvalidOption:  # `nbcache config` says what is wrong
        return NBCache()


def _seconds(packages: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {format_duration(took)}" for name, took in packages.items())


def _is_this(program: str) -> bool:
    """Whether a path names this environment's interpreter: each has a folder of its own, though all may link to one file."""
    return os.path.dirname(os.path.abspath(program)) == os.path.dirname(os.path.abspath(sys.executable))
