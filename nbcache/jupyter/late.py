"""In a forked kernel: what a cell sets too late, for the package that reads it was imported ahead.

In an ordinary kernel ``os.environ["HF_HOME"] = ...`` before the first ``import transformers`` has an effect, and so has a
folder that is put before the installed packages. Here the import was done before the cell was run. Owns the telling of it.
Must not undo imports. It exists so that nobody takes the results of the one for those of the other.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Set
from typing import Any

from nbcache.client.notices import SetTooLate
from nbcache.jupyter.installed import is_below, shadowed

READERS: Mapping[str, tuple[str, ...]] = {
    "HF_": ("huggingface_hub",), "HUGGING": ("huggingface_hub",), "TRANSFORMERS_": ("transformers",),
    "DIFFUSERS_": ("diffusers",), "ACCELERATE_": ("accelerate",), "DATASETS_": ("datasets",), "KERAS_": ("keras",),
    "TF_": ("tensorflow",), "JAX_": ("jax",), "NUMBA_": ("numba",), "MPL": ("matplotlib",), "TORCH": ("torch",),
    "PYTORCH_": ("torch",), "OMP_": ("torch", "numpy"), "MKL_": ("torch", "numpy"), "KMP_": ("torch",), "GOMP_": ("torch",),
    "OPENBLAS_": ("numpy", "scipy"), "NUMEXPR_": ("numexpr",), "JOBLIB_": ("joblib",), "TQDM_": ("tqdm",),
}  # fmt: skip
"""The packages that read variables which begin so, when they are imported."""
READ_LATER = frozenset({"HF_TOKEN", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"})
"""Variables that begin so too, and are read when they are used."""


class LateSettings:
    """What a kernel started with. ``ahead`` are the packages that an ordinary one would not have imported yet."""

    def __init__(self, ahead: Set[str]) -> None:
        self._ahead = ahead
        self._environment = dict(os.environ)
        self._folders = self._searched()
        self._told: set[str] = set()

    def after_cell(self, *_: object) -> None:
        """Warn of what the cell has set, once for each variable and package."""
        environment = dict(os.environ)
        for name in sorted(environment.keys() | self._environment.keys()):
            if environment.get(name) != self._environment.get(name):
                self._tell(name, [package for package in _readers(name) if package in self._ahead])
        self._environment = environment
        folders = self._searched()
        for number, folder in enumerate(folders):
            if folder not in self._folders:
                later = {package for package in self._ahead if not is_below(_file_of(package), folders[:number])}
                if (path := shadowed([folder], later)) is not None:
                    package = os.path.basename(path).partition(".")[0]
                    found = f"{_file_of(package)} was imported ahead of this kernel"
                    self._warn(path, f"{path} is not what `import {package}` gives here: {found}")
        self._folders = folders

    @staticmethod
    def _searched() -> list[str]:
        """Where modules are looked for."""
        return [os.path.abspath(folder) for folder in sys.path if isinstance(folder, str)]

    def _tell(self, variable: str, packages: list[str]) -> None:
        if packages:
            names, were = " and ".join(packages), "was" if len(packages) == 1 else "were"
            self._warn(
                variable, f"{variable} was set after {names} {were} imported ahead of this kernel, and has no effect on it"
            )

    def _warn(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            remedy = "Set it where Jupyter is started, or in the kernelspec's env; or choose an ordinary kernel (Python 3)"
            warnings.warn_explicit(f"{message}. {remedy} for this notebook", SetTooLate, "nbcache", 1)


def _file_of(package: str) -> str:
    file = getattr(sys.modules.get(package), "__file__", None)
    return os.path.abspath(file) if isinstance(file, str) else ""


def _readers(variable: str) -> tuple[str, ...]:
    if variable in READ_LATER:
        return ()
    return next((packages for beginning, packages in READERS.items() if variable.startswith(beginning)), ())


def watch(shell: Any, ahead: Set[str]) -> None:  # noqa: ANN401 - IPython's
    """Look after each cell of a shell."""
    shell.events.register("post_run_cell", LateSettings(ahead).after_cell)
