"""What a kernel owes those who talk to it because it opens its ports sooner than they expect.

Jupyter's programs, and ZeroMQ below them, are made for kernels that take half a second to open their ports. Owns what a forked
one, which takes a tenth of that, does for it: what it publishes waits until all who listened to the kernel before it listen
again, and what was meant for that one is disregarded. It exists because neither is an error that anybody would be told of: a
message is lost, and a front end waits for it. Needs ipykernel, 6.29 or newer.
"""

from __future__ import annotations

import atexit
import inspect
import os
import time
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipykernel.iostream import IOPubThread
    from ipykernel.kernelbase import Kernel

RETURN_S = 0.25
"""How long after a port is open all who look for it have found it: ZeroMQ tries again after 100 to 199 ms."""
LEFT_OVER_S = 10.0
"""How long a kernel that begins to answer may get what was meant for the one before it: ZeroMQ tries for 100 ms to bring it."""


class Peers:
    """Those who talk to a kernel that was asked for at ``born``, in seconds since 1970. One for each kernel."""

    def __init__(self, born: float) -> None:
        self._born = born
        self._all_there_s = 0.0

    def hold_back(self, thread: IOPubThread) -> None:
        """Have what is published from now on, as the port has just been opened, wait until all who want it are connected.

        In order, and for :data:`RETURN_S` at most. ZeroMQ drops what is published to somebody who is not connected yet, while
        requests, which have connections of their own, are answered already: a cell's output would be lost, and its end.
        """
        self._all_there_s = time.monotonic() + RETURN_S
        pid, send = os.getpid(), thread._really_send
        held: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        is_held = True

        def hold(*message: Any, **options: Any) -> None:  # noqa: ANN401
            if is_held and os.getpid() == pid:
                held.append((message, options))
            else:  # in a child that the kernel forked, to its parent
                send(*message, **options)  # type: ignore[no-untyped-call]

        def release() -> None:
            nonlocal is_held
            is_held = False
            atexit.unregister(release_at_exit)
            if thread._really_send is hold:
                del thread._really_send
            for message, options in held:
                send(*message, **options)  # type: ignore[no-untyped-call]
            held.clear()

        def release_at_exit() -> None:
            if os.getpid() == pid and thread.thread.is_alive():
                self._await()  # or nobody would be told how it ended
                thread.io_loop.add_callback(release)

        thread._really_send = hold  # type: ignore[method-assign]
        atexit.register(release_at_exit)  # comes before the thread's own, which ends it
        thread.io_loop.add_callback(thread.io_loop.call_later, RETURN_S, release)

    def _await(self) -> None:
        """Wait until all are there."""
        time.sleep(max(0.0, self._all_there_s - time.monotonic()))

    def mind(self, kernel: Kernel) -> None:
        """Have the kernel ask its first question, and obey its first orders, with that in mind."""
        self._ask_later(kernel)
        self._disregard_what_is_older(kernel)

    def _ask_later(self, kernel: Kernel) -> None:
        """A question, of ``input()``, is lost as output is; its cell would wait for ever."""
        ask = kernel._input_request

        def input_request(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            self._await()
            return ask(*arguments, **options)

        kernel._input_request = input_request  # type: ignore[method-assign]

    def _disregard_what_is_older(self, kernel: Kernel) -> None:
        """A request to shut down that was made before this kernel was asked for is not for it.

        Where a kernel had died, or was interrupted before it could listen, jupyter_client's request reaches whoever opens the
        same port within 100 ms of it.
        """
        start, obey = kernel.start, kernel.control_handlers.get("shutdown_request")
        if obey is None:
            return
        until_s = 0.0

        def begin() -> Any:  # noqa: ANN401
            nonlocal until_s
            until_s = time.monotonic() + LEFT_OVER_S  # start-up files may have taken long, and nothing is read before this
            return start()  # type: ignore[no-untyped-call]

        async def shutdown_request(stream: object, ident: object, parent: Mapping[str, Any]) -> None:
            made = parent["header"].get("date")
            if isinstance(made, datetime) and made.timestamp() < self._born and time.monotonic() < until_s:
                kernel.log.info("Disregarded a request to shut down the kernel before this one.")
                return
            done = obey(stream, ident, parent)
            if inspect.isawaitable(done):
                await done

        kernel.start = begin  # type: ignore[method-assign]
        kernel.control_handlers["shutdown_request"] = shutdown_request
