"""Which files of a repository a load downloads: pure, from names to names."""

from __future__ import annotations

import pytest

from nbcache.checkpoints.hub import files_needed, is_id

FLUX = [
    ".gitattributes", "README.md", "ae.safetensors", "flux1-dev.safetensors", "model_index.json", "dev_grid.jpg",
    "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
    "text_encoder_2/config.json", "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors", "text_encoder_2/model.safetensors.index.json",
    "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model", "tokenizer_2/tokenizer.json",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
]  # fmt: skip
SDXL = [
    "model_index.json", "sd_xl_base_1.0.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_flax_model.msgpack", "unet/model.onnx",
    "vae_decoder/model.onnx", "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin",
    "text_encoder/model.fp16.safetensors", "scheduler/scheduler_config.json",
]  # fmt: skip
BERT = [
    "config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "rust_model.ot", "vocab.txt", "tokenizer.json",
    "onnx/model.onnx", "1_Pooling/config.json", "openvino/openvino_model.xml",
]  # fmt: skip


def test_of_a_pipeline_its_components():
    left = {".gitattributes", "README.md", "ae.safetensors", "flux1-dev.safetensors", "dev_grid.jpg"}
    assert set(files_needed(FLUX)) == set(FLUX) - left


def test_of_a_pipeline_one_folder():
    assert files_needed(FLUX, "vae") == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert files_needed(FLUX, "scheduler") == []


def test_a_variant_where_there_is_one():
    assert [name for name in files_needed(SDXL, variant="fp16") if name.endswith("safetensors")] == [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
    ]
    assert [name for name in files_needed(SDXL) if name.endswith("safetensors")] == [
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ]
    assert not [name for name in files_needed(SDXL) if name.endswith((".onnx", ".msgpack", ".bin"))]
    assert "vae/diffusion_pytorch_model.safetensors" in files_needed(FLUX, variant="fp16")


def test_sharded_variants_in_both_spellings():
    for shards in (
        ["m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors"],
        ["m-00001-of-00002.fp16.safetensors", "m-00002-of-00002.fp16.safetensors"],
    ):
        names = [name.replace("m", "model", 1) for name in shards] + ["model.safetensors.index.fp16.json", "config.json"]
        assert sorted(files_needed([*names, "model.safetensors"], variant="fp16")) == sorted(names)


def test_of_a_model_what_lies_at_the_top():
    assert sorted(files_needed(BERT)) == ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]


def test_pickles_where_there_is_nothing_better():
    assert sorted(files_needed(["config.json", "pytorch_model.bin"])) == ["config.json", "pytorch_model.bin"]
    assert files_needed(["lora.safetensors"]) == ["lora.safetensors"]
    assert files_needed(["a.safetensors", "b.safetensors", "config.json"]) == []


@pytest.mark.parametrize("text", ["org/name", "gpt2", "black-forest-labs/FLUX.1-dev", "a/b_c.d-e"])
def test_ids(text):
    assert is_id(text)


@pytest.mark.parametrize("text", ["", "a/b/c", "/a/b", "./a", "../a", "~/a", "a b", "a/", "-a/b", "a--b/c", "a/b..c", "é\n/b"])
def test_what_is_no_id(text):
    assert not is_id(text)
