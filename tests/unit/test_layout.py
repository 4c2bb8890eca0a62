"""The planner, held against its rules and against a model of the allocator whose addresses it predicts."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbcache.layout import Layout, carving_order, plan_layout

KIB = 1 << 10
MIB = 1 << 20

SIZES = st.one_of(
    st.integers(0, 4 * KIB),
    st.integers(0, MIB + 1),
    st.integers(MIB, 10 * MIB),
    st.integers(9 * MIB, 30 * MIB),
    st.integers(0, 24).map(lambda n: n * MIB),
    st.integers(0, 24).map(lambda n: n * MIB + 1),
    st.integers(1, 24).map(lambda n: n * MIB - 1),
    st.sampled_from([1, 511, 512, 513, MIB - 512, MIB + 512, 10 * MIB - 512, 10 * MIB - 513, 1 << 33]),
)
CHECKPOINTS = st.lists(SIZES, max_size=40)
EXAMPLES = settings(max_examples=400, deadline=None)


def rounded(size: int) -> int:
    return -(-size // 512) * 512


def kind(size: int) -> int:
    """0: at most 1 MiB; 1: under 10 MiB; 2: larger."""
    return (rounded(size) > MIB) + (rounded(size) >= 10 * MIB)


def planned_order(sizes: list[int]) -> list[int]:
    """Indices of the tensors that take room, in the order in which they are meant to be allocated."""
    return sorted((i for i, size in enumerate(sizes) if size), key=lambda i: (kind(sizes[i]), -rounded(sizes[i]), i))


# An independent model of torch's caching allocator


@dataclass
class CachingAllocator:
    """What ``c10/cuda/CUDACachingAllocator.cpp`` does with a row of allocations and no free, on one stream.

    ``round_size``: multiples of 512. ``get_pool``: small up to 1 MiB, else large. ``get_free_block``: the smallest free block
    of the pool that is large enough, of equal ones the lowest. ``get_allocation_size``: a new segment of 2 MiB (small), 20 MiB
    (under 10 MiB) or the size rounded up to 2 MiB. ``should_split``: a remainder of 512 bytes or more (small pool), of more
    than 1 MiB (large pool). Segments come from a custom allocator that hands out one range from its start.
    """

    end: int = 0
    free: dict[bool, list[tuple[int, int]]] = field(default_factory=lambda: {True: [], False: []})

    def allocate(self, size: int) -> int:
        size = max(512, rounded(size))
        small = size <= MIB
        blocks = self.free[small]
        fitting = sorted(block for block in blocks if block[0] >= size)
        if fitting:
            block_size, address = fitting[0]
            blocks.remove(fitting[0])
        else:
            address = self.end
            block_size = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.end += block_size
        remaining = block_size - size
        if (remaining >= 512) if small else (remaining > MIB):
            blocks.append((remaining, address + size))
        return address


def allocated(sizes: list[int]) -> tuple[dict[int, int], int]:
    """Addresses by index, and the bytes of all segments, if the tensors are allocated in planned order."""
    allocator = CachingAllocator()
    return {i: allocator.allocate(sizes[i]) for i in planned_order(sizes)}, allocator.end


@EXAMPLES
@given(CHECKPOINTS)
def test_every_tensor_lies_where_the_allocator_puts_it(sizes):
    layout = plan_layout(sizes)
    addresses, end = allocated(sizes)
    assert carving_order(sizes) == planned_order(sizes)
    assert {i: layout.places[i] for i in addresses} == addresses
    assert layout.extent_bytes == max(end, 2 * MIB)


def test_the_model_itself_carves_as_torch_was_seen_to():
    """Addresses worked out by hand from the allocator's source, so that the model cannot drift with the planner."""
    allocator = CachingAllocator()
    assert [allocator.allocate(size) for size in (1, 512, 513, MIB)] == [0, 512, 1024, 2048]
    assert allocator.allocate(MIB) == 2 * MIB  # 2048 bytes short in the first segment
    assert allocator.allocate(100) == 2048 + MIB  # best fit: the first segment's smaller rest
    assert [allocator.allocate(9 * MIB) for _ in range(3)] == [4 * MIB, 13 * MIB, 24 * MIB]
    assert allocator.allocate(11 * MIB) == 33 * MIB  # the rest of the second 20 MiB, whole
    assert allocator.allocate(11 * MIB) == 44 * MIB  # a segment of its own
    assert allocator.end == 56 * MIB


# The rules


@EXAMPLES
@given(CHECKPOINTS)
def test_places_are_aligned_disjoint_and_inside_the_extent(sizes):
    layout = plan_layout(sizes)
    assert len(layout.places) == len(sizes)
    assert all(place % 512 == 0 for place in layout.places)
    end = 0
    for place, size in sorted((place, size) for place, size in zip(layout.places, sizes, strict=True) if size):
        assert place >= end
        end = place + size
    assert end <= layout.extent_bytes


@EXAMPLES
@given(CHECKPOINTS)
def test_the_extent_is_never_nothing_and_a_multiple_of_two_mib(sizes):
    extent = plan_layout(sizes).extent_bytes
    assert extent > 0
    assert extent % (2 * MIB) == 0


@EXAMPLES
@given(CHECKPOINTS)
def test_empty_tensors_have_place_0_and_do_not_count(sizes):
    layout = plan_layout(sizes)
    assert all(place == 0 for place, size in zip(layout.places, sizes, strict=True) if not size)
    full = [size for size in sizes if size]
    assert plan_layout(full).extent_bytes == layout.extent_bytes


@EXAMPLES
@given(CHECKPOINTS)
def test_segments_hold_what_they_may(sizes):
    """No small tensor crosses 2 MiB, nor shares them with one that is not small."""
    layout = plan_layout(sizes)
    small, others = ([i for i in planned_order(sizes) if (kind(sizes[i]) == 0) is is_small] for is_small in (True, False))
    taken = {
        at for i in others for at in range(layout.places[i] // (2 * MIB), (layout.places[i] + sizes[i] - 1) // (2 * MIB) + 1)
    }
    for i in small:
        first = layout.places[i] // (2 * MIB)
        assert first == (layout.places[i] + sizes[i] - 1) // (2 * MIB)
        assert first not in taken


@EXAMPLES
@given(st.permutations([1, 600, MIB, 3 * MIB, 9 * MIB, 12 * MIB, 40 * MIB, 700, 5 * MIB]))
def test_the_extent_does_not_depend_on_the_order_of_the_file(sizes):
    assert plan_layout(sizes).extent_bytes == plan_layout(sorted(sizes)).extent_bytes
    assert sorted(plan_layout(sizes).places) == sorted(plan_layout(sorted(sizes)).places)


@EXAMPLES
@given(CHECKPOINTS)
def test_small_tensors_pad_little(sizes):
    """Two segments that are half empty would be one."""
    layout = plan_layout(sizes)
    filled: dict[int, int] = {}
    for i in planned_order(sizes):
        if kind(sizes[i]) == 0:
            segment = layout.places[i] // (2 * MIB)
            filled[segment] = filled.get(segment, 0) + rounded(sizes[i])
    assert sum(size <= MIB for size in filled.values()) <= 1


# By example


@pytest.mark.parametrize(
    ("sizes", "places", "extent"),
    [
        ([], (), 2 * MIB),
        ([0], (0,), 2 * MIB),
        ([1], (0,), 2 * MIB),
        ([0, 5, 0, 5], (0, 0, 0, 512), 2 * MIB),
        ([600, 1], (0, 1024), 2 * MIB),
        ([MIB, MIB], (0, MIB), 2 * MIB),
        ([MIB, MIB, MIB], (0, MIB, 2 * MIB), 4 * MIB),
        ([MIB, MIB - 512, 512], (0, MIB, 2 * MIB - 512), 2 * MIB),
        # what three of 768 KiB and more leave is there for the smaller
        ([768 * KIB, 768 * KIB, 768 * KIB, 512 * KIB], (0, 768 * KIB, 2 * MIB, 1536 * KIB), 4 * MIB),
        ([MIB + 1], (0,), 20 * MIB),
        ([5 * MIB, 5 * MIB, 9 * MIB], (9 * MIB, 14 * MIB, 0), 20 * MIB),
        # a remainder of 1 MiB or less is not split off; one of 512 bytes more is
        ([9 * MIB + 512 * KIB] * 3, (0, 9 * MIB + 512 * KIB, 20 * MIB), 40 * MIB),
        ([9 * MIB, 9 * MIB - 512, MIB + 512], (0, 9 * MIB, 18 * MIB - 512), 20 * MIB),
        ([10 * MIB - 1], (0,), 10 * MIB),  # rounds up to 10 MiB, and so is large
        ([10 * MIB - 512], (0,), 20 * MIB),
        ([11 * MIB, 10 * MIB + 1], (0, 12 * MIB), 24 * MIB),
        ([10 * MIB, 1], (2 * MIB, 0), 12 * MIB),
        # the large take what the middle have left, where they fit
        ([10 * MIB, 10 * MIB], (0, 10 * MIB), 20 * MIB),
        ([2 * MIB, 10 * MIB], (0, 2 * MIB), 20 * MIB),
        ([2 * MIB, 18 * MIB], (0, 2 * MIB), 20 * MIB),
        ([2 * MIB, 18 * MIB + 1], (0, 20 * MIB), 40 * MIB),
        ([2 * MIB, 18 * MIB - 511], (0, 2 * MIB), 20 * MIB),
        ([30 * MIB, 12 * MIB, 3 * MIB, 4 * MIB], (20 * MIB, 7 * MIB, 4 * MIB, 0), 50 * MIB),
        # best fit: the smallest rest that will do, the lowest of equal ones
        ([9 * MIB, 9 * MIB, 8 * MIB, 8 * MIB, 2 * MIB], (0, 9 * MIB, 20 * MIB, 28 * MIB, 18 * MIB), 40 * MIB),
        ([9 * MIB, 9 * MIB, 9 * MIB, 10 * MIB, 11 * MIB], (0, 9 * MIB, 20 * MIB, 40 * MIB, 29 * MIB), 50 * MIB),
    ],
)
def test_by_example(sizes, places, extent):
    assert plan_layout(sizes) == Layout(places, extent)
