"""What several of these files set up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def one_thread(runtime_dir: Path) -> Iterator[None]:
    """A daemon of the test's own, and one thread for torch: tiny models are too small for more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
