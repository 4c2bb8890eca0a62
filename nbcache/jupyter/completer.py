"""Tab in the arguments of our magics: flags and their values, what is cached, aliases, files, variables; and mistyped ones.

One completer serves every magic of a class: what a flag takes is read from the magic's own parser. IPython calls it, in a
terminal and for a front end's ``complete_request`` alike. Quick, silent, and loads nothing.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from nbcache import completion
from nbcache.typos import did_you_mean

DTYPES = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
HOOK = "complete_command"


class MagicCompleter:
    """Completes lines of these magics, by name. :meth:`install` it; :meth:`remove` takes it away."""

    def __init__(self, shell: InteractiveShell, magics: Mapping[str, Any]) -> None:
        self._shell = shell
        self._parsers = {name: getattr(magic, "parser", None) for name, magic in magics.items()}
        self._pattern = re.compile(rf"(?s).*%({'|'.join(sorted(self._parsers, key=len, reverse=True))})\s")

    def install(self) -> None:
        """Have IPython ask."""
        shell: Any = self._shell
        shell.set_hook(HOOK, lambda _shell, event: self.complete(event), re_key=self._pattern.pattern)

    def remove(self) -> None:
        """Have IPython forget."""
        self._shell.strdispatchers[HOOK].regexs.pop(self._pattern, None)

    def complete(self, event: SimpleNamespace) -> list[str]:
        """What the word at the cursor may become. ``event.symbol`` is the part of it that IPython replaces."""
        line = event.text_until_cursor.rpartition("\n")[2]
        found = self._pattern.match(f"{line} ")
        if found is None:
            return []
        words = _split(line[found.end() :] if found.end() <= len(line) else "")
        *before, fragment = words
        bare = fragment.lstrip("'\"")
        kept = len(bare) - len(event.symbol)  # IPython takes a word to begin after a blank, a quote, an equals sign
        return [name[max(0, kept) :] for name in self._candidates(found[1], before, bare) if name.startswith(bare)]

    def _candidates(self, magic: str, before: list[str], fragment: str) -> Iterable[str]:
        parser: argparse.ArgumentParser | None = self._parsers[magic]
        if parser is None:  # %save_weights NAME EXPR
            return completion.cached(fragment) if not before else self._variables()
        flags = {flag: action for action in parser._actions for flag in action.option_strings}
        if fragment.startswith("-"):
            return [flag for flag in flags if flag.startswith("--") and flag not in before]
        last = flags.get(before[-1]) if before else None
        if last is not None and last.nargs != 0:
            return self._values(last, fragment)
        positional = [action for action in parser._actions if not action.option_strings]
        place = _positionals_in(before, flags)
        if place >= len(positional):
            return [flag for flag in flags if flag.startswith("--")] if not fragment else []
        action = positional[place]
        if action.choices or action.dest != "name":
            return action.choices or self._variables()
        return completion.loadable(fragment) if magic.startswith("load") else completion.cached(fragment)

    def _values(self, action: argparse.Action, fragment: str) -> Iterable[str]:
        by_flag: dict[str, Callable[[], Iterable[str]]] = {
            "device": lambda: ("cpu", "cuda", "cuda:0", "cuda:1"),
            "dtype": lambda: DTYPES,
            "variable": self._variables,
        }
        return action.choices or by_flag.get(action.dest, lambda: completion.paths(fragment))()

    def _variables(self) -> Iterable[str]:
        hidden = self._shell.user_ns_hidden
        return [name for name in self._shell.user_ns if not name.startswith("_") and name not in hidden]


def meant(parser: argparse.ArgumentParser | None, complaint: str) -> str:
    """What a flag or a value that argparse complains of may have meant, as the end of that error; empty if it is not known."""
    choice = re.search(r"invalid choice: '([^']*)'", complaint)
    flag = re.search(r"unrecognized arguments: (--[^\s=]+)", complaint)
    actions = parser._actions if parser else []
    if choice:
        return did_you_mean(choice[1], [str(known) for action in actions for known in action.choices or ()])
    return did_you_mean(flag[1], [known for action in actions for known in action.option_strings]) if flag else ""


def _split(text: str) -> list[str]:
    """The words of a line, the last one as far as it goes, which may be nothing; quotes hold blanks together."""
    words = re.findall(r"""(?:"[^"]*"?|'[^']*'?|[^\s'"])+""", text)
    return words if words and not _ended(text) else [*words, ""]


def _ended(text: str) -> bool:
    """Whether the last word is complete: a blank follows it, outside quotes."""
    open_quote = ""
    for character in text:
        if character in "'\"":
            open_quote = "" if character == open_quote else open_quote or character
    return text[-1:].isspace() and not open_quote


def _positionals_in(before: list[str], flags: Mapping[str, argparse.Action]) -> int:
    count, skip = 0, False
    for word in before:
        if skip:
            skip = False
        elif word in flags:
            skip = flags[word].nargs != 0
        else:
            count += 1
    return count
