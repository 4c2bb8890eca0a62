"""One zygote for the tests of a file, which is what a user has for days; or one for a test, with packages it makes up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbcache.client.session import stop_daemon
from nbcache.jupyter.kernelspec import examine
from tests.support.kernels import Kernel
from tests.support.zygotes import installed, is_forked, start_zygote, write_specs, zygote, zygote_environment


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


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A zygote's surroundings of the test's own, and a folder of installed packages that the test fills."""
    site = tmp_path / "site-packages"
    (site / "made_up-1.0.dist-info").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(site))
    with zygote_environment(tmp_path):
        yield site


@pytest.fixture
def own_specs(tmp_path: Path) -> Path:
    return write_specs(tmp_path / "specs")


@pytest.fixture
def start(environment: Path, own_specs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Kernel]]:
    """A forked kernel whose zygote has imported these modules ahead, each of its source."""
    with ExitStack() as stack:

        def start(**sources: str) -> Kernel:
            monkeypatch.setenv("NBCACHE_PRELOAD", ",".join(sources))
            for name, source in sources.items():
                installed(environment, name, source)
            start_zygote(own_specs)
            kernel = stack.enter_context(Kernel("nbcache", own_specs))
            assert is_forked(kernel)
            return kernel

        yield start
