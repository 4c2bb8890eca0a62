"""LoRAs where something comes between: Ctrl-C, another model in its place, a file that is none, an adapter that is off."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import peft.tuners.lora.layer
import pytest
import torch
from diffusers import FluxControlPipeline
from safetensors.torch import load_file

import nbcache
from nbcache.client.notices import LoraReinjected
from nbcache.errors import CheckpointInvalid, InvalidOption, LoraError, LoraFused, LoraMismatch, UnsupportedFormat
from nbcache.models import lora
from tests.support.lora_parity import identical, same, stock
from tests.support.loras import Writer, flux, flux_output, outputs, sdxl, text_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def write(tmp_path) -> Writer:
    return Writer(tmp_path)


@pytest.fixture
def some(write) -> dict[str, str]:
    """LoRAs of the transformer: two over every layer, of ranks 4 and 8, one over its attention alone."""
    pipe = flux()
    return {
        "a": write.diffusers("a", pipe, only="transformer"),
        "b": write.diffusers("b", pipe, rank=8, only="transformer", alpha=3.0),
        "attn": write.diffusers("attn", pipe, only="attn"),
    }


def modules(pipe: Any) -> list[str]:
    return [name for part in (pipe.transformer, pipe.text_encoder) for name, _ in part.named_modules()]


def as_stock(pipe: Any, path: str) -> bool:
    return same(outputs(pipe), outputs(stock(flux(), path)))


# Ctrl-C, and errors half-way


def on_call(monkeypatch, holder: Any, name: str, number: int, act: Callable[[], None]) -> None:
    """Do something in the middle of what is called."""
    real, calls = getattr(holder, name), iter(range(1, 1 << 30))

    def watched(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            act()
        return real(*arguments, **named)

    monkeypatch.setattr(holder, name, watched)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


MIDDLES = {
    "in peft's injection": (peft.tuners.lora.layer.LoraLayer, "update_layer", 5),
    "after it": (lora, "plan_of", 1),
    "in the writing": (lora.Plan, "write", 1),
}


@pytest.mark.parametrize("before", ["nothing", "fewer modules", "as many"])
@pytest.mark.parametrize("middle", MIDDLES)
def test_ctrl_c_waits_until_the_lora_is_in(some, monkeypatch, before, middle):
    pipe = flux()
    bare = outputs(pipe)
    if before != "nothing":
        nbcache.load_lora(pipe, some["attn" if before == "fewer modules" else "b"])
    holder, name, number = MIDDLES[middle]
    with monkeypatch.context() as patched:
        on_call(patched, holder, name, number, press_ctrl_c)
        if before == "as many" and middle != "in the writing":
            nbcache.load_lora(pipe, some["a"])  # a swap does not come there
        else:
            with pytest.raises(KeyboardInterrupt):
                nbcache.load_lora(pipe, some["a"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert as_stock(pipe, some["a"])
    nbcache.load_lora(pipe, some["b"])
    assert as_stock(pipe, some["b"])
    nbcache.unload_lora(pipe)
    assert identical(outputs(pipe), bare)


def give_up() -> None:
    raise MemoryError("no more")


@pytest.mark.parametrize("had", [False, True], ids=["the first", "in another's place"])
@pytest.mark.parametrize("middle", MIDDLES)
def test_an_error_half_way_leaves_the_pipeline_as_it_was(some, monkeypatch, had, middle):
    pipe = flux()
    if had:
        nbcache.load_lora(pipe, some["attn"])
    before, there = outputs(pipe), modules(pipe)
    holder, name, number = MIDDLES[middle]
    with monkeypatch.context() as patched:
        on_call(patched, holder, name, number, give_up)
        with pytest.raises((MemoryError, LoraError), match="no more"):
            nbcache.load_lora(pipe, some["a"])
    assert same(outputs(pipe), before)
    assert modules(pipe) == there
    assert nbcache.load_lora(pipe, some["a"]).how == "injected"
    assert as_stock(pipe, some["a"])


def test_where_the_former_lora_cannot_be_had_any_more_the_error_says_so(some, monkeypatch):
    pipe = flux()
    nbcache.load_lora(pipe, some["attn"])
    os.remove(some["attn"])
    on_call(monkeypatch, lora, "plan_of", 1, give_up)
    with pytest.raises(LoraError, match=r"no more; what adapter 'default' had, .*attn\.safetensors, could not be put back"):
        nbcache.load_lora(pipe, some["a"])


# Adapters that are off, fused, or partly there


def test_a_lora_that_is_swapped_into_an_adapter_that_was_off_takes_part(some):
    pipe = flux()
    nbcache.load_lora(pipe, some["a"])
    nbcache.set_lora(pipe, {})
    assert nbcache.load_lora(pipe, some["b"]).how == "swapped"
    assert as_stock(pipe, some["b"])
    nbcache.load_lora(pipe, some["a"], adapter="two")
    nbcache.set_lora(pipe, {"default": 1.0})
    nbcache.load_lora(pipe, some["a"], adapter="two")
    both = stock(stock(flux(), some["b"]), some["a"], "two")
    both.set_adapters(["default", "two"])
    assert same(outputs(pipe), outputs(both))


def test_beside_a_fused_adapter_no_other_is_changed_for_nothing(some):
    pipe = flux()
    nbcache.load_lora(pipe, some["a"], adapter="one")
    nbcache.load_lora(pipe, some["attn"], adapter="two")
    pipe.fuse_lora(components=["transformer"], adapter_names=["two"])
    for change in (lambda: nbcache.load_lora(pipe, some["b"], adapter="one"), lambda: nbcache.set_lora(pipe, {"one": 5.0})):
        with pytest.raises(LoraFused, match="'two' is fused"):
            change()


def test_fusing_an_adapter_of_few_layers_moves_no_other_weight(some):
    pipe = flux()
    places = {name: parameter.data_ptr() for name, parameter in pipe.transformer.named_parameters()}
    nbcache.load_lora(pipe, some["a"], adapter="one")
    nbcache.load_lora(pipe, some["attn"], adapter="two")
    pipe.fuse_lora(components=["transformer"], adapter_names=["two"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says which layers had nothing to unfuse
        pipe.unfuse_lora(components=["transformer"])
    nbcache.unload_lora(pipe)
    assert {name: parameter.data_ptr() for name, parameter in pipe.transformer.named_parameters()} == places


def test_a_cast_while_fused_stays_after_unfusing(some):
    pipe = flux()
    nbcache.load_lora(pipe, some["a"])
    pipe.fuse_lora(components=["transformer"])
    pipe.to(dtype=torch.bfloat16)
    pipe.unfuse_lora(components=["transformer"])
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    assert flux_output(pipe.transformer).dtype == torch.bfloat16


@pytest.mark.parametrize("padded", [False, True])
def test_loads_inside_inference_mode_and_swaps_outside(some, padded):
    pipe = flux()
    if padded:
        pipe.enable_lora_hotswap(target_rank=8)
    with torch.inference_mode():
        nbcache.load_lora(pipe, some["a"])
    nbcache.load_lora(pipe, some["b"], scale=0.5)
    other = stock(flux(), some["b"])
    other.set_adapters(["default"], [0.5])
    assert same(outputs(pipe), outputs(other))
    with torch.inference_mode():
        nbcache.set_lora(pipe, {"default": 1.0})
    assert as_stock(pipe, some["b"])


@pytest.mark.parametrize("first", [True, False], ids=["the first", "in another's place"])
def test_a_bias_where_the_other_modules_have_none(write, some, first):
    biased = dict(load_file(some["attn"]))
    for name in [name for name in biased if name.endswith("lora_B.weight")][:2]:
        biased[name.replace(".weight", ".bias")] = torch.ones(biased[name].shape[0])
    path = write.save("biased", biased)
    whole = write.save("whole", biased | {
        name.replace(".weight", ".bias"): biased.get(name.replace(".weight", ".bias"), torch.zeros(tensor.shape[0]))
        for name, tensor in biased.items() if name.endswith("lora_B.weight")
    })  # fmt: skip
    pipe = flux()
    if not first:
        nbcache.load_lora(pipe, some["a"])
    nbcache.load_lora(pipe, path)
    assert as_stock(pipe, whole)  # the stock loader leaves the biases that a file lacks without any memory
    nbcache.load_lora(pipe, some["a"])
    assert as_stock(pipe, some["a"])


def test_the_first_lora_above_the_target_rank_says_so_and_is_padded_to_its_own(write, some):
    big = write.diffusers("big", flux(), rank=16, only="transformer")
    pipe = flux()
    pipe.enable_lora_hotswap(target_rank=8)
    with pytest.warns(LoraReinjected, match="its rank 16 is above the target rank 8"):
        nbcache.load_lora(pipe, big)
    assert as_stock(pipe, big)
    assert nbcache.load_lora(pipe, some["b"]).how == "swapped"
    assert as_stock(pipe, some["b"])


def test_a_warning_that_is_an_error_comes_before_anything_is_changed(write, some):
    big = write.diffusers("big", flux(), rank=16, only="transformer")
    pipe = flux()
    pipe.enable_lora_hotswap(target_rank=8)
    before, there = outputs(pipe), modules(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraReinjected)
        with pytest.raises(LoraReinjected):
            nbcache.load_lora(pipe, big)
    assert identical(outputs(pipe), before)
    assert modules(pipe) == there
    nbcache.load_lora(pipe, some["b"])
    assert as_stock(pipe, some["b"])


# What control LoRAs replace


def control() -> Any:
    return flux(kind=FluxControlPipeline)


def test_what_a_control_lora_replaced_is_back_when_an_ordinary_one_takes_its_place(write, some):
    path = write.control("control", control())
    pipe = control()
    nbcache.load_lora(pipe, path)
    nbcache.load_lora(pipe, some["a"])
    assert pipe.transformer.x_embedder.in_features == pipe.transformer.config.in_channels == 4
    assert same([flux_output(pipe.transformer)], [flux_output(stock(flux(), some["a"]).transformer)])


@pytest.mark.parametrize("how", ["unload", "replace"])
def test_what_a_control_lora_replaced_is_back_while_another_adapter_stays(write, some, how):
    path = write.control("control", control())
    pipe = control()
    nbcache.load_lora(pipe, path, adapter="control")
    nbcache.load_lora(pipe, some["a"], scale=0.5, adapter="style")
    expected = stock(flux(), some["a"], "style")
    if how == "unload":
        nbcache.unload_lora(pipe, "control")
        expected.set_adapters(["style"], [0.5])
    else:
        nbcache.load_lora(pipe, some["attn"], adapter="control")
        stock(expected, some["attn"], "control")
        expected.set_adapters(["style", "control"], [0.5, 1.0])
    assert same([flux_output(pipe.transformer)], [flux_output(expected.transformer)])


def test_a_control_lora_does_not_leave_while_an_adapter_of_others_stays(write, some):
    path = write.control("control", control())
    pipe = control()
    nbcache.load_lora(pipe, path, adapter="control")
    stock(pipe, some["attn"], "theirs")
    before = outputs(pipe)
    with pytest.raises(LoraError, match="theirs was loaded by other means: delete it first"):
        nbcache.unload_lora(pipe, "control")
    assert identical(outputs(pipe), before)


@pytest.mark.parametrize("how", ["compile", "torch.compile"])
def test_what_a_control_lora_replaced_is_back_where_the_transformer_is_compiled(write, some, how):
    path = write.control("control", control())
    pipe = control()
    if how == "compile":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    wrapper = pipe.transformer
    before = flux_output(pipe.transformer)
    nbcache.load_lora(pipe, path)
    nbcache.unload_lora(pipe)
    assert pipe.transformer is wrapper
    assert identical([flux_output(pipe.transformer)], [before])
    nbcache.load_lora(pipe, path)
    nbcache.load_lora(pipe, some["a"])
    assert same([flux_output(pipe.transformer)], [flux_output(stock(flux(), some["a"]).transformer)])


@pytest.mark.parametrize("held", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize("what", ["norm", "lora_A"])
def test_a_control_lora_that_does_not_fit_changes_nothing(write, some, what, held):
    tensors = load_file(write.control("control", control()))
    norm = next(name for name in reversed(tensors) if ".norm_" in name)
    matrix = next(name for name in reversed(tensors) if name.endswith("lora_A.weight") and "single" in name)
    wrong = {norm: torch.zeros(7)} if what == "norm" else {matrix: tensors[matrix][:, :, None, None]}
    path = write.save("wrong", tensors | wrong)
    pipe = control()
    if held:
        nbcache.load_lora(pipe, some["a"], adapter="style")
    before = outputs(pipe)
    with pytest.raises(LoraMismatch, match="the pipeline is as it was"):
        nbcache.load_lora(pipe, path)
    assert pipe.transformer.x_embedder.in_features == 4
    assert identical(outputs(pipe), before)


@pytest.mark.parametrize("what", ["saved over", "gone"])
def test_an_adapter_that_stays_is_what_it_was_whatever_became_of_its_file(write, some, tmp_path, monkeypatch, what):
    path = write.control("control", control())
    style = tmp_path / "style.safetensors"
    shutil.copy(some["a"], style)
    monkeypatch.chdir(tmp_path)
    pipe = control()
    nbcache.load_lora(pipe, "style.safetensors", adapter="style", scale=0.5)
    nbcache.load_lora(pipe, path, adapter="control")
    if what == "gone":
        style.unlink()
        monkeypatch.chdir("/")
    else:
        shutil.copy(some["b"], style)
    nbcache.unload_lora(pipe, "control")
    expected = stock(flux(), some["a"], "style")
    expected.set_adapters("style", 0.5)
    assert same([flux_output(pipe.transformer)], [flux_output(expected.transformer)])


# What others do to the pipeline meanwhile


@pytest.mark.parametrize("how", ["set_adapters", "a scale for one call"])
def test_padded_adapters_whose_scales_others_have_set(some, how):
    from diffusers.utils import scale_lora_layers, unscale_lora_layers

    pipe = flux()
    pipe.enable_lora_hotswap(target_rank=8)
    nbcache.load_lora(pipe, some["a"])
    if how == "set_adapters":
        pipe.set_adapters("default", 0.5)
    else:
        scale_lora_layers(pipe.transformer, 0)
        unscale_lora_layers(pipe.transformer, 0)
    assert nbcache.load_lora(pipe, some["b"]).how == "swapped"
    assert as_stock(pipe, some["b"])
    nbcache.set_lora(pipe, {"default": 0.25})
    expected = stock(flux(), some["b"])
    expected.set_adapters("default", 0.25)
    assert same(outputs(pipe), outputs(expected))


def test_an_adapter_that_is_trained_goes_on_being_trained(some):
    from peft import LoraConfig

    pipe = flux()
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="mine")

    def trained() -> list[str]:
        return [name for name, parameter in pipe.transformer.named_parameters() if parameter.requires_grad]

    before = trained()
    assert before
    nbcache.load_lora(pipe, some["a"], adapter="style")
    assert trained() == before
    nbcache.set_lora(pipe, {"style": 0.5})
    assert trained() == before
    nbcache.unload_lora(pipe)
    assert trained() == before


def test_a_pipelines_adapters_are_not_asked_for_by_its_transformer_alone(some):
    pipe = flux()
    before = outputs(pipe)
    nbcache.load_lora(pipe, some["a"])
    for call in (
        lambda: nbcache.load_lora(pipe.transformer, some["b"]),
        lambda: nbcache.set_lora(pipe.transformer, {"default": 0.5}),
        lambda: nbcache.unload_lora(pipe.transformer),
    ):
        with pytest.raises(LoraError, match="loaded into the pipeline that it is part of"):
            call()
    assert as_stock(pipe, some["a"])
    nbcache.load_lora(pipe, some["b"])
    assert as_stock(pipe, some["b"])
    nbcache.unload_lora(pipe)
    assert identical(outputs(pipe), before)


# Other models in the pipeline's places


@pytest.fixture
def whole(write) -> str:
    """Of the transformer and the text encoder."""
    return write.diffusers("whole", flux())


def test_a_text_encoder_that_came_later_gets_its_part(whole):
    pipe = flux()
    nbcache.load_lora(pipe, whole)
    torch.manual_seed(9)
    pipe.text_encoder = text_encoder()
    torch.manual_seed(9)
    other = flux()
    other.text_encoder = text_encoder()
    other.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    nbcache.load_lora(pipe, whole)
    assert same(outputs(pipe), outputs(stock(other, whole)))


def test_a_transformer_that_came_later_gets_its_part_and_can_be_rid_of_it(whole):
    pipe = flux()
    nbcache.load_lora(pipe, whole)
    pipe.transformer = flux(seed=3).transformer
    nbcache.unload_lora(pipe)  # what is left in the text encoder
    assert not [name for name in modules(pipe) if "lora" in name]
    nbcache.load_lora(pipe, whole)
    pipe.transformer = flux(seed=4).transformer
    nbcache.load_lora(pipe, whole)
    assert same(outputs(pipe)[:1], outputs(stock(flux(seed=4), whole))[:1])
    assert same(outputs(pipe)[1:], outputs(stock(flux(), whole))[1:])


def test_a_pipeline_that_lacks_the_text_encoder_of_another_leaves_it_with_its_part(whole, write):
    one, two = flux(), flux()
    two.transformer, two.text_encoder = one.transformer, None
    nbcache.load_lora(one, whole)
    nbcache.set_lora(two, {"default": 0.5})
    nbcache.set_lora(one, {"default": 0.25})
    expected = stock(flux(), whole)
    expected.set_adapters("default", 0.25)
    assert same(outputs(one), outputs(expected))
    nbcache.load_lora(two, write.diffusers("other", flux(), rank=8))
    nbcache.unload_lora(two)
    nbcache.unload_lora(one)
    assert same(outputs(one), outputs(flux()))


def test_two_pipelines_that_share_a_transformer(whole):
    one, two = flux(), flux(seed=5)
    two.transformer = one.transformer
    nbcache.load_lora(one, whole)
    nbcache.load_lora(two, whole)
    assert same(outputs(two)[1:], outputs(stock(flux(seed=5), whole))[1:])
    nbcache.load_lora(one, whole)
    assert as_stock(one, whole)


def test_a_text_encoder_that_is_dropped_is_freed(whole):
    pipe = flux()
    nbcache.load_lora(pipe, whole)
    weights = [weakref.ref(parameter) for parameter in pipe.text_encoder.parameters()]
    pipe.text_encoder = None
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline lacks the text encoder's modules
        nbcache.load_lora(pipe, whole)
    assert same(outputs(pipe), outputs(stock(flux(), whole))[:1])


# What is no LoRA for it


def test_a_kohya_lora_of_another_family_is_named_by_its_first_modules(write):
    path = write.kohya_unet("other", sdxl())
    pipe = flux()
    before = outputs(pipe)
    with pytest.raises(LoraMismatch, match=r"not a LoRA for a FluxPipeline .* modules are lora_unet_\w+") as caught:
        nbcache.load_lora(pipe, path)
    assert len(str(caught.value)) < 900
    assert identical(outputs(pipe), before)


def strange(write: Writer, some: dict[str, str]) -> dict[str, tuple[str, type[Exception], str]]:
    """Files that are no LoRA: path, the error and what it says."""
    good = load_file(some["attn"])
    first = next(name for name in good if name.endswith("lora_A.weight"))
    second = first.replace("lora_A", "lora_B")
    rank_none = good | {first: torch.zeros(0, 32), second: torch.zeros(32, 0)}
    half = {name: tensor for name, tensor in good.items() if name != first}
    nameless = good | {f"transformer.lora_{m}.weight": good[n].clone() for m, n in (("A", first), ("B", second))}
    kohya = load_file(write.kohya_flux("kohya", flux()))
    alpha = next(name for name in kohya if name.endswith(".alpha"))
    return {
        "no rank": (write.save("rank", rank_none), UnsupportedFormat, "not a LoRA"),
        "no A": (write.save("half", half), UnsupportedFormat, "no lora_A.weight beside it"),
        "no module": (write.save("nameless", nameless), UnsupportedFormat, "is of no module"),
        "alpha nan": (write.save("nan", kohya | {alpha: torch.tensor(torch.nan)}), UnsupportedFormat, "alpha is nan"),
        "alpha below": (write.save("minus", kohya | {alpha: torch.tensor(-1.0)}), UnsupportedFormat, "alpha is -1"),
        "metadata": (write.save("meta", good, {"lora_adapter_metadata": "no"}), UnsupportedFormat, "JSONDecodeError"),
    }


KINDS_OF_STRANGE = ["no rank", "no A", "no module", "alpha nan", "alpha below", "metadata"]


@pytest.mark.parametrize("swap", [False, True], ids=["the first", "in another's place"])
@pytest.mark.parametrize("kind", KINDS_OF_STRANGE)
def test_what_is_no_lora_changes_nothing_and_is_not_kept(write, some, kind, swap):
    path, error, words = strange(write, some)[kind]
    pipe = flux()
    if swap:
        nbcache.load_lora(pipe, some["a"])
    before = outputs(pipe)
    for _ in range(2):
        with pytest.raises(error, match=words):
            nbcache.load_lora(pipe, path)
    assert identical(outputs(pipe), before)
    assert len(nbcache.status().entries) == int(swap)


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", None], ids=["no text", "a folder"])
def test_a_configuration_that_cannot_be_read_is_named(write, some, tmp_path, text):
    config = tmp_path / "adapter_config.json"
    if text is None:
        config.mkdir()
    else:
        config.write_bytes(text)
    with pytest.raises(CheckpointInvalid, match=r"adapter_config\.json"):
        nbcache.load_lora(flux(), some["a"])


def test_a_rank_alpha_that_is_no_number_is_refused(write, tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 99}
    model = BertModel(BertConfig(**sizes))
    name = "base_model.model.encoder.layer.0.attention.self.query"
    path = write.save("bert", {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": float("nan"), "target_modules": ["query"], "r": 2}))
    for _ in range(2):
        with pytest.raises(UnsupportedFormat, match="has alpha nan"):
            nbcache.load_lora(model, path)


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_files_of_torch_save(some, tmp_path, suffix):
    path = tmp_path / f"lora{suffix}"
    torch.save(load_file(some["a"]), path)
    pipe = flux()
    nbcache.load_lora(pipe, path)
    assert as_stock(pipe, some["a"])
    torch.save([1, 2], path)
    with pytest.raises(UnsupportedFormat, match="not a dict of tensors"):
        nbcache.load_lora(pipe, path)
    path.write_bytes(b"not a pickle at all")
    with pytest.raises(UnsupportedFormat, match="weights_only"):
        nbcache.load_lora(pipe, path)
    assert as_stock(pipe, some["a"])


def test_an_alias_is_a_name_here_too(some, monkeypatch, tmp_path):
    from nbcache.checkpoints import aliases

    monkeypatch.setenv("NBCACHE_CONFIG_DIR", str(tmp_path / "config"))
    aliases.add("pixels", some["a"])
    pipe = flux()
    assert nbcache.load_lora(pipe, "pixels").name == some["a"]
    assert as_stock(pipe, some["a"])


def test_what_is_no_pipeline_no_scale_and_no_dict_is_refused(some):
    import numpy as np

    pipe = flux()
    for what in (type(pipe), torch.nn.ReLU(), None, flux_without_models()):
        with pytest.raises(InvalidOption, match=r"takes? no LoRAs|none of the models that take LoRAs"):
            nbcache.load_lora(what, some["a"])
    assert repr(nbcache.load_lora(pipe, some["a"], scale=np.float32(0.5)).scale) == "0.5"
    for scales in (None, "default", ["default"]):
        with pytest.raises(InvalidOption, match="not a dict"):
            nbcache.set_lora(pipe, scales)


def flux_without_models() -> Any:
    pipe = flux()
    pipe.transformer = pipe.text_encoder = None
    return pipe
