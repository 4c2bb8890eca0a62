"""A single-file checkpoint in its authors' layout: as ``from_single_file`` makes it, converted once."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nbcache
from nbcache.errors import CheckpointNotFound, InvalidOption, UnsupportedFormat
from nbcache.models.api import assemble_name
from tests.parity.harness import differences, library_noise, portrait, run
from tests.support.models import SUBJECTS, Subject, unet

RENAMED = (
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d)\.upsamplers\.0", r"up.\1.upsample"),
)
"""From diffusers' names in a VAE to those of the latent diffusion papers' code."""


def authors_layout(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    name = re.sub(r"decoder\.up\.(\d)", lambda match: f"decoder.up.{1 - int(match[1])}", name)  # there they count downwards
    if ".attn_1." in name and name.endswith("weight") and tensor.dim() == 2:
        tensor = tensor[:, :, None, None]  # and their projections are convolutions
    return f"first_stage_model.{name}", tensor.contiguous()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a pipeline, and a file that holds its VAE and text encoder."""
    root = tmp_path_factory.mktemp("single")
    with library_noise():
        SUBJECTS["sd"].write(root / "sd")
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(root / "sd", torch_dtype=torch.float32)
    vae = dict(authors_layout(name, tensor) for name, tensor in pipe.vae.state_dict().items())
    prefix = "" if any(name.startswith("text_model.") for name in pipe.text_encoder.state_dict()) else "text_model."
    clip = {f"cond_stage_model.transformer.{prefix}{name}": t for name, t in pipe.text_encoder.state_dict().items()}
    save_file({name: tensor.half() for name, tensor in (vae | clip).items()}, root / "model.safetensors")
    return root


def saved() -> list[str]:
    return sorted(entry.name for entry in nbcache.status().entries if entry.provenance == "put")


def test_a_model_out_of_a_file(runtime_dir, written):
    from diffusers import AutoencoderKL

    file, config = written / "model.safetensors", written / "sd" / "vae"
    with library_noise():
        stock = AutoencoderKL.from_single_file(str(file), config=str(config), torch_dtype=torch.float16)
    for hit in (False, True):
        made = assemble_name(file, device="cpu", config=config)
        assert list(differences(portrait(stock), portrait(made.value))) == []
        assert made.tally.hit is hit
        assert [name.partition("@")[0] for name in saved()] == ["model.safetensors:AutoencoderKL"]
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
    assert [name.partition("@")[0] for name in saved()] == ["model.safetensors:text_encoder", "model.safetensors:vae"]


def test_a_file_that_changed_is_converted_again(runtime_dir, written, tmp_path):
    file = Path(tmp_path, "model.safetensors")
    file.write_bytes((written / "model.safetensors").read_bytes())
    config = written / "sd" / "vae"
    before = nbcache.load_model(file, device="cpu", config=config)
    from safetensors.torch import load_file

    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    after = nbcache.load_model(file, device="cpu", config=config)
    assert torch.equal(after.decoder.conv_in.bias, before.decoder.conv_in.bias + 1)


def test_what_cannot_be_converted(runtime_dir, written):
    file = written / "model.safetensors"
    with pytest.raises(CheckpointNotFound, match="no such folder, alias or repository"):
        nbcache.load_model(file, device="cpu", config="nowhere")
    with pytest.raises(
        UnsupportedFormat, match="a transformers model; the config of a single file is the folder of a diffusers"
    ):
        nbcache.load_model(file, device="cpu", config=written / "sd" / "text_encoder")
    with pytest.raises(InvalidOption, match="unet: a single model is made from its config alone"):
        nbcache.load_model(file, device="cpu", config=written / "sd" / "vae", unet=None)
