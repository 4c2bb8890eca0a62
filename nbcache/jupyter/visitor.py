"""A launcher, as a zygote sees it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys

from nbcache.jupyter import handover
from nbcache.jupyter.supervision import Child

PACKET_TIMEOUT_S = 1.0
"""A launcher that does not take what it is told is not waited for."""


class Visitor:
    """A launcher: what it asked for, and later the kernel that it stands in for. Owns its connection and what came with it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PACKET_TIMEOUT_S)
        self.connection = connection
        self.request: handover.Request | None = None
        self.received: list[int] = []
        self.kernel: Child | None = None
        self.waiting = False
        """It said go, and waits for the end of another kernel of its connection file."""

    def say(self, packet: bytes, descriptors: tuple[int, ...] = ()) -> None:
        """Tell the launcher something, if it is still there."""
        with contextlib.suppress(OSError):
            socket.send_fds(self.connection, [packet[: handover.MAX_PACKET_BYTES]], descriptors)

    def drop_received(self) -> None:
        """Close what came with the request."""
        while self.received:
            os.close(self.received.pop())

    def peer(self) -> int:
        """The launcher's process. PermissionError if it is another user's."""
        credentials = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid = (int.from_bytes(credentials[at : at + 4], sys.byteorder) for at in (0, 4))
        if uid != os.getuid():
            raise PermissionError(f"user {uid} is another one")
        return pid
