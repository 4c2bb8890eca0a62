"""What goes to a GPU, over the emulated driver: slabs where a file goes there whole, single tensors else.

``device_map`` is tried as the libraries pass it on; with the libraries themselves, and a GPU, in tests/gpu.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.checkpoints import write_checkpoint
from tests.support.kernels import Interpreter, RemoteError

SIZES = ((300, 100), (7,), (64, 64))
PRELUDE = """
import types
import torch
import safetensors, safetensors.torch
import nbcache
from nbcache.models import hooks
STOCK = types.SimpleNamespace(load=safetensors.torch.load_file)
nbcache.enable()
service = hooks._switch._serving()

def slabs(path):
    return [(slab.dtype, slab.state) for e in nbcache.status().entries if e.source == (path,) for slab in e.devices]

def same(tensors, path, dtype=None):
    return all(torch.equal(tensors[n], t.to(dtype or t.dtype)) for n, t in STOCK.load(path).items() if n in tensors)

def convert(path, device_map, keep=None, model=torch.nn.Linear(2, 2), **config):
    file = safetensors.safe_open(path, "pt")
    state = {name: file.get_slice(name) for name in file.keys() if name != keep}
    standard = dict(hf_quantizer=None, device_mesh=None, dtype=torch.float32, dtype_plan={})
    stock = lambda model, state_dict, load_config: {name: part[...] for name, part in state_dict.items()}
    config = types.SimpleNamespace(**{**standard, **config, "device_map": device_map})
    return service.convert(stock, model=model, state_dict=state, load_config=config)

def place(state, **options):
    return service.place(lambda model, state_dict, **_: dict(state_dict), None, state, **options)
"""
RESIDENT = [["", "resident"]]


@pytest.fixture
def kernel(runtime_dir, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setenv("NBCACHE_TEST_DRIVER", "tests.support.emulated:make")
    monkeypatch.setenv("NBCACHE_GPU_LOW_WATERMARK", "0")
    with Interpreter() as kernel:
        kernel.run(PRELUDE)
        yield kernel


def test_load_file_gives_the_slab_and_safe_open_single_tensors(kernel, tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors", sizes=SIZES)
    kernel.run(f"path = {str(path)!r}")
    kernel.run("f = safetensors.safe_open(path, 'pt', 'cuda')\nx = f.get_tensor('layer.0'), f.get_slice('layer.1')[2:]")
    assert kernel.run(
        "stock = STOCK.load(path)\ntorch.equal(x[0], stock['layer.0']), torch.equal(x[1], stock['layer.1'][2:])"
    ) == [
        True,
        True,
    ]
    assert kernel.run("slabs(path)") == []  # one tensor does not bring the whole file there
    for device in ("'cuda'", "0", "'cuda:0'"):
        assert kernel.run(f"same(safetensors.torch.load_file(path, device={device}), path)")
    assert kernel.run("slabs(path)") == RESIDENT


def test_a_gpu_without_room_is_given_tensors_one_by_one(kernel, tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors", sizes=SIZES)
    failures = tmp_path / "failures.json"
    kernel.run(f"import os\nos.environ['NBCACHE_TEST_FAILURES'] = {str(failures)!r}")  # for the daemon that it starts
    kernel.run(f"path = {str(path)!r}")
    failures.write_text(json.dumps(["memory"]))
    with pytest.raises(RemoteError, match="DeviceMemoryFull"):
        kernel.run("nbcache.load(path, device='cuda')")
    kernel.run(
        "import warnings\nwith warnings.catch_warnings(record=True) as caught:\n    loaded = convert(path, {'': 'cuda'})"
    )
    assert kernel.run("same(loaded, path), len(loaded)") == [True, len(SIZES)]
    assert kernel.run("[w.category.__name__ for w in caught]") == ["NotServed"]
    assert kernel.run("slabs(path)") == []


CONVERTED = {
    "{'': 'cuda'}": RESIDENT,
    "{'': 0, 'x': 0}": RESIDENT,
    "{'': torch.device('cuda')}, dtype=torch.float16, model=torch.nn.Linear(2, 2).half()": [["F16", "resident"]],
    "{'': 'cuda'}, dtype=torch.float16": RESIDENT,  # some of the model stays as it is: cast one by one, as ever
    "{'': 'cuda'}, dtype=torch.float16, model=torch.nn.Linear(2, 2).half(), dtype_plan={'x': 1}": RESIDENT,
    "{'a': 'cuda', 'b': 'cpu'}": [],
    "{'a': 'cuda:0', 'b': 'cuda:1'}": [],
    "{'': 'cpu'}": [],
    "{'': 'cuda'}, hf_quantizer=1": [],
    "{'': 'cuda'}, device_mesh=1": [],
    "{'': 'cuda'}, keep='layer.0'": [],
    "None": [],
}


def test_a_model_that_goes_to_one_gpu_is_had_there(kernel, tmp_path):
    for number, (arguments, expected) in enumerate(CONVERTED.items()):
        path = write_checkpoint(tmp_path / f"{number}.safetensors", seed=number, sizes=SIZES)
        kernel.run(f"path = {str(path)!r}\nloaded = convert(path, {arguments})")
        assert kernel.run("len(loaded)") == len(SIZES) - ("keep" in arguments)
        dtype = "torch.float16" if expected == [["F16", "resident"]] else None
        assert kernel.run(f"same(loaded, path, {dtype})"), arguments
        assert kernel.run("slabs(path)") == expected, arguments


FILLED = {
    "device_map={'': 'cuda'}": RESIDENT,
    "device_map={'a': 'cuda', 'b': 'cpu'}": [],
    "device_map={'': 'cuda'}, hf_quantizer=1": [],
    "device_map={'': 'cuda'}, device_mesh=1": [],
    "device_map=None": [],
}


def test_a_file_that_transformers_4_opens_on_a_gpu(kernel, tmp_path):
    kernel.run("read = lambda **_: safetensors.safe_open(path, 'pt', 'cuda').get_slice('layer.0')[...]")
    for number, (options, expected) in enumerate(FILLED.items()):
        path = write_checkpoint(tmp_path / f"{number}.safetensors", seed=number, sizes=SIZES)
        kernel.run(f"path = {str(path)!r}")
        assert kernel.run(f"torch.equal(service.fill(read, {options}), STOCK.load(path)['layer.0'])")
        assert kernel.run("slabs(path)") == expected, options
    assert kernel.run("read() is None or slabs(path)") == []  # and no longer, once it is done


PLACED = {
    ("", "device_map={'': 'cuda'}"): RESIDENT,
    ("", "device_map={'': 'cuda'}, dtype=torch.bfloat16"): [["BF16", "resident"]],
    ("", "device_map={'': 'cuda'}, dtype=torch.bfloat16, keep_in_fp32_modules=['x']"): RESIDENT,
    ("state['renamed'] = state.pop('layer.0')", "device_map={'': 'cuda'}"): RESIDENT,
    ("state['layer.0'].mul_(2)", "device_map={'': 'cuda'}"): [],
    ("state['layer.0'] = state['layer.0'] * 2", "device_map={'': 'cuda'}"): [],
    ("del state['layer.0']", "device_map={'': 'cuda'}"): [],
    ("", "device_map={'': 'cuda'}, hf_quantizer=1"): [],
    ("", "device_map={'': 'cpu'}"): [],
    ("", "device_map=None"): [],
}


def test_a_state_dict_that_goes_to_one_gpu_is_had_there(kernel, tmp_path):
    for number, ((change, options), expected) in enumerate(PLACED.items()):
        path = write_checkpoint(tmp_path / f"{number}.safetensors", seed=number, sizes=SIZES)
        kernel.run(
            f"path = {str(path)!r}\nstate = safetensors.torch.load_file(path)\n{change}\nplaced = place(state, {options})"
        )
        assert kernel.run("list(placed) == list(state)")
        assert kernel.run("all(torch.equal(placed[n], t.to(placed[n].dtype)) for n, t in state.items())"), (change, options)
        assert kernel.run("slabs(path)") == expected, (change, options)
        assert kernel.run("any(placed[n] is t for n, t in state.items())") is (expected == [])


def test_the_allocator_is_warmed_up_only_for_what_is_not_served(kernel):
    kernel.run("warmed = []\nstock = lambda *arguments: warmed.append(len(arguments))")
    kernel.run("service.warmup(stock, 'model', {'a': 'cuda', 'b': 'cuda'}, None)")
    kernel.run("service.warmup(stock, 'model', {'a': 'cuda', 'b': 'cuda'}, torch.float16, None)")
    assert kernel.run("warmed") == []
    kernel.run("service.warmup(stock, 'model', {'a': 'cuda', 'b': 'cpu'}, None)")
    kernel.run("service.warmup(stock, 'model', {'a': 'cuda'}, torch.float16, 'a quantizer')")
    assert kernel.run("warmed") == [3, 4]
