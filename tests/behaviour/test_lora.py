"""LoRAs in real pipelines of diffusers, small ones, on the CPU; each beside what the stock loader makes of the same file."""

from __future__ import annotations

import gc
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlPipeline
from safetensors.torch import load_file

import nbcache
from nbcache.errors import UnsupportedFormat
from tests.support.lora_parity import LAYOUTS, held_alike, identical, same, stock
from tests.support.loras import Writer, flux, outputs, sd15

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def write(tmp_path) -> Writer:
    return Writer(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_those_of_the_stock_loader(write, layout):
    make, save = LAYOUTS[layout]
    pipe = make()
    before = outputs(pipe)
    path = save(write, "lora", pipe)
    first = nbcache.load_lora(pipe, path)
    assert (first.how, first.found) == ("injected", "converted")
    other = stock(make(), path)
    assert held_alike(pipe, other)
    assert same(outputs(pipe), outputs(other))
    again = nbcache.load_lora(pipe, path)
    assert again.found == "cached"
    assert held_alike(pipe, other)
    assert not same(outputs(pipe), before)
    nbcache.unload_lora(pipe)
    assert identical(outputs(pipe), before)
    assert not any("lora" in name for name, _ in (getattr(pipe, "unet", None) or pipe.transformer).named_modules())


def entries() -> list[Any]:
    return list(nbcache.status().entries)


def test_what_was_converted_is_kept_without_the_original_and_known_by_the_file(write):
    pipe = flux()
    path = write.kohya_flux("style", pipe)
    nbcache.load_lora(pipe, path)
    (kept,) = entries()
    assert kept.name.startswith("style [lora ")
    assert (kept.provenance, kept.source) == ("derived", ())
    assert nbcache.load_lora(flux(), path).found == "cached"
    write.kohya_flux("style", pipe)
    assert nbcache.load_lora(pipe, path).found == "converted"  # the file is another
    assert len(entries()) == 2


def test_a_path_from_home(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe = flux()
    path = write.diffusers("style", pipe)
    assert [nbcache.load_lora(pipe, f"~/{Path(path).name}").found for _ in range(2)] == ["converted", "cached"]


def test_no_matrix_shares_memory_with_another_though_the_converter_makes_them_so(write):
    pipe = flux()
    path = write.kohya_flux("style", pipe)
    converted = FluxControlPipeline.lora_state_dict({name: tensor.clone() for name, tensor in load_file(path).items()})
    q, k = (converted[f"transformer.transformer_blocks.0.attn.{name}.lora_A.weight"] for name in ("to_q", "to_k"))
    assert q.data_ptr() == k.data_ptr()
    nbcache.load_lora(pipe, path)
    q, k = (
        pipe.transformer.get_submodule(f"transformer_blocks.0.attn.{name}").lora_A["default"].weight
        for name in ("to_q", "to_k")
    )
    assert torch.equal(q, k)
    q.data.zero_()
    assert not torch.equal(q, k)


def test_a_control_lora_of_the_real_size_is_converted_as_the_stock_converter_does(write):
    from nbcache.models.lora_convert import Family, convert

    path = write.bfl_control("control")
    stock_form = FluxControlPipeline.lora_state_dict(dict(load_file(path)))
    tensors, recipe = convert(load_file(path), {}, "", Family(("transformer", "text_encoder"), FluxControlPipeline))
    assert tensors.keys() == stock_form.keys()
    assert all(torch.equal(tensors[name], stock_form[name]) for name in tensors)
    assert len(recipe.others) == 2 * 19 * 2 + 2 * 38
    assert set(recipe.alphas.values()) == {2.0}  # the rank: a scaling of one
    assert len(recipe.alphas) == len([name for name in stock_form if name.endswith("lora_A.weight")])


def test_a_converted_lora_gives_way_to_other_loads(write, tmp_path, monkeypatch):
    from tests.support.checkpoints import write_checkpoint

    monkeypatch.setenv("NBCACHE_HOST_LIMIT", "24MiB")
    pipe = flux()
    path = write.diffusers("wide", pipe, rank=200)
    nbcache.load_lora(pipe, path)
    pipe = None  # it held the lease
    gc.collect()
    nbcache.load(write_checkpoint(tmp_path / "model.safetensors", sizes=((2300, 2300),)), device="cpu")
    assert [entry.provenance for entry in entries()] == ["file"]
    assert nbcache.load_lora(flux(), path).found == "converted"


@pytest.fixture
def three(write) -> list[str]:
    """LoRAs for :func:`flux`, of several ranks and of different modules."""
    pipe = flux()
    return [write.diffusers("a", pipe), write.diffusers("b", pipe, rank=8, to_q=3), write.diffusers("c", pipe, only="attn")]


def test_swaps_are_as_fresh_loads_whatever_the_ranks_and_the_modules(three):
    pipe, paths = flux(), three
    expected = [outputs(stock(flux(), path)) for path in paths]
    nbcache.load_lora(pipe, paths[0])
    for number in (1, 2, 0, 2, 1, 1, 0):
        assert nbcache.load_lora(pipe, paths[number]).how == "swapped"
        assert same(outputs(pipe), expected[number])


def test_modules_that_an_adapter_lacks_are_injected_once(three):
    pipe, paths = flux(), three
    expected = [outputs(stock(flux(), path)) for path in paths]
    nbcache.load_lora(pipe, paths[2])
    how = []
    for number in (0, 2, 0, 1):
        how.append(nbcache.load_lora(pipe, paths[number]).how)
        assert same(outputs(pipe), expected[number])
    assert how == ["injected", "swapped", "swapped", "swapped"]


def test_the_scale_is_that_of_set_adapters(three):
    pipe, (path, *_) = flux(), three
    other = stock(flux(), path)
    other.set_adapters("default", 0.7)
    nbcache.load_lora(pipe, path, scale=0.7)
    assert same(outputs(pipe), outputs(other))
    other.set_adapters("default", 0.3)
    nbcache.set_lora(pipe, {"default": 0.3})
    assert same(outputs(pipe), outputs(other))


def test_two_adapters_at_once(three):
    pipe, (first, second, third) = flux(), three
    other = stock(stock(flux(), first, "one"), second, "two")
    nbcache.load_lora(pipe, first, adapter="one")
    nbcache.load_lora(pipe, second, 0.5, adapter="two")
    other.set_adapters(["one", "two"], [1.0, 0.5])
    assert same(outputs(pipe), outputs(other))
    nbcache.set_lora(pipe, {"one": 0.8, "two": 0.25})
    other.set_adapters(["one", "two"], [0.8, 0.25])
    assert same(outputs(pipe), outputs(other))
    nbcache.set_lora(pipe, {"two": 1.0})
    assert same(outputs(pipe), outputs(stock(flux(), second)))
    nbcache.load_lora(pipe, third, adapter="two")
    assert same(outputs(pipe), outputs(stock(flux(), third)))
    nbcache.set_lora(pipe, {})
    assert same(outputs(pipe), outputs(flux()))
    nbcache.unload_lora(pipe, "two")
    assert pipe.get_list_adapters() == {"transformer": ["one"], "text_encoder": ["one"]}
    nbcache.set_lora(pipe, {"one": 1.0})
    assert same(outputs(pipe), outputs(stock(flux(), first)))


def test_adapters_of_others_are_left_alone(three):
    pipe, (first, second, _) = flux(), three
    stock(pipe, first, "theirs")
    with pytest.raises(nbcache.errors.LoraError, match="'theirs' was loaded by other means"):
        nbcache.load_lora(pipe, second, adapter="theirs")
    nbcache.load_lora(pipe, second, adapter="ours")
    other = stock(stock(flux(), first, "theirs"), second, "ours")
    other.set_adapters(["theirs", "ours"])
    assert same(outputs(pipe), outputs(other))
    nbcache.unload_lora(pipe)
    assert same(outputs(pipe), outputs(stock(flux(), first)))


def test_what_the_stock_functions_took_out_is_injected_again(three):
    pipe, (first, second, _) = flux(), three
    nbcache.load_lora(pipe, first)
    pipe.unload_lora_weights()
    assert nbcache.load_lora(pipe, second).how == "injected"
    pipe.delete_adapters("default")
    with pytest.raises(
        nbcache.errors.AdapterNotFound, match="no adapter 'default' was loaded with load_lora here; loaded: none"
    ):
        nbcache.set_lora(pipe, {"default": 1.0})
    nbcache.load_lora(pipe, second)
    assert same(outputs(pipe), outputs(stock(flux(), second)))


@pytest.mark.parametrize("rank", [2, 4, 16])
def test_a_stock_hotswap_writes_into_nothing_that_others_see(write, rank):
    """To a larger rank it swaps the tensor objects; to others it writes into them."""
    pipe = flux()
    path = write.diffusers("a", pipe, only="transformer")
    other = write.diffusers("b", pipe, rank=rank, only="transformer")
    nbcache.load_lora(pipe, path)
    stock(pipe, other, hotswap=True)
    swapped, loaded = outputs(pipe)[0], outputs(stock(flux(), other))[0]
    torch.testing.assert_close(swapped, loaded)  # a smaller rank is padded: the same sums, in another order
    assert not torch.equal(swapped, outputs(stock(flux(), path))[0])
    fresh = flux()
    nbcache.load_lora(fresh, path)
    assert same(outputs(fresh), outputs(stock(flux(), path)))
    assert nbcache.load_lora(pipe, path).how == "swapped"
    assert same(outputs(pipe), outputs(fresh))


def test_unfusing_gives_the_base_back_to_the_bit_and_the_cache_never_saw_it(three, write, tmp_path):
    from safetensors.torch import save_file

    pipe, (first, second, _) = flux(), three
    base = tmp_path / "base.safetensors"
    save_file(pipe.transformer.state_dict(), base)
    weights = nbcache.load(base, device="cpu")
    pipe.transformer.load_state_dict(weights, assign=True)
    before, places = outputs(pipe), {name: p.data_ptr() for name, p in pipe.transformer.named_parameters()}
    nbcache.load_lora(pipe, first)
    with_lora = outputs(pipe)
    for fused in ([first], [first, second]):
        for number, path in enumerate(fused):
            nbcache.load_lora(pipe, path, adapter=("default", "more")[number])
        pipe.fuse_lora(components=["transformer", "text_encoder"], lora_scale=0.9)
        assert not same(outputs(pipe), before)
        with pytest.raises(nbcache.errors.LoraFused, match="unfuse"):
            nbcache.load_lora(pipe, second)
        with pytest.raises(nbcache.errors.LoraFused, match="unfuse"):
            nbcache.unload_lora(pipe)
        pipe.unfuse_lora(components=["transformer", "text_encoder"])
        if len(fused) > 1:
            nbcache.unload_lora(pipe, "more")
        nbcache.load_lora(pipe, first)
        assert identical(outputs(pipe), with_lora)
    nbcache.unload_lora(pipe)
    assert {name: p.data_ptr() for name, p in pipe.transformer.named_parameters()} == places
    assert identical(outputs(pipe), before)
    stored = load_file(base)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in nbcache.load(base, device="cpu").items())


def test_fused_layers_can_be_copied_and_pickled(three):
    import copy
    import io

    pipe, (first, *_) = flux(), three
    nbcache.load_lora(pipe, first)
    pipe.fuse_lora(components=["transformer"])
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x = torch.randn(2, layer.in_features)
    fused = layer(x)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        twin.unmerge()
        assert not twin.merged
        assert not torch.equal(twin.get_base_layer()(x), fused)
    assert layer.merged
    assert torch.equal(layer(x), fused)


@pytest.mark.parametrize("loaded", [False, True])
def test_the_wrong_architecture_is_named_and_changes_nothing(write, loaded):
    pipe = flux()
    wrong = {
        "wider": (write.diffusers("wider", flux(heads=4)), r"transformer\.\S+ is 32→\d+, the LoRA's 64→\d+"),
        "other": (write.diffusers("other", sd15()), r"tensors are for none of transformer, text_encoder: unet\."),
    }
    right = write.diffusers("right", pipe)
    if loaded:
        nbcache.load_lora(pipe, right)
    before = outputs(pipe)
    modules = [name for name, _ in pipe.transformer.named_modules()]
    for path, words in wrong.values():
        with pytest.raises(nbcache.errors.LoraMismatch, match=words) as caught:
            nbcache.load_lora(pipe, path)
        assert path in str(caught.value)
        assert str(caught.value).endswith("the pipeline is as it was")
        assert identical(outputs(pipe), before)
        assert [name for name, _ in pipe.transformer.named_modules()] == modules
    assert nbcache.load_lora(pipe, right).how == ("swapped" if loaded else "injected")


def test_a_few_modules_too_many_are_left_out_with_a_warning(write):
    path = write.diffusers("deep", flux(blocks=2))
    pipe = flux(blocks=2)
    pipe.transformer.single_transformer_blocks = pipe.transformer.single_transformer_blocks[:1]
    other = write.diffusers("right", pipe)
    for how in ("injected", "swapped"):
        with pytest.warns(UserWarning, match=r"lacks \d+ of its 48 modules, such as transformer.single_transformer_blocks.1"):
            assert nbcache.load_lora(pipe, path).how == how
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = flux(blocks=2)
            twin.transformer.single_transformer_blocks = twin.transformer.single_transformer_blocks[:1]
            assert same(outputs(pipe), outputs(stock(twin, path)))
        nbcache.load_lora(pipe, other)


def test_what_is_no_lora_is_refused(write, tmp_path):
    pipe = flux()
    layers = {"transformer.transformer_blocks.0.attn.to_q": pipe.transformer.transformer_blocks[0].attn.to_q}
    dora = {}
    for name, layer in layers.items():
        dora[f"{name}.lora_A.weight"], dora[f"{name}.lora_B.weight"] = write.pair(layer, 4)
        dora[f"{name}.lora_magnitude_vector"] = torch.ones(32)
    half = {name: tensor for name, tensor in dora.items() if name.endswith("lora_A.weight")}
    cases = {
        write.save("dora", dora): "a DoRA",
        write.save("half", half): "has no lora_B.weight beside it",
        write.save("none", {"weight": torch.zeros(3)}): "not a LoRA",
    }
    for path, words in cases.items():
        with pytest.raises(nbcache.errors.UnsupportedFormat, match=words) as caught:
            nbcache.load_lora(pipe, path)
        assert path in str(caught.value)
    with pytest.raises(nbcache.errors.CheckpointNotFound):
        nbcache.load_lora(pipe, tmp_path / "missing.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{torn")
    with pytest.raises(nbcache.errors.CheckpointInvalid):
        nbcache.load_lora(pipe, tmp_path / "torn.safetensors")
    with pytest.raises(nbcache.errors.InvalidOption, match="takes no LoRAs"):
        nbcache.load_lora(object(), tmp_path / "torn.safetensors")
    for options in ({"scale": float("nan")}, {"scale": "much"}, {"adapter": "a.b"}, {"adapter": ""}):
        with pytest.raises(nbcache.errors.InvalidOption, match="adapter"):
            nbcache.load_lora(pipe, tmp_path / "torn.safetensors", **options)
    assert not pipe.get_list_adapters()


def compile_counting(module: torch.nn.Module) -> list[int]:
    """Compile a module with a backend that counts how often it is asked to."""
    compiled = [0]

    def backend(graph: Any, inputs: Any) -> Any:
        compiled[0] += 1
        return graph.forward

    torch._dynamo.reset()
    module.compile(backend=backend, fullgraph=True)
    return compiled


def test_swaps_into_padded_buffers_compile_nothing_again(write):
    pipe = flux()
    paths = [
        write.diffusers("a", pipe, only="transformer"),
        write.diffusers("b", pipe, rank=8, only="transformer", alpha=3.0),
        write.diffusers("c", pipe, rank=2, only="_blocks.0.attn"),
    ]
    pipe.enable_lora_hotswap(target_rank=8)
    nbcache.load_lora(pipe, paths[0])
    held = {id(p) for p in pipe.transformer.parameters()}
    compiled = compile_counting(pipe.transformer)
    outputs(pipe)
    before = compiled[0]
    assert before
    for number in (1, 2, 0, 1):
        assert nbcache.load_lora(pipe, paths[number], scale=0.5 + number).how == "swapped"
        other = stock(flux(), paths[number])
        other.set_adapters("default", 0.5 + number)
        for mine, theirs in zip(outputs(pipe), outputs(other), strict=True):
            torch.testing.assert_close(mine, theirs)
        nbcache.set_lora(pipe, {"default": 1.0})
        torch.testing.assert_close(outputs(pipe)[0], outputs(stock(flux(), paths[number]))[0])
    assert compiled[0] == before
    assert {id(p) for p in pipe.transformer.parameters()} == held
    large = write.diffusers("large", flux(), rank=16, only="transformer")
    with pytest.warns(UserWarning, match="its rank 16 is above the target rank 8; the adapter is injected anew"):
        assert nbcache.load_lora(pipe, large).how == "injected"
    torch.testing.assert_close(outputs(pipe)[0], outputs(stock(flux(), large))[0])
    assert nbcache.load_lora(pipe, paths[1]).how == "swapped"  # the target rank is 16 from now on
    torch.testing.assert_close(outputs(pipe)[0], outputs(stock(flux(), paths[1]))[0])
    torch._dynamo.reset()


def test_what_is_compiled_without_padding_is_written_in_place_or_said_to_be_injected_again(write):
    pipe = flux()
    paths = [write.diffusers(name, pipe, rank, only="transformer") for name, rank in (("a", 4), ("b", 4), ("c", 8))]
    nbcache.load_lora(pipe, paths[0])
    compiled = compile_counting(pipe.transformer)
    outputs(pipe)
    before = compiled[0]
    assert nbcache.load_lora(pipe, paths[1]).how == "swapped"
    torch.testing.assert_close(outputs(pipe)[0], outputs(stock(flux(), paths[1]))[0])
    assert compiled[0] == before
    with pytest.warns(UserWarning, match="its rank 8 is not 4, and nothing was padded before compiling"):
        nbcache.load_lora(pipe, paths[2])
    torch.testing.assert_close(outputs(pipe)[0], outputs(stock(flux(), paths[2]))[0])
    torch._dynamo.reset()


def test_200_random_swaps_among_5_leave_nothing_behind(write):
    import random

    import psutil

    pipe = flux()
    ranks = {"a": 4, "b": 8, "c": 2, "d": 4, "e": 16}
    paths = [write.diffusers(name, pipe, rank) for name, rank in ranks.items()]
    order = random.Random(5)

    def swap(times: int) -> int:
        for _ in range(times):
            nbcache.load_lora(pipe, order.choice(paths))
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    for path in paths:
        nbcache.load_lora(pipe, path)
    while gc.collect():  # what an earlier test left would go meanwhile, in several steps
        pass
    tensors, process = swap(20), psutil.Process()
    descriptors, used, memory = process.num_fds(), nbcache.status().host.used_bytes, process.memory_info().rss
    maps = len(process.memory_maps(grouped=False))
    assert swap(200) == tensors
    assert process.num_fds() == descriptors
    assert len(process.memory_maps(grouped=False)) <= maps + 5
    assert process.memory_info().rss < memory + (8 << 20)
    assert nbcache.status().host.used_bytes == used
    nbcache.load_lora(pipe, paths[3])
    assert same(outputs(pipe), outputs(stock(flux(), paths[3])))


def test_a_pipeline_goes_when_it_is_let_go(write):
    """A LoRA of ours makes no cycle that keeps the weights until the next collection."""
    import weakref

    pipe = flux()
    nbcache.load_lora(pipe, write.diffusers("a", pipe))
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(pipe.transformer.transformer_blocks[0].attn.to_q.base_layer.weight)
        del pipe
        assert gone() is None
    finally:
        gc.enable()


def test_a_reinjection_that_fails_puts_back_what_was_there(write, monkeypatch):
    pipe = flux()
    first, wider = write.diffusers("a", pipe, only="attn"), write.diffusers("b", pipe)
    nbcache.load_lora(pipe, first, scale=0.5)
    before, real, calls = outputs(pipe), pipe.load_lora_weights, []

    def fails_once(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no memory")
        real(*args[1:], **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(pipe), "load_lora_weights", fails_once)
        with pytest.raises(nbcache.errors.LoraError, match="could not be injected: RuntimeError: no memory"):
            nbcache.load_lora(pipe, wider)
    assert identical(outputs(pipe), before)
    nbcache.load_lora(pipe, wider)
    assert same(outputs(pipe), outputs(stock(flux(), wider)))


def test_half_precision_pipelines_get_what_the_stock_loader_casts(write):
    pipe, other = flux(), flux()
    paths = [write.diffusers("a", pipe), write.diffusers("b", pipe)]
    for each in (pipe, other):
        each.to(dtype=torch.bfloat16)
    for path in paths:
        nbcache.load_lora(pipe, path)
    stock(other, paths[1])
    assert same(outputs(pipe), outputs(other))
    lora = [p.dtype for name, p in pipe.transformer.named_parameters() if "lora" in name]
    assert set(lora) == {torch.bfloat16}


def language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))


def adapter_folder(folder: Path, **settings: Any) -> str:
    """A folder as ``save_pretrained`` of a peft model makes it, of random numbers."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(language_model(), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **settings))
    torch.manual_seed(settings["r"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return str(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(9)[None]).logits


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers by that name
@pytest.mark.parametrize("wrapped", [False, True], ids=["transformers", "peft"])
def test_models_of_transformers_and_peft(tmp_path, wrapped):
    from peft import LoraConfig, PeftModel, get_peft_model

    settings = [
        {"r": 4, "lora_alpha": 6},
        {"r": 8, "lora_alpha": 3, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
    ]
    folders = [adapter_folder(tmp_path / str(number), **each) for number, each in enumerate(settings)]
    expected = [logits(PeftModel.from_pretrained(language_model(), folder)) for folder in folders]
    model = language_model()
    if wrapped:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"]), adapter_name="theirs")
    before = logits(model)
    how = []
    for number in (0, 1, 2, 0):
        how.append(nbcache.load_lora(model, folders[number], adapter="ours").how)
        torch.testing.assert_close(logits(model), expected[number])
    assert how == ["injected", "swapped", "swapped", "swapped"]
    nbcache.set_lora(model, {"ours": 0.0})
    torch.testing.assert_close(logits(model), before)
    nbcache.unload_lora(model, "ours")
    torch.testing.assert_close(logits(model), before)
    config = json.loads((tmp_path / "0" / "adapter_config.json").read_text())
    (tmp_path / "0" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 12}))
    assert nbcache.load_lora(model, folders[0], adapter="ours").found == "converted"  # the alpha is another
    torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(language_model(), folders[0])))


def test_what_was_swapped_in_can_be_saved_and_loaded_by_stock(write, tmp_path):
    pipe = flux()
    first = write.diffusers("a", pipe, only="transformer")
    second = write.diffusers("b", pipe, rank=8, only="transformer", alpha=3.0)
    nbcache.load_lora(pipe, first)
    nbcache.load_lora(pipe, second)
    pipe.transformer.save_lora_adapter(tmp_path / "saved", adapter_name="default")
    other = flux()
    other.transformer.load_lora_adapter(str(tmp_path / "saved"), prefix=None, adapter_name="default", use_safetensors=True)
    assert same(outputs(other), outputs(stock(flux(), second)))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora', which changes the base weights"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication="),
        ({"alora_invocation_tokens": [8, 9]}, "alora_invocation_tokens="),
        ({"use_dora": True}, "DoRA"),
        ({"of_another_day": 7}, "of_another_day=7, which this peft does not know"),
    ],
    ids=["pissa", "olora", "layer_replication", "alora", "dora", "unknown"],
)
def test_what_peft_saves_that_is_more_than_matrices_is_refused(tmp_path, settings, words):
    folder = adapter_folder(tmp_path, r=2)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    model = language_model()
    before = logits(model)
    with pytest.raises(UnsupportedFormat, match=re.escape(words)):
        nbcache.load_lora(model, folder)
    assert torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("beginning", ["gaussian", "orthogonal", False])
def test_how_a_lora_was_begun_does_not_matter_where_the_base_stayed(tmp_path, beginning):
    from peft import PeftModel

    folder = adapter_folder(tmp_path, r=2, init_lora_weights=beginning)
    model = language_model()
    nbcache.load_lora(model, folder)
    torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(language_model(), folder)))
