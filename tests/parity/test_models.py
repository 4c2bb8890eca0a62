"""Models and pipelines out of the cache are what the libraries load: in every tensor, setting and output."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

import nbcache
from tests.parity.harness import COPIED, differences, library_noise, load_stock, outside_the_cache, portrait, run
from tests.support.kernels import Interpreter
from tests.support.models import SUBJECTS, Subject, minilm_folder, run_encoder

pytestmark = pytest.mark.timeout(300)  # a process that imports diffusers, on a busy machine

CASES = [(name, None) for name in SUBJECTS] + [
    (name, torch.float16) for name in SUBJECTS if name not in ("sd", "sdxl", "llama-tied", "bert-tied", "clip-text")
]
"""A cast of each sort: of a pipeline, with modules that stay in float32, of tied weights."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Each subject's folder, written when it is first asked for."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            with library_noise():
                SUBJECTS[name].write(path)
        return path

    return folder


def stored_dtype(folder: Path) -> torch.dtype:
    from safetensors.torch import load_file

    tensors = load_file(next(folder.rglob("*.safetensors")))
    return next(t.dtype for t in tensors.values() if t.is_floating_point())


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_a_cached_load_equals_a_stock_load(runtime_dir, folders, name, dtype):
    subject, folder = SUBJECTS[name], folders(name)
    stock = load_stock(folder, subject, dtype or stored_dtype(folder))
    expected, output = portrait(stock), run(subject, stock)
    for _ in ("read", "cached"):
        loaded = nbcache.load_model(folder, device="cpu", dtype=dtype)
        assert list(differences(expected, portrait(loaded))) == []
        assert run(subject, loaded) == output
        assert dtype is not None or outside_the_cache(loaded) in ([], COPIED.get(name))
        del loaded
        gc.collect()


def test_the_real_minilm(runtime_dir):
    subject, folder = Subject(lambda _: None, run_encoder), minilm_folder()
    stock = load_stock(folder, subject, "auto")
    loaded = nbcache.load_model(folder, device="cpu")
    assert list(differences(portrait(stock), portrait(loaded))) == []
    assert run(subject, loaded) == run(subject, stock)
    assert type(loaded).__name__ == "BertModel"


def test_a_restarted_process_finds_the_same(runtime_dir, folders, monkeypatch):
    """All subjects once more in a process of its own: from the cache, and equal to what this process loaded the stock way."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    for name in SUBJECTS:
        nbcache.load_model(folders(name), device="cpu")
    entries = {entry.key: entry.bytes for entry in nbcache.status().entries}
    assert len(entries) == 20
    with Interpreter() as restarted:
        restarted.run("from tests.parity.harness import seen")
        for name, subject in SUBJECTS.items():
            stock = load_stock(folders(name), subject, stored_dtype(folders(name)))
            there, output, hit = restarted.run(f"seen({name!r}, {str(folders(name))!r})")
            assert list(differences(json.loads(json.dumps(portrait(stock))), there)) == [], name
            assert output == run(subject, stock), name
            assert hit, name
    assert {entry.key: entry.bytes for entry in nbcache.status().entries} == entries
