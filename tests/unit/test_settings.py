"""Options from files, environment, flags and %config: which goes before which, and what becomes of misspelt ones."""

from __future__ import annotations

import json
import os
import re

import pytest
from traitlets import TraitError
from traitlets.config import Config

from nbcache import settings
from nbcache.config import NBCache
from nbcache.errors import InvalidOption


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith("NBCACHE_"):
            monkeypatch.delenv(name)
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(tmp_path / "first"))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "second"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    yield
    for name in os.environ.keys() - before.keys():  # what was adopted
        del os.environ[name]


def write(folder, python="", **options):
    if python:
        (folder / "jupyter_nbcache_config.py").write_text(python)
    if options:
        (folder / "jupyter_nbcache_config.json").write_text(json.dumps({"NBCache": options}))


def sources():
    return {each.option: (each.value, each.source) for each in settings.in_force()}


def test_every_option_has_help_and_a_variable_that_it_reads(monkeypatch):
    for each in settings.in_force():
        assert each.source == "default"
        assert len(each.help) > 20
        assert settings.variable_of(each.option) in each.help


def test_files_are_read_and_the_first_folder_of_the_path_goes_before_the_next(tmp_path):
    write(tmp_path / "second", "c.NBCache.host_limit = '1G'\nc.NBCache.gpu_keep_s = 5")
    write(tmp_path / "first", host_limit="2G")
    found = sources()
    assert found["host_limit"] == ("2G", str(tmp_path / "first" / "jupyter_nbcache_config.json"))
    assert found["gpu_keep_s"] == (5.0, str(tmp_path / "second" / "jupyter_nbcache_config.py"))
    assert NBCache().host_limit_bytes() == 2 * 10**9  # adopted: what this process starts agrees


def test_the_environment_goes_before_files_and_flags_before_both(tmp_path, monkeypatch):
    write(tmp_path / "first", host_limit="2G")
    monkeypatch.setenv("NBCACHE_HOST_LIMIT", "3G")
    assert sources()["host_limit"] == ("3G", "environment NBCACHE_HOST_LIMIT")
    option = settings.set_flag("NBCache.host_limit=4G")
    (found,) = [each for each in settings.in_force([option]) if each.option == option]
    assert (found.value, found.source) == ("4G", "flag --NBCache.host_limit")


@pytest.mark.parametrize(
    ("python", "options", "words"),
    [
        ("c.NBCache.host_limt = '1G'", {}, "no option NBCache.host_limt; did you mean host_limit?"),
        ("", {"gpu_keep": 3}, "no option NBCache.gpu_keep; did you mean gpu_keep_s?"),
        ("", {"zzz": 3}, "no option NBCache.zzz; there are gpu_keep_s"),
        ("", {"host_limit": "lots"}, "'lots' is not a size"),
        ("", {"gpu_keep_s": "soon"}, "expected a float"),
        ("c.NBCache.host_limit = (", {}, "SyntaxError"),
        ("1 / 0", {}, "ZeroDivisionError"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, python, options, words):
    write(tmp_path / "first", python, **options)
    with pytest.raises(InvalidOption, match="jupyter_nbcache_config") as caught:
        settings.in_force()
    assert words in str(caught.value)


def test_json_that_is_none(tmp_path):
    (tmp_path / "first" / "jupyter_nbcache_config.json").write_text("{")
    with pytest.raises(InvalidOption, match=re.escape("jupyter_nbcache_config.json")):
        settings.in_force()


def test_misspelt_variables():
    with pytest.raises(InvalidOption, match="NBCACHE_HOST_LIMT; did you mean NBCACHE_HOST_LIMIT"):
        settings.check_environment({"NBCACHE_HOST_LIMT": "1"})
    settings.check_environment({"NBCACHE_HOST_LIMIT": "1", "NBCACHE_MY_OWN": "x", "NBCACHE_RUNTIME_DIR": "/", "HOME": "/"})


@pytest.mark.parametrize(
    ("flag", "words"), [("NBCache.gpu_kep_s=3", "did you mean gpu_keep_s"), ("NBCache.host_limit", "value")]
)
def test_flags_that_cannot_be(flag, words):
    with pytest.raises(InvalidOption, match=words):
        settings.set_flag(flag, {})


def test_configuration_of_a_shell_that_names_no_option():
    with pytest.raises(TraitError, match="did you mean host_limit"):
        NBCache(config=Config(NBCache={"host_limt": "2G"}))
    config = NBCache()
    with pytest.raises(TraitError, match="did you mean gpu_keep_s"):
        config.update_config(Config(NBCache={"gpu_keep": 2}))
