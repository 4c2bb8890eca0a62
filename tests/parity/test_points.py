"""The table of patch points is true of the installed releases of safetensors, transformers, diffusers, accelerate and peft."""

from __future__ import annotations

import ast
from importlib import metadata

import pytest

from nbcache.models.packages import release
from nbcache.models.points import POINTS, Point
from tests.support.names import imported_in, names_in

pytestmark = pytest.mark.timeout(300)  # importing all the libraries, some times over

PLANTED = """
from nbcache.models.points import POINTS, Point
from tests.support.names import missing, strangers
moved = Point("transformers.modeling_utils", "safe_opened", "safe_open")
gone = Point("transformers.modelling", "safe_open", "safe_open")
other = Point("transformers.modeling_utils", "logger", "warmup")
early = Point("diffusers.loaders.ip_adapter", "safe_open", "safe_open", since="99")
"""


def test_every_name_of_the_table_is_where_it_says(libraries):
    libraries.begin(f"{PLANTED}\nmissing(POINTS), strangers(POINTS), missing([moved, gone, other, early]), strangers([])")
    wrong, strange, planted, all_strange = libraries.finish(timeout_s=110)
    assert wrong == []
    assert strange == []
    assert [line.partition(":")[0] for line in planted] == [
        "transformers.modeling_utils.safe_opened",
        "transformers.modelling.safe_open",
        "transformers.modeling_utils.logger",
        "diffusers.loaders.ip_adapter.safe_open",
    ]
    assert len(all_strange) > (10 if release(metadata.version("transformers")) >= (5, 0) else 9)  # which has one more


def test_a_new_import_in_a_package_is_seen(tmp_path):
    package = tmp_path / "diffusers"
    (package / "loaders").mkdir(parents=True)
    (package / "__init__.py").write_text("import safetensors")
    (package / "loaders" / "new.py").write_text(
        "if True:\n    from safetensors.torch import load_file as quick, save_file\n"
        "def late():\n    from safetensors import safe_open"
    )
    assert list(imported_in(package)) == [("diffusers.loaders.new", "quick")]
    assert list(names_in(ast.parse("from safetensors import SafetensorError, safe_open"))) == ["safe_open"]


def test_no_name_stands_twice_in_the_table():
    assert len({(point.module, point.name) for point in POINTS}) == len(POINTS)
    assert Point("a.b.c", "d", "place").package == "a"
