"""What is asked in a process of its own, because the asking imports torch, starts a GPU driver, or may not come back.

``python -m nbcache.doctor.probes driver|torch`` answers with one JSON document; :func:`ask` starts such a process. A child that
hangs or crashes is an answer too. Must not judge.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from nbcache.memory.features import DriverProbe, probe_driver

PATIENCE_S = 60.0
"""How long a child may take; importing torch from a cold network disk takes most of that."""

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])

A = TypeVar("A", bound=msgspec.Struct)


class TorchProbe(msgspec.Struct, frozen=True):
    """What torch says of itself. ``cuda`` is the CUDA it was built for, or empty; ``error`` why it does not import."""

    version: str = ""
    cuda: str = ""
    gpus: int = 0
    lacks: tuple[str, ...] = ()
    """Private names of torch that copy-on-write needs, and that are gone."""
    error: str = ""


class Silent(msgspec.Struct, frozen=True):
    """A child that gave no answer, and how it ended."""

    reason: str


class Question(Generic[A]):
    """A child that has been asked. :meth:`answer` waits for it; close it, or use it as a context manager."""

    def __init__(self, what: str, kind: type[A], environment: Mapping[str, str]) -> None:
        self._kind = kind
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "nbcache.doctor.probes", what],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_child_environment(environment),
        )

    def __enter__(self) -> Question[A]:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()

    def answer(self) -> A | Silent:
        """What the child found."""
        try:
            text, _ = self._child.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            return Silent(f"no answer within {PATIENCE_S:g} s")
        try:
            return msgspec.json.decode(text, type=self._kind)
        except msgspec.DecodeError:
            status = self._child.returncode
            return Silent(f"crashed: {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}")


def _child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    paths = [_PACKAGE_ROOT, *(entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry)]
    # A torch that counts GPUs by NVML does not start the driver.
    return {**environment, "PYTHONPATH": os.pathsep.join(paths), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def ask_torch(environment: Mapping[str, str]) -> Question[TorchProbe]:
    """Ask torch about itself."""
    return Question("torch", TorchProbe, environment)


def ask_driver(environment: Mapping[str, str]) -> Question[DriverProbe]:
    """Ask the GPU driver what it can do."""
    return Question("driver", DriverProbe, environment)


def _probe_torch() -> TorchProbe:
    try:
        import torch

        from nbcache.client.cow import _MISSING
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is the answer
        return TorchProbe(error=" ".join(f"{type(error).__name__}: {error}".split()))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return TorchProbe(str(torch.__version__), torch.version.cuda or "", gpus, tuple(_MISSING))


PROBES: Mapping[str, Callable[[], msgspec.Struct]] = {"driver": probe_driver, "torch": _probe_torch}


def main() -> None:
    """Answer on the real stdout; what libraries print goes to stderr."""
    answers = os.dup(1)
    os.dup2(2, 1)
    os.write(answers, msgspec.json.encode(PROBES[sys.argv[1]]()))


if __name__ == "__main__":
    main()
