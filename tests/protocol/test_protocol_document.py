"""PROTOCOL.md says what the code does: its messages, the daemon's table of phases, the table of transitions.

The daemon's table is taken from a daemon that was put together as in earnest, wherever in it the table is kept.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import pytest

from nbcache import errors
from nbcache.config import NBCache, RuntimePaths
from nbcache.daemon import lifecycle
from nbcache.daemon.entries import TRANSITIONS
from nbcache.daemon.server import Server
from nbcache.protocol import messages as m

DOCUMENT = Path(m.__file__).with_name("PROTOCOL.md").read_text()

Pair = tuple[enum.Enum, type[m.Message]]

CAMEL = r"[A-Z][a-z]+(?:[A-Z][a-z]+)*"
MESSAGES: dict[str, type[m.Message]] = {kind.__name__: kind for kind in m.Message.__subclasses__()}
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type)}


def table(document: str, *header: str) -> list[list[str]]:
    """Cells of the rows of every table whose header begins so; an empty first cell repeats the one above."""
    rows: list[list[str]] = []
    inside = False
    for line in document.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells or cells[: len(header)] == list(header):
            inside = bool(cells)
        elif inside and set(cells[0]) != {"-"}:
            rows.append([cells[0] or rows[-1][0], *cells[1:]])
    return rows


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def names_of_messages(document: str) -> set[str]:
    """What the document presents as messages, wherever it does: quoted, or in an example."""
    examples = re.findall(r"^```\n(.*?)^```", document, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```\n.*?^```", "", document, flags=re.DOTALL | re.MULTILINE)
    found = {name for name in quoted(prose) if re.fullmatch(CAMEL, name)}
    return found.union(*(re.findall(rf"\b{CAMEL}\b", example) for example in examples)) - ERRORS


def contradictions(document: str, dispatched: set[Pair]) -> list[str]:
    """What the document says otherwise than the code, or does not say."""
    found = []
    rows = {name: row for row in table(document, "message", "fields") for name in quoted(row[0])}
    found += [f"no row for the message {name}" for name in MESSAGES.keys() - rows.keys()]
    structs = {name for name, kind in vars(m).items() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)}
    unknown = (names_of_messages(document) - structs) | (rows.keys() - MESSAGES.keys())
    found += [f"no such message: {name}" for name in unknown]
    for name in rows.keys() & MESSAGES.keys():
        if quoted(rows[name][1]) != list(MESSAGES[name].__struct_fields__):
            found.append(f"{name} has the fields {MESSAGES[name].__struct_fields__}")

    phases = table(document, "phase", "may be said")
    written = {(row[0], name) for row in phases for name in quoted(row[1])}
    real = {(phase.name, kind.__name__) for phase, kind in dispatched}
    found += [f"no row for {name} in {phase}" for phase, name in real - written]
    found += [f"{name} in {phase} is a protocol error" for phase, name in written - real]
    known = {phase.name for kind in {type(phase) for phase, _ in dispatched} for phase in kind}
    found += [f"phases that differ: {phase}" for phase in known ^ {row[0] for row in phases}]

    transitions = {tuple(row) for row in table(document, "state", "event")}
    for before, event, after in transitions ^ {(s.name, e.value, TRANSITIONS[s, e].name) for s, e in TRANSITIONS}:
        found.append(f"transitions that differ: {before}, {event}, {after}")
    return sorted(found)


def dispatch_tables(root: object) -> Iterator[Mapping[Pair, object]]:
    """Every mapping from (phase, kind of message) that hangs on this object, or on an nbcache object that it holds."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        holder = waiting.pop()
        seen.add(id(holder))
        for value in getattr(holder, "__dict__", {}).values():
            if isinstance(value, Mapping) and value and all(_is_pair(key) for key in value):
                yield value
            elif type(value).__module__.startswith("nbcache.") and id(value) not in seen:
                waiting.append(value)


def _is_pair(key: object) -> bool:
    return (
        isinstance(key, tuple)
        and len(key) == 2
        and isinstance(key[0], enum.Enum)
        and isinstance(key[1], type)
        and issubclass(key[1], m.Message)
    )


@pytest.fixture
def dispatched(tmp_path, monkeypatch, no_leaks) -> set[Pair]:
    """What the daemon hears, and when: from a daemon that is stopped before it serves anyone."""
    found: set[Pair] = set()
    run = Server.run

    def look_and_leave(server: Server) -> None:
        found.update(pair for each in dispatch_tables(server) for pair in each)
        server.stop()
        run(server)

    with monkeypatch.context() as patched:
        patched.setattr(Server, "run", look_and_leave)
        patched.setattr(lifecycle.signal, "signal", lambda *_: None)
        lifecycle.Daemon(RuntimePaths(tmp_path / "runtime", tmp_path / "state"), NBCache()).serve()
    return found


def test_the_document_says_what_the_code_does(dispatched):
    assert contradictions(DOCUMENT, dispatched) == []


def test_the_daemon_hears_every_message_of_a_client(dispatched):
    """The table that was found is the whole one."""
    assert {kind for _, kind in dispatched} == set(m.ClientMessage.__args__)


def test_a_pair_that_the_daemon_hears_and_the_document_does_not_know_is_seen(dispatched):
    phases = {phase.name: phase for phase, _ in dispatched}
    assert contradictions(DOCUMENT, dispatched | {(phases["HOLDING"], m.Query)}) == ["no row for Query in HOLDING"]


PLANTED = {
    "a message that is left out": (r"^\| `Vacant` \|.*\n", "", "no row for the message Vacant"),
    "a row for no message": (r"^(\| `Done` \|.*\n)", r"\1| `Fetched` | | |\n", "no such message: Fetched"),
    "prose about no message": (r"^## Errors$", "## Errors\n\n`FetchBlock` is refused.", "no such message: FetchBlock"),
    "an example with no message": (r"its copy; Want 2 ", "its copy; Take 2 ", "no such message: Take"),
    "a field that is left out": (r"`key`, `device`, `warm`", "`key`, `device`", "Find has the fields"),
    "a pair that is left out": (r"^\| FILLING \| `Want` \|", "| FILLING | nothing |", "no row for Want in FILLING"),
    "a pair too many": (r"^\| HOLDING \| `Pin`", "| HOLDING | `Pin`, `Find`", "Find in HOLDING is a protocol error"),
    "a phase that is left out": (r"^\| COMMITTING \|.*\n", "", "phases that differ: COMMITTING"),
    "a phase too many": (r"^\| CLOSING \|", "| LEAVING | nothing | |\n| CLOSING |", "phases that differ: LEAVING"),
    "a transition that is left out": (r"^\| FILLING \| fail \|.*\n", "", "transitions that differ: FILLING, fail, ABSENT"),
    "a transition too many": (
        r"^\| READY \| evict \|",
        "| READY | fill | FILLING |\n| READY | evict |",
        "transitions that differ: READY, fill, FILLING",
    ),
}


@pytest.mark.parametrize(("pattern", "planted", "expected"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_contradiction_is_seen(dispatched, pattern, planted, expected):
    document, count = re.subn(pattern, planted, DOCUMENT, count=1, flags=re.MULTILINE)
    assert count == 1
    (found,) = contradictions(document, dispatched)
    assert expected in found


def test_a_message_is_tagged_by_its_name_in_snake_case():
    for name, kind in MESSAGES.items():
        assert kind.__struct_config__.tag == re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
