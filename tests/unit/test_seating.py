"""Tensors that are there already become a model's as torch would have it, or are left to it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from nbcache.models import seating  # noqa: E402
from tests.support.modules import Model  # noqa: E402


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


class Library:
    """A loader and a renamer of transformers' names, that take these arguments."""

    def __init__(self, loader, renamer="source_key, weight_renamings, weight_converters, base_model_prefix, meta_state_dict"):
        self.convert_and_load_state_dict_in_model = eval(f"lambda {loader}: None")
        self.rename_source_key = eval(f"lambda {renamer}: None")


KNOWN = "model, state_dict, load_config, disk_offload_index=None"


@pytest.mark.parametrize(
    ("library", "is_known"),
    [
        (Library(KNOWN), True),
        (Library(f"{KNOWN}, another=None"), False),
        (Library("model, state_dict, load_config, tp_plan"), False),
        (Library(KNOWN, "source_key, patterns"), False),
        (object(), False),
    ],
)
def test_a_loader_that_takes_something_else_is_left_alone(library, is_known):
    before = getattr(library, seating.LOADER, None)
    with seating.seating_first(library, library):
        assert (getattr(library, seating.LOADER, None) is not before) is is_known
    assert getattr(library, seating.LOADER, None) is before
