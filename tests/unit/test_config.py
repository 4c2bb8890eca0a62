"""Settings, the places of a user's daemon, long socket paths, and the memory a container may use."""

from __future__ import annotations

import os
import re
import socket
import stat
from pathlib import Path

import psutil
import pytest
from traitlets import TraitError
from traitlets.config import Config

from nbcache.config import NBCache, RuntimePaths, SocketAddress, available_memory_bytes
from nbcache.errors import DaemonUnavailable, InvalidOption, NBCacheError

MACHINE = psutil.virtual_memory().total
GIB = 1 << 30
SMALL = 64 << 20
"""Less than any machine has, so that the group's limit is what counts."""


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


# Control groups

V2 = "0::/user.slice/app.scope\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, MACHINE),
        ({"proc/self/cgroup": ""}, MACHINE),
        ({"proc/self/cgroup": V2}, MACHINE),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/user.slice/app.scope/memory.max": "max\n"}, MACHINE),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/user.slice/app.scope/memory.max": f"{SMALL}\n"}, SMALL),
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/user.slice/app.scope/memory.max": f"{2 * SMALL}\n",
                "sys/fs/cgroup/user.slice/memory.max": f"{SMALL}\n",
            },
            SMALL,
        ),
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/user.slice/app.scope/memory.max": "max\n",
                "sys/fs/cgroup/user.slice/memory.max": f"{SMALL}\n",
            },
            SMALL,
        ),
        # inside a container: the path is the host's, the mount's root is the group
        ({"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/memory.max": f"{SMALL}\n"}, SMALL),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{SMALL}\n"}, SMALL),
        ({"proc/self/cgroup": "0::/../../other\n", "sys/fs/cgroup/memory.max": f"{SMALL}\n"}, SMALL),
        ({"proc/self/cgroup": "0::/with:colon\n", "sys/fs/cgroup/with:colon/memory.max": f"{SMALL}\n"}, SMALL),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/user.slice/app.scope/memory.max": "garbage"}, MACHINE),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/user.slice/app.scope/memory.max": f"{1 << 62}"}, MACHINE),
        # a file above the mount is no limit
        ({"proc/self/cgroup": V2, "sys/fs/memory.max": f"{SMALL}\n"}, MACHINE),
    ],
)
def test_limits_of_version_2(tmp_path, files, expected):
    assert available_memory_bytes(tree(tmp_path, files)) == expected


V1 = "11:cpu,cpuacct:/docker/abc\n5:memory:/docker/abc\n1:name=systemd:/docker/abc\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": V1}, MACHINE),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{SMALL}\n"}, SMALL),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{SMALL}\n"}, SMALL),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "9223372036854771712\n"}, MACHINE),
        (
            {
                "proc/self/cgroup": "5:hugetlb,memory:/a\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{2 * SMALL}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{SMALL}\n",
            },
            SMALL,
        ),
        # both versions at once: the least counts
        (
            {
                "proc/self/cgroup": V1 + "0::/docker/abc\n",
                "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{2 * SMALL}\n",
                "sys/fs/cgroup/docker/abc/memory.max": f"{SMALL}\n",
            },
            SMALL,
        ),
        # another controller's group is not memory's
        ({"proc/self/cgroup": "5:memory_like:/a\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{SMALL}\n"}, MACHINE),
    ],
)
def test_limits_of_version_1(tmp_path, files, expected):
    assert available_memory_bytes(tree(tmp_path, files)) == expected


def test_this_machine_has_memory():
    assert 0 < available_memory_bytes() <= MACHINE


# Settings


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("NBCACHE_", "XDG_")):
            monkeypatch.delenv(name)


def test_by_default_half_of_the_memory_is_the_limit():
    assert NBCache().host_limit_bytes() == available_memory_bytes() // 2


def test_the_limit_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("NBCACHE_HOST_LIMIT", "3GiB")
    assert NBCache().host_limit_bytes() == 3 * GIB
    monkeypatch.setenv("NBCACHE_HOST_LIMIT", "")
    assert NBCache().host_limit_bytes() == available_memory_bytes() // 2


def test_a_configured_limit_goes_before_the_environments(monkeypatch):
    monkeypatch.setenv("NBCACHE_HOST_LIMIT", "3GiB")
    assert NBCache(config=Config(NBCache={"host_limit": "2G"})).host_limit_bytes() == 2 * 10**9
    assert NBCache(host_limit="1G").host_limit_bytes() == 10**9


def test_a_limit_that_is_no_size_is_refused_when_it_is_set():
    config = NBCache()
    with pytest.raises(TraitError, match=r"NBCache.host_limit: 'plenty' is not a size"):
        config.host_limit = "plenty"
    assert config.host_limit == ""
    with pytest.raises(TraitError):
        NBCache(host_limit="-1G")


def test_a_limit_in_the_environment_that_is_no_size_is_refused_by_a_typed_error(monkeypatch):
    monkeypatch.setenv("NBCACHE_HOST_LIMIT", "plenty")
    with pytest.raises((InvalidOption, TraitError), match="'plenty' is not a size"):
        NBCache().host_limit_bytes()


@pytest.mark.parametrize(
    ("variable", "trait", "otherwise"),
    [("NBCACHE_START_TIMEOUT_S", "start_timeout_s", 20.0), ("NBCACHE_REPLY_TIMEOUT_S", "reply_timeout_s", 20.0)],
)
def test_timeouts_are_read_from_the_environment(monkeypatch, variable, trait, otherwise):
    assert getattr(NBCache(), trait) == otherwise
    monkeypatch.setenv(variable, "1.5")
    assert getattr(NBCache(), trait) == 1.5
    monkeypatch.setenv(variable, "soon")
    with pytest.raises(InvalidOption, match=f"{variable}='soon'"):
        getattr(NBCache(), trait)


# Places


def test_one_variable_moves_everything(monkeypatch, tmp_path):
    monkeypatch.setenv("NBCACHE_RUNTIME_DIR", str(tmp_path / "r"))
    paths = RuntimePaths.of_user()
    places = {paths.socket, paths.lock, paths.start_lock, paths.log}
    assert len(places) == 4
    assert {place.parent for place in places} == {tmp_path / "r"}


def test_a_relative_directory_or_one_of_the_home_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBCACHE_RUNTIME_DIR", "r")
    assert RuntimePaths.of_user().runtime == tmp_path / "r"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NBCACHE_RUNTIME_DIR", "~/s")
    assert RuntimePaths.of_user().runtime == tmp_path / "s"


def test_by_default_the_platforms_directories_are_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "run").mkdir(mode=0o700)
    paths = RuntimePaths.of_user()
    assert paths.socket == tmp_path / "run" / "nbcache" / "daemon.sock"
    assert paths.log == tmp_path / "state" / "nbcache" / "daemon.log"


def test_directories_are_made_private_to_the_user(tmp_path):
    paths = RuntimePaths(tmp_path / "a" / "b", tmp_path / "c")
    paths.create()
    paths.create()
    assert stat.S_IMODE(paths.runtime.stat().st_mode) == 0o700
    assert paths.state.is_dir()


def test_a_directory_that_was_there_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o755)
    RuntimePaths(tmp_path, tmp_path).create()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path, mode):
    """They could put a socket of their own in the daemon's place."""
    tmp_path.chmod(mode)
    with pytest.raises(DaemonUnavailable, match="others may write to"):
        RuntimePaths(tmp_path, tmp_path).create()
    tmp_path.chmod(0o700)


def test_a_directory_of_another_user_is_refused(tmp_path, monkeypatch):
    """Really owned by another user where the test may give it away; else this process says it is somebody else."""
    if os.getuid() == 0:
        os.chown(tmp_path, 65534, 65534)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 65534)
    with pytest.raises(DaemonUnavailable, match=f"{re.escape(str(tmp_path))} belongs to user .*NBCACHE_RUNTIME_DIR"):
        RuntimePaths(tmp_path, tmp_path).create()


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/nbcache", "x" * 300])
def test_a_directory_that_cannot_be_made_is_refused_by_name(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(NBCacheError, match="NBCACHE_RUNTIME_DIR") as caught:
        RuntimePaths(tmp_path / name, tmp_path / name).create()
    assert isinstance(caught.value, DaemonUnavailable)
    assert name in str(caught.value)


# Socket addresses


def path_of(folder: Path, length: int) -> Path:
    """A socket's path of this many bytes below a folder, which is made."""
    while (missing := length - len(os.fsencode(folder / "daemon.sock"))) > 1:
        folder /= "d" * min(missing - 1, 100)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / ("daemon.sock" + "k" * missing)


@pytest.mark.parametrize("length", [105, 106, 107, 108, 109, 110, 250, 1000])
def test_a_socket_binds_and_connects_however_long_its_path(tmp_path, length):
    path = path_of(tmp_path, length)
    assert len(os.fsencode(path)) == length
    before = os.listdir("/proc/self/fd")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        with SocketAddress(path) as address:
            listener.bind(address)
        listener.listen()
        assert stat.S_ISSOCK(path.stat().st_mode)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            with SocketAddress(path) as address:
                client.connect(address)
            client.send(b"hello")
            served, _ = listener.accept()
            with served:
                assert served.recv(10) == b"hello"
    assert os.listdir("/proc/self/fd") == before


def test_a_path_of_wide_characters_counts_in_bytes(tmp_path):
    (tmp_path / ("ü" * 60)).mkdir()
    path = tmp_path / ("ü" * 60) / "s"
    with socket.socket(socket.AF_UNIX) as listener, SocketAddress(path) as address:
        listener.bind(address)
        assert path.exists()


def test_a_long_path_without_its_directory_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError), SocketAddress(tmp_path / ("d" * 120) / "s"):
        raise AssertionError("unreachable")


def test_the_limit_of_hot_loras_is_a_size(monkeypatch):
    from nbcache.config import lora_gpu_limit_bytes

    monkeypatch.delenv("NBCACHE_LORA_GPU_LIMIT", raising=False)
    assert lora_gpu_limit_bytes() == 4 << 30
    assert NBCache().lora_gpu_limit == "4GiB"
    monkeypatch.setenv("NBCACHE_LORA_GPU_LIMIT", "500MB")
    assert lora_gpu_limit_bytes() == 500_000_000
    assert NBCache().lora_gpu_limit == "500MB"
    monkeypatch.setenv("NBCACHE_LORA_GPU_LIMIT", "much")
    with pytest.raises(InvalidOption, match=r"NBCache\.lora_gpu_limit \(NBCACHE_LORA_GPU_LIMIT\)"):
        lora_gpu_limit_bytes()
    with pytest.raises(TraitError, match="lora_gpu_limit"):
        NBCache(lora_gpu_limit="much")
