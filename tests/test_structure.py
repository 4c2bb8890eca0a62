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
    "typos": 1,
    "collection": 1,
    "layout": 2,
    "config": 2,
    "settings": 3,
    "pages": 3,
    "manifest": 3,
    "output": 3,
    "memory": 4,
    "checkpoints": 5,
    "protocol": 6,
    "daemon": 7,
    "client": 7,
    "models": 8,
    "jupyter": 9,
    "completion": 8,
    "cli": 10,
    "top": 10,
    "bench": 10,
    "doctor": 10,
    "guide": 10,
    "demo": 10,
    "demo_kernel": 10,
    "__main__": 11,
}
"""A module may import from its own part and from lower ranks. Parts of one rank never import each other."""

INNER_RANKS: dict[str, dict[str, int]] = {
    "daemon": {
        "entries": 0,
        "reader": 0,
        "store": 1,
        "connection": 1,
        "claims": 1,
        "tiers": 2,
        "policy": 2,
        "report": 2,
        "holdings": 3,
        "host": 4,
        "leases": 5,
        "slabs": 6,
        "service": 7,
        "server": 8,
        "lifecycle": 9,
        "__main__": 10,
    },
    "client": {
        "notices": 0,
        "options": 0,
        "tensors": 0,
        "ends": 0,
        "session": 1,
        "fill": 2,
        "blocks": 2,
        "slabs": 2,
        "quantized": 1,
        "cow": 3,
        "views": 4,
        "device": 5,
        "loading": 6,
        "weights": 7,
        "users": 0,
        "spare": 0,
        "api": 8,
    },
    "checkpoints": {
        "content": 0,
        "safetensors": 0,
        "archive": 1,
        "rebuilds": 1,
        "unpickle": 2,
        "gguf": 2,
        "arrays": 2,
        "pickled": 3,
        "formats": 4,
        "catalog": 5,
        "known": 0,
        "aliases": 1,
        "folders": 0,
        "hub": 1,
        "names": 2,
    },
    "memory": {"shared": 0, "driver": 0, "arena": 1, "features": 2},
    "doctor": {"findings": 0, "probes": 1, "machine": 1, "gpus": 2, "jupyter": 2, "companion": 2, "checkup": 3},
    "models": {
        "gguf": 0,
        "points": 0,
        "served": 0,
        "aside": 0,
        "derived": 1,
        "service": 1,
        "hooks": 2,
        "packages": 0,
        "lean": 0,
        "seating": 1,
        "supply": 2,
        "diffusers": 3,
        "transformers": 3,
        "pipelines": 4,
        "single_file": 5,
        "assembly": 6,
        "api": 7,
        "lora_convert": 0,
        "lora_cache": 2,
        "lora_host": 1,
        "lora_offload": 2,
        "lora_slots": 1,
        "lora_fuse": 3,
        "lora_plan": 3,
        "lora_inject": 3,
        "lora": 4,
    },
    "bench": {
        "clients": 0,
        "figures": 0,
        "disk": 0,
        "footprint": 0,
        "isolation": 0,
        "kernel": 0,
        "restart_report": 0,
        "saving": 0,
        "host": 1,
        "lora_files": 1,
        "lora_report": 1,
        "peers": 1,
        "room": 1,
        "flux": 2,
        "lora_swaps": 2,
        "models": 2,
        "restart": 2,
        "gpu": 3,
        "lora": 3,
        "pipeline": 3,
        "tables": 4,
        "commands": 5,
    },
    "jupyter": {
        "display": 0,
        "progress": 1,
        "panels": 1,
        "release": 1,
        "completer": 1,
        "handover": 0,
        "deferred": 0,
        "installed": 1,
        "experience": 0,
        "encryption": 0,
        "launcher": 1,
        "effects": 0,
        "ahead": 2,
        "veil": 3,
        "learning": 4,
        "preload": 3,
        "manners": 5,
        "magics": 6,
        "kernelspec": 2,
        "commands": 4,
        "proof": 4,
        "peers": 0,
        "traces": 0,
        "forked": 5,
        "supervision": 6,
        "visitor": 7,
        "nursery": 8,
        "zygote": 9,
    },
}
"""The same rule within a part: a module imports those of lower ranks alone."""

SAME_RANK = {
    *(("cli", part) for part in ("bench", "demo", "doctor", "guide", "top")),
    ("guide", "bench"),
    ("demo", "demo_kernel"),
}
"""The top is one layer: the command line runs the demo and the benchmarks, and the guide tells of them."""

FORBIDDEN = {("daemon", "checkpoints")}
"""The daemon knows no format."""

OUTSIDE = ("bench/", "demo.py", "demo_kernel.py")
"""The demo and the benchmarks stand outside: they compare with stock loaders, in functions that only they call."""

EDGES: dict[str, tuple[str, ...]] = {
    "torch": (
        *(f"client/{name}.py" for name in ("tensors", "slabs", "cow", "views", "device", "loading", "quantized")),
        "models/",
        "doctor/probes.py",
        "jupyter/proof.py",  # in a forked process, and only if torch was imported before the fork
        *OUTSIDE,
    ),
    "cuda": ("memory/driver.py", "memory/features.py"),
    "pynvml": ("memory/driver.py", "bench/"),
    "cupy": ("memory/arena.py", "client/slabs.py"),
    "cupyx": ("memory/arena.py",),
}
"""Who may import these packages, and nobody else."""

LATE = ("cuda", "pynvml", "cupy", "cupyx")
"""Those that are imported in functions only, when they are first needed: they are not always there, and slow."""


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


def imports_at_once(tree: ast.Module) -> Iterator[str]:
    """Names of the packages that importing the module imports: everything outside functions."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def part_of(dotted: str) -> str | None:
    """The part of the package that an import of this name reaches; None for other packages and for ``nbcache`` itself."""
    names = dotted.split(".")
    if names[0] != "nbcache" or len(names) < 2:
        return None
    if names[1] == "__version__":
        return None
    return names[1]


def edge_violations(relative: str, tree: ast.Module, dotted: list[str]) -> Iterator[str]:
    """Imports of torch, CUDA or CuPy where they do not belong."""
    for package in sorted({name.split(".")[0] for name in dotted} & EDGES.keys()):
        if not relative.startswith(EDGES[package]):
            yield f"{relative}: imports {package}"
    for package in sorted(set(imports_at_once(tree)) & set(LATE)):
        if relative.startswith(EDGES[package]):
            yield f"{relative}: imports {package} when it is imported"


def inner_violation(part: str, module: str, dotted: str) -> str | None:
    """What is wrong with an import within a part."""
    ranks, names = INNER_RANKS.get(part), dotted.split(".")
    if ranks is None or module == "__init__" or len(names) < 3:
        return None
    target = names[2]
    if target == module:
        return None
    if target not in ranks:
        return f"imports {dotted}, which has no rank"
    return f"imports {dotted}, which is not below it" if ranks[target] >= ranks[module] else None


def violations(root: Path) -> list[str]:
    """What breaks the rules in a package whose files lie under ``root``."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if str(relative) == "__init__.py":
            continue
        part, name = relative.parts[0].removesuffix(".py"), relative.stem
        if part not in RANKS:
            found.append(f"{relative}: {part} has no rank")
            continue
        if part in INNER_RANKS and name not in INNER_RANKS[part] and name != "__init__":
            found.append(f"{relative}: {name} has no rank in {part}")
            continue
        tree = ast.parse(path.read_text())
        dotted_names = list(imports(tree, ".".join(["nbcache", *relative.with_suffix("").parts])))
        found += edge_violations(str(relative), tree, dotted_names)
        for dotted in dotted_names:
            target = part_of(dotted)
            if target == part and (wrong := inner_violation(part, name, dotted)):
                found.append(f"{relative}: {wrong}")
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
    "daemon/store.py": ("from nbcache.client import api", "client.api"),
    "client/session.py": ("import nbcache.daemon.store", "daemon.store"),
    "protocol/x.py": ("def late():\n    from nbcache.daemon.store import Store", "daemon.store.Store"),
    "errors.py": ("from nbcache.units import format_size", "units.format_size"),
    "layout.py": ("from .config import NBCache", "config.NBCache"),
    "config.py": ("from nbcache import layout", "layout"),
    "memory/shared.py": ("from ..protocol import wire", "protocol.wire"),
    "daemon/server.py": ("from nbcache.checkpoints.catalog import resolve", "must not know checkpoints"),
    "daemon/lifecycle.py": ("def late():\n    import torch", "imports torch"),
    "client/weights.py": ("from torch import Tensor", "imports torch"),
    "client/fill.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import torch.nn",
        "imports torch",
    ),
    "jupyter/display.py": ("try:\n    import nbcache.cli\nexcept ImportError:\n    pass", "nbcache.cli"),
    "cli.py": ("def late():\n    import torch", "imports torch"),
    "newcomer.py": ("", "newcomer has no rank"),
    "daemon/newcomer.py": ("", "newcomer has no rank in daemon"),
    "client/options.py": ("import nbcache.newcomer", "has no rank"),
    "client/api.py": ("from nbcache.client.newcomer import load", "client.newcomer.load, which has no rank"),
    "daemon/reader.py": ("from nbcache.daemon.store import Store", "daemon.store.Store, which is not below it"),
    "daemon/policy.py": ("from . import tiers", "daemon.tiers, which is not below it"),
    "daemon/tiers.py": ("def late():\n    from .server import Server", "daemon.server.Server, which is not below it"),
    "client/cow.py": (
        "def late():\n    from nbcache.client.device import CudaViews",
        "client.device.CudaViews, which is not below",
    ),
    "client/tensors.py": ("import nbcache.client.cow", "client.cow, which is not below it"),
    "memory/driver.py": ("from nbcache.memory.arena import Arena", "memory.arena.Arena, which is not below it"),
    "checkpoints/gguf.py": ("from nbcache.bench.host import measure", "bench.host.measure, which is not below it"),
    "checkpoints/arrays.py": ("def late():\n    import cuda.bindings.driver", "imports cuda"),
    "memory/arena.py": ("import cupy", "imports cupy when it is imported"),
    "client/slabs.py": ("class X:\n    import cupy", "imports cupy when it is imported"),
    "bench/gpu.py": ("def late():\n    from cuda.bindings import driver", "imports cuda"),
    "bench/peers.py": ("import pynvml", "imports pynvml when it is imported"),
    "jupyter/magics.py": ("def late():\n    import pynvml", "imports pynvml"),
    "client/loading.py": ("def late():\n    import cupy", "imports cupy"),
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
        ("client/loading.py", "import torch\nfrom nbcache.client.device import find_device"),
        ("models/service.py", "from torch import nn"),
        ("models/diffusers.py", "from torch import nn"),
        ("client/weights.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n    import nbcache.cli"),
        (
            "client/options.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from nbcache.client.device import SlabMap",
        ),
        (
            "daemon/server.py",
            "from nbcache import __version__\nfrom nbcache.protocol import messages\nfrom nbcache.errors import X",
        ),
        ("daemon/server.py", "from . import store\nfrom .store import Store\nfrom nbcache.daemon.tiers import Tiers"),
        ("memory/driver.py", "def late():\n    from cuda.bindings import driver\n    import pynvml"),
        ("memory/arena.py", "class Arrays:\n    def __init__(self):\n        import cupy, cupyx"),
        ("client/slabs.py", "def late():\n    import cupy"),
        ("bench/gpu.py", "def late():\n    import pynvml, torch\nfrom nbcache.bench.disk import read"),
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
        "jupyter",
        "bench",
        "demo",
        "doctor",
        "cli",
    }
    for part, ranks in INNER_RANKS.items():
        assert {path.stem for path in (ROOT / part).glob("*.py")} == {*ranks, "__init__"}


def modules_after(statement: str) -> set[str]:
    """Names of all modules in a fresh interpreter that ran this statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd="/")
    return set(json.loads(done.stdout))


SLOW = (
    "torch",
    "numpy",
    "safetensors",
    "cupy",
    "cupyx",
    "cuda",
    "pynvml",
    "transformers",
    "gguf",
    "diffusers",
    "huggingface_hub",
)


@pytest.mark.parametrize(
    "module",
    [
        "nbcache",
        "nbcache.cli",
        "nbcache.bench",
        "nbcache.daemon.lifecycle",
        "nbcache.client.api",
        "nbcache.jupyter.magics",
        "nbcache.doctor.checkup",
        "nbcache.models.hooks",
        "nbcache.models.api",
    ],
)
def test_starting_does_not_import_torch(module):
    loaded = modules_after(f"import {module}")
    assert module in loaded
    assert not {name for name in loaded if name.split(".")[0] in SLOW}


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
    "NBCacheError", "Weights", "__version__", "disable", "enable", "enabled", "errors", "evict", "evict_all", "free_gpu",
    "load", "load_lora", "load_model", "pin", "put", "set_lora", "status", "unload_lora", "unpin",
}  # fmt: skip


def test_the_public_surface_is_exactly_what_is_documented():
    assert set(nbcache.__all__) == SURFACE
    assert len(nbcache.__all__) == len(SURFACE)
    assert set(dir(nbcache)) == SURFACE


def test_every_public_name_is_there_documented_and_one_object():
    from nbcache import errors
    from nbcache.client import api, weights
    from nbcache.models import api as models
    from nbcache.models import hooks

    for name in SURFACE - {"__version__"}:
        assert getattr(nbcache, name).__doc__, name
    assert nbcache.load is api.load
    assert nbcache.load_model is models.load_model
    assert nbcache.put is api.put
    assert nbcache.free_gpu is api.free_gpu
    assert nbcache.enable is hooks.enable
    assert nbcache.Weights is weights.Weights
    assert nbcache.errors is errors
    assert nbcache.NBCacheError is errors.NBCacheError


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = nbcache.nonsense
    assert not hasattr(nbcache, "acquire")


def test_the_package_names_itself_in_its_docstring_functions():
    """The module's docstring presents the functions that a user calls."""
    names = ("load", "load_model", "put", "status", "evict", "pin", "unpin", "enable", "disable", "enabled")
    for name in (*names, "load_lora", "set_lora", "unload_lora"):
        assert f":func:`{name}`" in nbcache.__doc__
