"""The shortcuts of building a model: each gives what the long way gives, or declines."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from nbcache.models import lean  # noqa: E402
from tests.support.modules import Model  # noqa: E402


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


def test_layers_of_other_threads_have_memory_meanwhile():
    made = []
    with lean.layers_without_memory():
        thread = threading.Thread(
            target=lambda: made.append(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv2d(1, 2, 3)))
        )
        thread.start()
        thread.join()
        assert nn.Linear(3, 4).weight.is_meta
        assert not nn.Linear(3, 4, True, "cpu").weight.is_meta
    assert not any(parameter.is_meta for parameter in made[0].parameters())
    assert 0 < made[0][0].weight.abs().max() <= 3**-0.5


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
