"""A converted single file, as an entry: known by what it was made from, made again when it gave way, shown as what it is."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nbcache
from nbcache.errors import CheckpointChanged, InvalidOption, ModelMismatch
from nbcache.models.api import assemble_name
from tests.support.checkpoints import write_checkpoint
from tests.support.kernels import Interpreter
from tests.support.single_files import write_single_file

BIAS = "first_stage_model.decoder.conv_in.bias"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("single")
    write_single_file(root)
    return root


@pytest.fixture
def file(written, tmp_path):
    return Path(shutil.copy(written / "model.safetensors", tmp_path))


@pytest.fixture
def load(runtime_dir, written, file):
    """Loads the VAE in the file; gives it, and whether it was converted for that."""

    def load_vae(**options):
        made = assemble_name(file, config=written / "sd" / "vae", **{"device": "cpu", **options})
        assert made.tally.hit is not made.tally.converted or options
        return made.value, made.tally.converted

    return load_vae


def entries():
    return [(entry.name, entry.provenance) for entry in nbcache.status().entries]


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "nbcache", *arguments], capture_output=True, text=True, check=True).stdout


def change(file):
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)


@contextmanager
def watched(path: Path) -> Iterator[list[str]]:
    """A list that at the end holds an item if anybody, of any process, opened or read the file meanwhile."""
    libc, accesses = ctypes.CDLL(None, use_errno=True), 0x1 | 0x20  # IN_ACCESS, IN_OPEN
    seen: list[str] = []
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert fd >= 0
    try:
        assert libc.inotify_add_watch(fd, os.fsencode(path), accesses) >= 0
        yield seen
        with suppress(BlockingIOError):
            seen += ["touched"] if os.read(fd, 4096) else []
    finally:
        os.close(fd)


def test_the_second_load_neither_converts_nor_opens_the_original(load, file):
    with watched(file) as seen:
        first, converted = load()
    assert (converted, seen) == (True, ["touched"])
    with watched(file) as seen:
        second, converted = load()
    assert (converted, seen) == (False, [])
    assert torch.equal(first.decoder.conv_in.bias, second.decoder.conv_in.bias)


def test_a_changed_file_is_converted_anew(load, file):
    before, _ = load()
    change(file)
    after, converted = load()
    assert converted
    assert torch.equal(after.decoder.conv_in.bias, before.decoder.conv_in.bias + 1)
    assert not load()[1]
    assert [provenance for _, provenance in entries()] == ["derived", "derived"]  # the older one gives way in time


def test_another_version_of_the_converter_means_another_entry(load, monkeypatch):
    import diffusers

    load()
    with monkeypatch.context() as changed:
        changed.setattr(diffusers, "__version__", "99.0.0")
        assert load()[1]
        assert not load()[1]
    assert not load()[1]
    assert len(set(entries())) == 2


def test_another_config_means_another_entry_and_a_copy_of_it_does_not(load, written, file, tmp_path):
    load()
    config = Path(shutil.copytree(written / "sd" / "vae", tmp_path / "vae"))
    assert assemble_name(file, "cpu", config=config).tally.hit
    text = (config / "config.json").read_text()
    (config / "config.json").write_text(text.replace('"scaling_factor": 0.18215', '"scaling_factor": 0.5'))
    assert assemble_name(file, "cpu", config=config).tally.converted


def test_what_the_library_takes_from_the_config_folder_counts_as_a_source(runtime_dir, written, file, tmp_path):
    """The single file may lack a text encoder; then the library reads the one in the pipeline's folder.

    If it believes that weights are there: it looks for the file that a model of diffusers would have.
    """
    config = Path(shutil.copytree(written / "sd", tmp_path / "sd"))
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.startswith("cond")}, file)
    (weights,) = (config / "text_encoder").glob("*.safetensors")
    with pytest.raises(ModelMismatch, match=r"CLIPTextModel.*missing.* Give what the file lacks: nbcache\.load"):
        nbcache.load_model(file, "cpu", config=config, unet=None)
    (config / "text_encoder" / "diffusion_pytorch_model.bin").touch()

    def bias():
        made = assemble_name(file, "cpu", config=config, unet=None)
        state = made.value.text_encoder.state_dict()
        return next(tensor for name, tensor in state.items() if name.endswith("final_layer_norm.bias")), made.tally.hit

    (before, _), (again, hit) = bias(), bias()
    assert hit
    assert torch.equal(before, again)
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    after, hit = bias()
    assert not hit
    assert torch.equal(after, before + 1)


def test_it_gives_way_to_other_loads_and_is_then_converted_again(load, tmp_path, monkeypatch):
    monkeypatch.setenv("NBCACHE_HOST_LIMIT", "23MiB")
    expected = load()[0].decoder.conv_in.bias.detach().clone()
    gc.collect()  # the model held the lease
    other = nbcache.load(write_checkpoint(tmp_path / "other.safetensors", sizes=((2300, 2300),)), device="cpu")
    assert [provenance for _, provenance in entries()] == ["file"]
    other.release()
    again, converted = load()
    assert converted
    assert torch.equal(again.decoder.conv_in.bias, expected)
    assert [provenance for _, provenance in entries()] == ["derived"]


def test_of_a_pipeline_only_what_is_gone_is_kept_anew(runtime_dir, written, file):
    def load_both():
        return assemble_name(file, "cpu", config=written / "sd", unet=None).tally.hits

    assert load_both() == [False, False]
    nbcache.evict(next(name for name, _ in entries() if "vae" in name))
    assert sorted(load_both()) == [False, True]
    assert load_both() == [True, True]


def test_components_alone(runtime_dir, written, file):
    """What is converted alone needs nothing else of the pipeline in the file, and is the entry that the pipeline has."""
    config = written / "sd"
    vae = assemble_name(file, "cpu", config=config, components="vae")
    assert (vae.what, vae.tally.hits) == ("AutoencoderKL", [False])
    two = assemble_name(file, "cpu", config=config, components="vae,scheduler")
    assert (two.what, list(two.value), two.tally.hits) == ("vae, scheduler", ["vae", "scheduler"], [True])
    assert sorted(assemble_name(file, "cpu", config=config, unet=None).tally.hits) == [False, True]
    text = assemble_name(file, "cpu", config=config, components="text_encoder")
    assert (text.what, text.tally.hits) == ("CLIPTextModel", [True])
    with pytest.raises(InvalidOption, match=r"component 'vea': .*; did you mean vae"):
        nbcache.load_model(file, device="cpu", config=config, components="vea")
    with pytest.raises(InvalidOption, match="a diffusers model, not a pipeline: it has no components"):
        nbcache.load_model(file, device="cpu", config=config / "vae", components="decoder")
    with pytest.raises(InvalidOption, match="raw gives the file as it is"):
        nbcache.load_model(file, device="cpu", config=config, raw=True)


TOGETHER = """
import nbcache, torch
from diffusers import AutoencoderKL
from nbcache.models.api import assemble_name
stock = AutoencoderKL.from_single_file
converted = []
def meet(*arguments, **options):
    model = stock(*arguments, **options)
    open({fifo!r}, {mode!r}).close()  # until the other has converted it too
    converted.append(1)
    return model
AutoencoderKL.from_single_file = meet
def load():
    made = assemble_name({file!r}, "cpu", config={config!r})
    return [len(converted), made.tally.hit, made.value.decoder.conv_in.bias.tolist()]
"""


def test_two_processes_at_once(runtime_dir, written, file, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    names = {"fifo": str(fifo), "file": str(file), "config": str(written / "sd" / "vae")}
    expected = load_file(file)[BIAS].tolist()
    with Interpreter() as one, Interpreter() as other:
        for process, mode in ((one, "w"), (other, "r")):
            process.begin(TOGETHER.format(mode=mode, **names) + "load()")
        assert [process.finish() for process in (one, other)] == [[1, False, expected]] * 2
        for process in (one, other):
            assert process.run("load()") == [1, True, expected]
    assert len({name for name, _ in entries()}) == 1
    assert nbcache.load(entries()[0][0], device="cpu")["decoder.conv_in.bias"].tolist() == expected


def test_a_file_that_changes_meanwhile_is_not_kept(load, file, monkeypatch):
    from diffusers import AutoencoderKL

    stock = AutoencoderKL.from_single_file

    def convert(*arguments, **options):
        model = stock(*arguments, **options)
        change(file)
        return model

    monkeypatch.setattr(AutoencoderKL, "from_single_file", convert)
    nbcache.put("something", torch.zeros(1))
    with pytest.raises(CheckpointChanged, match=r"model\.safetensors: changed while it was converted; load it again"):
        load()
    assert entries() == [("something", "put")]


def test_the_original_is_not_cached_even_if_stock_loaders_are_served(load):
    with nbcache.enabled():
        load()
    assert [provenance for _, provenance in entries()] == ["derived"]


def test_it_is_shown_as_converted_and_evicted_by_its_name(load):
    load()
    gc.collect()
    ((name, _),) = entries()
    (row,) = (line for line in command("status").splitlines() if name in line)
    assert row.rstrip().endswith("converted")
    command("evict", name)
    assert entries() == []
    load()
    gc.collect()
    command("evict", "--all")
    assert entries() == []


def test_over_an_emulated_gpu(runtime_dir, written, file, monkeypatch):
    """Converted on the CPU, then mapped from the slab, cast or not."""
    monkeypatch.setenv("NBCACHE_TEST_DRIVER", "tests.support.emulated:make")
    monkeypatch.setenv("NBCACHE_GPU_LOW_WATERMARK", "0")
    code = f"assemble_name({str(file)!r}, 'cuda', %s, config={str(written / 'sd' / 'vae')!r})"
    expected = load_file(file)[BIAS].tolist()
    with Interpreter() as kernel:
        kernel.run("import torch\nfrom nbcache.models.api import assemble_name")
        for dtype, hit in (("None", False), ("None", True), ("torch.float32", False), ("torch.float32", True)):
            found = kernel.run(f"made = {code % dtype}\nmade.tally.hit, made.value.decoder.conv_in.bias.tolist()")
            assert found == [hit, expected]
    (entry,) = nbcache.status().entries
    assert sorted((slab.dtype, slab.state) for slab in entry.devices) == [("", "resident"), ("F32", "resident")]
