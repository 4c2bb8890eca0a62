"""Unchanged programs give what they gave: each loader of transformers, diffusers and peft, stock and served."""

from __future__ import annotations

import pytest

import nbcache
from tests.parity.conftest import MINILM, QUIET, digests
from tests.support.kernels import Interpreter

pytestmark = pytest.mark.timeout(300)  # importing all the libraries, some times over


def entries() -> dict[str, tuple[str, ...]]:
    """What is cached: keys, and the files that they were read from."""
    return {entry.key: entry.source for entry in nbcache.status().entries}


def test_stock_and_served_are_equal_in_a_first_and_in_a_second_process(runtime_dir, models):
    with Interpreter(**QUIET) as first:
        first.run("import nbcache\nnbcache.enable()")
        served = digests(first, models.root)
        assert {name: served[name] == models.stock[name] for name in models.stock} == dict.fromkeys(models.stock, True)
        cached = entries()
        files = {str(path) for path in [*models.root.rglob("*.safetensors"), *MINILM.glob("*.safetensors")]}
        assert {path for source in cached.values() for path in source} == files  # all that there is
    with Interpreter(**QUIET) as second:
        second.run("import nbcache\nnbcache.enable()")
        assert digests(second, models.root) == models.stock
        assert entries() == cached
        second.run(f"from transformers import AutoModel\nmodel = AutoModel.from_pretrained({str(MINILM)!r})")
        (used,) = [entry for entry in nbcache.status().entries if entry.source[0].startswith(str(MINILM))]
        assert [lease.pid for lease in used.used_by] == [second.pid]
