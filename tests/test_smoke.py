import torch
from safetensors.torch import load_file

import nbcache
from tests.support.checkpoints import write_checkpoint


def test_load_equals_stock(runtime_dir, tmp_path):
    path = write_checkpoint(tmp_path / "model.safetensors")
    weights = nbcache.load(str(path), device="cpu")
    stock = load_file(path)
    assert list(weights) == list(stock)
    assert all(torch.equal(weights[name], stock[name]) for name in stock)
