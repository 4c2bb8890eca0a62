"""The topics of ``nbcache help``, and the page of each.

A page is a Markdown file beside this one, or is made from docstrings and the help of options, so that nothing is said twice.
Imports what a page is made from when that page is asked for.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from types import ModuleType

from nbcache.errors import TopicNotFound
from nbcache.typos import did_you_mean

PYTHON_NAMES = (
    "load", "load_model", "put", "status", "evict", "evict_all", "pin", "unpin", "free_gpu", "enable", "load_lora", "set_lora",
    "unload_lora",
)  # fmt: skip
MAGICS = ("load_weights", "save_weights", "weights", "load_lora", "unload_lora", "nbcache")


@dataclass(frozen=True)
class Topic:
    """A topic: its name, one line about it, and what gives its page, in Markdown."""

    name: str
    summary: str
    page: Callable[[], str]
    words: tuple[str, ...] = ()
    """Other words that people look for it by."""


def _written(name: str) -> Callable[[], str]:
    return lambda: files("nbcache.guide").joinpath(f"{name}.md").read_text(encoding="utf-8")


def _magics() -> str:
    from nbcache.jupyter.magics import NBCacheMagics

    parts = ["# Magics", "`%load_ext nbcache` makes them known; the kernel *Python 3 (nbcache)* has them from the start."]
    for name in MAGICS:
        described = inspect.cleandoc(getattr(NBCacheMagics, name).__doc__).removeprefix("::")
        parts += [f"## %{name}", _fenced(inspect.cleandoc(described))]
    return "\n\n".join(parts)


def _python() -> str:
    import nbcache

    parts = ["# In Python", _plain(nbcache)]
    for name in PYTHON_NAMES:
        function = getattr(nbcache, name)
        parts += [f"## nbcache.{name}", _fenced(f"{name}{_parameters(function)}\n\n{_without_roles(function.__doc__)}")]
    return "\n\n".join(parts)


def _parameters(function: Callable[..., object]) -> str:
    signature, nothing = inspect.signature(function), inspect.Parameter.empty
    bare = [parameter.replace(annotation=nothing) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=nothing))


IN_FORCE = (
    "`nbcache config` shows what is in force, and what the daemon that runs was started with where that is something else."
)


def _options() -> str:
    from nbcache import settings
    from nbcache.config import NBCache

    parts = [
        "# Options",
        _plain(settings),
        IN_FORCE,
    ]
    parts += [
        f"- **{name}**: {' '.join(trait.help.split())}" for name, trait in sorted(NBCache.class_traits(config=True).items())
    ]
    return "\n\n".join(parts)


def _errors() -> str:
    from nbcache import errors

    return f"# Errors\n\n{_plain(errors)}"


def _benchmarks() -> str:
    from nbcache import bench
    from nbcache.bench.commands import app

    parts = ["# Benchmarks", _plain(bench), "`nbcache bench NAME --help` has the options of each."]
    parts += [
        f"- **{command.name}**: {inspect.getdoc(command.callback)}" for command in app.registered_commands if command.callback
    ]
    return "\n\n".join(parts)


def _protocol() -> str:
    return files("nbcache.protocol").joinpath("PROTOCOL.md").read_text(encoding="utf-8")


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def _without_roles(docstring: str | None) -> str:
    return re.sub(r":\w+:`", "`", inspect.cleandoc(docstring or ""))


def _plain(module: ModuleType) -> str:
    """A module's docstring as Markdown: what follows ``::`` is shown as it is, and roles are names."""
    paragraphs = _without_roles(module.__doc__).replace("``", "`").split("\n\n")
    shown, literal = [], False
    for paragraph in paragraphs:
        if paragraph == "::":
            literal = True
            continue
        shown.append(_fenced(inspect.cleandoc("\n" + paragraph)) if literal else paragraph)
        literal = False
    return "\n\n".join(shown)


TOPICS: tuple[Topic, ...] = (
    Topic("names", "what a name may be: aliases, paths, hub ids", _written("names"), ("aliases", "hub", "paths")),
    Topic("formats", "which files are served, and what comes of them", _written("formats"), ("gguf", "safetensors", "files")),
    Topic("models", "whole models and pipelines, ready to run", _written("models"), ("diffusers", "transformers", "pipelines")),
    Topic("loras", "LoRAs that swap in place", _written("loras"), ("lora", "peft", "adapters")),
    Topic("unchanged", "ordinary from_pretrained and load_file, served", _written("unchanged"), ("hooks", "from_pretrained")),
    Topic(
        "sharing", "copy-on-write, read-only, private; on CPU and GPU", _written("sharing"), ("gpu", "share", "cow", "private")
    ),
    Topic(
        "memory", "limits, what gives way, what you saved, guarantees", _written("memory"), ("limits", "evict", "pin", "save")
    ),
    Topic(
        "restarts", "the kernel that skips the imports", _written("restarts"), ("kernelspec", "zygote", "preload", "kernels")
    ),
    Topic("magics", "%load_weights, %save_weights, %weights, %load_lora, ...", _magics, ("notebooks", "jupyter")),
    Topic("python", "the functions of the package", _python, ("api",)),
    Topic("options", "every option, and where it is set", _options, ("config", "settings", "environment")),
    Topic("errors", "what can go wrong, as a tree", _errors, ("exceptions",)),
    Topic("doctor", "what it looks at, and how to read it", _written("doctor"), ("problems", "trouble")),
    Topic("benchmarks", "measure your own machine", _benchmarks, ("bench", "speed")),
    Topic("protocol", "what is said between kernels and daemon", _protocol, ("daemon", "security")),
)


def names() -> list[str]:
    """The names of all topics."""
    return [topic.name for topic in TOPICS]


def names_from(text: str) -> list[str]:
    """The topics that begin so."""
    return [name for name in names() if name.startswith(text)]


def listing() -> str:
    """All topics, a line each."""
    rows = "\n".join(f"  {topic.name.ljust(12)}{topic.summary}" for topic in TOPICS)
    return f"nbcache help TOPIC shows a page:\n\n{rows}"


def find(word: str) -> Topic:
    """The topic that a word names. TopicNotFound, with the nearest one, for a word that names none."""
    known = {name: topic for topic in reversed(TOPICS) for name in (*topic.words, topic.name)}
    wanted = word.lower()
    if wanted in known:
        return known[wanted]
    meant = did_you_mean(wanted, known) or f"; there are {', '.join(names())}"
    raise TopicNotFound(f"no topic {word!r}{meant}")
