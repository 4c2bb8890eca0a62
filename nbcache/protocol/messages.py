"""The vocabulary of the protocol: every message, and how many descriptors each carries.

One packet is one message. A message is JSON with its type under ``"type"``; what does not fit in 64 KiB (manifests, status)
travels beside it as a sealed memfd. See PROTOCOL.md for who says what and when.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

PROTOCOL_VERSION = 1

FILES_PER_MESSAGE = 128
"""Files that one message may hand over (the kernel's own limit is 253 descriptors)."""


class Message(msgspec.Struct, frozen=True, tag_field="type"):
    """A message. ``DESCRIPTORS`` is the smallest and the largest number of descriptors that may come with it."""

    DESCRIPTORS: ClassVar[tuple[int, int]] = (0, 0)


class Hello(Message, frozen=True, tag="hello"):
    """Client, first: the versions it speaks, and who it is for people's eyes."""

    protocol: int
    version: str
    label: str = ""


class DeviceWish(msgspec.Struct, frozen=True):
    """A slab: on the GPU of this UUID, floating-point tensors as this dtype (empty: as in the file).

    With ``ahead``, but not with a dtype: if it is Vacant, as if Fill, and Want for so many of the first blocks, had been said.
    """

    uuid: str
    dtype: str = ""
    ahead: int = 0


class Find(Message, frozen=True, tag="find"):
    """Client: the entry with this key, or, without a key, the first that one of these names names.

    An entry that is found by key gets the names as aliases. Without a ``device`` it is wanted in shared host memory, or, with
    ``warm``, in whichever host memory this machine's loads will want. Answered by Granted, by Progress while it is staged, by
    Vacant if the slab is yet to be filled, or by Absent: then the files are needed.
    """

    names: tuple[str, ...] = ()
    key: str = ""
    device: DeviceWish | None = None
    warm: bool = False


class Stage(Message, frozen=True, tag="stage"):
    """Client: read these files into an entry, for what the last Find wished. Answered as Find is.

    Descriptors: the manifest, then the first of ``file_count`` files; the rest follow in Files.
    """

    DESCRIPTORS = (1, 1 + FILES_PER_MESSAGE)
    name: str
    file_count: int


class Files(Message, frozen=True, tag="files"):
    """Client: more of the files that its Stage announced."""

    DESCRIPTORS = (1, FILES_PER_MESSAGE)


class Reserve(Message, frozen=True, tag="reserve"):
    """Client: memory for an entry that it will fill itself. Descriptor: the manifest. Answered by Reserved.

    ``derived``: made of something that it can be made of again, so policy may evict it.
    """

    DESCRIPTORS = (1, 1)
    name: str
    derived: bool = False


class Commit(Message, frozen=True, tag="commit"):
    """Client: what I reserved, or the slab I fill, is full and I no longer map it writable. Answered by Granted."""


class Fill(Message, frozen=True, tag="fill"):
    """Client, after Vacant: I will fill a slab of this size. Answered by Filling, or as Find is if another is quicker."""

    extent_bytes: int


class Want(Message, frozen=True, tag="want"):
    """Client, while it fills: the host copy's block of this number. Answered by Block once staged, by Progress until then."""

    number: int


class Watch(Message, frozen=True, tag="watch"):
    """Client: I keep blocks of this copy of the entry mapped. Answered by Watched or Absent; the end comes with the copy's.

    ``copy`` is what Filling called it.
    """

    key: str
    copy: int


class FreeGpu(Message, frozen=True, tag="free_gpu"):
    """Client: drop the idle slabs, all of them or those of the entry that these names name. Answered by Evicted."""

    names: tuple[str, ...] = ()


class Evict(Message, frozen=True, tag="evict"):
    """Client: drop the entry that the first known of these names names. Answered by Evicted.

    With ``everything``: drop each idle one that can be read from its files again.
    """

    names: tuple[str, ...] = ()
    everything: bool = False


class Pin(Message, frozen=True, tag="pin"):
    """Client: keep the entry that the first known of these names names, or let policy have it again. Answered by Done."""

    names: tuple[str, ...]
    pinned: bool


class Query(Message, frozen=True, tag="query"):
    """Client: the daemon's status; with a key, the manifest of that entry. Answered by Document. Counts as no use of it."""

    key: str = ""


class Welcome(Message, frozen=True, tag="welcome"):
    """Daemon, first: its versions. If ``protocol`` differs from the client's it says no more and closes."""

    protocol: int
    version: str
    pid: int


class Granted(Message, frozen=True, tag="granted"):
    """Daemon: a lease, for as long as this connection and its process live.

    Descriptors: the manifest, and the sealed block or the slab. A pinned host copy has none: it is only held.
    """

    DESCRIPTORS = (1, 2)
    key: str
    name: str
    provenance: str
    staged: bool = False
    """Whether files were read, a slab was filled or bytes were saved for this answer; False on a hit."""


class Absent(Message, frozen=True, tag="absent"):
    """Daemon: no such entry, or no bytes of it that could serve."""


class Vacant(Message, frozen=True, tag="vacant"):
    """Daemon: the entry's host copy is there or on its way, but no slab is; Fill one. Descriptor: the manifest.

    ``filled``: it was wished ``ahead``, so this is followed by the answer to a Fill, and what is wanted of it.
    """

    DESCRIPTORS = (1, 1)
    key: str
    filled: bool = False


class Filling(Message, frozen=True, tag="filling"):
    """Daemon: yours to fill from the host copy, which is cut into blocks of these sizes. Descriptor: the slab.

    ``copy`` tells it from every other host copy of this daemon's, of this entry too.
    """

    DESCRIPTORS = (1, 1)
    block_sizes: tuple[int, ...]
    copy: int = 0


class Block(Message, frozen=True, tag="block"):
    """Daemon: a block of the host copy, staged. Descriptor: the block, to be mapped for the GPU."""

    DESCRIPTORS = (1, 1)
    number: int
    size_bytes: int


class Progress(Message, frozen=True, tag="progress"):
    """Daemon, unasked, to whoever waits: how far the staging is; 0 of 0 where another fills a slab. At least once a second."""

    staged_bytes: int
    total_bytes: int


class Watched(Message, frozen=True, tag="watched"):
    """Daemon: this connection ends when the copy does."""


class Reserved(Message, frozen=True, tag="reserved"):
    """Daemon: fill this, unmap it, and Commit. Descriptor: the block, writable."""

    DESCRIPTORS = (1, 1)


class Done(Message, frozen=True, tag="done"):
    """Daemon: it is so."""


class Evicted(Message, frozen=True, tag="evicted"):
    """Daemon: what went, and what ``everything`` left because it is in use, pinned or a put entry."""

    names: tuple[str, ...]
    freed_bytes: int
    kept: tuple[str, ...] = ()


class Document(Message, frozen=True, tag="document"):
    """Daemon: a JSON document. Descriptor: the sealed memfd that holds it."""

    DESCRIPTORS = (1, 1)


class Failed(Message, frozen=True, tag="failed"):
    """Daemon: no, and why. ``error`` is the name of a class in :mod:`nbcache.errors`."""

    error: str
    message: str


ClientMessage = Hello | Find | Stage | Files | Reserve | Commit | Fill | Want | Watch | FreeGpu | Evict | Pin | Query
DaemonMessage = (
    Welcome | Granted | Absent | Vacant | Filling | Block | Progress | Watched | Reserved | Done | Evicted | Document | Failed
)


class Lease(msgspec.Struct, frozen=True):
    """Who uses an entry, in a status document."""

    pid: int
    label: str


class DeviceResidence(msgspec.Struct, frozen=True):
    """An entry's slab on one GPU, in a status document. ``bytes`` are what it takes there."""

    uuid: str
    dtype: str
    state: str
    leases: int
    bytes: int = 0


class EntryStatus(msgspec.Struct, frozen=True):
    """One entry in a status document. ``bytes`` are the tensors' own; ``last_used_s`` is seconds ago."""

    name: str
    aliases: tuple[str, ...]
    provenance: str
    source: tuple[str, ...]
    bytes: int
    tensors: int
    host: str
    host_kind: str
    devices: tuple[DeviceResidence, ...]
    leases: int
    pinned: bool
    last_used_s: float
    key: str
    used_by: tuple[Lease, ...]
    staged_bytes: int = 0
    """How much of the host copy is there, while ``host`` is ``staging``."""


class HostStatus(msgspec.Struct, frozen=True):
    """The host tier in a status document."""

    used_bytes: int
    limit_bytes: int


class DeviceStatus(msgspec.Struct, frozen=True):
    """A GPU in a status document."""

    uuid: str
    name: str
    slab_bytes: int
    total_bytes: int = 0


class Status(msgspec.Struct, frozen=True):
    """The daemon's status document: what ``nbcache status --json`` prints."""

    version: str
    protocol: int
    pid: int
    uptime_s: float
    host: HostStatus
    devices: tuple[DeviceStatus, ...]
    entries: tuple[EntryStatus, ...]
    settings: dict[str, str] = {}
    """The options that it was started with, as environment variables would hold them."""
