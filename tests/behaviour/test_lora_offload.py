"""LoRAs where hooks keep the weights elsewhere: sequential offloading, and groups that go to the GPU from copies.

Over the CPU, which stands for the GPU; ``tests/gpu/test_lora.py`` has the same with a real one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload

import nbcache
from nbcache.errors import LoraError
from tests.support.lora_parity import identical, same, stock
from tests.support.loras import Writer, flux, flux_output, outputs
from tests.support.offloading import offload_in_groups, pretend_accelerator, pretend_streams

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def some(tmp_path) -> dict[str, str]:
    """LoRAs of the transformer, of equal shapes and of others; one of the text encoder too."""
    write, pipe = Writer(tmp_path), flux()
    return {
        "a": write.diffusers("a", pipe, only="transformer"),
        "b": write.diffusers("b", pipe, only="transformer", alpha=3.0),
        "wide": write.diffusers("wide", pipe, rank=8, only="transformer"),
        "attn": write.diffusers("attn", pipe, only="attn"),
        "both": write.diffusers("both", pipe),
    }


def computes(pipe: Any, path: str | None) -> bool:
    expected = flux() if path is None else stock(flux(), path)
    return same([flux_output(pipe.transformer)], [flux_output(expected.transformer)])


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_groups_with_copies_see_what_is_loaded_swapped_and_taken_out(some, monkeypatch, kind):
    pretend_streams(monkeypatch)
    pipe = flux()
    offload_in_groups(pipe.transformer, kind)
    for name in ("attn", "a", "b", "wide"):  # the first is injected, the next adds modules, then one is written in place
        nbcache.load_lora(pipe, some[name])
        assert computes(pipe, some[name]), name
    nbcache.unload_lora(pipe)
    assert computes(pipe, None)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_groups_with_copies_that_were_made_after_the_lora(some, monkeypatch, kind):
    pretend_streams(monkeypatch)
    pipe = flux()
    nbcache.load_lora(pipe, some["a"])
    offload_in_groups(pipe.transformer, kind)
    assert computes(pipe, some["a"])
    nbcache.load_lora(pipe, some["b"])
    assert computes(pipe, some["b"])


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_groups_with_copies_see_what_is_fused_and_unfused(some, monkeypatch, kind):
    pretend_streams(monkeypatch)
    pipe, expected = flux(), flux()
    for each in (pipe, expected):
        offload_in_groups(each.transformer, kind)
    nbcache.load_lora(pipe, some["a"])
    stock(expected, some["a"])
    before = flux_output(pipe.transformer)
    pipe.fuse_lora()
    expected.fuse_lora()
    assert same([flux_output(pipe.transformer)], [flux_output(expected.transformer)])
    pipe.unfuse_lora()
    assert identical([flux_output(pipe.transformer)], [before])


def test_a_pipeline_that_is_offloaded_module_by_module(some, monkeypatch):
    pretend_accelerator(monkeypatch)
    pipe = flux()
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert next(pipe.transformer.parameters()).is_meta

    def compute() -> list[torch.Tensor]:
        ids = torch.arange(6)[None]
        with torch.no_grad():
            return [flux_output(pipe.transformer, like=torch.empty(0)), pipe.text_encoder(ids).last_hidden_state]

    for name in ("attn", "both", "a", "b"):
        nbcache.load_lora(pipe, some[name])
        assert next(pipe.transformer.parameters()).is_meta
        expected = stock(flux(), some[name])
        assert same(compute(), [flux_output(expected.transformer), *outputs(expected)[1:]]), name
    nbcache.load_lora(pipe, some["attn"], adapter="second")
    nbcache.set_lora(pipe, {"default": 0.5, "second": 2.0})
    expected = stock(stock(flux(), some["b"]), some["attn"], "second")
    expected.set_adapters(["default", "second"], [0.5, 2.0])
    assert same(compute()[:1], [flux_output(expected.transformer)])
    nbcache.unload_lora(pipe)
    assert same(compute(), [flux_output(flux().transformer), *outputs(flux())[1:]])


def test_a_model_alone_that_is_offloaded_is_refused(tmp_path, monkeypatch):
    from transformers import BertConfig, BertModel

    pretend_accelerator(monkeypatch)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 99}
    model = BertModel(BertConfig(**sizes))
    name = "base_model.model.encoder.layer.0.attention.self.query"
    matrices = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    path = Writer(tmp_path).save("bert", matrices)
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(LoraError, match=r"BertModel are offloaded by accelerate's hooks.*load it to one device"):
        nbcache.load_lora(model, path)
