"""Copies side by side are queued as one, and write nothing that is somebody else's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbcache.client import slabs
from nbcache.client.slabs import _Copies, _runs
from nbcache.layout import round_up
from nbcache.manifest import Extent

ROUNDING = 8
PLACES = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)
"""Sizes, and how many units of memory lie before each in the target and in the source."""


EVERYWHERE = (0, 1 << 40)


def extent(place: int, nbytes: int) -> Extent:
    return Extent(f"at {place}", "U8", (nbytes,), 0, 0, nbytes, place)


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

    _Copies(copy, allocation, rounding).add(
        [extent(at, size) for at, (size, *_) in zip(sources, places, strict=True)], targets, 0
    )
    own = set()
    for (size, *_), to, start in zip(places, targets, sources, strict=True):
        assert written[to : to + size] == memory[start : start + size]
        own.update(range(to, to + round_up(size, rounding)))
    assert not any(written[at] for at in range(len(written)) if at not in own)


def test_what_lies_side_by_side_is_one_copy() -> None:
    queued: list[tuple[int, int, int]] = []
    extents = [extent(number * 16, 13) for number in range(4)] + [extent(0, 0), extent(800, 5)]
    copies = _Copies(lambda *copy: queued.append(copy), lambda _: EVERYWHERE, ROUNDING)
    copies.add(extents, [*(1000 + e.place for e in extents[:4]), 0, 4000], 5000)
    assert queued == [(1000, 5000, 61), (4000, 5800, 5)]
    copies.add(extents[:2], [2000, 3000], 5000)
    assert queued[2:] == [(2000, 5000, 13), (3000, 5016, 13)]


def test_tensors_are_queued_few_at_first_and_then_more_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "FIRST_RUN_BYTES", 10)
    monkeypatch.setattr(slabs, "LAST_RUN_BYTES", 30)
    extents = [extent(number * 4, 4) for number in range(27)]
    runs = list(_runs(extents))
    assert [(len(run), nbytes) for run, nbytes in runs] == [(3, 12), (5, 20), (8, 32), (8, 32), (3, 12)]
    assert [each for run, _ in runs for each in run] == extents
    assert not list(_runs([]))
