"""What Jupyter needs to find: the packages of a kernel, and the kernelspec."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator

from nbcache.doctor.findings import Finding, broken, ok, warning

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
    """The kernel *Python 3 (nbcache)*, and the interpreter it starts."""
    try:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ImportError:
        return  # check_packages says so
    install = "`nbcache kernelspec install`"
    try:
        spec = KernelSpecManager().get_kernel_spec(KERNELSPEC)
    except NoSuchKernel:
        yield warning("kernelspec", "no kernel 'nbcache'; other kernels need `%load_ext nbcache`", install)
        return
    program = spec.argv[0] if spec.argv else ""
    found = program if os.path.isabs(program) else shutil.which(program)
    if not found or not os.access(found, os.X_OK):
        yield warning("kernelspec", f"{spec.resource_dir} starts {program!r}, which is not there", install)
    elif os.path.isabs(program) and not _is_this(program):
        yield ok("kernelspec", f"{spec.resource_dir}, which starts {program}: another environment than this")
    else:
        yield ok("kernelspec", str(spec.resource_dir))


def _is_this(program: str) -> bool:
    """Whether a path names this environment's interpreter: each has a folder of its own, though all may link to one file."""
    return os.path.dirname(os.path.abspath(program)) == os.path.dirname(os.path.abspath(sys.executable))
