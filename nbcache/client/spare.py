"""What this process holds only to be quick next time, and lets go of when its room is wanted.

Owns the list of who holds such things. Must not know what they are. It exists so that a load that does not fit, or a user who
frees the GPU, need not know of LoRAs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol


class Keeper(Protocol):
    """Who holds entries that nobody has asked for just now."""

    @property
    def nbytes(self) -> int:
        """What they take on GPUs."""

    def let_go(self, names: Collection[str] | None = None) -> bool:
        """Let go of the entries of these names, or of all; whether there was any."""

    def let_go_oldest(self) -> bool:
        """Let go of the one that was used longest ago; whether there was one."""


_keepers: list[Keeper] = []


def register(keeper: Keeper) -> None:
    """Ask this one too, from now on."""
    _keepers.append(keeper)


def nbytes() -> int:
    """What all of them hold on GPUs."""
    return sum(keeper.nbytes for keeper in _keepers)


def let_go(names: Collection[str] | None = None) -> bool:
    """Have all let go of the entries of these names, or of everything; whether there was any."""
    return any([keeper.let_go(names) for keeper in _keepers])


def let_go_oldest() -> bool:
    """Have one let go of one entry; whether there was one."""
    return any(keeper.let_go_oldest() for keeper in _keepers)
