"""One zygote for the tests of a file, which is what a user has for days."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbcache.client.session import stop_daemon
from nbcache.jupyter.kernelspec import examine
from tests.support.kernels import Kernel
from tests.support.zygotes import start_zygote, write_specs, zygote, zygote_environment


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_specs(tmp_path_factory.mktemp("specs"))


@pytest.fixture(scope="module")
def warm(specs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A zygote that is ready."""
    with zygote_environment(tmp_path_factory.mktemp("zygote"), NBCACHE_PRELOAD="numpy,multiprocess"):
        try:
            start_zygote(specs)
            yield
        finally:
            stop_daemon()


@pytest.fixture
def kernel(warm: None, specs: Path) -> Iterator[Kernel]:
    """A kernel that was forked."""
    if not examine().zygotes:  # an earlier test ended it, and failed
        start_zygote(specs)
    zygote()
    with Kernel("nbcache", specs) as kernel:
        yield kernel
