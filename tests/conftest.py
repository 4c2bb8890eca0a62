"""Fixtures that every test has: a daemon of its own, and a check that it left nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbcache.client.session import stop_daemon
from tests.support.gpu import warm_gpu
from tests.support.leaks import Snapshot, leaked


@pytest.fixture(autouse=True)
def no_leaks(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that leaves a descriptor, a process, a daemon or a map of nbcache memory behind."""
    if request.node.get_closest_marker("gpu"):
        warm_gpu()  # what the first use of a GPU opens stays open
    before = Snapshot.take(str(tmp_path))
    yield
    left = leaked(before, str(tmp_path))
    assert not left, "left behind:\n" + "\n".join(left)


@pytest.fixture
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> Iterator[Path]:
    """A runtime directory of the test's own, for it and for the processes it starts; its daemon is stopped at the end."""
    directory = tmp_path / "runtime"
    monkeypatch.setenv("NBCACHE_RUNTIME_DIR", str(directory))
    monkeypatch.setenv("NBCACHE_ZYGOTE_IDLE_S", "0")  # none, unless the test is about them
    yield directory
    if os.environ.get("NBCACHE_RUNTIME_DIR") == str(directory):
        stop_daemon()
