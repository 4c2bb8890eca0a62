"""How far a load is: a bar that is redrawn in place, in a notebook or a terminal, and one line that is left when it is done.

Says what the daemon says: bytes that are staged, how many a second, how long the rest will take. Silent for the first half
second, where nobody watches, and with ``NBCACHE_PROGRESS=0``.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any, Protocol, TextIO

from nbcache.jupyter.display import cells
from nbcache.pages import bar, page
from nbcache.units import format_duration, format_size

SILENT_S = 0.5
WINDOW_S = 3.0
"""The speed is that of the last seconds: it says what to expect, not what was."""


@dataclass(frozen=True)
class Standing:
    """How far it is. ``speed`` in bytes per second, 0 while unknown; ``total_bytes`` is 0 while another fills the slab."""

    name: str
    staged_bytes: int
    total_bytes: int
    speed: float

    def __str__(self) -> str:
        if not self.total_bytes:
            return f"{self.name}: waiting for another process that loads it"
        done = f"{self.name}: {format_size(self.staged_bytes)} of {format_size(self.total_bytes)}"
        if not self.speed:
            return done
        left_s = (self.total_bytes - self.staged_bytes) / self.speed
        return f"{done}, {self.speed / 1e9:.2f} GB/s, {format_duration(left_s)} left"

    @property
    def cells(self) -> str:
        """The bar, in characters."""
        return cells(self.staged_bytes, self.total_bytes)


class Screen(Protocol):
    """Where a bar is drawn."""

    def draw(self, standing: Standing) -> None:
        """Draw the bar, in place of the one before."""

    def leave(self, line: str) -> None:
        """Put a line in the bar's place; an empty one removes it."""


class Progress:
    """What :func:`nbcache.load` calls as ``on_progress``. A context manager: on an error the bar goes.

    ``screen`` is None where nothing is to be drawn.
    """

    def __init__(self, name: str, screen: Screen | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._screen = screen
        self._clock = clock
        self._start_s = 0.0
        self._seen: deque[tuple[float, int]] = deque()
        self._drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.finish("")

    def __call__(self, staged_bytes: int, total_bytes: int) -> None:
        """Take note, and draw if it is time to."""
        now = self._clock()
        if not self._seen:
            self._start_s = now  # starting a daemon is no part of it
        self._seen.append((now, staged_bytes))
        while now - self._seen[0][0] > WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()
        if self._screen is not None and now - self._start_s >= SILENT_S:
            self._drawn = True
            self._screen.draw(Standing(self._name, staged_bytes, total_bytes, self._speed()))

    def _speed(self) -> float:
        (then, before), (now, staged) = self._seen[0], self._seen[-1]
        return max(0.0, (staged - before) / (now - then)) if now > then else 0.0

    @property
    def drawn(self) -> bool:
        """Whether a bar is there now."""
        return self._drawn

    def finish(self, line: str) -> bool:
        """Leave this line where the bar is; False, and nothing is shown, if none was drawn."""
        drawn, self._drawn = self._drawn, False
        if drawn and self._screen is not None:
            self._screen.leave(line)
        return drawn


class TerminalScreen:
    """A line of a terminal that is written over."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def draw(self, standing: Standing) -> None:
        """See :class:`Screen`."""
        columns = os.get_terminal_size(self._stream.fileno()).columns or 80
        self._stream.write(f"\r\x1b[2K{f'{standing.cells} {standing}'[: columns - 1]}")
        self._stream.flush()

    def leave(self, line: str) -> None:
        """See :class:`Screen`."""
        self._stream.write("\r\x1b[2K" + (f"{line}\n" if line else ""))
        self._stream.flush()


class NotebookScreen:
    """A display of a notebook that is updated."""

    def __init__(self) -> None:
        self._handle: Any = None

    def draw(self, standing: Standing) -> None:
        """See :class:`Screen`."""
        drawn = bar(standing.staged_bytes, standing.total_bytes)
        self._show(f"{standing.cells} {standing}", page(f"{drawn} {escape(str(standing))}"))

    def leave(self, line: str) -> None:
        """See :class:`Screen`."""
        self._show(line, page(escape(line)) if line else "")

    def _show(self, text: str, html: str) -> None:
        content = {"text/plain": text, "text/html": html}
        if self._handle is None:
            from IPython import display

            make: Any = display.DisplayHandle
            self._handle = make()
            self._handle.display(content, raw=True)
        else:
            self._handle.update(content, raw=True)


def find_screen(stream: TextIO, shell: object = None) -> Screen | None:
    """Where to draw: in the notebook of a shell that has a kernel, else on a terminal; None where there is neither."""
    if os.environ.get("NBCACHE_PROGRESS", "1") == "0":
        return None
    if getattr(shell, "kernel", None) is not None:
        return NotebookScreen()
    return TerminalScreen(stream) if stream.isatty() else None
