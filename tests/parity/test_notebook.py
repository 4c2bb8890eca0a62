"""Notebooks in real kernels: ``%nbcache``, and one that nobody changed but for two lines."""

from __future__ import annotations

import ast
import asyncio
import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.parity.conftest import MINILM, QUIET
from tests.parity.test_hooks import entries
from tests.support.checkpoints import write_checkpoint
from tests.support.kernels import Kernel

pytestmark = pytest.mark.timeout(300)  # importing all the libraries, some times over

SERVED = "import nbcache\n[entry.leases for entry in nbcache.status().entries]"


@pytest.fixture
def path(runtime_dir, tmp_path):
    return write_checkpoint(tmp_path / "model.safetensors")


def test_the_magic_serves_what_the_notebook_imported_before(path):
    with Kernel() as kernel:
        kernel.run("from safetensors.torch import load_file\nimport safetensors\nstock = [load_file]")
        kernel.run("%load_ext nbcache")
        assert kernel.run("%nbcache") == "nbcache is off"
        assert kernel.run("%nbcache on") == ""
        assert kernel.run("%nbcache") == "nbcache is on"
        kernel.run(f"w = load_file({str(path)!r})")
        assert kernel.run(SERVED) == "[1]"
        kernel.run("%nbcache off")
        assert kernel.run("load_file is stock[0], safetensors.torch.load_file is stock[0]") == "(True, True)"
        wrong = kernel.try_run("%nbcache perhaps")
        assert wrong.error.startswith("UsageError")
        assert "perhaps" in wrong.error
        kernel.run("%nbcache on")
        kernel.run("%unload_ext nbcache")
        assert kernel.run("load_file is stock[0]") == "True"


def test_configuration_turns_it_on_and_off(path):
    with Kernel(NBCACHE_SERVE_FROM_PRETRAINED="1") as kernel:
        kernel.run("%load_ext nbcache")
        assert kernel.run("%nbcache") == "nbcache is on"
        kernel.run(f"import safetensors.torch\nw = safetensors.torch.load_file({str(path)!r})")
        assert kernel.run(SERVED) == "[1]"
        kernel.run("%config NBCache.serve_from_pretrained = False")
        assert kernel.run("%nbcache") == "nbcache is off"
        kernel.run("%config NBCache.serve_from_pretrained = True")
        assert kernel.run("%nbcache") == "nbcache is on"
    with Kernel(NBCACHE_SERVE_FROM_PRETRAINED="maybe") as kernel:
        refused = kernel.try_run("%load_ext nbcache")
        assert "NBCACHE_SERVE_FROM_PRETRAINED='maybe' is neither true nor false" in refused.error


CELLS = (
    """
import torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModel
folder = Path(MINILM)
weights = load_file(folder / "model.safetensors")
len(weights), weights["pooler.dense.bias"].sum().item()""",
    """
model = AutoModel.from_pretrained(folder)
model(torch.arange(12).view(1, 12)).last_hidden_state.double().abs().sum().item()""",
    """
from diffusers import FluxPipeline
pipe = FluxPipeline.from_pretrained(FLUX, tokenizer=None, tokenizer_2=None)
steps = torch.linspace(-1, 1, 256).view(1, 8, 32)
images = pipe(prompt_embeds=steps, pooled_prompt_embeds=steps[:, 0], height=32, width=32, num_inference_steps=2,
              generator=torch.Generator().manual_seed(0), output_type="np").images
images.astype("float64").sum().item()""",
)
"""A notebook of somebody who has never heard of nbcache."""
ADDED = ("%load_ext nbcache\n%nbcache on",)
COUNT = "import json, nbcache\njson.dumps(sorted((entry.source[0], entry.leases) for entry in nbcache.status().entries))"


def execute(cells: tuple[str, ...], folder: Path) -> list[str]:
    """Run the cells in a kernel of their own, in this folder; what each showed as its result."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    asyncio.run(
        execute_all(NotebookClient(notebook, timeout=110, kernel_name="python3", resources={"metadata": {"path": folder}}))
    )
    results = [[output for output in cell.outputs if output.output_type == "execute_result"] for cell in notebook.cells]
    return ["".join(output.data["text/plain"] for output in found) for found in results]


async def execute_all(client: NotebookClient) -> None:
    async with client.async_setup_kernel():
        for number, cell in enumerate(client.nb.cells):
            await client.async_execute_cell(cell, number)


def test_a_notebook_that_adds_two_lines_gives_the_same_and_is_served_the_second_time(
    runtime_dir, tmp_path, models, libraries, monkeypatch
):
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    flux = models.root / "flux"
    cells = tuple(cell.replace("MINILM", repr(str(MINILM))).replace("FLUX", repr(str(flux))) for cell in CELLS)
    stock = [libraries.run(cell) for cell in cells]
    _, *first, used = execute((*ADDED, *cells, COUNT), tmp_path)
    cached = entries()
    _, *second, used_again = execute((*ADDED, *cells, COUNT), tmp_path)
    assert first == second
    assert ast.literal_eval(first[0]) == tuple(stock[0])
    # Stock maps weights where the file's header ends; some CPU kernels compute differently there, in the last bit.
    assert [float(result) for result in first[1:]] == pytest.approx(stock[1:], rel=1e-5)
    assert used == used_again  # each file by the notebook that showed this: MiniLM twice
    assert entries() == cached
    parts = [str(flux / part) for part in ("text_encoder", "text_encoder_2", "transformer", "vae")]
    expected = {**{part: 1 for part in parts}, str(MINILM): 2}
    assert {os.path.dirname(source): leases for source, leases in json.loads(used.strip("'"))} == expected
