"""The shortcuts of building a model: each gives what the long way gives, or declines."""

from __future__ import annotations

import copy
import pickle
import re
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from nbcache.models import lean  # noqa: E402


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
    assert lean.seat(mine, tensors)
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
    assert not lean.seat(model, tensors)
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
    assert not lean.seat(model, dict(model.state_dict()))


def test_layers_are_made_without_memory_and_then_as_before():
    inits = [(layer.__init__, layer.__init__.__defaults__, layer.reset_parameters) for layer in lean.LAYERS]
    with pytest.raises(ZeroDivisionError), lean.layers_without_memory():
        model = Model()
        assert all(parameter.is_meta for parameter in model.layers.parameters())
        assert not model.scalar.is_meta and not model.kept.is_meta
        told = nn.Linear(3, 4, device="cpu")
        assert not told.weight.is_meta and told.weight.abs().max() <= 3**-0.5  # as its own way of initialising says
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in Model().named_parameters()]
        raise ZeroDivisionError
    assert [(layer.__init__, layer.__init__.__defaults__, layer.reset_parameters) for layer in lean.LAYERS] == inits
    assert not any(parameter.is_meta for parameter in Model().parameters())


def test_patterns_are_compiled_when_they_are_used():
    library = ModuleType("library")
    library.re = re
    with lean.late_patterns(library):
        pattern, wrong = library.re.compile(r"(?P<g0>a+)\.b", re.IGNORECASE), library.re.compile("(")
        assert library.re.search("b", "abc")
    assert library.re is re
    for each in (pattern, copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert each.search("xAA.b")["g0"] == "AA"
        assert each.groupindex == {"g0": 1}
        assert each.match("xAA.b") is None
    with pytest.raises(re.error):
        wrong.search("")


def test_a_module_with_patterns_of_its_own_is_left_alone():
    library = ModuleType("library")
    library.re = object()
    before = library.re
    with lean.late_patterns(library):
        assert library.re is before
    with lean.late_patterns(ModuleType("without")):
        pass
