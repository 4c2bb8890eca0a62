"""LoRAs in real pipelines of diffusers, small ones, on the CPU; each beside what the stock loader makes of the same file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlPipeline
from safetensors.torch import load_file

import nbcache
from tests.support.loras import Writer, flux, outputs, sd3, sd15, sdxl


def stock(pipe: Any, path: str, adapter: str = "default", **options: Any) -> Any:
    """The pipeline, after ``load_lora_weights`` of the file. Of copies: on a CPU, a map's odd addresses make other arithmetic."""
    config = safetensors_metadata(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if config:
            pipe.load_lora_weights(path, adapter_name=adapter, **options)
        else:
            tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
            pipe.load_lora_weights(tensors, adapter_name=adapter, **options)
    return pipe


def safetensors_metadata(path: str) -> dict[str, str] | None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def write(tmp_path) -> Writer:
    return Writer(tmp_path)


@pytest.fixture(autouse=True)
def daemon(runtime_dir: Path) -> None:
    """Each test has its own."""


LAYOUTS = {
    "flux": (flux, Writer.diffusers),
    "flux with alphas": (flux, lambda write, name, pipe: write.diffusers(name, pipe, alpha=3.0)),
    "flux of several ranks": (flux, lambda write, name, pipe: write.diffusers(name, pipe, to_q=2, proj=8)),
    "flux, kohya": (flux, Writer.kohya_flux),
    "flux, XLabs": (flux, Writer.xlabs_flux),
    "flux, control": (lambda: flux(kind=FluxControlPipeline), Writer.control),
    "sd3": (sd3, Writer.diffusers),
    "sd1.5": (sd15, Writer.diffusers),
    "sd1.5, kohya": (sd15, Writer.kohya_unet),
    "sdxl": (sdxl, Writer.diffusers),
    "sdxl, kohya": (sdxl, Writer.kohya_unet),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_those_of_the_stock_loader(write, layout):
    make, save = LAYOUTS[layout]
    pipe = make()
    before = outputs(pipe)
    path = save(write, "lora", pipe)
    first = nbcache.load_lora(pipe, path)
    assert (first.how, first.found) == ("injected", "converted")
    expected = outputs(stock(make(), path))
    assert same(outputs(pipe), expected)
    assert not same(expected, before)
    again = nbcache.load_lora(pipe, path)
    assert again.found == "cached"
    assert same(outputs(pipe), expected)
    nbcache.unload_lora(pipe)
    assert same(outputs(pipe), before)
    assert not any("lora" in name for name, _ in (getattr(pipe, "unet", None) or pipe.transformer).named_modules())
