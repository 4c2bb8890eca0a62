"""The shape of the package: imports run downwards, torch stays at the edge, and the public surface is what is documented."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbcache

ROOT = Path(nbcache.__file__).parent

RANKS: dict[str, int] = {
    "errors": 0,
    "units": 1,
    "layout": 2,
    "config": 2,
    "manifest": 3,
    "memory": 4,
    "checkpoints": 5,
    "protocol": 6,
    "daemon": 7,
    "client": 7,
    "models": 8,
    "jupyter": 9,
    "cli": 10,
    "bench": 10,
    "demo": 10,
    "demo_kernel": 10,
    "__main__": 11,
}
"""A module may import from its own part and from lower ranks. Parts of one rank never import each other."""

SAME_RANK = {("cli", "bench"), ("cli", "demo"), ("demo", "demo_kernel")}
"""The top is one layer: the command line runs the demo and the benchmarks."""

FORBIDDEN = {("daemon", "checkpoints")}
"""The daemon knows no format."""

TORCH_MODULES = ("client/tensors.py", "models/", "bench.py", "demo.py", "demo_kernel.py")
"""The demo and the benchmarks stand outside: they compare with stock loaders, in functions that only they call."""


def imports(tree: ast.Module, module: str) -> Iterator[str]:
    """Dotted names of everything a module imports, in functions too, but not under ``if TYPE_CHECKING``."""

    class Visitor(ast.NodeVisitor):
        def __init__(self) -> None:
            self.found: list[str] = []

        def visit_If(self, node: ast.If) -> None:
            if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                for child in node.orelse:
                    self.visit(child)
            else:
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            self.found += [alias.name for alias in node.names]

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, *([base] if base else [])])
            self.found += [f"{base}.{alias.name}" for alias in node.names]

    visitor = Visitor()
    visitor.visit(tree)
    yield from visitor.found


def part_of(dotted: str) -> str | None:
    """The part of the package that an import of this name reaches; None for other packages and for ``nbcache`` itself."""
    names = dotted.split(".")
    if names[0] != "nbcache" or len(names) < 2:
        return None
    if names[1] == "__version__":
        return None
    return names[1]


def violations(root: Path) -> list[str]:
    """What breaks the rules in a package whose files lie under ``root``."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if str(relative) == "__init__.py":
            continue
        part = relative.parts[0].removesuffix(".py")
        if part not in RANKS:
            found.append(f"{relative}: {part} has no rank")
            continue
        module = ".".join(["nbcache", *relative.with_suffix("").parts])
        for dotted in imports(ast.parse(path.read_text()), module):
            target = part_of(dotted)
            if dotted.split(".")[0] == "torch" and not str(relative).startswith(TORCH_MODULES):
                found.append(f"{relative}: imports torch")
            if target is None or target == part:
                continue
            if target not in RANKS:
                found.append(f"{relative}: imports {dotted}, which has no rank")
            elif (part, target) in FORBIDDEN:
                found.append(f"{relative}: {part} must not know {target}")
            elif RANKS[target] >= RANKS[part] and (part, target) not in SAME_RANK:
                found.append(f"{relative}: imports {dotted}, which is not below it")
    return found


def test_imports_run_downwards():
    assert violations(ROOT) == []


PLANTED = {
    "daemon/x.py": ("from nbcache.client import api", "client.api"),
    "client/x.py": ("import nbcache.daemon.store", "daemon.store"),
    "protocol/x.py": ("def late():\n    from nbcache.daemon.store import Store", "daemon.store.Store"),
    "errors.py": ("from nbcache.units import format_size", "units.format_size"),
    "layout.py": ("from .config import NBCache", "config.NBCache"),
    "config.py": ("from nbcache import layout", "layout"),
    "memory/x.py": ("from ..protocol import wire", "protocol.wire"),
    "daemon/y.py": ("from nbcache.checkpoints.catalog import resolve", "must not know checkpoints"),
    "daemon/z.py": ("def late():\n    import torch", "imports torch"),
    "client/weights.py": ("from torch import Tensor", "imports torch"),
    "client/y.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import torch.nn",
        "imports torch",
    ),
    "jupyter/x.py": ("try:\n    import nbcache.cli\nexcept ImportError:\n    pass", "nbcache.cli"),
    "cli.py": ("def late():\n    import torch", "imports torch"),
    "newcomer.py": ("", "newcomer has no rank"),
    "client/z.py": ("import nbcache.newcomer", "has no rank"),
}


@pytest.mark.parametrize(("path", "planted"), PLANTED.items(), ids=PLANTED.keys())
def test_a_planted_violation_is_seen(tmp_path, path, planted):
    source, expected = planted
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.write_text(source)
    (found,) = violations(tmp_path)
    assert path in found
    assert expected in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("client/tensors.py", "import torch"),
        ("models/lora.py", "from torch import nn"),
        ("client/weights.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n    import nbcache.cli"),
        (
            "daemon/server.py",
            "from nbcache import __version__\nfrom nbcache.protocol import messages\nfrom nbcache.errors import X",
        ),
        ("daemon/x.py", "from . import store\nfrom .store import Store"),
        ("cli.py", "from nbcache.client import api\ndef late():\n    from nbcache.bench import run"),
    ],
)
def test_what_is_allowed_is_not_taken_for_a_violation(tmp_path, path, source):
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.write_text(source)
    assert violations(tmp_path) == []


def test_every_source_file_was_looked_at():
    """The walk really meets the package: each part that has a rank and exists was parsed."""
    met = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert met >= {
        "errors",
        "units",
        "layout",
        "config",
        "manifest",
        "memory",
        "checkpoints",
        "protocol",
        "daemon",
        "client",
        "cli",
    }


def modules_after(statement: str) -> set[str]:
    """Names of all modules in a fresh interpreter that ran this statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd="/")
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "module",
    ["nbcache", "nbcache.cli", "nbcache.bench", "nbcache.daemon.lifecycle", "nbcache.client.api", "nbcache.jupyter.magics"],
)
def test_starting_does_not_import_torch(module):
    loaded = modules_after(f"import {module}")
    assert module in loaded
    assert not {
        name for name in loaded if name.split(".")[0] in ("torch", "numpy", "safetensors", "cupy", "cuda", "transformers")
    }


def test_importing_the_package_imports_nothing_of_it():
    loaded = modules_after("import nbcache")
    assert {name for name in loaded if name.split(".")[0] == "nbcache"} == {"nbcache"}
    assert not loaded & {"msgspec", "traitlets", "IPython", "psutil", "typer", "rich"}


def test_the_daemon_loads_no_format_and_no_client():
    loaded = modules_after("import nbcache.daemon.lifecycle")
    assert not {
        name for name in loaded if name.startswith(("nbcache.client", "nbcache.checkpoints", "nbcache.jupyter", "IPython"))
    }


def test_the_probe_sees_torch_when_it_is_there():
    assert "torch" in modules_after("import nbcache.client.tensors")


SURFACE = {
    "NBCacheError", "Weights", "__version__", "errors", "evict", "evict_all", "load", "pin", "put", "status", "unpin",
}  # fmt: skip


def test_the_public_surface_is_exactly_what_is_documented():
    assert set(nbcache.__all__) == SURFACE
    assert len(nbcache.__all__) == len(SURFACE)
    assert set(dir(nbcache)) == SURFACE


def test_every_public_name_is_there_documented_and_one_object():
    from nbcache import errors
    from nbcache.client import api, weights

    for name in SURFACE - {"__version__"}:
        assert getattr(nbcache, name).__doc__, name
    assert nbcache.load is api.load
    assert nbcache.put is api.put
    assert nbcache.Weights is weights.Weights
    assert nbcache.errors is errors
    assert nbcache.NBCacheError is errors.NBCacheError


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = nbcache.nonsense
    assert not hasattr(nbcache, "acquire")


def test_the_package_names_itself_in_its_docstring_functions():
    """The module's docstring presents the functions that a user calls."""
    for name in ("load", "put", "status", "evict", "pin", "unpin"):
        assert f":func:`{name}`" in nbcache.__doc__
