"""A peer that lies, babbles or leaves: it loses its connection, and the daemon loses nothing (I5, I8).

Each test talks to a real daemon over a raw socket. Whatever it said, the fixture then loads a checkpoint properly, from the
same daemon process, and counts the daemon's descriptors.
"""

from __future__ import annotations

import copy
import fcntl
import json
import mmap
import os
import resource
import socket
import string
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from nbcache.checkpoints.catalog import describe, resolve
from nbcache.client.api import evict, evict_all, status
from nbcache.client.fill import acquire, put_bytes
from nbcache.client.session import Session
from nbcache.config import SocketAddress
from nbcache.layout import LAYOUT_VERSION
from nbcache.manifest import Extent, Manifest, decode_manifest, encode_manifest, key_of, place_tensors
from nbcache.memory.shared import map_private, seal_bytes
from nbcache.protocol import messages as m
from nbcache.protocol.wire import MAX_PACKET_BYTES
from tests.support.checkpoints import write_checkpoint
from tests.support.waiting import eventually

REPLY_TIMEOUT_S = 10.0
HELLO = {"type": "hello", "protocol": m.PROTOCOL_VERSION, "version": "hostile"}


class Peer:
    """A raw connection that may say anything."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def say(self, message: dict[str, Any] | bytes, descriptors: Sequence[int] = ()) -> None:
        packet = message if isinstance(message, bytes) else msgspec.json.encode(message)
        socket.send_fds(self.sock, [packet], list(descriptors))

    def hear(self) -> dict[str, Any] | None:
        """The next answer that is not progress; None if the connection was ended. Descriptors are closed, and counted."""
        while True:
            try:
                packet, descriptors, flags, _ = socket.recv_fds(self.sock, 1 << 20, 16)
            except ConnectionResetError:
                return None
            for descriptor in descriptors:
                os.close(descriptor)
            assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
            if not packet:
                return None
            answer = json.loads(packet)
            if answer["type"] != "progress":
                return {**answer, "descriptors": len(descriptors)}

    def is_refused(self, error: str = "ProtocolError") -> None:
        """The last thing said was answered by this error, and by the end of the connection."""
        answer = self.hear()
        assert answer is not None, "the connection ended without a word"
        assert (answer["type"], answer.get("error")) == ("failed", error), answer
        assert self.hear() is None

    def is_denied(self, error: str) -> None:
        """The last thing said was answered by this error, and the connection lives on."""
        answer = self.hear()
        assert answer is not None, "the connection ended without a word"
        assert (answer["type"], answer.get("error")) == ("failed", error), answer
        self.say({"type": "find", "names": ["/no/such"]})
        assert self.hear() == {"type": "absent", "descriptors": 0}


@dataclass(frozen=True)
class Target:
    """The daemon under attack, and the checkpoint that a well-behaved client loads from it."""

    pid: int
    socket_path: Path
    checkpoint: Path
    descriptors: int = 0

    def serves(self) -> int:
        """A proper load works, from files and then from the cache, in the same process. Returns the daemon's descriptors."""
        assert status().pid == self.pid, "another daemon answered"
        evict_all()
        for hit in (False, True):
            grant = acquire(str(self.checkpoint), start=False)
            with map_private(grant.fd, grant.manifest.extent_bytes) as area:
                body = self.checkpoint.read_bytes()
                for tensor in grant.manifest.tensors:
                    assert area[tensor.place :][: tensor.nbytes] == body[tensor.offset :][: tensor.nbytes]
                assert grant.hit is hit
            grant.close()
        eventually(lambda: evict(str(self.checkpoint)) if not _leases(self.checkpoint) else None)
        return self.count_descriptors()

    def count_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @contextmanager
    def peer(self, greet: bool = True) -> Iterator[Peer]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(REPLY_TIMEOUT_S)
            with SocketAddress(self.socket_path) as address:
                sock.connect(address)
            peer = Peer(sock)
            if greet:
                peer.say(HELLO)
                welcome = peer.hear()
                assert welcome is not None
                assert welcome["pid"] == self.pid
            yield peer


def _leases(path: Path) -> int:
    return sum(entry.leases for entry in status().entries if entry.name == str(path))


@pytest.fixture
def target(runtime_dir: Path, tmp_path: Path) -> Iterator[Target]:
    checkpoint = write_checkpoint(tmp_path / "well-behaved.safetensors")
    Session.open().close()
    fresh = Target(status().pid, runtime_dir / "daemon.sock", checkpoint)
    fresh.serves()
    idle = eventually(lambda: _settled(fresh))
    yield Target(fresh.pid, fresh.socket_path, checkpoint, idle)
    fresh.serves()
    eventually(lambda: fresh.count_descriptors() == idle)


def _settled(target: Target) -> int:
    """Descriptors of the daemon once it holds no connection and no entry: what is left are its own."""
    kinds = []
    for name in os.listdir(f"/proc/{target.pid}/fd"):
        with suppress(FileNotFoundError):
            kinds.append(os.readlink(f"/proc/{target.pid}/fd/{name}"))
    busy = any("memfd:" in kind or "pidfd" in kind for kind in kinds)
    sockets = sum(kind.startswith("socket:") for kind in kinds)
    return 0 if busy or sockets != 1 else len(kinds)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a test opened."""
    with ExitStack() as closing:
        yield closing


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """An honest manifest, of a file that nobody has loaded yet."""
    return _describe(write_checkpoint(tmp_path / "victim.safetensors", seed=7, sizes=((64, 64), (7,), (33,))))


def _describe(path: Path) -> Manifest:
    description = describe(resolve(str(path)))
    description.close()
    return description.manifest


def _opened(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _file(stack: ExitStack, manifest: Manifest, flags: int = os.O_RDONLY) -> int:
    return _opened(stack, os.open(manifest.members[0].path, flags))


def _sealed(stack: ExitStack, payload: bytes) -> int:
    return _opened(stack, seal_bytes("hostile", payload))


def _stage(name: str = "/hostile/name", file_count: int = 1) -> dict[str, Any]:
    return {"type": "stage", "name": name, "file_count": file_count}


# Babble


BABBLE = {
    "nul": b"\0",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "binary": bytes(range(256)) * 16,
    "empty object": b"{}",
    "array": b"[]",
    "number": b"1",
    "no type": b'{"protocol":1,"version":"x"}',
    "unknown type": b'{"type":"obey"}',
    "a daemon's message": b'{"type":"done"}',
    "missing field": b'{"type":"hello"}',
    "wrong field": b'{"type":"hello","protocol":"one","version":"x"}',
    "huge number": b'{"type":"hello","protocol":' + b"9" * 6000 + b',"version":"x"}',
    "broken text": b'{"type":"hello","protocol":1,"version":"\xff\xfe"}',
    "lone surrogate": b'{"type":"hello","protocol":1,"version":"\\ud800"}',
    "cut short": b'{"type":"hello","protocol":1,"vers',
    "two messages": json.dumps(HELLO).encode() * 2,
    "deep array": b'{"type":"hello","x":' + b"[" * 60_000,
    "deep objects": b'{"type":"hello","x":' + b'{"x":' * 12_000,
    "oversize": b'{"type":"hello","protocol":1,"version":"' + b"x" * MAX_PACKET_BYTES + b'"}',
    "just over": b" " * (MAX_PACKET_BYTES + 1),
}


@pytest.mark.parametrize("packet", BABBLE.values(), ids=BABBLE.keys())
@pytest.mark.parametrize("greet", [False, True], ids=["before the greeting", "after it"])
def test_babble_is_refused_with_a_reason(target: Target, packet: bytes, greet: bool) -> None:
    with target.peer(greet) as peer:
        peer.say(packet)
        peer.is_refused()


def test_an_empty_packet_ends_the_connection(target: Target) -> None:
    with target.peer() as peer:
        peer.say(b"", [peer.sock.fileno()])
        assert peer.hear() is None


def test_a_peer_that_keeps_talking_after_its_refusal_is_not_heard(target: Target, stack: ExitStack) -> None:
    devnull = _opened(stack, os.open(os.devnull, os.O_RDONLY))
    with target.peer() as peer:
        peer.say(b"babble")
        for _ in range(20):
            peer.say({"type": "evict", "everything": True}, [devnull])
        peer.is_refused()


def test_another_protocol_version_is_welcomed_told_ours_and_let_go(target: Target) -> None:
    with target.peer(greet=False) as peer:
        peer.say({**HELLO, "protocol": 99})
        welcome = peer.hear()
        assert welcome is not None
        assert (welcome["type"], welcome["protocol"]) == ("welcome", m.PROTOCOL_VERSION)
        assert peer.hear() is None


def test_a_peer_that_reads_no_answers_is_dropped(target: Target) -> None:
    with target.peer() as peer, pytest.raises(OSError):
        peer.sock.settimeout(REPLY_TIMEOUT_S)
        for _ in range(100_000):
            peer.say({"type": "query"})


# Messages out of turn


@pytest.mark.parametrize("kind", ["find", "commit", "evict", "pin", "query"])
def test_a_request_before_the_greeting_is_refused(target: Target, kind: str) -> None:
    with target.peer(greet=False) as peer:
        peer.say({"type": kind, "names": [], "pinned": True})
        peer.is_refused()


@pytest.mark.parametrize("kind", ["hello", "commit"])
def test_a_message_out_of_turn_is_refused_when_idle(target: Target, kind: str) -> None:
    with target.peer() as peer:
        peer.say({**HELLO, "type": kind})
        peer.is_refused()


def test_files_that_nobody_asked_for_are_refused(target: Target, stack: ExitStack, manifest: Manifest) -> None:
    with target.peer() as peer:
        peer.say({"type": "files"}, [_file(stack, manifest)])
        peer.is_refused()


@pytest.mark.parametrize("kind", ["hello", "find", "commit", "evict", "query"])
def test_a_message_out_of_turn_is_refused_while_collecting(
    target: Target, stack: ExitStack, manifest: Manifest, kind: str
) -> None:
    with target.peer() as peer:
        peer.say(_stage(file_count=3), [_sealed(stack, encode_manifest(manifest)), _file(stack, manifest)])
        peer.say({**HELLO, "type": kind})
        peer.is_refused()


@pytest.mark.parametrize("kind", ["hello", "find", "commit", "evict", "query"])
def test_a_message_out_of_turn_costs_the_holder_its_lease(
    target: Target, stack: ExitStack, manifest: Manifest, kind: str
) -> None:
    name = manifest.members[0].path
    with target.peer() as peer:
        peer.say(_stage(name), [_sealed(stack, encode_manifest(manifest)), _file(stack, manifest)])
        granted = peer.hear()
        assert granted is not None
        assert (granted["type"], granted["descriptors"]) == ("granted", 2)
        peer.say({**HELLO, "type": kind})
        peer.is_refused()
        assert evict(name).names == (name,)


@pytest.mark.parametrize("kind", ["hello", "find", "evict", "query", "pin"])
def test_a_message_out_of_turn_costs_the_filler_its_reservation(target: Target, stack: ExitStack, kind: str) -> None:
    with target.peer() as peer:
        peer.say({"type": "reserve", "name": "half"}, [_sealed(stack, encode_manifest(_put_manifest()))])
        reserved = peer.hear()
        assert reserved is not None
        assert (reserved["type"], reserved["descriptors"]) == ("reserved", 1)
        peer.say({**HELLO, "type": kind, "names": ["half"], "pinned": True})
        peer.is_refused()
    with target.peer() as peer:
        peer.say({"type": "find", "names": ["half"]})
        assert peer.hear() == {"type": "absent", "descriptors": 0}


# Descriptors


def _pipe(stack: ExitStack) -> int:
    read_fd, write_fd = os.pipe()
    _opened(stack, write_fd)
    return _opened(stack, read_fd)


def _directory(stack: ExitStack) -> int:
    return _opened(stack, os.open("/", os.O_RDONLY))


def _unix_socket(stack: ExitStack) -> int:
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    return stack.enter_context(theirs).fileno()


def _unsealed_memfd(stack: ExitStack) -> int:
    fd = _opened(stack, os.memfd_create("hostile", os.MFD_ALLOW_SEALING))
    os.write(fd, b"{}")
    return fd


def _half_sealed_memfd(stack: ExitStack) -> int:
    fd = _unsealed_memfd(stack)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd


def _null_device(stack: ExitStack) -> int:
    return _opened(stack, os.open(os.devnull, os.O_RDWR))


def _eventfd(stack: ExitStack) -> int:
    return _opened(stack, os.eventfd(1))


def _process(stack: ExitStack) -> int:
    return _opened(stack, os.pidfd_open(os.getpid()))


def _path_only(stack: ExitStack) -> int:
    return _opened(stack, os.open("/", os.O_PATH))


KINDS = [
    _pipe, _directory, _unix_socket, _unsealed_memfd, _half_sealed_memfd, _null_device, _eventfd, _process, _path_only,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_is_no_sealed_memfd_is_refused(target: Target, stack: ExitStack, manifest: Manifest, kind: Any) -> None:
    with target.peer() as peer:
        peer.say(_stage(), [kind(stack), _file(stack, manifest)])
        peer.is_refused()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reservation_by_something_that_is_no_sealed_memfd_is_refused(target: Target, stack: ExitStack, kind: Any) -> None:
    with target.peer() as peer:
        peer.say({"type": "reserve", "name": "x"}, [kind(stack)])
        peer.is_refused()


def test_a_manifest_that_cannot_be_read_back_costs_only_its_connection(
    target: Target, stack: ExitStack, manifest: Manifest
) -> None:
    sealed = _sealed(stack, encode_manifest(manifest))
    write_only = _opened(stack, os.open(f"/proc/self/fd/{sealed}", os.O_WRONLY))
    with target.peer() as peer:
        peer.say(_stage(), [write_only, _file(stack, manifest)])
        answer = peer.hear()
        assert answer is None or answer["type"] == "failed"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "memfd" not in kind.__name__])
def test_a_file_that_is_no_regular_file_is_refused(target: Target, stack: ExitStack, manifest: Manifest, kind: Any) -> None:
    with target.peer() as peer:
        peer.say(_stage(), [_sealed(stack, encode_manifest(manifest)), kind(stack)])
        peer.is_refused()


def test_a_file_that_is_not_the_described_one_is_denied(target: Target, stack: ExitStack, manifest: Manifest) -> None:
    with target.peer() as peer:
        peer.say(_stage(), [_sealed(stack, encode_manifest(manifest)), _unsealed_memfd(stack)])
        peer.is_denied("CheckpointChanged")


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_PATH], ids=["write-only", "path-only"])
def test_a_file_that_cannot_be_read_is_denied(target: Target, stack: ExitStack, manifest: Manifest, flags: int) -> None:
    with target.peer() as peer:
        peer.say(_stage(), [_sealed(stack, encode_manifest(manifest)), _file(stack, manifest, flags)])
        peer.is_denied("CheckpointUnreadable")


def test_a_request_without_its_descriptors_is_refused(target: Target) -> None:
    for message in (_stage(), {"type": "reserve", "name": "x"}):
        with target.peer() as peer:
            peer.say(message)
            peer.is_refused()


def test_surplus_descriptors_are_refused(target: Target, stack: ExitStack, manifest: Manifest) -> None:
    described, file = _sealed(stack, encode_manifest(manifest)), _file(stack, manifest)
    for message, descriptors in (
        ({"type": "find", "names": ["/x"]}, [file]),
        ({"type": "query"}, [file]),
        ({"type": "reserve", "name": "x"}, [described, file]),
        (_stage(), [described] * (m.FILES_PER_MESSAGE + 2)),
        (_stage(), [described] * 253),
    ):
        with target.peer() as peer:
            peer.say(message, descriptors)
            peer.is_refused()


def test_a_connection_handed_over_as_a_file_does_not_keep_itself_alive(
    target: Target, stack: ExitStack, manifest: Manifest
) -> None:
    with target.peer() as peer:
        peer.say(_stage(file_count=50), [_sealed(stack, encode_manifest(manifest)), peer.sock.fileno()])
        peer.say({"type": "query"})
        peer.is_refused()


# Requests in several messages


def test_more_files_than_announced_are_refused(target: Target, stack: ExitStack, manifest: Manifest) -> None:
    described, file = _sealed(stack, encode_manifest(manifest)), _file(stack, manifest)
    with target.peer() as peer:
        peer.say(_stage(file_count=1), [described, file, file])
        peer.is_refused()
    with target.peer() as peer:
        peer.say(_stage(file_count=3), [described, file])
        peer.say({"type": "files"}, [file] * 5)
        peer.is_refused()


@pytest.mark.parametrize("count", [0, -1, -(10**30)])
def test_an_absurd_number_of_files_is_refused(target: Target, stack: ExitStack, manifest: Manifest, count: int) -> None:
    with target.peer() as peer:
        peer.say(_stage(file_count=count), [_sealed(stack, encode_manifest(manifest))])
        peer.is_refused()


def test_a_file_count_that_is_not_the_manifests_is_refused(target: Target, stack: ExitStack, manifest: Manifest) -> None:
    with target.peer() as peer:
        file = _file(stack, manifest)
        peer.say(_stage(file_count=2), [_sealed(stack, encode_manifest(manifest)), file])
        peer.say({"type": "files"}, [file])
        peer.is_refused()


def test_a_peer_that_leaves_in_the_middle_of_its_files_leaves_nothing(
    target: Target, stack: ExitStack, manifest: Manifest
) -> None:
    described, file = _sealed(stack, encode_manifest(manifest)), _file(stack, manifest)
    with target.peer() as peer:
        peer.say(_stage(file_count=9_999), [described, *[file] * 100])
        peer.say({"type": "files"}, [file] * 100)
        eventually(lambda: target.count_descriptors() >= target.descriptors + 200)
    eventually(lambda: target.count_descriptors() == target.descriptors)


def test_a_peer_that_leaves_while_it_waits_leaves_a_complete_entry(
    target: Target, stack: ExitStack, manifest: Manifest
) -> None:
    name = manifest.members[0].path
    with target.peer() as peer:
        peer.say(_stage(name), [_sealed(stack, encode_manifest(manifest)), _file(stack, manifest)])
    with target.peer() as peer:
        peer.say({"type": "find", "names": [], "key": key_of(manifest.members)})
        answer = peer.hear()
        assert answer is not None
        assert answer["type"] in ("granted", "absent")  # absent if it was asked before the daemon read what came first


def test_a_filler_that_leaves_leaves_nothing(target: Target, stack: ExitStack) -> None:
    with target.peer() as peer:
        peer.say({"type": "reserve", "name": "half"}, [_sealed(stack, encode_manifest(_put_manifest()))])
        assert peer.hear() is not None
    with target.peer() as peer:
        peer.say({"type": "find", "names": ["half"]})
        assert peer.hear() == {"type": "absent", "descriptors": 0}


# Filling


def _put_manifest(nbytes: int = 4096) -> Manifest:
    return place_tensors([Extent("x", "U8", (nbytes,), 0, 0, nbytes, 0)], (), {})


def _reserve(session: Session, stack: ExitStack, name: str) -> int:
    _, (block,) = session.request(m.Reserve(name), [_sealed(stack, encode_manifest(_put_manifest()))])
    return _opened(stack, block)


def test_commit_while_still_mapping_writable_is_refused_and_keeps_nothing(target: Target, stack: ExitStack) -> None:
    session = stack.enter_context(Session.open(start=False))
    block = _reserve(session, stack, "busy")
    with mmap.mmap(block, 4096) as area:
        area[:4] = b"mine"
        with pytest.raises(Exception, match="mapped writable"):
            session.request(m.Commit())
    with target.peer() as peer:
        peer.say({"type": "find", "names": ["busy"]})
        assert peer.hear() == {"type": "absent", "descriptors": 0}


@pytest.mark.parametrize("size_bytes", [0, 4096, 1 << 40], ids=["emptied", "cut", "grown"])
def test_a_filler_cannot_change_the_size_of_what_it_reserved(target: Target, stack: ExitStack, size_bytes: int) -> None:
    """What others are granted has the size that was accounted for, or they are granted nothing."""
    with ExitStack() as filling, suppress(Exception):
        session = filling.enter_context(Session.open(start=False))
        block = _reserve(session, filling, "resized")
        with suppress(PermissionError):
            os.ftruncate(block, size_bytes)
        _, granted = session.request(m.Commit())
        for fd in granted:
            os.close(fd)
    with Session.open(start=False) as session:
        answer, received = session.request(m.Find(("resized",)))
        sizes = [os.fstat(fd).st_size for fd in received]
        for fd in received:
            os.close(fd)
    if isinstance(answer, m.Granted):
        eventually(lambda: _evicted("resized"))
        assert sizes[1] == _put_manifest().extent_bytes


def test_a_filler_cannot_write_after_its_commit(target: Target, stack: ExitStack) -> None:
    session = stack.enter_context(Session.open(start=False))
    block = _reserve(session, stack, "sealed")
    os.pwrite(block, b"before", 0)
    _, granted = session.request(m.Commit())
    for fd in granted:
        _opened(stack, fd)
    with pytest.raises(PermissionError):
        os.pwrite(block, b"after!", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(block, 4096)
    session.close()
    eventually(lambda: _evicted("sealed"))


def _evicted(name: str) -> bool:
    from nbcache.errors import EntryInUse

    with suppress(EntryInUse):
        return bool(evict(name).names)
    return False


# Manifests that lie


def _edited(manifest: Manifest, index: int = 0, **fields: Any) -> Manifest:
    tensors = list(manifest.tensors)
    tensors[index] = msgspec.structs.replace(tensors[index], **fields)
    return msgspec.structs.replace(manifest, tensors=tuple(tensors))


LIES: dict[str, Any] = {
    "no extent": lambda f: msgspec.structs.replace(f, extent_bytes=0),
    "a negative extent": lambda f: msgspec.structs.replace(f, extent_bytes=-1),
    "an absurd extent": lambda f: msgspec.structs.replace(f, extent_bytes=1 << 62),
    "an unthinkable extent": lambda f: msgspec.structs.replace(f, extent_bytes=1 << 200),
    "another layout": lambda f: msgspec.structs.replace(f, layout_version=99),
    "no members": lambda f: msgspec.structs.replace(f, members=()),
    "a member too many": lambda f: msgspec.structs.replace(f, members=f.members * 2),
    "beyond the file": lambda f: _edited(f, offset=1 << 40),
    "one byte beyond the file": lambda f: _edited(f, offset=f.members[0].fingerprint.size_bytes - f.tensors[0].nbytes + 1),
    "before the file": lambda f: _edited(f, offset=-8),
    "beyond the extent": lambda f: _edited(f, place=f.extent_bytes),
    "before the extent": lambda f: _edited(f, place=-512),
    "unaligned": lambda f: _edited(f, place=f.tensors[0].place + 1),
    "an unthinkable place": lambda f: _edited(f, place=1 << 100),
    "overlap": lambda f: _edited(f, place=f.tensors[1].place),
    "too many bytes": lambda f: _edited(f, nbytes=f.tensors[0].nbytes + 4),
    "negative bytes": lambda f: _edited(f, nbytes=-4),
    "unknown dtype": lambda f: _edited(f, dtype="F33"),
    "negative shape": lambda f: _edited(f, shape=(-7,)),
    "twice negative shape": lambda f: _edited(f, shape=(-1, -7)),
    "overflowing shape": lambda f: _edited(f, shape=(1 << 63, 2)),
    "no such file": lambda f: _edited(f, file=1),
    "a file before the first": lambda f: _edited(f, file=-1),
    "one name twice": lambda f: _edited(f, name=f.tensors[1].name),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_manifest_that_lies_is_refused(target: Target, stack: ExitStack, manifest: Manifest, lie: Any) -> None:
    with target.peer() as peer:
        peer.say(_stage(), [_sealed(stack, encode_manifest(lie(manifest))), _file(stack, manifest)])
        peer.is_refused()


@pytest.mark.parametrize("field", ["device", "inode", "size_bytes", "mtime_ns", "ctime_ns"])
def test_a_fingerprint_that_is_not_the_files_is_denied(
    target: Target, stack: ExitStack, manifest: Manifest, field: str
) -> None:
    member = manifest.members[0]
    fingerprint = msgspec.structs.replace(member.fingerprint, **{field: getattr(member.fingerprint, field) + 1})
    lie = msgspec.structs.replace(manifest, members=(msgspec.structs.replace(member, fingerprint=fingerprint),))
    with target.peer() as peer:
        peer.say(_stage(), [_sealed(stack, encode_manifest(lie)), _file(stack, manifest)])
        peer.is_denied("CheckpointChanged")


def test_an_extent_that_this_machine_lacks_is_denied(target: Target, stack: ExitStack, manifest: Manifest) -> None:
    lie = msgspec.structs.replace(manifest, extent_bytes=1 << 45)
    with target.peer() as peer:
        peer.say(_stage(), [_sealed(stack, encode_manifest(lie)), _file(stack, manifest)])
        peer.is_denied("HostMemoryFull")


def test_a_manifest_that_is_none_is_refused(target: Target, stack: ExitStack, manifest: Manifest) -> None:
    payloads = [
        b"", b"{}", b"[]", b"null", b"\0" * 4096, b"\xff\xfe", b"[" * 300_000, b'{"tensors":' * 50_000,
        b'{"tensors":[],"members":[],"metadata":{"\xff":"x"},"extent_bytes":2097152}',
        encode_manifest(manifest)[:-1], encode_manifest(manifest) + b"x",
    ]  # fmt: skip
    for payload in payloads:
        with target.peer() as peer:
            peer.say(_stage(), [_sealed(stack, payload), _file(stack, manifest)])
            peer.is_refused()


def test_a_manifest_over_the_limit_is_refused_unread(target: Target, stack: ExitStack, manifest: Manifest) -> None:
    fd = _opened(stack, os.memfd_create("hostile", os.MFD_ALLOW_SEALING))
    os.ftruncate(fd, 1 << 40)  # sparse
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    with target.peer() as peer:
        peer.say(_stage(), [fd, _file(stack, manifest)])
        peer.is_refused()


def test_a_put_manifest_with_files_is_refused(target: Target, stack: ExitStack, manifest: Manifest) -> None:
    with target.peer() as peer:
        peer.say({"type": "reserve", "name": "x"}, [_sealed(stack, encode_manifest(manifest))])
        peer.is_refused()


def test_a_shape_of_very_many_dimensions_is_refused_quickly(target: Target, stack: ExitStack, manifest: Manifest) -> None:
    """Multiplied out, these dimensions make a number of millions of digits: meanwhile the daemon would serve nobody."""
    lie = _edited(manifest, shape=(1 << 62,) * 100_000)
    with target.peer() as peer:
        peer.sock.settimeout(3.0)
        peer.say(_stage(), [_sealed(stack, encode_manifest(lie)), _file(stack, manifest)])
        peer.is_refused()


# Answers that do not fit in a packet


@pytest.mark.parametrize("kind", ["evict", "pin"])
def test_a_name_that_makes_the_answer_too_long_costs_at_most_its_connection(target: Target, kind: str) -> None:
    with target.peer() as peer:
        peer.say({"type": kind, "names": ["x" * (MAX_PACKET_BYTES - 60)], "pinned": True})
        answer = peer.hear()
        assert answer is None or answer["error"] == "EntryNotFound"


def test_a_staging_under_a_very_long_name_costs_at_most_its_connection(
    target: Target, stack: ExitStack, manifest: Manifest
) -> None:
    with target.peer() as peer:
        peer.say(_stage("\x7f" * 60_000), [_sealed(stack, encode_manifest(manifest)), _file(stack, manifest)])
        answer = peer.hear()
        assert answer is None or answer["error"] == "InvalidName"


def test_a_lie_about_a_tensor_with_a_very_long_name_costs_at_most_its_connection(
    target: Target, stack: ExitStack, manifest: Manifest
) -> None:
    lie = _edited(manifest, name="n" * 200_000, offset=-1)
    with target.peer() as peer:
        peer.say(_stage(), [_sealed(stack, encode_manifest(lie)), _file(stack, manifest)])
        answer = peer.hear()
        assert answer is None or answer["error"] == "ProtocolError"


def test_a_changed_file_with_a_very_long_path_costs_at_most_its_connection(
    target: Target, stack: ExitStack, manifest: Manifest
) -> None:
    member = msgspec.structs.replace(manifest.members[0], path="/" + "p" * 200_000)
    lie = msgspec.structs.replace(manifest, members=(member,))
    with target.peer() as peer:  # refused at once
        peer.say(_stage(), [_sealed(stack, encode_manifest(lie)), _unsealed_memfd(stack)])
        answer = peer.hear()
        assert answer is None or answer["error"] == "CheckpointChanged"
    with target.peer() as peer:  # refused by the reader, later
        peer.say(_stage(), [_sealed(stack, encode_manifest(lie)), _file(stack, manifest, os.O_WRONLY)])
        answer = peer.hear()
        assert answer is None or answer["error"] == "CheckpointUnreadable"


def test_evicting_more_names_than_an_answer_holds_costs_at_most_the_connection(
    target: Target, stack: ExitStack, tmp_path: Path
) -> None:
    for number in range(20):
        other = _describe(write_checkpoint(tmp_path / f"many-{number}.safetensors", seed=number, sizes=((3,),)))
        with target.peer() as peer:
            name = "/" + f"{number:02}" * 2_000
            peer.say(_stage(name), [_sealed(stack, encode_manifest(other)), _file(stack, other)])
            answer = peer.hear()
            assert answer is not None
            assert answer["type"] == "granted", answer
    with target.peer() as peer:
        peer.say({"type": "evict", "everything": True})
        answer = peer.hear()
        assert answer is None or answer["type"] == "evicted"


# Names


@pytest.mark.parametrize("name", ["", "relative", "x" * 4097, "/" + "x" * 4096])
def test_a_name_that_cannot_name_a_file_entry_is_denied(
    target: Target, stack: ExitStack, manifest: Manifest, name: str
) -> None:
    with target.peer() as peer:
        peer.say(_stage(name), [_sealed(stack, encode_manifest(manifest)), _file(stack, manifest)])
        peer.is_denied("InvalidName")


def test_a_name_with_a_nul_is_denied_and_leaves_no_half_entry(target: Target, stack: ExitStack, manifest: Manifest) -> None:
    described, file = _sealed(stack, encode_manifest(manifest)), _file(stack, manifest)
    with target.peer() as peer:
        peer.say(_stage("/nul\0name"), [described, file])
        answer = peer.hear()
        assert answer is None or answer["error"] == "InvalidName"
    grant = acquire(manifest.members[0].path, start=False)
    grant.close()
    eventually(lambda: _evicted(manifest.members[0].path))


@pytest.mark.parametrize("length", [80, 120, 240, 1300])
def test_a_long_name_of_wide_characters_is_served(target: Target, stack: ExitStack, manifest: Manifest, length: int) -> None:
    """The name also labels the memory, and the system limits labels by their bytes."""
    with target.peer() as peer:
        peer.say(_stage("/" + "模" * length), [_sealed(stack, encode_manifest(manifest)), _file(stack, manifest)])
        answer = peer.hear()
        assert answer is not None
        assert answer["type"] == "granted", answer


@pytest.mark.parametrize("name", ["", "a/b", "x" * 201, " padded", "line\nbreak", "nul\0"])
def test_a_name_that_cannot_name_a_put_entry_is_denied(target: Target, stack: ExitStack, name: str) -> None:
    with target.peer() as peer:
        peer.say({"type": "reserve", "name": name}, [_sealed(stack, encode_manifest(_put_manifest()))])
        peer.is_denied("InvalidName")


def test_a_file_entry_cannot_take_the_name_of_a_put_entry(target: Target, stack: ExitStack, manifest: Manifest) -> None:
    """A put entry exists nowhere else: it goes by its own name being evicted, and by nothing else (I7)."""
    grant = put_bytes("precious", _put_manifest(), lambda area: area.write(b"only copy"))
    grant.close()
    name = manifest.members[0].path
    acquired = acquire(name, start=False)
    acquired.close()
    with target.peer() as peer:
        peer.say({"type": "find", "names": ["precious"], "key": acquired.key})
        peer.hear()
    again = acquire("precious", start=False)
    with map_private(again.fd, again.manifest.extent_bytes) as area:
        found = again.provenance, area[:9]
    again.close()
    eventually(lambda: _evicted("precious"))
    assert found == ("put", b"only copy")


# Exhaustion


@pytest.mark.parametrize("free", [0, 1, 2, 3])
def test_a_daemon_out_of_descriptors_survives(target: Target, free: int) -> None:
    limits = resource.prlimit(target.pid, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{target.pid}/fd")}
    unused = [number for number in range(1000) if number not in used]
    resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (unused[free], limits[1]))
    try:
        with ExitStack() as peers:
            for _ in range(4):
                sock = peers.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                sock.settimeout(0.3)
                with SocketAddress(target.socket_path) as address:
                    sock.connect(address)
                with suppress(OSError):
                    sock.send(json.dumps(HELLO).encode())
                    sock.recv(4096)  # answered, dropped, or left waiting: as the descriptors last
    finally:
        resource.prlimit(target.pid, resource.RLIMIT_NOFILE, limits)


# Anything at all


def _template() -> dict[str, Any]:
    return {
        "tensors": [["a", "F32", [8, 8], 0, 128, 256, 0], ["b", "U8", [7], 0, 384, 7, 512], ["c", "F32", [0], 0, 391, 0, 0]],
        "members": [["/m.safetensors", [1, 2, 400, 4, 5], ""]],
        "metadata": {"format": "pt"},
        "extent_bytes": 2 << 20,
        "layout_version": LAYOUT_VERSION,
    }


NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 511, 512, 1 << 21, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 200]),
    st.integers(-1024, 4096),
)
LEAVES = st.one_of(
    NUMBERS, st.none(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8),
    st.sampled_from(["F32", "U8", "F4", "BF16", "C128", "F6_E2M3", "a", "b"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=8
)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from _paths(child, (*at, key))


PATHS = list(_paths(_template()))


@st.composite
def hostile_manifests(draw: st.DrawFn) -> bytes:
    """An honest manifest with a few values replaced, removed or doubled, or its text changed; or any JSON; or any bytes."""
    kind = draw(st.sampled_from(["values", "values", "values", "values", "text", "json", "bytes"]))
    if kind == "json":
        return json.dumps(draw(VALUES)).encode()
    if kind == "bytes":
        return draw(st.binary(max_size=64))
    document = copy.deepcopy(_template())
    for path in draw(st.lists(st.sampled_from(PATHS), max_size=3)):
        with suppress(LookupError, TypeError, AttributeError):  # an earlier change took that place away
            parent = document
            for key in path[:-1]:
                parent = parent[key]
            change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "double"]))
            if change == "replace":
                parent[path[-1]] = draw(VALUES)
            elif change == "remove":
                del parent[path[-1]]
            elif isinstance(parent, list):
                parent.append(copy.deepcopy(parent[path[-1]]))
    text = json.dumps(document).encode()
    if kind == "text":
        at = draw(st.integers(0, len(text) - 1))
        noise = draw(st.one_of(st.binary(max_size=3), st.sampled_from(string.punctuation).map(str.encode)))
        text = text[:at] + noise + text[at + draw(st.integers(0, 3)) :]
    return text


@pytest.mark.parametrize("batch", range(4))
def test_no_manifest_harms_the_daemon(target: Target, tmp_path: Path, batch: int) -> None:
    """Each example over a connection of its own; the daemon must answer each, and be the same and whole after the batch."""
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(200)) * 2)
    found = os.stat(file)
    fingerprint = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    answers: dict[str, int] = {}

    @seed(batch)
    @settings(max_examples=260, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(hostile_manifests())
    def stage(payload: bytes) -> None:
        payload = payload.replace(b"[1, 2, 400, 4, 5]", json.dumps(fingerprint).encode())
        with ExitStack() as stack, target.peer() as peer:
            file_fd = _opened(stack, os.open(file, os.O_RDONLY))
            peer.say(_stage("/hostile/any"), [_sealed(stack, payload), file_fd])
            answer = peer.hear()
            assert answer is not None, "the connection ended without a word"
            kind = answer.get("error", answer["type"])
            answers[kind] = answers.get(kind, 0) + 1
            assert kind in ("ProtocolError", "CheckpointChanged", "HostMemoryFull", "granted"), answer
            if kind == "granted":
                decode_manifest(payload).check()

    stage()
    assert answers.keys() >= {"ProtocolError", "granted"}, answers  # both sides of the fence were met
    assert sum(answers.values()) >= 250
    eventually(lambda: not Session.open(start=False).close())
