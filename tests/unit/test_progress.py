"""How far a load is: when it is drawn, what it says, and what is left of it, on the test's screen and in a pseudo-terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select

import pytest

from nbcache.jupyter.progress import NotebookScreen, Progress, Standing, TerminalScreen, find_screen

GB = 10**9


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen:
    def __init__(self) -> None:
        self.drawn: list[Standing] = []
        self.left: list[str] = []

    def draw(self, standing: Standing) -> None:
        self.drawn.append(standing)

    def leave(self, line: str) -> None:
        self.left.append(line)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def screen():
    return Screen()


def advance(progress, clock, *standings, step_s=0.25, total=10 * GB):
    for staged in standings:
        progress(staged, total)
        clock.now += step_s


def test_it_is_silent_for_half_a_second(clock, screen):
    with Progress("m", screen, clock) as progress:
        clock.now += 60  # a daemon was started meanwhile
        advance(progress, clock, 0, GB)
        assert screen.drawn == []
        assert progress.finish("done") is False
        advance(progress, clock, 2 * GB)
        assert [each.staged_bytes for each in screen.drawn] == [2 * GB]
        assert progress.finish("done") is True
    assert screen.left == ["done"]


def test_it_says_speed_and_time_left(clock, screen):
    progress = Progress("m", screen, clock)
    advance(progress, clock, 0, GB, 2 * GB)
    assert str(screen.drawn[-1]) == "m: 2.0 GB of 10.0 GB, 4.00 GB/s, 2.0 s left"


def test_the_speed_is_that_of_the_last_seconds(clock, screen):
    progress = Progress("m", screen, clock)
    advance(progress, clock, 0, 8 * GB, step_s=1)
    advance(progress, clock, *(8 * GB + part * GB // 100 for part in range(20)), step_s=1)
    assert 0.009 * GB < screen.drawn[-1].speed < 0.011 * GB


def test_nothing_is_known_while_another_fills(clock, screen):
    progress = Progress("m", screen, clock)
    advance(progress, clock, 0, 0, 0, total=0)
    assert str(screen.drawn[-1]) == "m: waiting for another process that loads it"
    assert set(screen.drawn[-1].cells) == {"░"}


def test_an_error_takes_the_bar_away(clock, screen):
    with pytest.raises(KeyError), Progress("m", screen, clock) as progress:
        advance(progress, clock, 0, GB, 2 * GB)
        raise KeyError
    assert screen.left == [""]


def test_bars_grow_to_full():
    widths = [Standing("m", part, 10, 0.0).cells.count("█") for part in range(11)]
    assert widths == sorted(widths)
    assert (widths[0], widths[-1]) == (0, 24)


def test_where_it_is_drawn(monkeypatch):
    monkeypatch.delenv("NBCACHE_PROGRESS", raising=False)
    assert find_screen(io.StringIO()) is None
    shell = type("Shell", (), {"kernel": object()})()
    assert isinstance(find_screen(io.StringIO(), shell), NotebookScreen)
    monkeypatch.setenv("NBCACHE_PROGRESS", "0")
    assert find_screen(io.StringIO(), shell) is None


def visible(text: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    return [re.split(r"\r\x1b\[2K", line)[-1].rstrip("\r") for line in text.split("\n")]


def test_in_a_pseudo_terminal_one_line_is_written_over_and_the_summary_is_left(clock):
    master, slave = pty.openpty()
    try:
        with os.fdopen(slave, "w") as stream:
            screen = find_screen(stream)
            assert isinstance(screen, TerminalScreen)
            progress = Progress("m", screen, clock)
            advance(progress, clock, 0, GB, 2 * GB, 3 * GB)
            progress.finish("m: loaded")
            stream.flush()
            text = ""
            while select.select([master], [], [], 0)[0]:
                text += os.read(master, 1 << 16).decode()
    finally:
        os.close(master)
    assert text.count("GB/s") == 2
    assert visible(text) == ["m: loaded", ""]


def test_a_line_fits_its_terminal(clock):
    master, slave = pty.openpty()
    try:
        with os.fdopen(slave, "w") as stream:
            TerminalScreen(stream).draw(Standing("m" * 500, 1, 2, 0.0))
            stream.flush()
            shown = visible(os.read(master, 1 << 16).decode())[-1]
    finally:
        os.close(master)
    assert 0 < len(shown) < 500
