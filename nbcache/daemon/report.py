"""The status document, from what the daemon knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Protocol

from nbcache import __version__
from nbcache.daemon.entries import Entry, Kind, Residence, State
from nbcache.daemon.store import Store
from nbcache.memory.driver import Driver
from nbcache.protocol import messages as m

_HOST_WORDS = {State.ABSENT: "absent", State.FILLING: "staging", State.READY: "staged"}
_DEVICE_WORDS = {State.FILLING: "filling", State.READY: "resident"}


class User(Protocol):
    """Who holds a lease: a connection."""

    pid: int
    label: str


def describe_status(
    store: Store,
    users: Mapping[int, User],
    driver: Driver | None,
    uptime_s: float,
    now_s: float,
    staged_bytes: Callable[[str], int],
    settings: Mapping[str, str],
) -> m.Status:
    """The document that ``nbcache status --json`` prints. ``users`` are found by lease, ``staged_bytes`` by key."""
    gpus = driver.gpus() if driver else ()
    return m.Status(
        version=__version__,
        protocol=m.PROTOCOL_VERSION,
        pid=os.getpid(),
        uptime_s=round(uptime_s, 3),
        host=m.HostStatus(store.used_bytes, store.limit_bytes),
        devices=tuple(m.DeviceStatus(gpu.uuid, gpu.name, store.slab_bytes(gpu.uuid), gpu.total_bytes) for gpu in gpus),
        entries=tuple(_entry_status(entry, users, now_s, staged_bytes(entry.key)) for entry in store.entries.values()),
        settings=dict(settings),
    )


def _entry_status(entry: Entry, users: Mapping[int, User], now_s: float, staged_bytes: int) -> m.EntryStatus:
    leases = entry.leases
    kinds = [place.kind.value for place in entry.residences if place.on_host]
    return m.EntryStatus(
        name=entry.name,
        aliases=tuple(name for name in entry.names if name != entry.name),
        provenance=entry.provenance,
        source=entry.source,
        bytes=entry.bytes,
        tensors=entry.tensors,
        host=_HOST_WORDS[entry.host],
        host_kind="both" if len(kinds) > 1 else "".join(kinds),
        devices=tuple(_residence(r) for r in entry.residences.values() if r.place.kind is Kind.DEVICE),
        leases=len(leases),
        pinned=entry.pinned,
        last_used_s=round(now_s - entry.last_used_s, 3),
        key=entry.key,
        used_by=tuple(_user(users.get(lease)) for lease in leases),
        staged_bytes=staged_bytes,
    )


def _user(user: User | None) -> m.Lease:
    """Who holds a lease; the daemon itself holds one on a host copy that it is copying."""
    return m.Lease(user.pid, user.label) if user else m.Lease(os.getpid(), "nbcache")


def _residence(residence: Residence) -> m.DeviceResidence:
    place = residence.place
    state, leases = _DEVICE_WORDS[residence.state], len(residence.leases)
    return m.DeviceResidence(place.uuid, place.dtype, state, leases, residence.extent_bytes)
