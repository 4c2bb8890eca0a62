"""Tensors that fit become those of a model of transformers as the library would have it; the others are the library's."""

from __future__ import annotations

import importlib
import sys

import pytest

torch = pytest.importorskip("torch")

from nbcache.models import seating  # noqa: E402

transformers = pytest.importorskip("transformers", minversion="5.16")
initialization = importlib.import_module("transformers.initialization")
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


class OwnConfig(transformers.PretrainedConfig):
    model_type = "own"


class Own(transformers.PreTrainedModel):
    """A module of two names, and a common layer with a buffer that no checkpoint has."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.b = torch.nn.Linear(2, 2, bias=False)
        self.a = self.b
        self.layer = torch.nn.Linear(2, 2, bias=False)
        self.layer.register_buffer("scale", torch.full((2,), 3.0), persistent=False)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if hasattr(module, "scale"):
            initialization.constant_(module.scale, 3.0)


@pytest.mark.parametrize("first_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("order", [("a.weight", "b.weight"), ("b.weight", "a.weight")])
def test_models_out_of_the_ordinary(monkeypatch, order, first_dtype):
    monkeypatch.setitem(MODELS, "own", (Own, OwnConfig()))
    made = {
        "a.weight": torch.full((2, 2), 1.0),
        "b.weight": torch.full((2, 2), 2.0, dtype=first_dtype),
        "layer.weight": torch.ones(2, 2),
    }
    tensors = {name: made[name] for name in (*order, "layer.weight")}
    stock, expected, _ = loaded("own", tensors, False, dtype=torch.float32)
    model, report, _ = loaded("own", tensors, True, dtype=torch.float32)
    assert report == expected
    assert portrait(model) == portrait(stock)
    assert model.layer.scale.tolist() == [3.0, 3.0]
    del made["a.weight"], made["b.weight"]
    model, _, left = loaded("own", made, True, dtype=torch.float32)
    assert left == 0
    assert model.layer.scale.tolist() == [3.0, 3.0]
