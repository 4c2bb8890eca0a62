"""The pages of ``nbcache help``: every topic has one, and those made from the code tell of all of it."""

from __future__ import annotations

import re

import pytest

import nbcache
from nbcache import errors, settings
from nbcache.bench.commands import app as bench
from nbcache.checkpoints.formats import FORMATS
from nbcache.client.options import SHARE_MODES
from nbcache.doctor.checkup import PARTS
from nbcache.guide.topics import MAGICS, TOPICS, find, listing, names
from nbcache.jupyter.magics import NBCacheMagics


@pytest.mark.parametrize("topic", TOPICS, ids=names())
def test_a_page_is_markdown(topic):
    page = topic.page()
    assert re.match(r"# \S", page)
    assert page.count("```") % 2 == 0
    assert len(page.split()) > 40
    assert not re.search(r":(func|class|mod|meth):", page)
    assert topic.summary in listing()


def test_words_name_one_topic_each():
    words = [word for topic in TOPICS for word in (topic.name, *topic.words)]
    assert len(words) == len(set(words))
    assert find("zygote") is find("Restarts")


@pytest.mark.parametrize(
    ("typed", "meant"), [("modles", "models"), ("restart", "restarts"), ("option", "options"), ("ggfu", "gguf")]
)
def test_a_typo_is_answered_with_the_nearest(typed, meant):
    with pytest.raises(errors.TopicNotFound, match=f"no topic '{typed}'; did you mean {meant}\\?"):
        find(typed)


def test_what_is_like_none_is_answered_with_all():
    with pytest.raises(errors.TopicNotFound, match="there are names, formats, "):
        find("qqqq")


def tree(root: type[Exception]) -> set[str]:
    return {root.__name__}.union(*(tree(child) for child in root.__subclasses__()))


def magics() -> set[str]:
    return set(NBCacheMagics.magics["line"])


TOLD = {
    "errors": tree(errors.NBCacheError),
    "options": set(settings.options()) | {settings.variable_of(option) for option in settings.options()},
    "python": {name for name in nbcache.__all__ if name[0].islower() and name not in ("errors", "disable", "enabled")},
    "magics": {f"## %{name}" for name in magics()},
    "benchmarks": {f"**{command.name}**" for command in bench.registered_commands},
    "sharing": {f"`{mode}`" for mode in SHARE_MODES},
    "formats": {f"`{suffix}`" for each in FORMATS for suffix in each.suffixes},
    "doctor": {f"`{part}`" for part in PARTS},
}


@pytest.mark.parametrize("topic", TOLD)
def test_a_page_tells_of_all_there_is(topic):
    page = find(topic).page()
    assert {word for word in TOLD[topic] if word not in page} == set()
    assert set(MAGICS) == magics()
