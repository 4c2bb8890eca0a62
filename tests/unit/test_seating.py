"""Tensors that are there already become a model's as the libraries would have it, or are left to them."""

from __future__ import annotations

import sys

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from nbcache.models import seating  # noqa: E402


class Model(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4, **kwargs), nn.LayerNorm(4), nn.Conv2d(1, 2, 3), nn.Embedding(5, 6))
        self.scalar = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("made", torch.arange(4.0), persistent=False)


def facts(model: nn.Module) -> dict[str, tuple[object, ...]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (type(tensor), tensor.requires_grad, tensor.data_ptr(), tensor.shape) for name, tensor in named}


def test_seated_as_by_load_state_dict():
    tensors = {name: tensor.clone() for name, tensor in Model().state_dict().items()}
    with torch.device("meta"):
        mine, stock = Model(), Model()
    mine.made, stock.made = torch.zeros(4), torch.zeros(4)
    stock.load_state_dict(tensors, assign=True)
    assert seating.seat(mine, tensors)
    found, expected = facts(mine), facts(stock)
    assert found.pop("made")[2] == mine.made.data_ptr() and expected.pop("made")
    assert found == expected


def lacking(tensors):
    del tensors["kept"]


def surplus(tensors):
    tensors["made"] = torch.zeros(4)


def renamed(tensors):
    tensors["other"] = tensors.pop("scalar")


def reshaped(tensors):
    tensors["layers.0.weight"] = torch.zeros(4, 2)


def of_another_kind(tensors):
    tensors["layers.0.weight"] = nn.Parameter(tensors["layers.0.weight"])


@pytest.mark.parametrize("change", [lacking, surplus, renamed, reshaped, of_another_kind])
def test_tensors_out_of_the_ordinary_are_left_to_the_library(change):
    model = Model()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(tensors)
    before = facts(model)
    assert not seating.seat(model, tensors)
    assert facts(model) == before


def with_hook(model):
    model.layers[0]._register_load_state_dict_pre_hook(lambda *_: None)


def with_later_hook(model):
    model.layers[0].register_load_state_dict_post_hook(lambda *_: None)


def with_own_way(model):
    model.norm = nn.BatchNorm1d(2)


def with_own_state(model):
    class Own(nn.Linear):
        def get_extra_state(self):
            return torch.zeros(1)

        def set_extra_state(self, state):
            pass

    model.layers[0] = Own(3, 4)


@pytest.mark.parametrize("change", [with_hook, with_later_hook, with_own_way, with_own_state])
def test_modules_out_of_the_ordinary_are_left_to_the_library(change):
    model = Model()
    change(model)
    assert not seating.seat(model, dict(model.state_dict()))


transformers = pytest.importorskip("transformers", minversion="5.0")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
LLAMA = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=1, tie_word_embeddings=False, **SIZES)
T5 = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=20, num_layers=2, num_heads=4)
CLIP = transformers.CLIPTextConfig(vocab_size=64, bos_token_id=0, eos_token_id=1, **SIZES)
MIXTRAL = transformers.MixtralConfig(vocab_size=64, num_local_experts=3, num_key_value_heads=1, **SIZES)
IN_PART = "in part to float32"
MODELS = {
    "plain": (transformers.LlamaForCausalLM, LLAMA),
    "tied": (transformers.T5EncoderModel, T5),
    "renamed": (transformers.CLIPTextModel, CLIP),
    "fused": (transformers.MixtralForCausalLM, MIXTRAL),
    "of the base model": (transformers.LlamaForCausalLM, LLAMA),
    IN_PART: (transformers.T5ForConditionalGeneration, T5),
}
WHOLLY = ("plain", "renamed")


def dtype_of(kind):
    """T5 keeps some tensors in float32 where the rest is float16."""
    return torch.float16 if kind == IN_PART else torch.bfloat16


def saved(kind, folder):
    """The tensors as they are saved, which is not as the model has them."""
    from safetensors.torch import load_file

    cls, config = MODELS[kind]
    torch.manual_seed(1)
    model = cls(config).to(dtype_of(kind))
    (model.base_model if kind == "of the base model" else model).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def loaded(kind, tensors, first, **options):
    """The model, what the library reports, and how many tensors were left to it."""
    cls, config = MODELS[kind]
    options = {"dtype": dtype_of(kind), **options}
    loading, user = sys.modules["transformers.core_model_loading"], transformers.modeling_utils
    left = []
    stock = user.convert_and_load_state_dict_in_model

    def counting(model, state_dict, load_config, disk_offload_index):
        left.append(len(state_dict))
        return stock(model, state_dict, load_config, disk_offload_index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(user, "convert_and_load_state_dict_in_model", counting)
        before = user.convert_and_load_state_dict_in_model
        if first:
            with seating.seating_first(loading, user):
                model, report = load(cls, config, tensors, options)
            assert user.convert_and_load_state_dict_in_model is before
        else:
            model, report = load(cls, config, tensors, options)
    return model, report, left[0]


def load(cls, config, tensors, options):
    torch.manual_seed(2)  # for what the checkpoint lacks
    return cls.from_pretrained(None, config=config, state_dict=dict(tensors), output_loading_info=True, **options)


def portrait(model):
    """All that can be told of the tensors, with those that are one and the same."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return {
        name: (type(tensor), tensor.dtype, tensor.requires_grad, tensor.tolist(), first.setdefault(id(tensor), name))
        for name, tensor in named
    } | {name: getattr(module, seating.FLAG, False) for name, module in model.named_modules()}


def whole(tensors):
    pass


def one_lacking(tensors):
    del tensors[min(tensors)]


def one_more(tensors):
    tensors["surplus.weight"] = torch.zeros(3)


def one_of_another_shape(tensors):
    name = next(name for name in tensors if "norm" in name)
    tensors[name] = torch.zeros(3, dtype=tensors[name].dtype)


def one_of_another_dtype(tensors):
    name = max(tensors)
    tensors[name] = tensors[name].float()


def one_twice(tensors):
    """Under its own name, and under that of the base model."""
    name = next(name for name in tensors if "norm" in name)
    tensors[name.removeprefix("model.") if name.startswith("model.") else f"model.{name}"] = tensors[name] + 1


CHANGES = [whole, one_lacking, one_more, one_of_another_shape, one_of_another_dtype, one_twice]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", MODELS)
def test_what_fits_is_seated_as_transformers_does_it(tmp_path, kind, change):
    tensors = saved(kind, tmp_path)
    change(tensors)
    options = {"ignore_mismatched_sizes": True}
    stock, expected, _ = loaded(kind, tensors, False, **options)
    model, report, left = loaded(kind, tensors, True, **options)
    assert report == expected
    assert portrait(model) == portrait(stock)
    if change is whole and kind in WHOLLY:
        assert left == 0
        assert {tensor.data_ptr() for tensor in tensors.values()} == {p.data_ptr() for p in model.parameters()}
    elif change is not one_twice:
        assert left < len(tensors) or kind == IN_PART


def test_a_cast_and_an_unknown_device_are_the_librarys(tmp_path):
    tensors = saved("plain", tmp_path)
    for options in ({"dtype": torch.float32}, {"device_map": {"": "meta"}}):
        _, _, left = loaded("plain", tensors, True, **options)
        assert left == len(tensors)


def test_a_module_with_its_own_state_is_the_librarys(tmp_path):
    tensors = saved("plain", tmp_path)
    stock = transformers.LlamaForCausalLM.__init__

    def hooked(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        self.model.layers[0].register_state_dict_pre_hook(lambda *_: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "__init__", hooked)
        model, _, left = loaded("plain", tensors, True)
    assert left == len(tensors)
    assert {tensor.data_ptr() for tensor in tensors.values()} == {p.data_ptr() for p in model.parameters()}


def test_a_loader_that_takes_something_else_is_left_alone():
    class Library:
        @staticmethod
        def convert_and_load_state_dict_in_model(model, state_dict, something):
            pass

        @staticmethod
        def rename_source_key(source_key, weight_renamings, weight_converters, base_model_prefix, meta_state_dict):
            pass

    before = Library.convert_and_load_state_dict_in_model
    with seating.seating_first(Library, Library):
        assert Library.convert_and_load_state_dict_in_model is before
    with seating.seating_first(object(), object()):
        pass
