"""Folders that are not what their config says: typed errors that name the component and the keys, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nbcache
from nbcache.errors import (
    CheckpointIncomplete,
    CheckpointInvalid,
    InvalidOption,
    ModelMismatch,
    ModelUnknown,
    PackageMissing,
    UnsupportedFormat,
)
from nbcache.models import packages
from tests.parity.harness import library_noise
from tests.support.models import SUBJECTS


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    with library_noise():
        SUBJECTS["sd"].write(root / "sd")
        SUBJECTS["bert"].write(root / "bert")
    return root


@pytest.fixture
def pipeline(written, tmp_path):
    return Path(shutil.copytree(written / "sd", tmp_path / "sd"))


@pytest.fixture
def bert(written, tmp_path):
    return Path(shutil.copytree(written / "bert", tmp_path / "bert"))


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}))


def edit_tensors(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def load(folder: Path, **options):
    return nbcache.load_model(folder, device="cpu", **options)


def test_a_component_without_weights(runtime_dir, pipeline):
    weights_of(pipeline / "unet").unlink()
    with pytest.raises(CheckpointIncomplete, match=r"^unet: .*no weights"):
        load(pipeline)


def test_a_component_without_a_shard(runtime_dir, pipeline):
    file = weights_of(pipeline / "vae")
    index = {"weight_map": dict.fromkeys(load_file(file), "part-00001-of-00002.safetensors")}
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    with pytest.raises(CheckpointIncomplete, match=r"^vae: .*part-00001-of-00002.safetensors is missing"):
        load(pipeline)


def test_a_component_without_its_folder(runtime_dir, pipeline):
    shutil.rmtree(pipeline / "unet")
    with pytest.raises(CheckpointIncomplete, match=r"^unet: .*sd/unet/config.json is missing"):
        load(pipeline)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"unet": ["diffusers", "UNetOfTomorrow"]}, "component unet.*diffusers .*no class 'UNetOfTomorrow'"),
        ({"text_encoder": ["transformers", "Unheard"]}, "component text_encoder.*transformers .*no class 'Unheard'"),
        ({"_class_name": "PipelineOfTomorrow"}, "no class 'PipelineOfTomorrow'"),
    ],
)
def test_an_unknown_class(runtime_dir, pipeline, index, words):
    rewrite(pipeline / "model_index.json", **index)
    with pytest.raises(ModelUnknown, match=words):
        load(pipeline)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', '{"_class_name": 3}', '{"_class_name": "P", "vae": ["diffusers"]}', "\xff"])
def test_a_broken_index(runtime_dir, pipeline, text):
    (pipeline / "model_index.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointInvalid, match=r"model_index\.json"):
        load(pipeline)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_keys_that_do_not_match(runtime_dir, pipeline, name):
    gone = []

    def edit(tensors):
        gone.append(min(tensors))
        del tensors[gone[0]]
        tensors["surplus.weight"] = torch.zeros(2)

    edit_tensors(weights_of(pipeline / name), edit)
    with pytest.raises(ModelMismatch) as caught:
        load(pipeline)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert gone[0].removeprefix("text_model.") in message
    assert "1 missing" in message
    assert "1 unexpected (surplus.weight)" in message


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_shapes_that_do_not_fit(runtime_dir, pipeline, name):
    changed = []

    def edit(tensors):
        changed.append(min(tensors))
        tensors[changed[0]] = torch.zeros(3, 3, 3)

    edit_tensors(weights_of(pipeline / name), edit)
    with pytest.raises(ModelMismatch, match=rf"^{name}: .*{changed[0].removeprefix('text_model.')}"):
        load(pipeline)


def test_a_model_that_lacks_a_tensor_unless_a_class_was_chosen(runtime_dir, bert):
    edit_tensors(weights_of(bert), lambda tensors: tensors.pop("pooler.dense.bias"))
    with pytest.raises(ModelMismatch, match=r"BertModel: 1 missing .*pooler\.dense\.bias"):
        load(bert)
    with library_noise():
        chosen = load(bert, model_class="BertForSequenceClassification")
    assert chosen.classifier.weight.shape == (2, 16)


def test_a_class_that_the_library_lacks(runtime_dir, bert):
    rewrite(bert / "config.json", architectures=["BertOfTomorrow"])
    with pytest.raises(ModelUnknown, match="no class 'BertOfTomorrow'"):
        load(bert)
    rewrite(bert / "config.json", architectures=None)
    assert type(load(bert)).__name__ == "BertModel"


def test_options_that_do_not_exist(runtime_dir, pipeline, bert):
    with pytest.raises(InvalidOption, match=r"component 'transformer': .* has .*unet"):
        load(pipeline, components="transformer")
    with pytest.raises(InvalidOption, match=r"component 'vea': .*; did you mean vae\?"):
        load(pipeline, components="vea")
    with pytest.raises(InvalidOption, match="no components to choose from"):
        load(bert, components="encoder")
    with pytest.raises(InvalidOption, match="give one of them"):
        load(bert, dtype="float16", torch_dtype="bfloat16")
    with pytest.raises(InvalidOption, match="share='mine'"):
        load(bert, share="mine")
    with pytest.raises(InvalidOption, match="scheduler has no weights"):
        load(pipeline, components="scheduler", raw=True)
    with pytest.raises(UnsupportedFormat, match="a pipeline, of several checkpoints"):
        nbcache.load(pipeline, device="cpu")


def test_a_package_that_is_too_old_is_named_with_the_command(runtime_dir, written, monkeypatch):
    import diffusers
    import peft

    monkeypatch.setattr(peft, "__version__", "0.17.1")
    with pytest.raises(PackageMissing, match=r"a LoRA needs peft 0\.18 or newer; 0\.17\.1 is installed: pip install -U peft"):
        nbcache.load_lora(torch.nn.Linear(2, 2), "any")
    monkeypatch.setattr(diffusers, "__version__", "0.34.2.dev0")
    with pytest.raises(PackageMissing, match=r"needs diffusers 0\.35 or newer; 0\.34\.2\.dev0 is installed"):
        load(written / "sd")


def test_the_lowest_versions_are_those_that_the_extras_ask_for():
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for package, least in packages.LEAST.items():
        assert any(f"{package}>={least}" in extras[extra] for extra in ("diffusers", "transformers", "lora")), package
    assert f"diffusers>={packages.LEAST_FOR_LORAS}" in extras["lora"]


MISSING = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split(".")[0])
sys.meta_path.insert(0, Hidden())
import nbcache
try:
    nbcache.load_model({folder!r}, device="cpu")
except nbcache.errors.PackageMissing as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("package", "folder", "extra"),
    [("diffusers", "sd", "diffusers"), ("transformers", "sd", "transformers"), ("transformers", "bert", "transformers")],
)
def test_a_missing_package_is_named_with_the_command(runtime_dir, written, package, folder, extra):
    code = MISSING.format(package=package, folder=str(written / folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"the package {package}, which is not installed: pip install 'nbcache[{extra}]'" in done.stdout, done.stderr
