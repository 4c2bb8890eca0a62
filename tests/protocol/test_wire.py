"""One packet, one message: what arrives whole is read, everything else costs its descriptors and nothing more."""

from __future__ import annotations

import array
import fcntl
import os
import resource
import socket
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbcache.errors import ProtocolError
from nbcache.protocol import messages as m
from nbcache.protocol.wire import (
    MAX_DESCRIPTORS,
    MAX_PACKET_BYTES,
    Channel,
    Closed,
    client_messages,
    close_all,
    daemon_messages,
)


class Line:
    """A peer's raw end, and both readings of the other end."""

    def __init__(self) -> None:
        self.peer, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.peer.settimeout(5)
        ours.settimeout(5)
        self.daemon = Channel(ours, client_messages)
        self.client = Channel(ours, daemon_messages)

    def close(self) -> None:
        self.peer.close()
        self.daemon.close()


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.close()


@pytest.fixture
def devnull() -> Iterator[int]:
    fd = os.open(os.devnull, os.O_RDONLY)
    yield fd
    os.close(fd)


def held() -> set[str]:
    """Descriptors this process holds."""
    return set(os.listdir("/proc/self/fd"))


CLIENT_MESSAGES: list[tuple[m.Message, int]] = [
    (m.Hello(1, "0.1", "label ü"), 0),
    (m.Find(("a", "/b"), "key"), 0),
    (m.Stage("/x", 3), 4),
    (m.Stage("/x", 1000), 1 + m.FILES_PER_MESSAGE),
    (m.Files(), 1),
    (m.Files(), m.FILES_PER_MESSAGE),
    (m.Reserve("x"), 1),
    (m.Commit(), 0),
    (m.Evict(("a",)), 0),
    (m.Evict(everything=True), 0),
    (m.Pin(("a",), True), 0),
    (m.Query(), 0),
    (m.Find((), "key", m.DeviceWish("GPU-1", "BF16"), True), 0),
    (m.Find((), "key", m.DeviceWish("GPU-1", ahead=2)), 0),
    (m.Fill(1 << 40), 0),
    (m.Want(7), 0),
    (m.Watch("k", 3), 0),
    (m.FreeGpu(("a",)), 0),
]
DAEMON_MESSAGES: list[tuple[m.Message, int]] = [
    (m.Welcome(1, "0.1", 7), 0),
    (m.Granted("k", "n", "file", True), 2),
    (m.Granted("k", "n", "file", True), 1),
    (m.Vacant("k", True), 1),
    (m.Filling((1 << 20, 1 << 29), 3), 1),
    (m.Watched(), 0),
    (m.Block(3, 1 << 29), 1),
    (m.Absent(), 0),
    (m.Progress(1, 2), 0),
    (m.Reserved(), 1),
    (m.Done(), 0),
    (m.Evicted(("a",), 1 << 40, ("b",)), 0),
    (m.Document(), 1),
    (m.Failed("NBCacheError", "no\nand why"), 0),
]


@pytest.mark.parametrize(("message", "count"), CLIENT_MESSAGES)
def test_a_client_message_arrives_as_it_was_sent(line, devnull, message, count):
    Channel(line.peer, daemon_messages).send(message, [devnull] * count)
    received, descriptors = line.daemon.receive()
    close_all(descriptors)
    assert (received, len(descriptors)) == (message, count)


@pytest.mark.parametrize(("message", "count"), DAEMON_MESSAGES)
def test_a_daemon_message_arrives_as_it_was_sent(line, devnull, message, count):
    Channel(line.peer, client_messages).send(message, [devnull] * count)
    received, descriptors = line.client.receive()
    close_all(descriptors)
    assert (received, len(descriptors)) == (message, count)


def test_every_message_was_sent_above():
    sent = {type(message) for message, _ in CLIENT_MESSAGES + DAEMON_MESSAGES}
    assert sent == set(m.ClientMessage.__args__) | set(m.DaemonMessage.__args__)


def test_descriptors_arrive_in_order_and_close_on_exec(line):
    read_fd, write_fd = os.pipe()
    os.set_inheritable(read_fd, True)
    os.set_inheritable(write_fd, True)
    Channel(line.peer, client_messages).send(m.Granted("k", "n", "file"), [read_fd, write_fd])
    _, received = line.client.receive()
    try:
        os.write(received[1], b"through")
        assert os.read(received[0], 10) == b"through"
        assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in received)
    finally:
        close_all([*received, read_fd, write_fd])


def test_sending_leaves_the_descriptors_with_the_sender(line, devnull):
    before = held()
    Channel(line.peer, daemon_messages).send(m.Reserve("x"), [devnull])
    assert held() == before
    _, received = line.daemon.receive()
    close_all(received)
    assert held() == before


def test_packets_keep_their_own_descriptors(line, devnull):
    sender = Channel(line.peer, daemon_messages)
    sender.send(m.Query())
    sender.send(m.Files(), [devnull] * 2)
    sender.send(m.Query())
    counts = []
    for _ in range(3):
        _, received = line.daemon.receive()
        close_all(received)
        counts.append(len(received))
    assert counts == [0, 2, 0]


# What is refused


def refuse(line: Line, packet: bytes, descriptors: list[int], match: str | None = None) -> None:
    """This packet is a ProtocolError for the daemon, and every descriptor that came with it is closed again."""
    before = held()
    socket.send_fds(line.peer, [packet], descriptors)
    with pytest.raises(ProtocolError, match=match):
        line.daemon.receive()
    assert held() == before


GARBAGE = {
    "nul": b"\0", "text": b"hello", "binary": bytes(range(256)), "empty object": b"{}", "array": b'["query"]', "null": b"null",
    "number": b"1", "no such type": b'{"type":"obey"}', "type a number": b'{"type":1}', "type missing": b'{"names":[]}',
    "a daemon's message": b'{"type":"done"}', "cut": b'{"type":"que', "twice": b'{"type":"query"}{"type":"query"}',
    "missing field": b'{"type":"hello"}', "wrong field": b'{"type":"find","names":"a"}',
    "names of numbers": b'{"type":"find","names":[1]}', "huge number": b'{"type":"hello","protocol":' + b"9" * 5000 + b"}",
    "float": b'{"type":"hello","protocol":1.5,"version":""}', "broken text": b'{"type":"find","names":["\xff"]}',
    "broken key": b'{"\xff":"query"}', "lone surrogate": b'{"type":"find","names":["\\udc80"]}',
    "byte order mark": b'\xef\xbb\xbf{"type":"query"}',
    "deep array": b"[" * 60_000, "deep object": b'{"a":' * 12_000,
    "deep unknown field": b'{"type":"query","x":' + b"[" * 60_000,
    "deep closed": b'{"type":"query","x":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
}  # fmt: skip


@pytest.mark.parametrize("packet", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_refused_and_its_descriptors_closed(line, devnull, packet):
    refuse(line, packet, [])
    refuse(line, packet, [devnull] * 3)


def test_a_packet_over_64_kib_is_refused_and_its_descriptors_closed(line, devnull):
    text = msgspec.json.encode(m.Find(("x" * MAX_PACKET_BYTES,)))
    refuse(line, text, [], match=str(MAX_PACKET_BYTES))
    refuse(line, text, [devnull] * 5, match=str(MAX_PACKET_BYTES))
    refuse(line, b'{"type":"query"}' + b" " * MAX_PACKET_BYTES, [])


def test_a_packet_of_exactly_64_kib_is_read(line):
    padding = MAX_PACKET_BYTES - len(msgspec.json.encode(m.Find(("",))))
    message = m.Find(("x" * padding,))
    Channel(line.peer, daemon_messages).send(message)
    assert line.daemon.receive() == (message, [])


@pytest.mark.parametrize("count", [m.FILES_PER_MESSAGE + 2, MAX_DESCRIPTORS])
def test_too_many_descriptors_are_refused_and_closed(line, devnull, count):
    refuse(line, msgspec.json.encode(m.Stage("/x", 1)), [devnull] * count, match=f"{count} descriptors")


@pytest.mark.parametrize(
    ("message", "counts"),
    [
        (m.Stage("/x", 1), [0]),
        (m.Files(), [0, m.FILES_PER_MESSAGE + 1]),
        (m.Reserve("x"), [0, 2]),
        (m.Query(), [1]),
        (m.Hello(1, ""), [1]),
        (m.Commit(), [3]),
    ],
)
def test_missing_and_surplus_descriptors_are_refused_and_closed(line, devnull, message, counts):
    for count in counts:
        refuse(line, msgspec.json.encode(message), [devnull] * count, match=f"{type(message).__name__} with {count} descr")


def test_descriptors_for_which_this_process_has_no_room_are_the_systems_own_error(line, devnull):
    socket.send_fds(line.peer, [msgspec.json.encode(m.Granted("k", "n", "file", True))], [devnull] * 2)
    before, limits = held(), resource.getrlimit(resource.RLIMIT_NOFILE)
    unused = next(number for number in range(1000) if str(number) not in before)  # the listing's own is free again
    resource.setrlimit(resource.RLIMIT_NOFILE, (unused, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            line.client.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert held() == before


def test_descriptors_of_any_kind_are_closed_when_refused(line):
    read_fd, write_fd = os.pipe()
    kinds = [read_fd, write_fd, os.open("/", os.O_RDONLY), os.open("/", os.O_PATH), os.memfd_create("x"), os.eventfd(0)]
    one, two = socket.socketpair()
    kinds += [os.pidfd_open(os.getpid())]
    refuse(line, b"{}", [*kinds, one.fileno(), two.fileno(), line.peer.fileno()])
    close_all(kinds)
    one.close()
    two.close()


def test_descriptors_in_several_control_messages_are_all_found(line, devnull):
    """Two SCM_RIGHTS in one packet: the kernel may merge or refuse them; none may be lost track of."""
    before = held()
    rights = array.array("i", [devnull])
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] * 2
    line.peer.sendmsg([b'{"type":"files"}'], control)
    _, received = line.daemon.receive()
    close_all(received)
    assert len(received) == 2
    assert held() == before


def test_a_message_of_the_wrong_wing_is_refused(line):
    line.peer.send(msgspec.json.encode(m.Query()))
    with pytest.raises(ProtocolError):
        line.client.receive()


# The end, and silence


def test_the_end_of_the_connection_is_closed(line):
    line.peer.close()
    with pytest.raises(Closed):
        line.daemon.receive()


def test_what_was_sent_before_the_end_is_read_first(line):
    line.peer.send(msgspec.json.encode(m.Query()))
    line.peer.close()
    assert line.daemon.receive() == (m.Query(), [])
    with pytest.raises(Closed):
        line.daemon.receive()


def test_an_empty_packet_counts_as_the_end_and_its_descriptors_are_closed(line, devnull):
    before = held()
    socket.send_fds(line.peer, [b""], [devnull] * 4)
    with pytest.raises(Closed):
        line.daemon.receive()
    assert held() == before


def test_silence_is_the_sockets_own_error(line):
    line.daemon.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        line.daemon.receive()
    line.daemon.socket.settimeout(0.01)
    with pytest.raises(TimeoutError):
        line.daemon.receive()


# Sending


@pytest.mark.parametrize("count", [0, 1])
def test_a_message_over_64_kib_is_not_sent(line, devnull, count):
    with pytest.raises(ProtocolError, match=rf"a Find of \d+ bytes, the limit is {MAX_PACKET_BYTES}"):
        Channel(line.peer, daemon_messages).send(m.Find(("x" * MAX_PACKET_BYTES,)), [devnull] * count)
    line.daemon.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        line.daemon.receive()


def test_sending_to_a_closed_peer_is_the_sockets_own_error(line):
    line.peer.close()
    with pytest.raises(BrokenPipeError):
        line.daemon.send(m.Done())


def test_sending_a_descriptor_that_is_none_sends_nothing(line):
    with pytest.raises(OSError, match="Bad file descriptor"):
        Channel(line.peer, daemon_messages).send(m.Files(), [999_999])
    line.daemon.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        line.daemon.receive()


def test_no_packet_raises_anything_but_protocol_errors():
    line = Line()
    mutated = st.builds(
        lambda message, at, noise, cut: (t := msgspec.json.encode(message))[: at % len(t)] + noise + t[at % len(t) + cut :],
        st.sampled_from([message for message, _ in CLIENT_MESSAGES]), st.integers(0, 100),
        st.binary(max_size=4), st.integers(0, 4),
    )  # fmt: skip
    outcomes = set()

    @settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(mutated, st.binary(min_size=1, max_size=50)))
    def say(packet):
        line.peer.send(packet or b" ")
        try:
            line.daemon.receive()
            outcomes.add("read")
        except ProtocolError:
            outcomes.add("refused")

    try:
        say()
    finally:
        line.close()
    assert outcomes == {"read", "refused"}
