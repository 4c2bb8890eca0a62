"""One packet, one message: encoding, and a socket that carries descriptors.

The socket is ``SOCK_SEQPACKET``: the kernel keeps packets whole, so there is nothing to reassemble, and descriptors belong to
the packet they came with. Receipt of a descriptor is a transfer of ownership (I8): a packet that is refused has its
descriptors closed before the error is raised. Both wings use this module; it knows neither of them.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from nbcache.errors import ProtocolError
from nbcache.protocol.messages import ClientMessage, DaemonMessage, Message

MAX_PACKET_BYTES = 64 << 10
MAX_DESCRIPTORS = 253
_INT = array.array("i").itemsize

M = TypeVar("M", bound=Message)

_encoder = msgspec.json.Encoder()
client_messages: msgspec.json.Decoder[ClientMessage] = msgspec.json.Decoder(ClientMessage)
"""Reads what a client says."""
daemon_messages: msgspec.json.Decoder[DaemonMessage] = msgspec.json.Decoder(DaemonMessage)
"""Reads what the daemon says."""


class Closed(Exception):
    """The peer ended the connection between two packets."""


class Channel(Generic[M]):
    """A connected socket that sends messages and receives messages of kind ``M``.

    Notes
    -----
    Not locked: one thread at a time. A timeout or an error of :meth:`receive` leaves no descriptor behind; after ProtocolError
    the connection is not to be used again.
    """

    def __init__(self, sock: socket.socket, decoder: msgspec.json.Decoder[M]) -> None:
        self.socket = sock
        self._decoder = decoder

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one message; the descriptors stay the caller's. OSError as the socket says."""
        packet = _encoder.encode(message)
        if len(packet) > MAX_PACKET_BYTES:
            raise ProtocolError(f"a {type(message).__name__} of {len(packet)} bytes, the limit is {MAX_PACKET_BYTES}")
        if descriptors:
            socket.send_fds(self.socket, [packet], list(descriptors))
        else:
            self.socket.send(packet)

    def receive(self) -> tuple[M, list[int]]:
        """The next message and the descriptors that came with it, which are now the caller's.

        Closed at the end of the connection; ProtocolError for anything but one whole message with its number of descriptors;
        OSError (BlockingIOError, TimeoutError) as the socket says, and one of EMFILE if this process may open no more files.
        """
        packet, ancillary, flags, _ = self.socket.recvmsg(
            MAX_PACKET_BYTES, socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT), socket.MSG_CMSG_CLOEXEC
        )
        descriptors = _descriptors(ancillary)
        try:
            return self._read(packet, flags, len(descriptors)), descriptors
        except BaseException:
            close_all(descriptors)
            raise

    def _read(self, packet: bytes, flags: int, descriptor_count: int) -> M:
        if flags & socket.MSG_CTRUNC and not flags & socket.MSG_TRUNC and descriptor_count < MAX_DESCRIPTORS:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # there was room for more: the system made no more of them
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError(f"a packet over {MAX_PACKET_BYTES} bytes or {MAX_DESCRIPTORS} descriptors")
        if not packet:
            raise Closed
        try:
            message = self._decoder.decode(packet)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"not a message: {error}") from error
        least, most = message.DESCRIPTORS
        if not least <= descriptor_count <= most:
            raise ProtocolError(f"a {type(message).__name__} with {descriptor_count} descriptors, expected {least} to {most}")
        return message

    def close(self) -> None:
        """End the connection."""
        self.socket.close()


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(payload[: len(payload) - len(payload) % _INT])
    return list(found)


def close_all(descriptors: Sequence[int]) -> None:
    """Close what was received and will not be used."""
    for descriptor in descriptors:
        os.close(descriptor)
