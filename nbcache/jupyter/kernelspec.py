"""The kernelspec "Python 3 (nbcache)": installed, removed, examined; and the zygotes behind it.

The wheel brings one for servers of its own environment. ``nbcache kernelspec install`` writes one that names this interpreter,
for servers of any other. It imports neither torch nor ipykernel's kernel.
"""

from __future__ import annotations

import ast
import json
import os
import re
import select
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
from jupyter_client.kernelspec import KernelSpecManager

from nbcache.errors import KernelSpecError
from nbcache.jupyter import handover
from nbcache.jupyter.experience import by_package, recall

NAME = "nbcache"
DISPLAY_NAME = "Python 3 (nbcache)"
LAUNCHER = str(Path(__file__).with_name("launcher.py"))
LAUNCHER_MODULE = "nbcache.jupyter.launcher"
FOR_DEBUGGERS = ("-Xfrozen_modules=off",)
"""As ``python -m ipykernel install`` writes it: a breakpoint in a frozen module of Python's own is never met."""
ANSWER_TIMEOUT_S = 5.0
END_TIMEOUT_S = 10.0


class SpecState(msgspec.Struct, frozen=True):
    """A kernelspec that starts our launcher."""

    name: str
    folder: str
    argv: tuple[str, ...]
    problem: str
    """Why no kernel of it can start; empty if nothing is wrong."""


class ZygoteState(msgspec.Struct, frozen=True):
    """A zygote that answers."""

    pid: int
    executable: str
    kernels: int
    ready: bool
    """Whether a forked process waits."""
    preloaded: dict[str, float]
    """Packages that were imported ahead, and how many seconds each took."""
    files: int
    """How many files it compares with what it has imported."""


class KernelState(msgspec.Struct, frozen=True):
    """What there is to know about the kernelspec on this machine."""

    specs: tuple[SpecState, ...]
    zygotes: tuple[ZygoteState, ...]
    failures: tuple[str, ...]
    """Why zygotes could not serve; kernels start the ordinary way then."""
    learned: dict[str, float]
    """Packages that the next zygote of this interpreter imports ahead, and the seconds that this saves."""
    broken: dict[str, str]
    """What it leaves out, and why."""


def argv_of_this_interpreter() -> list[str]:
    """What a kernelspec is to start, from whichever environment the server runs in."""
    return [os.path.abspath(sys.executable), *FOR_DEBUGGERS, "-I", "-S", LAUNCHER, "-f", "{connection_file}", "--ext=nbcache"]


def install(name: str = NAME, display_name: str = "", prefix: str | None = None) -> str:
    """Install a kernelspec for this interpreter, and return its folder.

    ``prefix`` is an environment's, such as ``sys.prefix``; without it, the user's own Jupyter folder. A kernelspec of that name
    is replaced if it is one of ours. KernelSpecError if it is another's, or the folder cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]*[A-Za-z0-9_-]", name):
        raise KernelSpecError(f"{name!r}: letters, digits, '.', '-' and '_' make the name of a kernelspec")
    manager = KernelSpecManager()
    for found in (_found(manager, name), _placed(manager, name, prefix)):
        if found is not None and not is_ours(found):
            raise KernelSpecError(f"{name} is another kernel's name ({found}); give one of your own with --name")
    with tempfile.TemporaryDirectory(prefix="nbcache-kernelspec-") as folder:
        Path(folder, "kernel.json").write_text(json.dumps(_document(display_name or DISPLAY_NAME), indent=1) + "\n")
        for logo in _logos():
            shutil.copy(logo, folder)
        try:
            return str(manager.install_kernel_spec(folder, name, user=prefix is None, prefix=prefix))
        except OSError as error:
            raise KernelSpecError(f"cannot write a kernelspec to {error.filename}: {error.strerror}") from error


def remove(name: str = NAME, prefix: str | None = None, user: bool = False) -> tuple[str, str | None]:
    """Remove a kernelspec of ours. The folder it was in, and that of another of this name, which Jupyter finds now.

    ``prefix`` is an environment's; ``user`` means the user's own Jupyter folder and no other. Without either it is the user's
    own where there is one, as ``install`` writes it, else the one that Jupyter finds. Zygotes without kernels end.
    KernelSpecError if there is none, or it is another's.
    """
    manager = KernelSpecManager()
    folder = _placed(manager, name, prefix)
    if folder is None and prefix is None and not user:
        folder = _found(manager, name)
    if folder is None:
        raise KernelSpecError(_none_called(name, _found(manager, name)))
    if not is_ours(folder):
        raise KernelSpecError(f"{name} is another kernel's ({folder}); jupyter kernelspec remove {name} removes it")
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise KernelSpecError(f"cannot remove {folder}: {error.strerror}") from error
    end_zygotes()
    return folder, _found(manager, name)


def _none_called(name: str, elsewhere: str | None) -> str:
    if elsewhere is None:
        return f"no kernelspec is called {name}; jupyter kernelspec list shows those that there are"
    return f"no kernelspec there is called {name}; there is one in {elsewhere}"


def _placed(manager: KernelSpecManager, name: str, prefix: str | None) -> str | None:
    """The kernelspec's folder below a prefix, or the user's own; None if there is none."""
    kernels = manager.user_kernel_dir if prefix is None else Path(prefix, "share", "jupyter", "kernels")
    folder = Path(kernels, name)
    return str(folder) if Path(folder, "kernel.json").is_file() else None


def _found(manager: KernelSpecManager, name: str) -> str | None:
    """The folder of the kernelspec that Jupyter finds by this name; None if there is none."""
    return manager.find_kernel_specs().get(name)  # without reading it: it may be anything


def _document(display_name: str) -> dict[str, object]:
    from ipykernel.kernelspec import get_kernel_dict

    metadata = dict(get_kernel_dict().get("metadata", {}))  # what this ipykernel is capable of, encryption say
    return {
        "argv": argv_of_this_interpreter(),
        "display_name": display_name,
        "language": "python",
        "metadata": {**metadata, "debugger": True},
    }


def _logos() -> list[Path]:
    places = (Path(sys.prefix, "share/jupyter/kernels", NAME), Path(__file__).parents[2] / "kernelspec")
    return next((logos for place in places if (logos := sorted(place.glob("logo-*")))), [])


def is_ours(folder: str) -> bool:
    """Whether the kernelspec in a folder starts our launcher, of this installation or another."""
    return any(_is_launcher(word) for word in _argv(folder))


def _is_launcher(word: str) -> bool:
    return word == LAUNCHER_MODULE or word.endswith("/nbcache/jupyter/launcher.py")


def _argv(folder: str) -> list[str]:
    try:
        document = json.loads(Path(folder, "kernel.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    argv = document.get("argv") if isinstance(document, dict) else None
    return [str(word) for word in argv] if isinstance(argv, list) else []


def examine() -> KernelState:
    """The kernelspecs that start our launcher, the zygotes of this user, and what was learned for this interpreter."""
    known = recall()
    folders = KernelSpecManager().find_kernel_specs().items()
    return KernelState(
        specs=tuple(_spec_state(name, folder) for name, folder in sorted(folders) if is_ours(folder)),
        zygotes=tuple(_zygote_states()),
        failures=tuple(
            f"{path.stem}: {path.read_text(errors='replace').strip()}" for path in sorted(_zygote_folder().glob("*.failed"))
        ),
        learned=by_package(known.learned),
        broken=known.broken,
    )


def _spec_state(name: str, folder: str) -> SpecState:
    argv = _argv(folder)
    problem = ""
    if os.path.isabs(argv[0]) and not os.access(argv[0], os.X_OK):
        problem = f"there is no interpreter {argv[0]}; install it anew with `nbcache kernelspec install`"
    for word in argv:
        if word.endswith("/launcher.py") and not os.path.exists(word):
            problem = f"{word} is gone; install it anew with `nbcache kernelspec install`"
    return SpecState(name, folder, tuple(argv), problem)


def _zygote_folder() -> Path:
    return Path(handover.zygote_folder())


def _connections() -> Iterator[socket.socket]:
    """A connection to each zygote that listens."""
    for path in sorted(_zygote_folder().glob("*.sock")):
        try:
            connection = handover.connect(str(path))
        except OSError:
            continue
        if connection is not None:
            with connection:
                connection.settimeout(ANSWER_TIMEOUT_S)
                yield connection


def _zygote_states() -> Iterator[ZygoteState]:
    for connection in _connections():
        try:
            connection.send(handover.REPORT)
            packet, _ = handover.receive(connection)
            yield msgspec.convert(ast.literal_eval(packet.decode("ascii")), ZygoteState)
        except (OSError, ValueError, SyntaxError, msgspec.ValidationError):
            continue  # it is leaving, or of another version


def end_zygotes() -> int:
    """Have every zygote of this user take no more kernels, and leave once it has none. How many there were.

    Waits for those without kernels.
    """
    count = 0
    for connection in _connections():
        pid = int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            select.select([pidfd], [], [], END_TIMEOUT_S if not _has_kernels(connection) else 0)
        except OSError:
            continue
        finally:
            os.close(pidfd)
        count += 1
    return count


def _has_kernels(connection: socket.socket) -> bool:
    try:
        connection.send(handover.REPORT)
        packet, _ = handover.receive(connection)
        return bool(ast.literal_eval(packet.decode("ascii"))["kernels"])
    except (OSError, ValueError, SyntaxError, KeyError):
        return False
