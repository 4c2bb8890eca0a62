"""Who gets what: a connection's wish held against an entry, and answered with a lease, with an offer, or by waiting.

Owns no memory and keeps no list: who waits and who holds is written in the connections. Must not know how a slab is filled or
what a request looked like. It exists because an entry is attended to in the same way whether a request, the end of a staging
or the death of a filler brought it up.
"""

from __future__ import annotations

from collections.abc import Callable

from nbcache.daemon.connection import Connection, Phase, Port
from nbcache.daemon.entries import PINNED, SHARED, Entry, Kind, Place, State
from nbcache.daemon.holdings import Holdings
from nbcache.daemon.host import HostCopies
from nbcache.daemon.policy import GpuPolicy
from nbcache.errors import DriverError, NBCacheError
from nbcache.protocol import messages as m


class Leases:
    """Attends to connections, grants and releases.

    Notes
    -----
    The server's thread owns it. Each of these may end a connection that cannot be answered, and with it what that was in the
    middle of.
    """

    def __init__(
        self,
        port: Port,
        holdings: Holdings,
        host: HostCopies,
        policy: GpuPolicy,
        fill_ahead: Callable[[Connection, Entry, int], None],
    ) -> None:
        self._port = port
        self._holdings, self._store, self._tiers = holdings, holdings.store, holdings.tiers
        self._host = host
        self._policy = policy
        self._fill_ahead = fill_ahead

    def wished_place(self, find: m.Find) -> Place:
        """Where an entry is wanted. DriverError for a GPU that the daemon does not see."""
        if find.device is not None:
            known = {gpu.uuid for gpu in self._tiers.driver.gpus()}
            if find.device.uuid not in known:
                raise DriverError(f"GPU {find.device.uuid} is not visible to the daemon, which sees {', '.join(sorted(known))}")
            return Place(Kind.DEVICE, find.device.uuid, find.device.dtype)
        return PINNED if find.warm and self._has_gpu() else SHARED

    def _has_gpu(self) -> bool:
        try:
            return bool(self._tiers.driver.gpus())
        except DriverError:
            return False

    def attend(self, connection: Connection, entry: Entry) -> None:
        """Give a connection what it wished of an entry: now, when it is there, or by asking for the files or the filling."""
        connection.phase, connection.key = Phase.IDLE, entry.key
        connection.place = place = entry.place_as_stored(self.wished_place(connection.find))
        if entry.state(place) is State.READY:
            self.grant(connection, entry)
        elif entry.state(place) is State.FILLING or (place.on_host and self._host.is_coming(entry, place)):
            connection.phase, connection.told_s = Phase.WAITING, 0.0
        elif place.on_host or not self._host.is_coming(entry, PINNED):
            self._port.reply(connection, m.Absent())
        elif entry.state(PINNED) is State.ABSENT:  # on its way to the other kind of host copy, and from there to this one
            connection.phase, connection.told_s = Phase.WAITING, 0.0
        else:
            connection.phase, connection.refusal = Phase.OFFERED, None
            ahead = connection.find.device.ahead if connection.find.device else 0
            self._port.reply(connection, m.Vacant(entry.key, bool(ahead)), [self._tiers.manifest_fd(entry.key)])
            if ahead and connection.phase is Phase.OFFERED:  # it could be told
                self._fill_ahead(connection, entry, ahead)

    def again(self, connection: Connection, entry: Entry, staged: bool = False) -> None:
        """Attend to a connection that waits, if nothing else has served or ended it meanwhile; an error is its answer."""
        if connection.phase is not Phase.WAITING:
            return
        try:
            if staged and entry.state(connection.place) is State.READY:
                self.grant(connection, entry, staged=True)
            else:
                self.attend(connection, entry)
        except NBCacheError as error:
            connection.phase = Phase.IDLE
            self._port.fail(connection, error)

    def waiting_for(self, key: str) -> list[Connection]:
        """The connections that wait for an entry, wherever they want it."""
        return [c for c in self._port.connections.values() if c.phase is Phase.WAITING and c.key == key]

    def grant(self, connection: Connection, entry: Entry, staged: bool = False) -> None:
        """A lease on the residence in the connection's place, which must be complete (I2), with its descriptors."""
        place = connection.place
        self._store.grant(entry.key, place, connection.number, connection.pid)
        connection.phase, connection.key = Phase.HOLDING, entry.key
        descriptors = [self._tiers.manifest_fd(entry.key)]
        if place == SHARED:
            descriptors.append(self._tiers.shared_fd(entry.key))
        elif place.kind is Kind.DEVICE:
            descriptors.append(self._tiers.slab_fd(entry.key, place))
        self._port.reply(connection, m.Granted(entry.key, entry.name, entry.provenance, staged), descriptors)

    def release(self, connection: Connection) -> None:
        """The lease of a connection that held one ends (I1)."""
        self._holdings.free(self._store.release(connection.key, connection.place, connection.number))
        known = connection.key in self._store.entries  # a superseded one may have gone with its last lease
        if known and connection.place.kind is Kind.DEVICE and self._policy.keep_s == 0:
            self._holdings.free(self._store.idle_slabs(connection.place.uuid, (connection.key,)))
