"""A real JupyterLab, and a real Chromium that is pointed at it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import eventually

STARTING_S = 120.0
REPOSITORY = Path(__file__).resolve().parents[2]


def chromium() -> str:
    """The system's Chromium. Without one the test fails, unless NBCACHE_NO_BROWSER=1 says that this is known."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None and os.environ.get("NBCACHE_NO_BROWSER") == "1":
        pytest.skip("NBCACHE_NO_BROWSER=1, and there is no Chromium")
    if found is None:
        pytest.fail(
            "no Chromium: apt-get install chromium, as .ci/run does, or set NBCACHE_NO_BROWSER=1 to go without this test"
        )
    return found


def artifacts() -> Path:
    """Where screenshots are kept: NBCACHE_ARTIFACTS, or build/artifacts."""
    folder = Path(os.environ.get("NBCACHE_ARTIFACTS") or REPOSITORY / "build" / "artifacts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def jupyter_lab(root: Path, **environment: str) -> Iterator[str]:
    """A JupyterLab over a folder; the address to open, without a file."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    options = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    options += ["--LabApp.expose_app_in_browser=True"]  # for its commands, such as the one that changes the theme
    with open(artifacts() / "jupyterlab.log", "wb") as log:
        server = subprocess.Popen(
            [*command, *options, f"--ServerApp.root_dir={root}"],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        eventually(
            lambda: _answers(f"http://127.0.0.1:{port}/api/status?token={token}") or server.poll() is not None, STARTING_S
        )
        assert server.poll() is None, (artifacts() / "jupyterlab.log").read_text()
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}"
    finally:
        server.terminate()
        server.wait(60)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
        return answer.status == 200
    return False
