"""What a kernel does for its peers, one rule at a time, with a clock that is set."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from ipykernel.iostream import IOPubThread

from nbcache.jupyter import peers as room
from nbcache.jupyter.peers import Peers
from tests.support.waiting import eventually

BORN = 1_800_000_000.0


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that stands still until it is moved."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(room.time, "monotonic", lambda: now.s)
    return now


class FakeKernel:
    """As much of a kernel as is asked to shut down."""

    def __init__(self, orders: tuple[str, ...] = ("shutdown_request",)) -> None:
        self.obeyed: list[Any] = []
        self.log = logging.getLogger("kernel")
        self.control_handlers = dict.fromkeys(orders, self._obey)

    def _input_request(self) -> str:
        return "an answer"

    def start(self) -> str:
        return "started"

    async def _obey(self, stream: object, ident: object, parent: Any) -> None:
        self.obeyed.append(parent)

    def is_ended_by(self, header: dict[str, Any]) -> bool:
        before = len(self.obeyed)
        asyncio.run(self.control_handlers["shutdown_request"](None, None, {"header": header}))
        return len(self.obeyed) > before


def made(offset_s: float) -> dict[str, Any]:
    return {"date": datetime.fromtimestamp(BORN + offset_s, UTC)}


def started(kernel: FakeKernel) -> FakeKernel:
    Peers(BORN).mind(kernel)  # type: ignore[arg-type]
    assert kernel.start() == "started"
    return kernel


def test_a_request_is_disregarded_if_it_is_older_than_the_kernel(clock):
    kernel = started(FakeKernel())
    assert not kernel.is_ended_by(made(-0.001))
    assert not kernel.is_ended_by(made(-3600))
    assert kernel.is_ended_by(made(0))
    assert kernel.is_ended_by(made(+1))


def test_but_not_for_long(clock):
    """Clocks differ, and are set: a kernel must not be deaf for longer than something can be left over."""
    kernel = started(FakeKernel())
    clock.s += room.LEFT_OVER_S - 0.01
    assert not kernel.is_ended_by(made(-1))
    clock.s += 0.02
    assert kernel.is_ended_by(made(-1))


def test_the_time_counts_from_when_it_begins_to_answer(clock):
    kernel = FakeKernel()
    Peers(BORN).mind(kernel)  # type: ignore[arg-type]
    clock.s += 600  # start-up files
    kernel.start()
    assert not kernel.is_ended_by(made(-1))


@pytest.mark.parametrize("header", [{}, {"date": "2026-01-01T00:00:00Z"}, {"date": None}])
def test_a_request_without_a_date_is_obeyed(clock, header):
    assert started(FakeKernel()).is_ended_by(header)


def test_a_kernel_whose_orders_are_others(clock):
    started(FakeKernel(orders=()))
    kernel = FakeKernel()
    kernel.control_handlers["shutdown_request"] = lambda *order: kernel.obeyed.append(order)  # it waits for nothing
    assert started(kernel).is_ended_by(made(+1))


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def thread(context):
    """An IOPub thread, with the address of its port."""
    socket = context.socket(zmq.PUB)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    thread = IOPubThread(socket, pipe=True)
    thread.start()
    yield thread, f"tcp://127.0.0.1:{port}"
    tidying = thread._event_pipe_gc_task  # which a stop leaves pending, and Python complains
    thread.io_loop.add_callback(tidying.cancel)
    eventually(tidying.done)
    thread.stop()
    thread.close()


def subscribe(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    subscriber = context.socket(zmq.SUB)
    subscriber.subscribe(b"")
    subscriber.connect(address)
    return subscriber


def test_what_is_published_waits_for_those_who_come_late_and_keeps_its_order(context, thread, monkeypatch):
    monkeypatch.setattr(room, "RETURN_S", 1.0)
    thread, address = thread
    Peers(BORN).hold_back(thread)
    thread.send_multipart([b"first"])
    thread.send_multipart([b"second"])
    with subscribe(context, address) as late:
        assert late.poll(300) == 0
        thread.send_multipart([b"third"])
        assert [late.recv() for _ in range(3) if late.poll(20_000)] == [b"first", b"second", b"third"]
        thread.send_multipart([b"at once"])
        assert late.poll(20_000)
        assert late.recv() == b"at once"
    assert "_really_send" not in vars(thread)


def test_a_question_waits_too(thread, monkeypatch):
    monkeypatch.setattr(room, "RETURN_S", 0.2)
    kernel, peers = FakeKernel(), Peers(BORN)
    before = time.monotonic()
    peers.hold_back(thread[0])
    peers.mind(kernel)  # type: ignore[arg-type]
    assert kernel._input_request() == "an answer"
    assert time.monotonic() >= before + 0.2
    eventually(lambda: "_really_send" not in vars(thread[0]))


def test_when_a_process_was_started():
    """Never too early: what was asked of another process before this one was started is older."""
    code = "from nbcache.jupyter import handover; print(repr(handover._birth()))"
    for _ in range(5):
        before = time.time()
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            launched = time.time()
            said, _ = process.communicate(timeout=60)
        assert before <= float(said) <= launched + 1
