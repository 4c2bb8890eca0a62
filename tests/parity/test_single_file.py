"""A single-file checkpoint in its authors' layout: as ``from_single_file`` makes it, converted once."""

from __future__ import annotations

import gc
import re

import pytest
import torch
from safetensors.torch import load_file

import nbcache
from nbcache.errors import CheckpointNotFound, InvalidOption, ModelMismatch, UnsupportedFormat
from nbcache.models.api import assemble_name
from tests.parity.harness import differences, library_noise, portrait, run
from tests.support.models import SUBJECTS, Subject, unet
from tests.support.single_files import write_single_file


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("single")
    write_single_file(root)
    return root


def converted() -> list[str]:
    """What the entries are called, without their hashes. All are converted ones: the original is not cached."""
    entries = nbcache.status().entries
    assert {entry.provenance for entry in entries} == {"derived"}
    return sorted(re.sub(r" [0-9a-f]{16}\]$", "]", entry.name) for entry in entries)


def test_a_model_out_of_a_file(runtime_dir, written):
    from diffusers import AutoencoderKL

    file, config = written / "model.safetensors", written / "sd" / "vae"
    with library_noise():
        stock = AutoencoderKL.from_single_file(str(file), config=str(config), torch_dtype=torch.float16)
    for hit in (False, True):
        made = assemble_name(file, device="cpu", config=config)
        assert list(differences(portrait(stock), portrait(made.value))) == []
        assert made.tally.hit is hit
        assert converted() == ["model [AutoencoderKL]"]
        del made
    gc.collect()


def test_a_pipeline_out_of_a_file(runtime_dir, written, monkeypatch):
    from diffusers import StableDiffusionPipeline

    subject = Subject(lambda _: None, SUBJECTS["sd"].run, pipeline=True)
    file, config = written / "model.safetensors", written / "sd"
    given = {"unet": unet().half()}
    with library_noise():
        stock = StableDiffusionPipeline.from_single_file(str(file), config=str(config), torch_dtype=torch.float16, **given)
        for model in (stock.vae, stock.text_encoder):
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        first = nbcache.load_model(file, device="cpu", config=config, **given)
    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", None)  # from here on nothing is converted
    second = nbcache.load_model(file, device="cpu", config=config, **given)
    for loaded in (first, second):
        found = differences(portrait(stock), portrait(loaded))
        # Ours says in which dtype it is; stock leaves what the folder's config said.
        assert [text for text in found if not text.startswith("/text_encoder/config")] == []
        assert loaded.text_encoder.config.dtype == loaded.text_encoder.dtype == torch.float16
        assert run(subject, loaded) == run(subject, stock)
    assert converted() == ["model [text_encoder]", "model [vae]"]


@pytest.mark.parametrize("nested", [False, True])
def test_a_file_of_torch_save_as_stock(runtime_dir, written, tmp_path, nested):
    from diffusers import AutoencoderKL

    tensors = load_file(written / "model.safetensors")
    file, config = tmp_path / "model.ckpt", written / "sd" / "vae"
    torch.save({"state_dict": tensors} if nested else tensors, file)
    with library_noise():
        stock = AutoencoderKL.from_single_file(str(file), config=str(config), torch_dtype=torch.float16)
    for _ in ("converted", "cached"):
        assert list(differences(portrait(stock), portrait(nbcache.load_model(file, device="cpu", config=config)))) == []
    assert converted() == ["model [AutoencoderKL]"]


def test_what_cannot_be_converted(runtime_dir, written):
    file = written / "model.safetensors"
    with pytest.raises(CheckpointNotFound, match="no such folder, alias or repository"):
        nbcache.load_model(file, device="cpu", config="nowhere")
    with pytest.raises(
        UnsupportedFormat, match="a transformers model; the config of a single file is the folder of a diffusers"
    ):
        nbcache.load_model(file, device="cpu", config=written / "sd" / "text_encoder")
    with pytest.raises(ModelMismatch, match=r"model\.safetensors: the libraries cannot convert it: .*UNet2DConditionModel"):
        nbcache.load_model(file, device="cpu", config=written / "sd")
    with pytest.raises(InvalidOption, match="unet: a single model is made from its config alone"):
        nbcache.load_model(file, device="cpu", config=written / "sd" / "vae", unet=None)
