"""A model or a pipeline out of a GGUF file: as the libraries make it, over the blocks that are in the cache."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

import nbcache
from nbcache.errors import InvalidOption, ModelMismatch
from nbcache.models.api import assemble_name
from tests.parity.harness import library_noise, load_stock, outside_the_cache, run
from tests.support.gguf import write_quantized_state
from tests.support.kernels import Interpreter
from tests.support.models import SUBJECTS

pytestmark = pytest.mark.timeout(300)

FLUX = SUBJECTS["flux"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a pipeline, and its transformer once more as a GGUF file, alone and beside its config."""
    from diffusers import FluxTransformer2DModel

    root = tmp_path_factory.mktemp("gguf")
    FLUX.write(root / "flux")
    transformer = FluxTransformer2DModel.from_pretrained(root / "flux" / "transformer")
    write_quantized_state(root / "flux-Q8_0.gguf", transformer)
    transformer.save_config(root / "alone")
    write_quantized_state(root / "alone" / "model.gguf", transformer)
    return root


def stock_transformer(root: Path, dtype: torch.dtype):
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    settings = GGUFQuantizationConfig(compute_dtype=dtype)
    file, config = str(root / "flux-Q8_0.gguf"), str(root / "flux" / "transformer")
    model = FluxTransformer2DModel.from_single_file(file, config=config, torch_dtype=dtype, quantization_config=settings)
    for parameter in model.parameters():  # away from the odd addresses of a mapped file
        parameter.data = parameter.data.clone()
    return model


def contents(model: torch.nn.Module):
    return {
        name: (
            type(p).__name__,
            str(getattr(p, "quant_type", "")),
            p.dtype,
            p.requires_grad,
            p.as_subclass(torch.Tensor).tolist(),
        )
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_model_by_its_config(runtime_dir, written, dtype):
    stock = stock_transformer(written, dtype or torch.float32)
    for hit in (False, True):
        made = assemble_name(written / "flux-Q8_0.gguf", "cpu", dtype, config=written / "flux" / "transformer")
        assert contents(made.value) == contents(stock)
        assert made.tally.hit is hit
        assert dtype is not None or outside_the_cache(made.value) == []  # what is not quantized is cast
    assert "GGUFParameter" in {kind for kind, *_ in contents(stock).values()}
    folder = nbcache.load_model(written / "alone", device="cpu", dtype=dtype)
    assert contents(folder) == contents(stock)
    assert not folder.training
    del made, folder
    gc.collect()


def test_a_pipeline_around_it_before_and_after_a_restart(runtime_dir, written):
    code = (
        "import torch\nfrom nbcache.models.api import assemble_name\nfrom tests.parity.harness import run\n"
        "from tests.support.models import SUBJECTS\n"
        f"made = assemble_name({str(written / 'flux-Q8_0.gguf')!r}, 'cpu', torch.bfloat16, config={str(written / 'flux')!r})\n"
        "made.what, made.tally.hit, run(SUBJECTS['flux'], made.value)"
    )
    with library_noise():
        stock = load_stock(written / "flux", FLUX, torch.bfloat16)
        unquantized = run(FLUX, stock)
        stock.register_modules(transformer=stock_transformer(written, torch.bfloat16))
        expected = json.loads(json.dumps(run(FLUX, stock)))
    assert expected != unquantized
    for hit in (False, True):
        with Interpreter() as kernel:
            assert kernel.run(code) == ["FluxPipeline", hit, expected]


def test_of_the_pipeline_its_own_component_alone(runtime_dir, written):
    how = {"device": "cpu", "config": written / "flux"}
    transformer = nbcache.load_model(written / "flux-Q8_0.gguf", components="transformer", **how)
    assert contents(transformer) == contents(stock_transformer(written, torch.float32))
    with pytest.raises(InvalidOption, match="a GGUF file holds one model; of a pipeline it is component transformer"):
        nbcache.load_model(written / "flux-Q8_0.gguf", components="vae", **how)
    del transformer
    gc.collect()


def test_what_does_not_fit_is_said(runtime_dir, written):
    with pytest.raises(ModelMismatch, match=r"flux-Q8_0\.gguf: the libraries cannot convert it: "):
        nbcache.load_model(written / "flux-Q8_0.gguf", device="cpu", config=written / "flux" / "vae")
