"""Copies side by side are queued as one, and write nothing that is somebody else's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbcache.client import slabs
from nbcache.client.slabs import _Runs
from nbcache.layout import round_up

ROUNDING = 8
PLACES = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)
"""Sizes, and how many units of memory lie before each in the target and in the source."""


EVERYWHERE = (0, 1 << 40)


@given(PLACES, st.sampled_from([1, ROUNDING]), st.sets(st.integers(0, 60), max_size=8))
def test_all_is_copied_and_nothing_else_is_written(
    places: list[tuple[int, int, int]], rounding: int, borders: set[int]
) -> None:
    """Nor does a copy cross from one allocation to the next."""
    targets, sources, target, source = [], [], 0, 0
    for size, before, gap in places:
        target, source = target + before * ROUNDING, source + gap * ROUNDING
        targets.append(target)
        sources.append(source)
        target, source = target + round_up(size, ROUNDING), source + round_up(size, ROUNDING)
    memory = bytes(number % 251 + 1 for number in range(source + ROUNDING))
    written = bytearray(target + ROUNDING)
    starts = [0, *(to for number, to in enumerate(targets) if number in borders and to)]

    def allocation(address: int) -> tuple[int, int]:
        return max(at for at in starts if at <= address), min((at for at in starts if at > address), default=len(written))

    def copy(to: int, start: int, size: int) -> None:
        assert to + size <= allocation(to)[1]
        written[to : to + size] = memory[start : start + size]

    runs = _Runs(copy, allocation, rounding)
    for (size, *_), to, start in zip(places, targets, sources, strict=True):
        runs.add(to, start, size)
    runs.end()
    own = set()
    for (size, *_), to, start in zip(places, targets, sources, strict=True):
        assert written[to : to + size] == memory[start : start + size]
        own.update(range(to, to + round_up(size, rounding)))
    assert not any(written[at] for at in range(len(written)) if at not in own)


def test_what_lies_side_by_side_is_one_copy_up_to_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "RUN_BYTES", 64)
    queued: list[tuple[int, int, int]] = []
    runs = _Runs(lambda *copy: queued.append(copy), lambda _: EVERYWHERE, ROUNDING)
    for number in range(10):
        runs.add(1000 + number * 16, 5000 + number * 16, 13)
    runs.add(4000, 9000, 5)
    runs.end()
    assert queued == [(1000, 5000, 61), (1064, 5064, 61), (1128, 5128, 29), (4000, 9000, 5)]
