"""A pickle reader that can build containers, plain values and descriptions of tensors, and nothing else.

It runs no code and imports nothing: a global is a name to it, whose meaning ``rebuilds`` knows. It understands the instructions
that ``torch.load(..., weights_only=True)`` allows, which are those that ``torch.save`` writes. Why not ``pickle.Unpickler``:
its memo and its strings take what memory a hostile file asks for. Why not torch's: who stages weights need not import torch.
Every instruction takes bytes of the pickle and does little, so time and memory are bounded by its length.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from nbcache.checkpoints import rebuilds
from nbcache.checkpoints.content import OpenFile
from nbcache.checkpoints.rebuilds import Broken
from nbcache.errors import UnsupportedFormat

PROTOCOL = 2


def read_pickle(text: bytes, file: OpenFile) -> object:
    """The object of a pickle: dicts, lists, tuples, numbers, strings, None, and the descriptions of ``rebuilds``.

    Containers may share parts and contain themselves. CheckpointInvalid if it is no pickle; UnsupportedFormat, with the reason,
    if it needs code, or holds what has no plain bytes.
    """
    machine = _Machine(text)
    try:
        return machine.run()
    except UnsupportedFormat as error:
        raise UnsupportedFormat(f"{file.path}: {error}") from error
    except Broken as error:
        raise file.invalid(f"its pickle is broken at byte {machine.at}: {error}") from error
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        raise file.invalid(f"its pickle is broken at byte {machine.at} ({type(error).__name__})") from error


class _Machine:
    """The stack machine of pickle."""

    def __init__(self, text: bytes) -> None:
        self.at = 0
        self.stack: list[object] = []
        self._text = text
        self._marks: list[list[object]] = []
        self._memo: dict[int, object] = {}

    def run(self) -> object:
        text, instructions = self._text, _INSTRUCTIONS
        while True:
            code = text[self.at]
            self.at += 1
            if code == _STOP:
                return self.stack.pop()
            instruction = instructions.get(code)
            if instruction is None:
                raise Broken(f"instruction {code:#04x}, which torch.save does not write")
            instruction(self)

    def take(self, size_bytes: int) -> bytes:
        end = self.at + size_bytes
        if end > len(self._text):
            raise Broken("it ends too soon")
        taken, self.at = self._text[self.at : end], end
        return taken

    def number(self, form: struct.Struct) -> int:
        (value,) = form.unpack_from(self._text, self.at)
        self.at += form.size
        return int(value)

    def line(self) -> str:
        end = self._text.index(b"\n", self.at)
        taken, self.at = self._text[self.at : end], end + 1
        return taken.decode()

    def mark(self) -> None:
        self._marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[object]:
        items, self.stack = self.stack, self._marks.pop()
        return items

    def get(self, number: int) -> None:
        self.stack.append(self._memo[number])

    def put(self, number: int) -> None:
        self._memo[number] = self.stack[-1]

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(rebuilds.call(function, arguments))

    def build(self) -> None:
        """State of an ordered dict (``_metadata``, module versions) is not weights; nothing else may have any."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise Broken("state for what has none")

    def gather(self, count: int) -> None:
        if len(self.stack) < count:
            raise Broken("nothing to gather")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise Broken("items for what is no list")
        target.extend(items)

    def update(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise Broken("pairs for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | None):  # hashing a deep tuple would overflow the C stack
                raise Broken(f"a {type(key).__name__} as a key")
            target[key] = value

    def pop_pair(self) -> list[object]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]

    def check_protocol(self, protocol: int) -> None:
        if protocol > PROTOCOL:
            raise UnsupportedFormat(f"pickle protocol {protocol}; torch.save writes {PROTOCOL} unless it is told otherwise")


def _push(make: Callable[[_Machine], object]) -> Callable[[_Machine], None]:
    def push(machine: _Machine) -> None:
        made = make(machine)  # may put another stack in place of this one
        machine.stack.append(made)

    return push


_I1, _I2, _I4, _S4, _F8 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<i", ">d"))
_STOP = ord(".")

_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    ord(code): instruction
    for code, instruction in {
        "\x80": lambda m: m.check_protocol(m.number(_I1)),
        "c": _push(lambda m: rebuilds.find(m.line(), m.line())),
        "R": _Machine.reduce,
        "b": _Machine.build,
        "Q": _push(lambda m: rebuilds.find_storage(m.stack.pop())),
        "a": lambda m: m.extend([m.stack.pop()]),
        "e": lambda m: m.extend(m.pop_mark()),
        "s": lambda m: m.update(m.pop_pair()),
        "u": lambda m: m.update(m.pop_mark()),
        "(": _Machine.mark,
        "t": _push(lambda m: tuple(m.pop_mark())),
        "\x85": lambda m: m.gather(1),
        "\x86": lambda m: m.gather(2),
        "\x87": lambda m: m.gather(3),
        "N": _push(lambda m: None),
        "\x88": _push(lambda m: True),
        "\x89": _push(lambda m: False),
        ")": _push(lambda m: ()),
        "]": _push(lambda m: []),
        "}": _push(lambda m: {}),
        "K": _push(lambda m: m.number(_I1)),
        "M": _push(lambda m: m.number(_I2)),
        "J": _push(lambda m: m.number(_S4)),
        "\x8a": _push(lambda m: int.from_bytes(m.take(m.number(_I1)), "little", signed=True)),
        "G": _push(lambda m: _F8.unpack(m.take(8))[0]),
        "X": _push(lambda m: m.take(m.number(_I4)).decode()),
        "U": _push(lambda m: m.take(m.number(_I1)).decode()),
        "h": lambda m: m.get(m.number(_I1)),
        "j": lambda m: m.get(m.number(_I4)),
        "q": lambda m: m.put(m.number(_I1)),
        "r": lambda m: m.put(m.number(_I4)),
    }.items()
}
"""Protocol 2, without what torch.load refuses, and without NEWOBJ, whose classes would need code."""
