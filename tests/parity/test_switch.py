"""The switch: on means every name, whenever it was imported; off means that nothing is left of it."""

from __future__ import annotations

import importlib
import sys
import threading
from importlib import metadata
from types import SimpleNamespace

import pytest
import safetensors
import safetensors.torch
import torch
from safetensors.torch import load_file

import nbcache
from nbcache.models import hooks
from nbcache.models.packages import release
from tests.parity.conftest import QUIET
from tests.support.checkpoints import write_checkpoint
from tests.support.kernels import Interpreter

pytestmark = pytest.mark.timeout(300)  # importing all the libraries, some times over

STOCK = SimpleNamespace(open=safetensors.safe_open, load=safetensors.torch.load_file)
EVERYTHING = """
import sys
def everything():
    return {(m, n): id(v) for m, module in list(sys.modules.items()) for n, v in list(getattr(module, "__dict__", {}).items())
            if module is not sys.modules["__main__"] and not m.startswith("nbcache")}
import nbcache, nbcache.models.hooks, nbcache.models.service
"""


@pytest.fixture
def path(runtime_dir, tmp_path):
    return write_checkpoint(tmp_path / "model.safetensors")


def bound():
    """Whether the functions are replaced: at home, in this module and in safetensors' own use of them. All or none."""
    found = {
        safetensors.torch.load_file is not STOCK.load,
        load_file is not STOCK.load,
        safetensors.safe_open is not STOCK.open,
        safetensors.torch.safe_open is not STOCK.open,
        hooks.is_enabled(),
        any(isinstance(finder, hooks.ImportWatch) for finder in sys.meta_path),
    }
    (only,) = found
    return only


@pytest.mark.usefixtures("runtime_dir")
def test_what_opens_files_is_a_type_as_before(path):
    nbcache.enable()
    try:
        kind = safetensors.safe_open
        with kind(path, "pt") as file:
            assert isinstance(file, kind)
            assert file.keys()
        with STOCK.open(path, "np") as file:
            assert isinstance(file, kind)
        assert not isinstance(path, kind)
        assert (kind | None).__args__ == (kind, type(None))
        assert (kind.__name__, kind.__module__, kind.__doc__) == (
            STOCK.open.__name__,
            STOCK.open.__module__,
            STOCK.open.__doc__,
        )
    finally:
        nbcache.disable()
    assert safetensors.safe_open is STOCK.open


def test_on_off_and_again():
    assert not bound()
    nbcache.enable()
    nbcache.enable()
    assert bound()
    assert load_file.__doc__ == STOCK.load.__doc__
    nbcache.disable()
    assert not bound()
    nbcache.disable()
    assert not bound()
    nbcache.enable()
    assert bound()
    nbcache.disable()
    assert not bound()


def test_blocks_nest_and_the_last_one_undoes():
    with nbcache.enabled():
        with nbcache.enabled():
            assert bound()
        assert bound()
        nbcache.disable()
        assert bound()
    assert not bound()
    nbcache.enable()
    with nbcache.enabled():
        pass
    assert bound()
    with nbcache.enabled():
        nbcache.disable()
        assert bound()
    assert not bound()
    with pytest.raises(KeyError), nbcache.enabled():
        raise KeyError
    assert not bound()


def test_threads_with_blocks_of_their_own(path):
    start, wrong = threading.Barrier(8), []

    def work():
        start.wait()
        for _ in range(20):
            with nbcache.enabled():
                if not bound() or not torch.equal(load_file(path)["layer.0"], STOCK.load(path)["layer.0"]):
                    wrong.append(threading.current_thread())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not bound()
    assert len(nbcache.status().entries) == 1


def test_who_kept_a_replacement_calls_stock_after_off(path):
    with nbcache.enabled():
        kept = [safetensors.torch.load_file, safetensors.safe_open]
        opened = kept[1](path, "pt")
    assert torch.equal(kept[0](path)["layer.0"], STOCK.load(path)["layer.0"])
    assert type(kept[1](path, "pt")) is type(STOCK.open(path, "pt"))
    assert torch.equal(opened.get_tensor("layer.0"), STOCK.load(path)["layer.0"])  # what was opened before stays served


def test_what_somebody_else_put_in_a_name_stays(monkeypatch, path):
    monkeypatch.setattr(safetensors.torch, "load_file", STOCK.load)  # back to this in the end
    with nbcache.enabled():
        served = safetensors.torch.load_file
        safetensors.torch.load_file = lambda filename: served(filename)
    assert safetensors.torch.load_file is not STOCK.load
    assert torch.equal(safetensors.torch.load_file(path)["layer.0"], STOCK.load(path)["layer.0"])


def test_a_module_that_is_imported_again_is_bound_again(monkeypatch):
    with nbcache.enabled():
        module = importlib.reload(safetensors.torch)
        stock = module.load_file.__wrapped__
        assert module.load_file is not stock
    assert safetensors.torch.load_file is stock
    monkeypatch.setattr(safetensors.torch, "load_file", STOCK.load)


def test_all_names_of_all_libraries_and_nothing_left(libraries):
    libraries.begin(
        f"""{EVERYTHING}
import importlib
from nbcache.models.points import POINTS
from tests.support.names import applies
points = [point for point in POINTS if applies(point)]
for point in points:
    importlib.import_module(point.module)
before, finders = everything(), list(sys.meta_path)
nbcache.enable()
now = [getattr(sys.modules[point.module], point.name) for point in points]
bound = [before[point.module, point.name] == id(function if point.kind == "keep" else function.__wrapped__)
     for point, function in zip(points, now)]
changed = len([name for name, value in everything().items() if value != before.get(name)])
nbcache.disable()
after = everything()
left = sorted(".".join(name) for name in after.keys() | before.keys() if after.get(name) != before.get(name))
bound, changed, left, sys.meta_path == finders"""
    )
    bound_points, changed, left, finders_restored = libraries.finish(timeout_s=110)
    assert all(bound_points)
    assert changed >= len(bound_points) - 1 > 15
    assert left == []
    assert finders_restored


def test_modules_that_are_imported_while_it_is_on():
    wrapped = ["safe_open", "caching_allocator_warmup"]
    if release(metadata.version("transformers")) >= (5, 0):
        wrapped.append("convert_and_load_state_dict_in_model")
    with Interpreter(**QUIET) as process:
        process.begin(
            f"""{EVERYTHING}
nbcache.enable()
early = sorted({{"torch", "safetensors"}} & set(sys.modules))
import inspect
from safetensors import safe_open as mine
import accelerate.utils.offload, transformers.modeling_utils as library
names = {wrapped}
on = [hasattr(getattr(library, name), "__wrapped__") for name in names] + [mine is library.safe_open]
on += [accelerate.utils.offload.safe_open is mine.__wrapped__]
loader = [type(library.__loader__).__name__, type(library.__spec__.loader).__name__]
nbcache.disable()
import safetensors
off = [hasattr(getattr(library, name), "__wrapped__") for name in names] + [mine is not safetensors.safe_open]
home = inspect.getmodule(library.caching_allocator_warmup) is library
early, on, loader, off, home, "def load_state_dict" in inspect.getsource(library)"""
        )
        early, on, loader, off, home, source = process.finish(timeout_s=110)
    assert early == ["torch"]  # nbcache.models.service was imported above; nothing asks for safetensors
    assert on == [True] * (len(wrapped) + 2)
    assert loader == ["SourceFileLoader"] * 2
    assert off == [False] * (len(wrapped) + 1)
    assert home
    assert source
