"""Names: aliases, paths, the hub's cache, downloads from a hub (on the loopback), and what is said when none of it helps."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nbcache
from nbcache.checkpoints import aliases, names
from nbcache.checkpoints import hub as hub_room
from nbcache.errors import (
    CheckpointIncomplete,
    CheckpointNotFound,
    DaemonUnavailable,
    EntryNotFound,
    HubUnreachable,
    InvalidName,
    InvalidOption,
    UnsupportedFormat,
)
from tests.behaviour.test_cli import cli
from tests.parity.harness import library_noise
from tests.support.checkpoints import write_checkpoint
from tests.support.hub import COMMIT, hub
from tests.support.kernels import Interpreter, RemoteError
from tests.support.models import SUBJECTS

ROOT = Path(__file__).resolve().parents[2]
T5 = "text_encoder_2/model.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "flux"
    with library_noise():
        SUBJECTS["flux"].write(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch, runtime_dir):
    """An empty cache of the hub, which this process may only look into."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def put_into_cache(cache: Path, repo_id: str, source: Path, commit: str = COMMIT, ref: str = "main") -> Path:
    """As huggingface_hub lays it out: blobs named by content, links to them."""
    from tests.support.hub import etag

    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    snapshot = repository / "snapshots" / commit
    (repository / "blobs").mkdir(exist_ok=True)
    for file in (path for path in source.rglob("*") if path.is_file()):
        blob = repository / "blobs" / etag(file)
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def cached_names() -> list[str]:
    return sorted(entry.name for entry in nbcache.status().entries)


def test_an_alias_of_ones_own(runtime_dir, tmp_path):
    path = write_checkpoint(tmp_path / "model.safetensors")
    aliases.add("mine", os.path.relpath(path))
    assert aliases.listing() == {"mine": str(path)}
    assert aliases.resolve("mine") == str(path)
    weights = nbcache.load("mine", device="cpu")
    assert torch.equal(weights["layer.0"], load_file(path)["layer.0"])
    assert nbcache.load("mine", device="cpu").hit
    nbcache.pin("mine")
    nbcache.unpin("mine")
    del weights
    nbcache.evict("mine")
    aliases.remove("mine")
    assert aliases.listing() == {}
    with pytest.raises(CheckpointNotFound, match="mine"):
        nbcache.load("mine", device="cpu")


def test_nothing_is_saved_under_an_alias_of_ones_own(runtime_dir, tmp_path):
    """It could not be loaded: the alias goes first."""
    path = write_checkpoint(tmp_path / "model.safetensors")
    aliases.add("mine", str(path))
    with pytest.raises(InvalidName, match=rf"'mine' is an alias of yours, for {path}.* nbcache alias remove mine"):
        nbcache.put("mine", torch.ones(3))
    assert not (runtime_dir / "daemon.sock").exists(), "nobody was asked"
    nbcache.put("other", torch.ones(3))
    aliases.remove("mine")
    nbcache.put("mine", torch.ones(3))
    assert cached_names() == ["mine", "other"]


def test_the_order_in_which_a_name_is_looked_up(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine, folder, sdxl = (write_checkpoint(tmp_path / f"{n}.safetensors", seed=s) for s, n in enumerate("abc"))
    snapshot = put_into_cache(cache, "stabilityai/stable-diffusion-xl-base-1.0", tmp_path / "nothing")
    snapshot.mkdir(parents=True)
    assert names.look_up("sdxl").path == str(snapshot)
    shutil.copyfile(folder, tmp_path / "sdxl")
    assert names.look_up("sdxl").path == str(snapshot), "a built-in alias goes before a path"
    assert names.look_up("./sdxl").path == str(tmp_path / "sdxl")
    nbcache.put("sdxl", {"saved": torch.ones(3)})
    assert list(nbcache.load("sdxl", device="cpu")) == ["saved"], "what was saved under a name goes before a built-in alias"
    aliases.add("sdxl", str(mine))
    assert list(nbcache.load("sdxl", device="cpu")) == list(load_file(mine)), "the user's own goes first"
    repo = tmp_path / "org" / "repo"
    repo.parent.mkdir()
    shutil.copyfile(sdxl, repo)
    put_into_cache(cache, "org/repo", tmp_path / "nothing")
    assert names.look_up("org/repo").path == str(repo), "a path goes before a repository"


@pytest.mark.parametrize("name", ["", "a/b", "a b", "-x", ".x", "~x", "a\n"])
def test_names_that_cannot_be_aliases(runtime_dir, name):
    with pytest.raises(InvalidName):
        aliases.add(name, "org/repo")


def test_aliases_that_are_not_there_or_broken(runtime_dir):
    with pytest.raises(InvalidName, match="no such alias; yours: none"):
        aliases.remove("x")
    with pytest.raises(InvalidName, match="built in"):
        aliases.remove("sdxl")
    aliases.add("a", "flux-dev")
    assert aliases.listing() == {"a": "black-forest-labs/FLUX.1-dev"}
    with pytest.raises(InvalidOption, match="an alias itself"):
        aliases.add("b", "a")
    with pytest.raises(InvalidOption, match="for what"):
        aliases.add("b", "")
    (runtime_dir / "aliases.json").write_text("[")
    with pytest.raises(InvalidOption, match=r"aliases\.json: not a table of aliases"):
        nbcache.load("a", device="cpu")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HF_HOME": "$HOME/x"}, "{home}/x/hub"),
        ({}, "{home}/.cache/huggingface/hub"),
    ],
)
def test_the_hubs_cache_is_where_its_library_has_it(monkeypatch, settings, expected):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert hub_room.cache_folder() == expected.format(home=Path.home())
    with Interpreter() as other:
        assert other.run("from huggingface_hub import constants; constants.HF_HUB_CACHE") == hub_room.cache_folder()


def test_a_repository_in_the_cache(cache, pipeline):
    """Two repositories of one T5 share its entry; a hit of an id reads no header and no network."""
    put_into_cache(cache, "org/dev", pipeline)
    put_into_cache(cache, "org/schnell", pipeline, commit=COMMIT[::-1], ref="v2")
    dev = nbcache.load_model("org/dev", device="cpu")
    assert len(cached_names()) == 4
    schnell = nbcache.load_model("org/schnell", device="cpu", revision="v2")
    assert len(cached_names()) == 4, "the same content is one entry"
    assert schnell.text_encoder_2.shared.weight.shape == dev.text_encoder_2.shared.weight.shape
    by_commit = nbcache.load("org/schnell", device="cpu", revision=COMMIT[::-1], subfolder="text_encoder_2")
    assert by_commit.hit
    assert torch.equal(by_commit["shared.weight"], load_file(pipeline / T5)["shared.weight"])
    with pytest.raises(UnsupportedFormat, match="a pipeline, of several checkpoints"):
        nbcache.load("org/dev", device="cpu")
    del dev, schnell, by_commit
    assert len(nbcache.evict("org/dev").names) == 4
    with pytest.raises(EntryNotFound):
        nbcache.evict("org/dev")


def test_what_is_not_there_offline(cache, pipeline):
    with pytest.raises(
        HubUnreachable, match=r"org/none: not \(or not wholly\) in .*HF_HUB_OFFLINE is set; unset it, or give a path"
    ):
        nbcache.load_model("org/none", device="cpu")
    with pytest.raises(HubUnreachable, match=r"org/dev, revision next: not \(or"):
        nbcache.load_model("org/dev", device="cpu", revision="next")
    with pytest.raises(HubUnreachable, match=r"FLUX\.1-dev"):
        nbcache.load("flux-dev", device="cpu")
    partial = put_into_cache(cache, "org/partial", pipeline)
    (partial / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(HubUnreachable, match="org/partial"):
        nbcache.load_model("org/partial", device="cpu")
    assert type(nbcache.load_model("org/partial", device="cpu", subfolder="vae")).__name__ == "AutoencoderKL"
    with pytest.raises(CheckpointNotFound, match="nowhere"):
        nbcache.load_model("nowhere", device="cpu")
    with pytest.raises(InvalidOption, match="no repository of the hub"):
        nbcache.load_model(pipeline, device="cpu", revision="v2")


def test_a_variant(cache, pipeline, tmp_path):
    folder = Path(shutil.copytree(pipeline, tmp_path / "flux"))
    plain = folder / "vae" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(plain).items()}
    save_file(half, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    pipe = nbcache.load_model(folder, device="cpu", variant="fp16")
    assert (pipe.vae.dtype, pipe.transformer.dtype) == (torch.float16, torch.bfloat16)
    assert nbcache.load_model(folder, device="cpu", components="vae").dtype == torch.bfloat16
    assert nbcache.load(folder / "vae", device="cpu", variant="fp16")["decoder.conv_in.bias"].dtype == torch.float16
    del pipe
    assert len(nbcache.evict(folder / "vae").names) == 1


def test_staged_ahead_as_it_will_be_loaded(cache, pipeline, tmp_path):
    """What the command line was told to read is what a load with the same words finds."""
    folder = put_into_cache(cache, "org/dev", pipeline, ref="v2")
    half = {name: tensor.half() for name, tensor in load_file(pipeline / T5).items()}
    save_file(half, folder / "text_encoder_2" / "model.fp16.safetensors", metadata={"format": "pt"})

    def staged(*words: str) -> list[str]:
        answer = json.loads(cli("load", "org/dev", "--revision", "v2", "--json", *words))
        entries = answer if isinstance(answer, list) else [answer]
        assert not any(entry["hit"] for entry in entries)
        assert all(entry["pinned"] for entry in entries) is ("--pin" in words)
        return [Path(entry["name"]).relative_to(folder).as_posix() for entry in entries]

    assert staged("--component", "vae") == ["vae"]
    assert staged("--component", "text_encoder_2, text_encoder", "--variant", "fp16", "--pin") == [
        "text_encoder_2/model.fp16.safetensors",
        "text_encoder",
    ]
    assert staged("--subfolder", "transformer") == ["transformer"]
    assert nbcache.load("org/dev", device="cpu", revision="v2", subfolder="text_encoder_2", variant="fp16").hit
    nbcache.load_model("org/dev", device="cpu", revision="v2", variant="fp16")
    assert len(cached_names()) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--component", "vea"], "component 'vea': .* did you mean vae?"),
        (["--component", "tokenizer"], "component 'tokenizer': .*/tokenizer has no weights to cache"),
        (["--component", "vae", "--subfolder", "vae"], "holds a diffusers model, not a pipeline"),
        (["--revision", "v2"], "no repository of the hub"),
        (["--subfolder", "unet"], "no such file or folder"),
    ],
)
def test_what_cannot_be_staged_ahead(cache, pipeline, words, message):
    assert re.search(message, cli("load", str(pipeline), *words, code=1))
    with pytest.raises(DaemonUnavailable):
        nbcache.status()


def test_a_variant_in_shards(runtime_dir, pipeline, tmp_path):
    folder = Path(shutil.copytree(pipeline / "vae", tmp_path / "vae"))
    whole = folder / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(whole).items()}
    shard = "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
    save_file(half, folder / shard, metadata={"format": "pt"})
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(half, shard)}))
    assert nbcache.load_model(folder, device="cpu", variant="fp16").dtype == torch.float16
    assert nbcache.load_model(folder, device="cpu").dtype == torch.bfloat16
    (folder / shard).unlink()
    with pytest.raises(CheckpointIncomplete, match=rf"shard {shard} is missing"):
        nbcache.load_model(folder, device="cpu", variant="fp16")


FETCH = """
import warnings
warnings.simplefilter("ignore")
import nbcache
def load(*arguments, **options):
    made = nbcache.load_model(*arguments, device="cpu", **options)
    return type(made).__name__
"""


@pytest.fixture
def online(tmp_path, monkeypatch, runtime_dir, pipeline):
    """An interpreter whose hub is on the loopback; and what it fetched."""
    source = Path(shutil.copytree(pipeline, tmp_path / "source"))
    (source / "README.md").write_text("a card")
    save_file({"x": torch.zeros(8)}, source / "all-in-one.safetensors")
    (source / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with hub({"org/flux": source, "org/gated": source}, gated=("org/gated",)) as (address, fetched):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with Interpreter() as kernel:
            kernel.run(FETCH)
            yield kernel, fetched


def test_a_download_takes_what_is_needed_and_happens_once(online):
    kernel, fetched = online
    assert kernel.run("load('org/flux', subfolder='vae')") == "AutoencoderKL"
    first = [name.removeprefix("org/flux/") for name in fetched]
    assert sorted(first) == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert kernel.run("load('org/flux')") == "FluxPipeline"
    got = {name.removeprefix("org/flux/") for name in fetched}
    assert {"model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json", T5} < got
    assert not got & {"README.md", "all-in-one.safetensors", "vae/diffusion_pytorch_model.bin"}
    assert len(fetched) == len(got), "each file once"
    assert kernel.run("load('org/flux')") == "FluxPipeline"
    assert len(fetched) == len(got)


def test_what_a_hub_refuses(online):
    kernel, _ = online
    for arguments, words in (
        ("'org/gated'", r"HubDenied: org/gated is gated: accept its licence at .*/org/gated, log in"),
        ("'org/none'", r"CheckpointNotFound: org/none: no such path, and no such repository on the hub"),
        ("'org/flux', revision='v9'", r"CheckpointNotFound: org/flux: no revision 'v9'"),
        ("'org/flux', subfolder='unet'", r"CheckpointNotFound: org/flux: the repository has no weights .* in unet"),
    ):
        with pytest.raises(RemoteError, match=words):
            kernel.run(f"load({arguments})")


def test_a_hub_that_does_not_answer(runtime_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with Interpreter() as kernel:
        kernel.run("import nbcache")
        with pytest.raises(RemoteError, match=r"HubUnreachable: org/flux: no such path, .* check the connection"):
            kernel.run("nbcache.load_model('org/flux')")
