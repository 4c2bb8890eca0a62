"""What a demanding user's folders and options come to, beside stock loads of the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import nbcache
from nbcache.errors import InvalidOption, ModelUnknown, PackageMissing
from nbcache.models.pipelines import NotServed
from tests.parity.harness import library_noise
from tests.support.models import SUBJECTS


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    with library_noise():
        for name in ("sd", "llama", "bert"):
            SUBJECTS[name].write(root / name)
    return root


@pytest.fixture
def copy(written, tmp_path):
    return lambda name: Path(shutil.copytree(written / name, tmp_path / name))


@pytest.fixture(autouse=True)
def _runtime(runtime_dir):
    return


def load(path, **options):
    with library_noise():
        return nbcache.load_model(path, device="cpu", **options)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def same_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_hooks_serve_inside_inference_mode_too(written):
    with library_noise(), nbcache.enabled(), torch.inference_mode():
        served = diffusers.StableDiffusionPipeline.from_pretrained(written / "sd")
        tensors = load_file(next((written / "bert").glob("*.safetensors")))
    assert same_tensors(served.unet, diffusers.UNet2DConditionModel.from_pretrained(written / "sd" / "unet"))
    assert all(tensor.is_inference() for tensor in tensors.values())


def test_a_model_that_was_loaded_inside_inference_mode_can_be_trained(written):
    with torch.inference_mode():
        model = load(written / "llama")
    model.train()
    model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()


@pytest.mark.parametrize("chosen", ["StableDiffusionImg2ImgPipeline", diffusers.StableDiffusionImg2ImgPipeline])
def test_a_pipeline_of_another_class(written, chosen):
    assert type(load(written / "sd", model_class=chosen)).__name__ == "StableDiffusionImg2ImgPipeline"


def test_a_pipeline_of_another_class_with_a_component_of_the_callers(written):
    control = diffusers.ControlNetModel.from_unet(diffusers.UNet2DConditionModel.from_pretrained(written / "sd" / "unet"))
    pipe = load(written / "sd", model_class=diffusers.StableDiffusionControlNetPipeline, controlnet=control)
    assert type(pipe) is diffusers.StableDiffusionControlNetPipeline
    assert pipe.controlnet is control


@pytest.mark.parametrize("options", [{"raw": True}, {"components": "unet"}])
def test_a_class_where_none_is_wanted_is_refused(written, options):
    with pytest.raises(InvalidOption, match="model_class"):
        load(written / "sd", model_class="StableDiffusionPipeline", **options)


def test_a_pipeline_class_that_does_not_exist(written):
    with pytest.raises(ModelUnknown, match="NoSuchPipeline"):
        load(written / "sd", model_class="NoSuchPipeline")


@pytest.mark.parametrize("how", ["model", "component"])
def test_a_quantized_model_is_left_to_its_library(copy, how):
    """Stock fails for want of bitsandbytes; so do we, and do not load it as if it were plain."""
    sd = copy("sd")
    edit(sd / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.warns(NotServed, match="quantized"), pytest.raises(PackageMissing, match="bitsandbytes"):
        if how == "model":
            nbcache.load_model(sd / "unet", device="cpu")
        else:
            nbcache.load_model(sd, device="cpu", components="unet")


def test_what_is_to_be_quantized_is_left_to_the_library(written):
    from diffusers.quantizers import PipelineQuantizationConfig

    wanted = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit", quant_kwargs={"load_in_4bit": True}, components_to_quantize=["unet"]
    )
    with pytest.raises(ImportError, match="bitsandbytes"):
        load(written / "sd", quantization_config=wanted)


@pytest.mark.parametrize("own_file", [True, False])
def test_how_to_generate_is_as_stock_has_it(copy, own_file):
    llama = copy("llama")
    if not own_file:
        (llama / "generation_config.json").unlink()
        edit(llama / "config.json", max_length=12, num_beams=3, repetition_penalty=1.5)
    stock = transformers.LlamaForCausalLM.from_pretrained(llama)
    mine = load(llama)
    assert mine.generation_config.to_dict() == stock.generation_config.to_dict()
    given = torch.tensor([[1, 5, 7]])
    with library_noise():
        assert torch.equal(mine.generate(given), stock.generate(given))


def test_an_adapter_beside_the_model_is_attached(copy):
    import peft

    llama = copy("llama")
    torch.manual_seed(3)
    with library_noise():
        adapted = peft.get_peft_model(
            transformers.LlamaForCausalLM.from_pretrained(llama),
            peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False),
        )
        adapted.save_pretrained(llama)
        stock, mine = transformers.LlamaForCausalLM.from_pretrained(llama), load(llama)
    assert any("lora_A" in name for name in mine.state_dict())
    assert same_tensors(mine, stock)
    given = torch.tensor([[1, 5, 7]])
    assert torch.equal(mine(given).logits, stock(given).logits)


def test_options_of_the_config_reach_it(written):
    assert load(written / "llama", use_cache=False).config.use_cache is False
    options = {"model_class": "AutoModelForSequenceClassification", "num_labels": 5}
    assert load(written / "bert", **options).classifier.out_features == 5


def test_mismatched_sizes_may_be_ignored(copy):
    bert = copy("bert")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    classifier.save_pretrained(bert)
    model = load(bert, num_labels=5, ignore_mismatched_sizes=True)
    assert model.classifier.out_features == 5


@pytest.mark.parametrize("option", [{"device_map": "auto"}, {"state_dict": {}}, {"output_loading_info": True}])
def test_options_that_are_not_ours_say_so(written, option):
    with pytest.raises(InvalidOption, match=next(iter(option))):
        load(written / "llama", **option)


def test_a_part_of_clip_reads_its_part_of_the_config(tmp_path):
    with library_noise():
        clip = transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                             "num_attention_heads": 2, "projection_dim": 8},
                vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                               "image_size": 8, "patch_size": 4, "projection_dim": 8},
                projection_dim=8,
            )
        )  # fmt: skip
        clip.save_pretrained(tmp_path)
        stock = transformers.CLIPTextModel.from_pretrained(tmp_path)
    assert same_tensors(load(tmp_path, model_class="CLIPTextModel"), stock)


def test_classes_and_types_that_do_not_go_together(copy):
    llama = copy("llama")
    with pytest.raises(ModelUnknown, match="AutoModelForImageClassification has no model for a LlamaConfig"):
        load(llama, model_class="AutoModelForImageClassification")
    edit(llama / "config.json", model_type="never-heard-of")
    with pytest.raises(ModelUnknown, match="never-heard-of"):
        load(llama, model_class="AutoModel")


def test_a_variant_of_torch_files(tmp_path, written):
    shutil.copy(written / "llama" / "config.json", tmp_path)
    tensors = transformers.LlamaForCausalLM.from_pretrained(written / "llama").state_dict()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    torch.save({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "pytorch_model.fp16.bin")
    stock = transformers.LlamaForCausalLM.from_pretrained(tmp_path, variant="fp16")
    assert same_tensors(load(tmp_path, variant="fp16"), stock)


@pytest.fixture
def controlled(written, tmp_path):
    """A pipeline with two ControlNets."""
    with library_noise():
        unet = diffusers.UNet2DConditionModel.from_pretrained(written / "sd" / "unet")
        nets = [diffusers.ControlNetModel.from_unet(unet) for _ in range(2)]
        diffusers.StableDiffusionControlNetPipeline.from_pretrained(written / "sd", controlnet=nets).save_pretrained(tmp_path)
    return tmp_path


def test_several_controlnets_are_left_to_the_library(controlled):
    with pytest.warns(NotServed, match="controlnet holds several models"):
        pipe = nbcache.load_model(controlled, device="cpu", dtype=torch.float16)
    assert len(pipe.controlnet.nets) == 2
    assert pipe.controlnet.dtype == pipe.unet.dtype == torch.float16


def test_one_component_that_is_several_models(controlled):
    with pytest.warns(NotServed, match="controlnet: holds several models"):
        found = nbcache.load_model(controlled, device="cpu", dtype=torch.float16, components="controlnet")
    assert [net.dtype for net in found.nets] == [torch.float16] * 2


def test_a_pipeline_with_code_of_its_own(copy):
    sd = copy("sd")
    (sd / "my_pipe.py").write_text(
        "from diffusers import StableDiffusionPipeline\nclass MyPipe(StableDiffusionPipeline):\n    pass\n"
    )
    edit(sd / "model_index.json", _class_name=["my_pipe", "MyPipe"])
    assert type(load(sd, trust_remote_code=True)).__name__ == "MyPipe"


def test_a_component_with_code_of_its_own_has_the_dtype_and_a_word_is_said(copy):
    sd = copy("sd")
    (sd / "unet" / "my_unet.py").write_text(
        "from diffusers import UNet2DConditionModel\nclass MyUNet(UNet2DConditionModel):\n    pass\n"
    )
    edit(sd / "model_index.json", unet=["my_unet", "MyUNet"])
    edit(sd / "unet" / "config.json", _class_name="MyUNet")
    with pytest.warns(NotServed, match="unet is of a class of its own"):
        pipe = nbcache.load_model(sd, device="cpu", dtype=torch.float16, trust_remote_code=True)
    assert type(pipe.unet).__name__ == "MyUNet"
    assert pipe.unet.dtype == torch.float16


def test_a_model_with_code_of_its_own(copy):
    llama = copy("llama")
    (llama / "my_llama.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\nclass MyConfig(LlamaConfig):\n    model_type = 'my-llama'\n"
        "class MyLlama(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    auto_map = {"AutoConfig": "my_llama.MyConfig", "AutoModelForCausalLM": "my_llama.MyLlama"}
    edit(llama / "config.json", model_type="my-llama", architectures=["MyLlama"], auto_map=auto_map)
    with pytest.raises(ModelUnknown, match="MyLlama"):
        load(llama)
    with pytest.warns(NotServed, match="code of its own"):
        model = nbcache.load_model(llama, device="cpu", dtype=torch.float16, trust_remote_code=True)
    assert (type(model).__name__, model.dtype, model.training) == ("MyLlama", torch.float16, False)


def test_a_model_is_known_by_what_it_was_asked_for_as(written, monkeypatch):
    monkeypatch.chdir(written)
    for name in ("./llama", str(written / "llama")):
        stock = transformers.LlamaForCausalLM.from_pretrained(name)
        mine = load(name)
        assert (mine.name_or_path, mine.config._name_or_path) == (stock.name_or_path, stock.config._name_or_path)
    assert load("./sd").config["_name_or_path"] == "./sd"
    assert load(written / "sd" / "unet").config["_name_or_path"] == str(written / "sd" / "unet")


def test_two_repositories_with_the_same_shards_are_one_entry(tmp_path):
    """As in the hub's cache: shards are blobs named by their sha256, and the index one named by git's hash."""
    for repo in ("dev", "schnell"):
        blobs = tmp_path / repo / "blobs"
        snapshot = tmp_path / repo / "snapshots" / ("a" * 40)
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for number in (1, 2):
            save_file({f"t{number}": torch.full((9,), float(number))}, blobs / (str(number) * 64))
            (snapshot / f"model-0000{number}-of-00002.safetensors").symlink_to(blobs / (str(number) * 64))
        index = {"weight_map": {f"t{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}}
        (blobs / ("3" * 40)).write_text(json.dumps(index))
        (snapshot / "model.safetensors.index.json").symlink_to(blobs / ("3" * 40))
        assert set(nbcache.load(snapshot, device="cpu")) == {"t1", "t2"}
    assert len(nbcache.status().entries) == 1


def test_a_component_that_stands_beside_its_pipeline_is_not_remarked_upon(copy, caplog):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    folder = copy("sd")
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 1, "projection_dim": 16}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(
        transformers.CLIPConfig(text_config={**sizes, "vocab_size": 99}, vision_config=vision, projection_dim=16)
    )
    checker.save_pretrained(folder / "safety_checker")
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}).save_pretrained(folder / "feature_extractor")
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    for _ in range(2):
        pipe = nbcache.load_model(folder, device="cpu")
        assert same_tensors(pipe.safety_checker, checker)
    assert "non-standard module" not in caplog.text
    given = nbcache.load_model(folder, device="cpu", safety_checker=checker)  # which the library cannot vouch for either way
    assert given.safety_checker is checker
    assert "non-standard module" in caplog.text


def test_what_is_told_of_missing_keys_names_the_folder(written, caplog):
    nbcache.load_model(written / "bert", device="cpu", model_class="AutoModelForSequenceClassification", num_labels=3)
    assert str(written / "bert") in caplog.text
    assert "None" not in caplog.text.partition("\n")[0]


def test_a_configuration_in_the_place_of_a_name_is_refused(written):
    config = transformers.AutoConfig.from_pretrained(written / "llama", num_hidden_layers=1)
    with pytest.raises(InvalidOption, match=r"a LlamaConfig; here it is the folder .* such as num_hidden_layers=1"):
        nbcache.load_model(written / "llama", device="cpu", config=config)
    assert load(written / "llama", num_hidden_layers=1).config.num_hidden_layers == 1
