"""Where each tensor lies in its entry: one pure function.

The same places serve the host tier and the device slab, so that filling a slab is one straight copy per block. They are
the places at which torch's caching allocator would put the same tensors if they were allocated in the planned order
(``c10/cuda/CUDACachingAllocator.cpp``: small and large pools, 2 MiB and 20 MiB segments, 512-byte blocks), which is what
lets a kernel adopt each of them in place as a storage of its own.

Three classes by size: at most 1 MiB, under 10 MiB, larger. Within a class tensors ascend by size rounded up to 512 bytes
(equal sizes keep their order). The first class is packed into segments of 2 MiB, the second into segments of 20 MiB, where a
remainder of 1 MiB or less is not split off; each larger tensor has a segment of its own, rounded up to 2 MiB, but for the first
where it fits into what the second class left of its last segment. Ascending order means that the rest of a segment, once too
small for a tensor, is too small for every later one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LAYOUT_VERSION = 1
"""Part of every entry's key: entries planned by other rules are other entries."""

ALIGNMENT = 512
MIB = 1 << 20
SMALL_LIMIT = 1 * MIB
SMALL_SEGMENT = 2 * MIB
MIDDLE_LIMIT = 10 * MIB
MIDDLE_SEGMENT = 20 * MIB
LARGE_ROUNDING = 2 * MIB
UNSPLIT_REMAINDER = 1 * MIB


@dataclass(frozen=True)
class Layout:
    """Places of the tensors, in the order their sizes were given, and the extent of the whole, all in bytes."""

    places: tuple[int, ...]
    extent_bytes: int


def round_up(size_bytes: int, multiple: int) -> int:
    """``size_bytes`` rounded up to a multiple."""
    return -(-size_bytes // multiple) * multiple


def plan_layout(sizes_bytes: Sequence[int]) -> Layout:
    """Plan the places of tensors of these sizes.

    An empty tensor takes no room and has place 0. The extent is a multiple of 2 MiB, and never 0.
    """
    order = sorted((round_up(size, ALIGNMENT), index) for index, size in enumerate(sizes_bytes) if size)
    small = [(size, index) for size, index in order if size <= SMALL_LIMIT]
    middle = [(size, index) for size, index in order if SMALL_LIMIT < size < MIDDLE_LIMIT]
    large = [(size, index) for size, index in order if size >= MIDDLE_LIMIT]
    places = [0] * len(sizes_bytes)
    end, _ = _pack(small, SMALL_SEGMENT, ALIGNMENT - 1, 0, places)
    end, left = _pack(middle, MIDDLE_SEGMENT, UNSPLIT_REMAINDER, end, places)
    if large and large[0][0] <= left:
        places[large.pop(0)[1]] = end - left
    for size, index in large:
        places[index] = end
        end += round_up(size, LARGE_ROUNDING)
    return Layout(tuple(places), max(end, SMALL_SEGMENT))


def _pack(
    tensors: Iterable[tuple[int, int]], segment_bytes: int, unsplit_bytes: int, end: int, places: list[int]
) -> tuple[int, int]:
    """Fill segments that start at ``end`` one after the other; returns the new end, and what is left of the last segment."""
    cursor = left = 0
    for size, index in tensors:
        if size > left:
            cursor, left = end, segment_bytes
            end += segment_bytes
        places[index] = cursor
        cursor += size
        left -= size
        if left <= unsplit_bytes:
            left = 0
    return end, left
