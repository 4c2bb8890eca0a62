"""Where each tensor lies in its entry: one pure function.

The same places serve the host tier and the device slab, so that filling a slab is one straight copy per block. They are
the places at which torch's caching allocator would put the same tensors if they were allocated in :func:`carving_order`
(``c10/cuda/CUDACachingAllocator.cpp``: small and large pools, 2 MiB and 20 MiB segments, 512-byte blocks), which is what
lets a kernel adopt each of them in place as a storage of its own.

Three classes follow each other: at most 1 MiB, under 10 MiB, larger. Within a class the larger come first, so that what they
leave of a segment is there for the smaller; the third class may use what the second has left. The padding is what best fit
leaves: little for most models, more where many tensors are of one size that divides a segment badly.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

LAYOUT_VERSION = 2
"""Part of every entry's key: entries planned by other rules are other entries."""

ALIGNMENT = 512
MIB = 1 << 20
SMALL_LIMIT = 1 * MIB
"""Tensors up to this size have segments of their own kind."""
SMALL_SEGMENT = 2 * MIB
MIDDLE_LIMIT = 10 * MIB
"""A tensor under this size that fits nowhere begins a segment for several."""
MIDDLE_SEGMENT = 20 * MIB
LARGE_ROUNDING = 2 * MIB
UNSPLIT_REMAINDER = 1 * MIB
"""So much is not split off where tensors over ``SMALL_LIMIT`` lie."""


@dataclass(frozen=True)
class Layout:
    """Places of the tensors, in the order their sizes were given, and the extent of the whole, all in bytes."""

    places: tuple[int, ...]
    extent_bytes: int


def round_up(size_bytes: int, multiple: int) -> int:
    """``size_bytes`` rounded up to a multiple."""
    return -(-size_bytes // multiple) * multiple


def carving_order(sizes_bytes: Sequence[int]) -> list[int]:
    """Indices of the tensors in the order in which they are placed; those of equal rounded sizes as given. No empty ones."""
    rounded = [round_up(size, ALIGNMENT) for size in sizes_bytes]
    indices = [index for index, size in enumerate(rounded) if size]
    indices.sort(key=lambda index: ((rounded[index] > SMALL_LIMIT) + (rounded[index] >= MIDDLE_LIMIT), -rounded[index]))
    return indices


def plan_layout(sizes_bytes: Sequence[int]) -> Layout:
    """Plan the places of tensors of these sizes.

    An empty tensor takes no room and has place 0. The extent is a multiple of 2 MiB, and never 0.
    """
    places, end = [0] * len(sizes_bytes), 0
    small: list[tuple[int, int]] = []  # free blocks, size and place, ascending; a pool for small tensors, one for the others
    large: list[tuple[int, int]] = []
    for index in carving_order(sizes_bytes):
        size = round_up(sizes_bytes[index], ALIGNMENT)
        free, unsplit = (small, 0) if size <= SMALL_LIMIT else (large, UNSPLIT_REMAINDER)
        fitting = bisect_left(free, (size, 0))
        if fitting < len(free):
            block, place = free.pop(fitting)
        else:
            block, place = _segment_bytes(size), end
            end += block
        places[index] = place
        if block - size > unsplit:
            insort(free, (block - size, place + size))
    return Layout(tuple(places), max(end, SMALL_SEGMENT))


def _segment_bytes(size_bytes: int) -> int:
    """The segment that a tensor begins."""
    if size_bytes <= SMALL_LIMIT:
        return SMALL_SEGMENT
    return MIDDLE_SEGMENT if size_bytes < MIDDLE_LIMIT else round_up(size_bytes, LARGE_ROUNDING)
