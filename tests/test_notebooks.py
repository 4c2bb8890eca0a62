"""The notebooks as they are: compared with their stored outputs, and in one kernel that is restarted where they say so."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = REPOSITORY / "notebooks"
QUICKSTART = NOTEBOOKS / "quickstart.ipynb"
FLUX = NOTEBOOKS / "flux.ipynb"
RESOURCES = {"metadata": {"path": str(NOTEBOOKS)}}


def nbval(notebook: Path) -> subprocess.CompletedProcess[str]:
    """Run a notebook in a kernel of its own spec, and compare every output that is not marked."""
    arguments = ["--nbval", f"--nbval-sanitize-with={NOTEBOOKS / 'nbval-sanitize.cfg'}", "-p", "no:cacheprovider", "-q"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "-c", os.devnull, f"--rootdir={notebook.parent}", str(notebook)],
        cwd=notebook.parent,
        env={**os.environ, "PYTHONPATH": str(NOTEBOOKS), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def code_cells(notebook: Path) -> list[Any]:
    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_outputs_are_the_stored_ones(runtime_dir, tmp_path, monkeypatch, notebook):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where a toy model is written
    run = nbval(notebook)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(code_cells(notebook))} passed" in run.stdout


def test_other_stored_outputs_are_noticed(runtime_dir, tmp_path):
    forgeries = {"first-load": ("104", "105"), "embedding": ("0.0493", "0.0494"), "kept": ("True", "False")}
    document = nbformat.read(QUICKSTART, as_version=4)
    for cell in document.cells:
        if cell.id in forgeries:
            for output in cell.outputs:
                place = output if "text" in output else output.data
                key = "text" if "text" in output else "text/plain"
                place[key] = place[key].replace(*forgeries[cell.id])
    forged = tmp_path / "forged.ipynb"
    nbformat.write(document, forged)
    run = nbval(forged)
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"{len(forgeries)} failed" in run.stdout


def text_of(cell: Any) -> str:
    """What a cell showed, as text."""
    return "".join(output["text"] if "text" in output else output["data"]["text/plain"] for output in cell.outputs)


async def execute_with_restart(client: NotebookClient) -> list[subprocess.Popen[bytes]]:
    """Execute a notebook's cells, and restart the kernel before the tagged one. The kernel's processes, one after the other."""
    processes = []
    async with client.async_setup_kernel():
        for number, cell in enumerate(client.nb.cells):
            if "after-restart" in cell.metadata.get("tags", ()):
                processes.append(client.km.provisioner.process)
                await client.km.restart_kernel()
                await client.kc.wait_for_ready(timeout=60)
                processes.append(client.km.provisioner.process)
            await client.async_execute_cell(cell, number)
    return processes


def test_a_restart_in_the_middle(runtime_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(QUICKSTART, as_version=4)
    before, after = asyncio.run(execute_with_restart(NotebookClient(notebook, timeout=60, resources=RESOURCES)))
    assert before.pid != after.pid
    assert before.poll() is not None
    shown = {cell.id: text_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert "(read from disk)" in shown["first-load"]
    assert "(cached, " in shown["second-load"]
    assert shown["second-load"].endswith("True")  # weights.hit
    assert shown["embedding"].startswith("tensor([[")
    assert shown["embedding-again"] == shown["embedding"]
    assert shown["kept"].endswith("True")  # bit for bit
    assert shown["evict"].endswith("0")


@pytest.mark.timeout(300)  # two kernels import diffusers
def test_a_pipeline_makes_the_same_image_after_a_restart(runtime_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(FLUX, as_version=4)
    before, after = asyncio.run(execute_with_restart(NotebookClient(notebook, timeout=120, resources=RESOURCES)))
    assert before.pid != after.pid
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert "read from disk" in text_of(cells["load"])
    assert "; cached)" in text_of(cells["load-again"])
    images = [cells[name].outputs[0].data["image/png"] for name in ("image", "image-again")]
    assert images[0] == images[1]
    assert text_of(cells["same"]) == "True"


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_says_nothing_about_the_machine_it_ran_on(notebook):
    document = nbformat.read(notebook, as_version=4)
    assert document.metadata.kernelspec.name == "nbcache"
    stored = json.dumps([document.metadata, [cell.get("outputs") for cell in document.cells]])
    for trace in (str(REPOSITORY), sys.prefix, str(Path.home()), "/tmp/", "site-packages", "Warning"):
        assert trace not in stored
