"""Slabs on their way: made for one client that fills them, block by block, and committed or abandoned.

Owns the filling of slabs, from the offer that a client takes up to its commit or its end. Must not know how a host copy comes
about, nor touch what it holds. It exists because a slab is the one residence that a client fills: one client at a time (I3),
and nobody maps it before that client says that it is done (I2) and its files are proven unchanged (I6).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from nbcache.daemon.connection import Connection, Phase, Port
from nbcache.daemon.entries import PINNED, Entry, Place, State
from nbcache.daemon.holdings import Holdings
from nbcache.daemon.leases import Leases
from nbcache.errors import DeviceMemoryFull, DriverError, ProtocolError
from nbcache.manifest import MAX_EXTENT_BYTES
from nbcache.protocol import messages as m

MAX_WANTED = 64
"""Blocks that a filler may have asked for and not got yet."""


class Slabs:
    """Lets clients fill slabs, one client each.

    Notes
    -----
    The server's thread owns it. While a client fills, it leases the pinned copy that it reads, once that is complete.
    """

    def __init__(self, port: Port, holdings: Holdings, leases: Leases, clock: Callable[[], float]) -> None:
        self._port = port
        self._holdings, self._store, self._tiers = holdings, holdings.store, holdings.tiers
        self._leases = leases
        self._clock = clock

    def fill(self, connection: Connection, fill: m.Fill, _: list[int]) -> None:
        """Make the slab and let this connection fill it, unless another does (I3)."""
        if not 0 < fill.extent_bytes <= MAX_EXTENT_BYTES:
            raise ProtocolError(f"a slab of {fill.extent_bytes} bytes")
        if connection.refusal is not None:
            connection.phase = Phase.IDLE
            raise connection.refusal
        entry = self._store.entries.get(connection.key)
        if entry is None:
            connection.phase = Phase.IDLE
            self._port.reply(connection, m.Absent())
            return
        if entry.state(connection.place) is not State.ABSENT or entry.state(PINNED) is State.ABSENT:
            self._leases.attend(connection, entry)
            return
        self._begin(connection, entry, fill.extent_bytes)

    def fill_ahead(self, connection: Connection, entry: Entry, ahead: int) -> None:
        """Let this connection fill the slab that it was just offered, and hand over its first blocks, now or once staged."""
        if connection.place.dtype or not 0 < ahead <= MAX_WANTED:
            raise ProtocolError(f"{ahead} blocks ahead of a slab of dtype {connection.place.dtype!r}")
        self._begin(connection, entry, entry.extent_bytes)
        connection.wanted += range(min(ahead, self._count_blocks(entry)))
        connection.told_s = self._clock()
        self.serve_wants(entry.key)

    def _begin(self, connection: Connection, entry: Entry, extent_bytes: int) -> None:
        fd = self._create(connection, entry, extent_bytes)
        connection.phase = Phase.FILLING
        if entry.state(PINNED) is State.READY:
            self._store.grant(entry.key, PINNED, connection.number, connection.pid)
        sizes, copy = self._tiers.block_sizes(entry.extent_bytes), entry.residences[PINNED].number
        self._port.reply(connection, m.Filling(sizes, copy), [fd])

    def _create(self, connection: Connection, entry: Entry, extent_bytes: int) -> int:
        """A slab, for which idle ones give way one by one. DeviceMemoryFull, with who holds what, if all would not suffice."""
        place = connection.place
        for attempt in itertools.count():
            try:
                fd = self._tiers.create_slab(entry.key, place, extent_bytes)
                break
            except DeviceMemoryFull as error:
                connection.phase = Phase.IDLE
                if attempt:  # the first time, what is being freed already may suffice
                    self._give_way(entry, place, extent_bytes, error)
                self._tiers.settle()
            except DriverError:
                connection.phase = Phase.IDLE
                raise
        self._holdings.free(self._store.fill(entry, place, extent_bytes))
        return fd

    def _give_way(self, entry: Entry, place: Place, extent_bytes: int, refused: DeviceMemoryFull) -> None:
        """Free the slab that was idle longest. DeviceMemoryFull, and nothing freed, if not even all idle ones would suffice."""
        idle = self._store.idle_slabs(place.uuid)
        free, total = self._tiers.free_bytes(place.uuid), self._tiers.total_bytes(place.uuid)
        going = sum(self._store.entries[key].residences[slab].extent_bytes for key, slab in idle)
        if not idle or free + going < extent_bytes or total < extent_bytes:
            raise self._store.device_full(place.uuid, entry.name, extent_bytes, free, total) from refused
        self._holdings.free(idle[:1])

    def want(self, connection: Connection, want: m.Want, _: list[int]) -> None:
        """Hand over a block of the pinned copy, now or once it is staged."""
        count = self._count_blocks(self._store.entries[connection.key])
        if not 0 <= want.number < count or len(connection.wanted) >= MAX_WANTED:
            raise ProtocolError(f"block {want.number} of {count} wanted, with {len(connection.wanted)} outstanding")
        connection.wanted.append(want.number)
        connection.told_s = self._clock()
        self.serve_wants(connection.key)

    def _count_blocks(self, entry: Entry) -> int:
        return len(self._tiers.block_sizes(entry.extent_bytes))

    def serve_wants(self, key: str) -> None:
        """Hand over the blocks of an entry that were wanted and are staged by now, in the order of the asking."""
        for connection in self.fillers_of(key):
            while connection.wanted:
                number = connection.wanted[0]
                block = self._tiers.pinned_block(key, number)
                if block is None:
                    break
                del connection.wanted[0]
                self._port.reply(connection, m.Block(number, block.size_bytes), [block.fd])

    def fillers_of(self, key: str) -> list[Connection]:
        """The connections that fill slabs of an entry."""
        phases = (Phase.FILLING, Phase.COMMITTING)
        return [c for c in self._port.connections.values() if c.phase in phases and c.key == key]

    def commit(self, connection: Connection, _commit: m.Commit, _: list[int]) -> None:
        """The slab is full: hold it, once the pinned copy it came from is complete."""
        if connection.wanted:
            raise ProtocolError(f"commit with {len(connection.wanted)} blocks outstanding")
        entry = self._store.entries[connection.key]
        if entry.state(PINNED) is State.FILLING:  # its files are not proven unchanged yet (I6)
            connection.phase, connection.told_s = Phase.COMMITTING, self._clock()
        else:
            self._finish(connection, entry)

    def pinned_staged(self, entry: Entry) -> None:
        """The pinned copy is complete: those who fill from it lease it from now on, and what was committed meanwhile counts."""
        for connection in self.fillers_of(entry.key):
            self._store.grant(entry.key, PINNED, connection.number, connection.pid)
            if connection.phase is Phase.COMMITTING:
                self._finish(connection, entry)

    def _finish(self, connection: Connection, entry: Entry) -> None:
        self._holdings.free(self._store.release(entry.key, PINNED, connection.number))
        self._holdings.free(self._store.complete(entry.key, connection.place))
        self._leases.grant(connection, entry, staged=True)
        for waiting in self._leases.waiting_for(entry.key):
            self._leases.again(waiting, entry, staged=True)

    def abandon(self, connection: Connection) -> None:
        """The filler is gone (I2); whoever waits may fill (I3)."""
        entry = self._store.entries[connection.key]
        pinned = entry.residences.get(PINNED)
        if pinned is not None and connection.number in pinned.leases:
            self._holdings.free(self._store.release(entry.key, PINNED, connection.number))
        self._holdings.abandon(entry.key, connection.place)
        for waiting in self._leases.waiting_for(entry.key):
            if waiting.place == connection.place:
                self._leases.again(waiting, entry)
