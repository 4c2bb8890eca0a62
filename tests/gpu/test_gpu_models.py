"""Models on a real GPU: as stock, in the slabs' own memory, and a FLUX.1 of full shape, in a first and in a restarted process.

The last writes 33.7 GB to TMPDIR, or uses the folder of ``nbcache bench models --keep`` that NBCACHE_TEST_PIPELINE names; it
wants 60 GB of GPU memory (the whole pipeline and a stock transformer beside it) and 100 GB of host memory, page cache and all.
Run on a GPU host: ``make gpu``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from multiprocess import resource_tracker

from nbcache.bench.pipeline import pipeline_folder
from tests.parity.harness import library_noise
from tests.support.gpu import require_gpu
from tests.support.kernels import Interpreter
from tests.support.models import SUBJECTS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]

KERNEL = """
import gc, nbcache, torch, warnings
from pathlib import Path
from safetensors.torch import load_file
from nbcache.bench.pipeline import TRANSFORMER
from nbcache.models.api import assemble_name
from tests.parity.harness import describe, differences, library_noise, load_stock, portrait, run
from tests.support.models import SUBJECTS

def parameters(loaded):
    models = [loaded] if isinstance(loaded, torch.nn.Module) else loaded.components.values()
    return [p for model in models if isinstance(model, torch.nn.Module) for p in model.parameters()]

def compared(name, folder, dtype):
    with library_noise():
        stock = load_stock(Path(folder), SUBJECTS[name], dtype).to("cuda")
    made = assemble_name(folder, device="cuda")
    found = ["a parameter of its own"] * sum(not torch._C._is_cow_tensor(p.data) for p in parameters(made.value))
    found += differences(portrait(stock), portrait(made.value))
    if run(SUBJECTS[name], stock) != run(SUBJECTS[name], made.value):
        found.append("output")
    return found, made.tally.private_bytes

MOVES = {
    "to cpu": lambda pipe: pipe.to("cpu"),
    "to cpu and back": lambda pipe: pipe.to("cpu").to("cuda"),
    "to float16": lambda pipe: pipe.to(torch.float16),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential offload": lambda pipe: pipe.enable_sequential_cpu_offload(),
}

def moved(pipe, action):
    with library_noise():
        MOVES[action](pipe)
        images = [run(SUBJECTS["flux"], pipe), run(SUBJECTS["flux"], pipe)]
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    hooked = [f"{n}.{m}" for n, part in models.items() for m, module in part.named_modules() if hasattr(module, "_hf_hook")]
    return images, hooked

def moving(folder, action):
    # what differs after the same move of a stock pipeline and of one from the cache; whether hooks were left
    with library_noise():
        stock = load_stock(Path(folder), SUBJECTS["flux"], torch.bfloat16).to("cuda")
    made = assemble_name(folder, device="cuda")
    (images, hooked), found = moved(stock, action), moved(made.value, action)
    if found != (images, hooked):
        return ["the images, or the hooks"], bool(hooked)
    return list(differences(portrait(stock), portrait(made.value))), bool(hooked)

def unlike_files(folder):
    # the tensors of slabs that differ from what the files hold
    files = Path(folder).glob("*/*.safetensors")
    pairs = [(nbcache.load(file, device="cuda", share="readonly"), load_file(file)) for file in files]
    return [n for slab, stock in pairs for n, t in stock.items() if not torch.equal(slab[n].cpu(), t)], len(pairs)

def large_of_its_own(model):
    # an operator may ask for the address of a bias, which makes it private: a few kilobytes
    return sum(not torch._C._is_cow_tensor(p.data) for p in model.parameters() if p.nbytes > 100_000)

def forward(transformer):
    generator = torch.Generator("cuda").manual_seed(0)
    def random(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        return describe(transformer(
            hidden_states=random(1, 256, 64), encoder_hidden_states=random(1, 64, 4096), pooled_projections=random(1, 768),
            timestep=torch.ones(1, device="cuda", dtype=torch.bfloat16), guidance=torch.ones(1, device="cuda"),
            img_ids=torch.zeros(256, 3, device="cuda"), txt_ids=torch.zeros(64, 3, device="cuda"), return_dict=False,
        )[0])

def load(folder):
    global pipe, tally
    made = assemble_name(folder, device="cuda")
    pipe, tally = made.value, made.tally
    return made.what, tally.hit, tally.private_bytes

def unlike(component, folder):
    # what differs from stock, tensor by tensor, on the GPU; then the stock one goes
    cls = type(getattr(pipe, component))
    word = "dtype" if cls.__module__.startswith("transformers") else "torch_dtype"
    with library_noise():
        stock = cls.from_pretrained(f"{folder}/{component}", **{word: torch.bfloat16}).to("cuda")
    mine, theirs = getattr(pipe, component).state_dict(), stock.state_dict()
    found = [n for n in {**mine, **theirs} if n not in mine or n not in theirs or not torch.equal(mine[n], theirs[n])]
    if component == "transformer" and forward(stock) != forward(pipe.transformer):
        found.append("output")
    del stock, theirs
    gc.collect()
    torch.cuda.empty_cache()
    return found
"""


@pytest.fixture(scope="session", autouse=True)
def gpu():
    """A GPU, and the libraries: one that they import where it is installed (onnxruntime) opens files for good."""
    require_gpu()
    diffusers = pytest.importorskip("diffusers")
    _ = diffusers.FluxPipeline, diffusers.StableDiffusionPipeline, diffusers.OnnxRuntimeModel


@pytest.fixture
def kernel(runtime_dir, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with Interpreter() as kernel:
        kernel.run(KERNEL)
        yield kernel


@pytest.mark.parametrize("name", ["flux", "sd", "bert", "llama", "gpt2", "t5"])
def test_on_the_gpu_as_stock(kernel, tmp_path, name):
    folder = tmp_path / name
    with library_noise():
        SUBJECTS[name].write(folder)
    dtype = "torch.bfloat16" if name == "flux" else "torch.float32"
    for _ in ("filled", "resident"):
        assert kernel.run(f"compared({name!r}, {str(folder)!r}, {dtype})") == [[], 0]


@pytest.mark.parametrize("action", ["to cpu", "to cpu and back", "to float16", "model offload", "sequential offload"])
def test_moving_is_as_stock_and_writes_to_no_slab(kernel, tmp_path, action):
    folder = tmp_path / "flux"
    with library_noise():
        SUBJECTS["flux"].write(folder)
    assert kernel.run(f"moving({str(folder)!r}, {action!r})") == [[], "offload" in action]
    unlike, files = kernel.run(f"unlike_files({str(folder)!r})")
    assert unlike == []
    assert files == 4


@pytest.fixture
def full_pipeline(monkeypatch):
    """The folder, and a daemon with room for it: a machine's memory may grow as it is used, and the daemon takes half."""
    monkeypatch.setenv("NBCACHE_HOST_LIMIT", "40GB")
    with pipeline_folder(keep=os.environ.get("NBCACHE_TEST_PIPELINE", "")) as folder:
        yield folder


@pytest.fixture(scope="session")
def tracker():
    """The process that multiprocess keeps for the life of ours, which writes the pipeline in a fresh one, is no leak."""
    resource_tracker.ensure_running()


@pytest.mark.alone
def test_flux_of_full_shape(tracker, full_pipeline, kernel):
    """Every tensor and the transformer's output as stock; after a restart the same output from the same slabs."""
    folder = full_pipeline
    assert kernel.run(f"load({folder!r})") == ["FluxPipeline", False, 0]
    for component in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert kernel.run(f"unlike({component!r}, {folder!r})") == [], component
    output = kernel.run("forward(pipe.transformer)")
    assert kernel.run("large_of_its_own(pipe.transformer)") == 0
    kernel.kill()
    with Interpreter() as restarted:
        restarted.run(KERNEL)
        assert restarted.run(f"load({folder!r})") == ["FluxPipeline", True, 0]
        assert restarted.run("forward(pipe.transformer)") == output
