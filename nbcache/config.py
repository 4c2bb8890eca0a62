"""Configuration, and the places on disk: one class for the daemon, the magics and the command line.

Options are traits of :class:`NBCache`. Each also reads an environment variable ``NBCACHE_<OPTION>``, which is how a kernel's
settings reach the daemon that it starts.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import psutil
from traitlets import Bool, Enum, Float, List, TraitError, Unicode, default, validate
from traitlets.config import Config, Configurable

from nbcache.errors import DaemonUnavailable, InvalidOption
from nbcache.typos import did_you_mean
from nbcache.units import parse_size


class NBCache(Configurable):
    """Settings of nbcache."""

    host_limit = Unicode(
        help="Most host memory that entries may take, such as 48G or 64GiB. Empty: half of what the machine, or the control "
        "group this process is in, has. Environment: NBCACHE_HOST_LIMIT.",
    ).tag(config=True)

    gpu_keep_s = Float(
        600.0,
        help="Seconds that weights nobody uses stay on a GPU; 0: not at all, -1: until the memory is needed. "
        "Environment: NBCACHE_GPU_KEEP_S.",
    ).tag(config=True)

    gpu_low_watermark = Unicode(
        "2GB",
        help="Free memory of a GPU below which weights that nobody uses leave it. Environment: NBCACHE_GPU_LOW_WATERMARK.",
    ).tag(config=True)

    serve_from_pretrained = Bool(
        help="Serve ordinary from_pretrained, load_file and safe_open from the cache, as %nbcache on does, wherever the "
        "extension is loaded. Environment: NBCACHE_SERVE_FROM_PRETRAINED.",
    ).tag(config=True)

    lora_gpu_limit = Unicode(
        "4GiB",
        help="Most GPU memory that LoRAs a kernel has used may take to stay hot, such as 4GiB; the rest is in pinned host "
        "memory. Environment: NBCACHE_LORA_GPU_LIMIT.",
    ).tag(config=True)

    start_timeout_s = Float(
        20.0, help="Seconds to wait for a daemon that is being started. Environment: NBCACHE_START_TIMEOUT_S."
    ).tag(config=True)

    reply_timeout_s = Float(
        20.0, help="Seconds of silence after which the daemon counts as hung. Environment: NBCACHE_REPLY_TIMEOUT_S."
    ).tag(config=True)

    preload = List(
        Unicode(),
        default_value=None,
        allow_none=True,
        help="Modules that the kernelspec's zygote imports ahead of kernels, beside torch and what kernels need themselves. "
        "None: those that earlier kernels imported and that took long; an empty list: none. Environment: NBCACHE_PRELOAD, with "
        "commas.",
    ).tag(config=True)

    zygote_idle_s = Float(
        3600.0,
        help="Seconds that a zygote stays without kernels; 0: there is none, and kernels start the ordinary way. "
        "Environment: NBCACHE_ZYGOTE_IDLE_S.",
    ).tag(config=True)

    standby = Enum(
        ("", "cuda"),
        "",
        help="cuda: the process that waits to become a kernel has a GPU context already, which takes about 0.5 GB of GPU "
        "memory. Environment: NBCACHE_STANDBY.",
    ).tag(config=True)

    @default("preload")
    def _default_preload(self) -> list[str] | None:
        text = os.environ.get("NBCACHE_PRELOAD")
        return None if text is None else [name.strip() for name in text.split(",") if name.strip()]

    @default("zygote_idle_s")
    def _default_zygote_idle_s(self) -> float:
        return _float_from_environment("NBCACHE_ZYGOTE_IDLE_S", 3600.0)

    @default("standby")
    def _default_standby(self) -> str:
        return os.environ.get("NBCACHE_STANDBY", "")

    @default("host_limit")
    def _default_host_limit(self) -> str:
        return os.environ.get("NBCACHE_HOST_LIMIT", "")

    @default("serve_from_pretrained")
    def _default_serve_from_pretrained(self) -> bool:
        return _bool_from_environment("NBCACHE_SERVE_FROM_PRETRAINED")

    @default("gpu_keep_s")
    def _default_gpu_keep_s(self) -> float:
        return _float_from_environment("NBCACHE_GPU_KEEP_S", 600.0)

    @default("gpu_low_watermark")
    def _default_gpu_low_watermark(self) -> str:
        return os.environ.get("NBCACHE_GPU_LOW_WATERMARK", "2GB")

    @default("lora_gpu_limit")
    def _default_lora_gpu_limit(self) -> str:
        return os.environ.get("NBCACHE_LORA_GPU_LIMIT", "4GiB")

    @default("start_timeout_s")
    def _default_start_timeout_s(self) -> float:
        return _float_from_environment("NBCACHE_START_TIMEOUT_S", 20.0)

    @default("reply_timeout_s")
    def _default_reply_timeout_s(self) -> float:
        return reply_timeout_s()

    @validate("host_limit", "gpu_low_watermark", "lora_gpu_limit")
    def _check_size(self, proposal: Any) -> str:  # noqa: ANN401 - traitlets gives a bunch
        value: str = proposal["value"]
        try:
            if value or proposal["trait"].name != "host_limit":
                parse_size(value)
        except InvalidOption as error:
            raise TraitError(f"NBCache.{proposal['trait'].name}: {error}") from error
        return value

    def _load_config(self, cfg: Config, section_names: Any = None, traits: Any = None) -> None:  # noqa: ANN401
        """Traitlets calls this for each configuration. TraitError for an option that does not exist, where it only warns."""
        check_names(name for name in self._find_my_config(cfg) if not name[:1].isupper())
        super()._load_config(cfg, section_names, traits)

    def host_limit_bytes(self) -> int:
        """The host tier's limit now. Asked again each time: some machines' memory grows as it is used."""
        try:
            return parse_size(self.host_limit) if self.host_limit else available_memory_bytes() // 2
        except InvalidOption as error:
            raise InvalidOption(f"NBCache.host_limit (NBCACHE_HOST_LIMIT): {error}") from error


def check_names(names: Iterable[str]) -> None:
    """TraitError, with the nearest option that exists, for a name of one that does not."""
    known = NBCache.class_trait_names(config=True)
    for name in names:
        if name not in known:
            meant = did_you_mean(name, known, 0.5) or f"; there are {', '.join(sorted(known))}"
            raise TraitError(f"no option NBCache.{name}{meant}")


def reply_timeout_s() -> float:
    """What ``NBCache.reply_timeout_s`` starts from. Asked by each load, which should not pay 0.2 ms for a Configurable."""
    return _float_from_environment("NBCACHE_REPLY_TIMEOUT_S", 20.0)


def lora_gpu_limit_bytes() -> int:
    """What ``NBCache.lora_gpu_limit`` comes to. Asked by each swap that maps a LoRA."""
    text = os.environ.get("NBCACHE_LORA_GPU_LIMIT", "4GiB")
    try:
        return parse_size(text)
    except InvalidOption as error:
        raise InvalidOption(f"NBCache.lora_gpu_limit (NBCACHE_LORA_GPU_LIMIT): {error}") from error


def _float_from_environment(name: str, otherwise: float) -> float:
    text = os.environ.get(name, "")
    try:
        return float(text) if text else otherwise
    except ValueError as error:
        raise InvalidOption(f"{name}={text!r} is not a number of seconds") from error


def _bool_from_environment(name: str) -> bool:
    text = os.environ.get(name, "").lower()
    if text not in ("", "0", "false", "no", "off", "1", "true", "yes", "on"):
        raise InvalidOption(f"{name}={text!r} is neither true nor false")
    return text in ("1", "true", "yes", "on")


@dataclass(frozen=True)
class RuntimePaths:
    """Where the daemon of this user is met: socket, locks and log."""

    runtime: Path
    state: Path

    @classmethod
    def of_user(cls) -> RuntimePaths:
        """From ``NBCACHE_RUNTIME_DIR`` (which moves the log too), else the platform's directories for this user."""
        chosen = os.environ.get("NBCACHE_RUNTIME_DIR")
        if chosen:
            runtime = Path(os.path.abspath(os.path.expanduser(chosen)))
            return cls(runtime, runtime)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a container has no XDG_RUNTIME_DIR: where there is none is our affair
            runtime = Path(platformdirs.user_runtime_dir("nbcache", appauthor=False))
        return cls(runtime, Path(platformdirs.user_state_dir("nbcache", appauthor=False)))

    @property
    def socket(self) -> Path:
        """Where the daemon listens."""
        return self.runtime / "daemon.sock"

    @property
    def lock(self) -> Path:
        """Locked by a daemon for as long as it lives."""
        return self.runtime / "daemon.lock"

    @property
    def start_lock(self) -> Path:
        """Locked by the client that starts a daemon."""
        return self.runtime / "start.lock"

    @property
    def log(self) -> Path:
        """What the daemon writes about itself."""
        return self.state / "daemon.log"

    def create(self) -> None:
        """Make the directories, private to the user. DaemonUnavailable if that cannot be, or if others may write to one."""
        for directory in dict.fromkeys((self.runtime, self.state)):
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                found = directory.stat()
            except OSError as error:
                raise DaemonUnavailable(
                    f"cannot make the directory {directory}: {error.strerror}; set NBCACHE_RUNTIME_DIR to one that you may "
                    "write"
                ) from error
            if found.st_uid != os.getuid():
                raise DaemonUnavailable(
                    f"{directory} belongs to user {found.st_uid}, not to you ({os.getuid()}); set NBCACHE_RUNTIME_DIR to a "
                    "directory of your own"
                )
            if stat.S_IMODE(found.st_mode) & 0o022:
                raise DaemonUnavailable(
                    f"others may write to {directory}; chmod 700 it, or set NBCACHE_RUNTIME_DIR to a directory of your own"
                )


class SocketAddress:
    """The socket's address for ``bind`` and ``connect``, however long its path.

    Over 107 bytes, the system's limit, it goes through an open directory. A context manager: the address holds only inside it.
    OSError if the directory is not there.
    """

    LONGEST = 107

    def __init__(self, path: Path) -> None:
        self._path = path
        self._directory = -1

    def __enter__(self) -> str:
        if len(os.fsencode(self._path)) <= self.LONGEST:
            return str(self._path)
        self._directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._directory}/{self._path.name}"

    def __exit__(self, *_: object) -> None:
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory this process may use: the machine's, or the least limit of its control groups (v2 and v1) where that is less."""
    return min([int(psutil.virtual_memory().total), *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> list[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        # Inside a container the path may be the host's: then only the mount's own root is there to read.
        for directory in (group, *group.parents):
            limits += _limit_in(directory / name)
            if directory == mount:
                break
    return limits


def _limit_in(file: Path) -> list[int]:
    try:
        text = file.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []
