"""What several of these files set up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.kernels import WITH_SAME, Interpreter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def one_thread(runtime_dir: Path) -> Iterator[None]:
    """A daemon of the test's own, and one thread for torch: tiny models are too small for more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def failures(tmp_path: Path) -> Path:
    """What the emulated driver is to fail at: a JSON list in this file, read anew at each call."""
    return tmp_path / "failures.json"


@pytest.fixture
def emulated(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, failures: Path) -> None:
    """Daemon and kernels of this test have the emulated driver."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("NBCACHE_TEST_DRIVER", "tests.support.emulated:make")
    monkeypatch.setenv("NBCACHE_TEST_FAILURES", str(failures))
    monkeypatch.setenv("NBCACHE_GPU_LOW_WATERMARK", "0")


@pytest.fixture
def kernel(emulated: None) -> Iterator[Interpreter]:
    """A kernel over the emulated driver, with what these tests ask of one."""
    with Interpreter() as kernel:
        kernel.run(WITH_SAME)
        yield kernel
