"""Connections as the requests see them: what each peer is in the middle of, and the port through which it is answered.

Owns the phases and what one connection has said so far. Knows no sockets, which are the server's, and decides nothing. It
stands between the two so that neither need know the other: the server carries packets and the service answers them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nbcache.daemon.entries import SHARED, Place
from nbcache.errors import NBCacheError
from nbcache.protocol import messages as m

PROGRESS_PERIOD_S = 0.1
HEARTBEAT_S = 1.0
MESSAGE_CHARACTERS = 4000
"""What an answer quotes at most: escaped and in JSON it stays below a packet's limit."""


class Phase(enum.Enum):
    """What a connection is in the middle of."""

    GREETING = "greeting"
    IDLE = "idle"
    COLLECTING = "collecting"
    WAITING = "waiting"
    RESERVED = "filling what it reserved"
    OFFERED = "offered a slab to fill"
    FILLING = "filling a slab"
    COMMITTING = "done filling a slab whose host copy is not complete"
    HOLDING = "holding"
    WATCHING = "watching a pinned copy"
    CLOSING = "closing"


@dataclass(eq=False)
class Connection:
    """One peer. ``number`` names its lease; ``key`` and ``place`` are the residence it waits for, fills or holds."""

    number: int
    pid: int
    since_s: float
    phase: Phase = Phase.GREETING
    label: str = ""
    key: str = ""
    place: Place = SHARED
    find: m.Find = field(default_factory=m.Find)
    """What it wished for last."""
    stage: m.Stage | None = None
    collected: list[int] = field(default_factory=list)
    """The manifest and files of a Stage that is not complete yet."""
    wanted: list[int] = field(default_factory=list)
    """Blocks it asked for that are not staged yet."""
    refusal: NBCacheError | None = None
    """Why the host copy behind the slab that it was offered came to nothing: what its Fill will be answered."""
    told_s: float = 0.0
    """When it last heard of progress."""

    @property
    def is_waiting(self) -> bool:
        """Whether it is to hear of progress."""
        return self.phase in (Phase.WAITING, Phase.COMMITTING) or bool(self.wanted)

    @property
    def is_limited(self) -> bool:
        """Whether it is the peer's turn, for so long and no longer."""
        return self.phase in (Phase.GREETING, Phase.COLLECTING, Phase.CLOSING)


class Port(Protocol):
    """What answers requests reaches connections through this. The server is one.

    Notes
    -----
    All but :meth:`post` are for the server's thread alone. An answer that cannot be sent ends its connection, and with it
    whatever that was in the middle of, before :meth:`reply` returns.
    """

    @property
    def connections(self) -> Mapping[int, Connection]:
        """Those that have not ended, by number."""

    def reply(self, connection: Connection, message: m.Message, descriptors: Sequence[int] = ()) -> None:
        """Answer. The descriptors stay the caller's. Nothing happens if the connection has ended."""

    def fail(self, connection: Connection, error: NBCacheError) -> None:
        """Answer with an error; its message is cut to what a packet holds."""

    def end(self, connection: Connection, why: str) -> None:
        """End a connection, and what it was in the middle of. Nothing happens if it has ended."""

    def post(self, report: Callable[[], None]) -> None:
        """Have the server's thread call ``report``. May be called from any thread."""
