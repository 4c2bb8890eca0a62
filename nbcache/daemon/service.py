"""What each request does: decided with the store, done through the rooms below, answered through the port.

Owns the daemon's rooms (holdings, host copies, leases, slabs) and says which request is one for which of them. Knows no
sockets, no selector and no time but its clock: a connection is what it is in the middle of, and ends when it is let go. It
exists so that what the daemon promises can be read without how packets come and go.
"""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from nbcache.daemon.claims import MAX_FILES, check_files, check_name, read_manifest
from nbcache.daemon.connection import HEARTBEAT_S, MESSAGE_CHARACTERS, PROGRESS_PERIOD_S, Connection, Phase, Port
from nbcache.daemon.entries import PINNED, SHARED, Entry, Place, Residences
from nbcache.daemon.holdings import Holdings
from nbcache.daemon.host import HostCopies
from nbcache.daemon.leases import Leases
from nbcache.daemon.policy import GpuPolicy
from nbcache.daemon.reader import FileSource, Reader
from nbcache.daemon.report import describe_status
from nbcache.daemon.slabs import Slabs
from nbcache.daemon.store import Store
from nbcache.daemon.tiers import Tiers
from nbcache.errors import DriverError, EntryNotFound, HostMemoryFull, NBCacheError, ProtocolError
from nbcache.manifest import Manifest, key_of
from nbcache.memory.driver import Driver
from nbcache.memory.shared import seal_bytes
from nbcache.protocol import messages as m
from nbcache.protocol.wire import close_all

Requests = dict[tuple[Phase, type[m.Message]], Callable[..., None]]
"""What answers which message in which phase: called with the connection, the message and the descriptors that came."""


class Service:
    """Answers requests. ``requests`` says what may be asked when; a pair that is not in it breaks the protocol.

    Notes
    -----
    The server's thread owns it. Who answers a request takes the descriptors it keeps out of the list; the rest are closed. An
    error that it raises is the answer.
    """

    def __init__(
        self,
        port: Port,
        limit_bytes: Callable[[], int],
        open_driver: Callable[[], Driver],
        policy: GpuPolicy,
        clock: Callable[[], float] = time.monotonic,
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._port = port
        self._settings = settings
        self._policy = policy
        self._clock = clock
        self._started_s = clock()
        self._store = Store(limit_bytes, clock)
        self._tiers = Tiers(open_driver, port.post, Reader(), policy.block_bytes)
        self._holdings = Holdings(self._store, self._tiers, self._freed)
        self._host = HostCopies(self._holdings, self)
        self._leases = Leases(port, self._holdings, self._host, policy, lambda *offer: self._slabs.fill_ahead(*offer))
        self._slabs = Slabs(port, self._holdings, self._leases, clock)
        self.requests: Requests = {
            (Phase.IDLE, m.Find): self._find,
            (Phase.IDLE, m.Stage): self._stage,
            (Phase.COLLECTING, m.Files): self._files,
            (Phase.OFFERED, m.Fill): self._slabs.fill,
            (Phase.FILLING, m.Want): self._slabs.want,
            (Phase.FILLING, m.Commit): self._slabs.commit,
            (Phase.IDLE, m.Watch): self._watch,
            (Phase.IDLE, m.Reserve): self._reserve,
            (Phase.RESERVED, m.Commit): self._commit_reserved,
            (Phase.IDLE, m.Evict): self._evict,
            (Phase.IDLE, m.FreeGpu): self._free_gpu,
            (Phase.IDLE, m.Pin): self._pin,
            (Phase.HOLDING, m.Pin): self._pin,
            (Phase.IDLE, m.Query): self._query,
        }

    # What the server calls, beside the requests

    @property
    def is_empty(self) -> bool:
        """Whether nothing is cached, nor on its way."""
        return not self._store.entries

    def let_go(self, connection: Connection) -> None:
        """Undo what the connection was in the middle of (I1, I2)."""
        phase, connection.phase = connection.phase, Phase.CLOSING
        connection.wanted.clear()
        collected, connection.collected = connection.collected, []
        close_all(collected)
        if phase is Phase.RESERVED:
            self._holdings.abandon(connection.key, SHARED)
        elif phase in (Phase.FILLING, Phase.COMMITTING):
            self._slabs.abandon(connection)
        elif phase is Phase.HOLDING:
            self._leases.release(connection)

    def _staged_bytes(self, key: str) -> int:
        staging = self._host.staging_of(key)
        return staging.staged_bytes if staging else 0

    def tell_progress(self, connection: Connection, now: float) -> None:
        """Say how far the staging is that this connection waits for, if it is time to."""
        staging = self._host.staging_of(connection.key)
        staged = staging.staged_bytes if staging else 0
        total = staging.total_bytes if staging else 0
        if now - connection.told_s >= (PROGRESS_PERIOD_S if staging else HEARTBEAT_S):
            connection.told_s = now
            self._port.reply(connection, m.Progress(staged, total))

    def free_expired(self) -> None:
        """Free the slabs whose time is over."""
        self._holdings.free(self._policy.expired(self._store, self._tiers.driver_in_use))

    def close(self) -> None:
        """Cancel what is being read and free everything."""
        self._tiers.close()

    # Finding and staging

    def _find(self, connection: Connection, find: m.Find, _: list[int]) -> None:
        connection.find = find
        entry = self._store.find(find.names, find.key)
        if entry is None:
            self._port.reply(connection, m.Absent())
            return
        if find.key:
            for name in find.names:
                check_name(name, path=entry.provenance == "file")
            for name in find.names:
                self._holdings.free(self._store.give_name(entry.key, name))
        self._leases.attend(connection, entry)

    def _stage(self, connection: Connection, stage: m.Stage, descriptors: list[int]) -> None:
        if not 0 < stage.file_count <= MAX_FILES:
            raise ProtocolError(f"a checkpoint of {stage.file_count} files")
        connection.stage, connection.phase, connection.since_s = stage, Phase.COLLECTING, self._clock()
        self._files(connection, stage, descriptors)

    def _files(self, connection: Connection, _: m.Stage | m.Files, descriptors: list[int]) -> None:
        assert connection.stage is not None
        connection.collected += descriptors
        descriptors.clear()
        connection.since_s = self._clock()
        missing = 1 + connection.stage.file_count - len(connection.collected)
        if missing < 0:
            raise ProtocolError(f"{-missing} more files than the {connection.stage.file_count} announced")
        if missing == 0:
            taken, connection.collected = connection.collected, []
            connection.phase = Phase.IDLE
            try:
                self._start_staging(connection, connection.stage.name, taken)
            finally:
                close_all(taken)

    def _start_staging(self, connection: Connection, name: str, taken: list[int]) -> None:
        """Begin to read files, unless the entry is there or on its way. Takes what it keeps out of ``taken``."""
        manifest_fd, *files = taken
        manifest = read_manifest(manifest_fd)
        check_files(manifest, files)
        check_name(name, path=True)
        place = self._leases.wished_place(connection.find)
        host = SHARED if place == SHARED else PINNED
        key = key_of(manifest.members)
        entry = self._store.find((), key)
        if entry is None or not self._host.is_coming(entry, host):
            known = self._store.find((), key)  # its other host copy may have given way just now, and it with it
            entry = known or _new_entry(key, name, "file", manifest)
            self._holdings.free(self._store.fill(entry, host, entry.extent_bytes))
            if not known:
                taken.remove(manifest_fd)
                self._tiers.keep_manifest(entry.key, manifest_fd)
            with self._holdings.undone_on_error(entry.key, host):
                source = FileSource(manifest, files)
                del taken[-len(files) :]
                self._host.read(entry, host, source)
        self._holdings.free(self._store.give_name(entry.key, name))
        self._leases.attend(connection, entry)

    # How host copies fare: see :class:`nbcache.daemon.host.Watcher`

    def block_staged(self, key: str) -> None:
        """Who fills a slab from the copy may have wanted it."""
        self._slabs.serve_wants(key)

    def staged(self, entry: Entry, place: Place) -> None:
        """Who waits is attended to, who fills a slab gets on."""
        waiting = self._leases.waiting_for(entry.key)
        self._slabs.serve_wants(entry.key)
        if place == PINNED:
            self._slabs.pinned_staged(entry)
        for connection in waiting:
            self._leases.again(connection, entry, staged=True)

    def staging_failed(self, entry: Entry, place: Place, error: NBCacheError) -> None:
        """Who waits for it is told, and who fills a slab from it; they may ask again. Other slabs are filled on."""
        fillers = self._slabs.fillers_of(entry.key) if place == PINNED else []
        fed = {connection.place for connection in self._slabs.fillers_of(entry.key)} - {filler.place for filler in fillers}
        waiting = [connection for connection in self._leases.waiting_for(entry.key) if connection.place not in fed]
        offered = [c for c in self._port.connections.values() if c.phase is Phase.OFFERED and c.key == entry.key]
        for connection in offered if place == PINNED else []:
            connection.refusal = error
        for connection in waiting:
            if connection.place == SHARED != place and isinstance(error, DriverError | HostMemoryFull):
                # Its own needs no pinned memory: it waited only because that was on its way.
                self._leases.again(connection, entry)
                continue
            connection.phase = Phase.IDLE
            self._port.fail(connection, error)
        for connection in fillers:
            self.let_go(connection)
            connection.phase = Phase.IDLE
            self._port.fail(connection, error)

    # Watching

    def _watch(self, connection: Connection, watch: m.Watch, _: list[int]) -> None:
        entry = self._store.find((), watch.key)
        copy = entry.residences.get(PINNED) if entry else None
        if copy is None or copy.number != watch.copy:
            self._port.reply(connection, m.Absent())
            return
        connection.phase, connection.key = Phase.WATCHING, watch.key
        self._port.reply(connection, m.Watched())

    def _freed(self, key: str, place: Place) -> None:
        """Who keeps blocks of a pinned copy mapped learns that it is gone."""
        if place != PINNED:
            return
        for connection in list(self._port.connections.values()):
            if connection.phase is Phase.WATCHING and connection.key == key:
                self._port.end(connection, "the copy that it watched was freed")

    # Saving, evicting, asking

    def _reserve(self, connection: Connection, reserve: m.Reserve, descriptors: list[int]) -> None:
        manifest = read_manifest(descriptors[0])
        check_name(reserve.name, path=False)
        if manifest.members:
            raise ProtocolError("a put entry with files")
        provenance = "derived" if reserve.derived else "put"
        entry = _new_entry(f"{provenance}-{secrets.token_hex(16)}", reserve.name, provenance, manifest)
        self._holdings.free(self._store.fill(entry, SHARED, entry.extent_bytes))
        self._tiers.keep_manifest(entry.key, descriptors.pop())
        with self._holdings.undone_on_error(entry.key, SHARED):
            block = self._tiers.create_shared(entry.key, entry.name, entry.extent_bytes)
        self._store.give_name(entry.key, reserve.name)
        connection.phase, connection.key, connection.place = Phase.RESERVED, entry.key, SHARED
        self._port.reply(connection, m.Reserved(), [block.fd])

    def _commit_reserved(self, connection: Connection, _commit: m.Commit, _: list[int]) -> None:
        try:
            self._tiers.seal_shared(connection.key)
        except OSError as error:
            raise ProtocolError(f"commit while the block is still mapped writable: {error.strerror}") from error
        entry = self._store.entries[connection.key]
        self._holdings.free(self._store.complete(entry.key, SHARED))
        self._leases.grant(connection, entry, staged=True)

    def _evict(self, connection: Connection, evict: m.Evict, _: list[int]) -> None:
        if evict.everything:
            keys, kept = self._store.evictable_by_all()
        else:
            keys, kept = [self._store.check_evictable(evict.names).key], []
        self._answer_evicted(connection, [(k, place) for k in keys for place in self._store.entries[k].residences], kept)

    def _free_gpu(self, connection: Connection, free: m.FreeGpu, _: list[int]) -> None:
        self._answer_evicted(connection, self._store.idle_slabs(names=free.names), [])
        self._tiers.settle()

    def _answer_evicted(self, connection: Connection, going: Residences, kept: Sequence[str]) -> None:
        entries = self._store.entries
        names = tuple(dict.fromkeys(entries[key].name for key, _ in going))
        freed = sum(entries[key].residences[place].extent_bytes for key, place in going)
        self._holdings.free(going)
        self._port.reply(connection, m.Evicted(_fitting(names), freed, _fitting(kept)))

    def _pin(self, connection: Connection, pin: m.Pin, _: list[int]) -> None:
        self._holdings.free(self._store.pin(pin.names, pin.pinned))
        self._port.reply(connection, m.Done())

    def _query(self, connection: Connection, query: m.Query, _: list[int]) -> None:
        if query.key:
            if query.key not in self._store.entries:
                raise EntryNotFound(f"{query.key}: not cached")
            self._port.reply(connection, m.Document(), [self._tiers.manifest_fd(query.key)])
            return
        now_s = self._clock()
        users, driver = self._port.connections, self._tiers.driver_in_use
        document = describe_status(
            self._store, users, driver, now_s - self._started_s, now_s, self._staged_bytes, self._settings
        )
        fd = seal_bytes("status", msgspec.json.encode(document))
        try:
            self._port.reply(connection, m.Document(), [fd])
        finally:
            os.close(fd)


def _fitting(names: Sequence[str]) -> tuple[str, ...]:
    """As many names as fit in a message."""
    lengths = itertools.accumulate(len(name) + 8 for name in names)
    fit = sum(length < MESSAGE_CHARACTERS for length in lengths)
    return (*names[:fit], f"and {len(names) - fit} more") if fit < len(names) else tuple(names)


def _new_entry(key: str, name: str, provenance: str, manifest: Manifest) -> Entry:
    return Entry(
        key=key,
        name=name,
        provenance=provenance,
        source=tuple(member.path for member in manifest.members),
        bytes=manifest.nbytes,
        extent_bytes=manifest.extent_bytes,
        tensors=manifest.count,
        float_dtypes=manifest.float_dtypes,
    )
