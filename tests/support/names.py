"""Whether the table of patch points is true of the installed packages. Imports them, so run it in a process of its own."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.version import Version

from nbcache.models.points import Point

PACKAGES = ("transformers", "diffusers", "accelerate", "peft")
NAMES = {("safetensors", "safe_open"), ("safetensors.torch", "load_file"), ("safetensors.torch", "safe_open")}
NO_LOADERS = ("convert", "conversion", "testing_utils", "test_utils", "_tf_", "_flax_", "commands")
"""Modules that are scripts, tests or another framework's."""


def applies(point: Point) -> bool:
    """Whether the installed release of the point's package is one that should have it."""
    version = Version(importlib.metadata.version(point.package))
    return Version(point.since) <= version and not (point.before and version >= Version(point.before))


def missing(points: Iterable[Point]) -> list[str]:
    """What the installed packages do not have, or have as something else."""
    import safetensors
    import safetensors.torch

    stock = {"keep": safetensors.safe_open, "safe_open": safetensors.safe_open, "load_file": safetensors.torch.load_file}
    found = []
    for point in points:
        try:
            value = getattr(importlib.import_module(point.module), point.name, None)
        except ImportError as error:
            value = error
        if applies(point) and (not callable(value) or stock.get(point.kind, value) is not value):
            found.append(f"{point.module}.{point.name}: {value!r}")
        if not applies(point) and callable(value):
            found.append(f"{point.module}.{point.name}: is there in {importlib.metadata.version(point.package)} too")
    return found


def strangers(points: Iterable[Point]) -> list[str]:
    """Names under which the installed packages import the stock functions, and the table lacks."""
    known = {(point.module, point.name) for point in points}
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        found += [f"{module}.{name}" for module, name in imported_in(Path(spec.origin).parent) if (module, name) not in known]
    return found


def imported_in(package: Path) -> Iterator[tuple[str, str]]:
    """Module and name of each import of a stock function, outside functions, in a package's files."""
    for path in sorted(package.rglob("*.py")):
        source = path.read_text()
        if "safetensors" not in source or any(part in str(path.relative_to(package)) for part in NO_LOADERS):
            continue
        module = ".".join([package.name, *path.relative_to(package).with_suffix("").parts]).removesuffix(".__init__")
        for name in names_in(ast.parse(source)):
            yield module, name


def names_in(tree: ast.Module) -> Iterator[str]:
    """The names, in a module's namespace, of stock functions that it imports."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names if (node.module, alias.name) in NAMES)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
