"""In a process that a zygote forked: waits to become a kernel, then is one, as if it had been started by itself.

Everything that a kernel inherits from who starts it comes with the request: arguments, directory, environment, standard
streams and other descriptors, umask, limits, niceness, ignored signals. What an interpreter sets up from that at its start is
set up again. What stays different is in ``nbcache help restarts``: the parent process, the session, the hash seed, the layout
of addresses.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import os
import resource
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TextIO

from nbcache.jupyter import handover, proof, traces
from nbcache.jupyter.ahead import Ahead
from nbcache.jupyter.installed import entries_in
from nbcache.jupyter.peers import Peers
from nbcache.jupyter.veil import Veil

ABOVE = 200
"""Descriptors that are in the way are moved to numbers from here on."""
UNLIMITED_STACK_BYTES = 2 << 20
"""What glibc gives threads where the stack has no limit, on x86-64."""
SIZE_OF_ATTRIBUTES = 128
"""Room for a ``pthread_attr_t``: 56 bytes on x86-64, 64 on Arm."""
START_ERROR = 121
"""Exit status of a process that did not get as far as to be a kernel. Nobody sees it: the launcher starts an ordinary one."""


class Birth:
    """From a forked process to a kernel.

    Notes
    -----
    ``job`` is the connection to the zygote. The request comes on it, ``serving`` or ``failed`` goes back, and afterwards it
    shows whether the zygote lives.
    """

    def __init__(self, job: socket.socket) -> None:
        self._job = job
        self._launcher = -1

    def wait(self) -> handover.Request:
        """Wait for a request, and take over its descriptors. Leaves if the zygote goes away."""
        try:
            packet, received = handover.receive(self._job)
        except OSError:
            os._exit(0)
        if not packet:
            os._exit(0)
        memfd, self._launcher, *descriptors = received
        request = handover.read_request(memfd)
        os.close(memfd)
        if len(descriptors) != len(request.descriptors):
            raise ValueError(f"{len(descriptors)} descriptors, {len(request.descriptors)} were listed")
        self._job = socket.socket(fileno=_move_up(self._job.detach()))
        self._launcher = _move_up(self._launcher)
        take_descriptors(descriptors, request.descriptors)
        return request

    def watch(self) -> None:
        """From now on, end this process's group once zygote and launcher are gone. Either would see to it, while it lives."""
        threading.Thread(target=self._end_when_alone, name="nbcache-watch", daemon=True).start()

    def _end_when_alone(self) -> None:
        with contextlib.suppress(OSError):
            self._job.recv(1)
        select.select([self._launcher], [], [])
        os.killpg(0, signal.SIGKILL)

    def tell(self, packet: bytes) -> None:
        """Say something to the zygote, if it is still there."""
        with contextlib.suppress(OSError):
            self._job.send(packet[: handover.MAX_PACKET_BYTES])


def live(
    job: socket.socket,
    prepare: Callable[[], None] | None,
    variables: Mapping[str, str],
    anew: Iterable[str],
    ahead: Ahead,
) -> NoReturn:
    """What a forked process does with its life. ``prepare`` is done before the request comes, if given.

    ``variables`` are those that a kernel's own modules set in its environment when they are imported; ``anew`` the modules that
    it is to import itself, if it wants them; ``ahead`` those that it is to find once it imports them.
    """
    birth, writers, veil = Birth(job), traces.Writers(), Veil(ahead)
    try:
        if prepare is not None:
            prepare()
        forget_modules(anew)
        veil.draw()
        request = birth.wait()
        follow_path(request.directory)
        inherit(request)
        begin_anew(request, veil.known)
        os.environ.update(variables)
        birth.watch()
        _adapt_kernel(lambda: birth.tell(handover.SERVING), request.born, writers, veil)
    except Exception as error:  # noqa: BLE001 - told to the zygote
        birth.tell(handover.FAILED + f"{type(error).__name__}: {error}".encode(errors="replace"))
        traceback.print_exc()
        os._exit(START_ERROR)
    leave(run_kernel())


def _move_up(fd: int) -> int:
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, ABOVE)
    os.close(fd)
    return moved


def take_descriptors(received: list[int], numbers: list[int]) -> None:
    """Give received descriptors the numbers they had, and close the standard streams that were not among them."""
    received = [_move_up(fd) for fd in received]
    for fd, number in zip(received, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    for number in {0, 1, 2} - set(numbers):
        os.close(number)


def follow_path(directory: str) -> None:
    """Have ``sys.path`` as in an interpreter that starts in a directory, not in this one. As site does: no entry twice."""
    if moved := dict(zip(entries_in(os.getcwd()), entries_in(directory), strict=True)):
        sys.path[:] = dict.fromkeys(moved.get(entry, entry) for entry in sys.path)


def inherit(request: handover.Request) -> None:
    """Be what the launcher is, as far as the system is concerned. OSError where that is not allowed."""
    os.umask(request.umask)
    os.chdir(request.directory)
    for number, limits in request.limits.items():
        if resource.getrlimit(number) != limits:
            resource.setrlimit(number, limits)
            if number == resource.RLIMIT_STACK:
                set_stack_of_threads(limits[0])
    if os.getpriority(os.PRIO_PROCESS, 0) != request.nice:
        os.setpriority(os.PRIO_PROCESS, 0, request.nice)
    ignored = {*request.ignored, signal.SIGINT}  # an interrupt is for a cell: ipykernel takes it while it handles a message
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ):
            with contextlib.suppress(OSError, ValueError):  # those that the C library keeps for itself
                signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked)
    os.environ.clear()
    os.environb.update(request.environment)


def set_stack_of_threads(size_bytes: int) -> None:
    """Give threads the stack that they would have, had the process been started with this limit (glibc reads it then alone)."""
    size_bytes = UNLIMITED_STACK_BYTES if size_bytes == resource.RLIM_INFINITY else size_bytes
    library, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(SIZE_OF_ATTRIBUTES)
    with contextlib.suppress(AttributeError):  # another C library
        if library.pthread_attr_init(attributes) == 0:
            if library.pthread_attr_setstacksize(attributes, ctypes.c_size_t(size_bytes)) == 0:
                library.pthread_setattr_default_np(attributes)
            library.pthread_attr_destroy(attributes)


def begin_anew(request: handover.Request, find: Callable[[str], Any]) -> None:
    """Set up what an interpreter and its libraries set up when they start. ``find`` gives a module, if it was imported."""
    sys.argv[:] = ["-m", *request.arguments]
    sys.orig_argv[:] = [
        sys.executable,
        *handover.interpreter_flags("nbcache.jupyter.zygote"),
        "-m",
        "ipykernel_launcher",
        *request.arguments,
    ]
    if not sys.flags.safe_path:
        sys.path.insert(0, request.directory)
    open_streams(request.descriptors)
    tempfile.tempdir = None
    tempfile._name_sequence = None  # type: ignore[attr-defined]
    importlib.invalidate_caches()
    for name in ("multiprocessing", "multiprocess"):
        if (module := find(f"{name}.process")) is not None:
            module.__dict__["ORIGINAL_DIR"] = request.directory
            module.current_process().authkey = os.urandom(32)
    proof.reseed(find)
    traces.begin_logging_anew()


def forget_modules(names: Iterable[str]) -> None:
    """Have these imported anew; matplotlib, too, looks for its backend again."""
    gone = [sys.modules.pop(name, None) for name in names]
    pyplot: Any = sys.modules.get("matplotlib.pyplot")
    if (backend := getattr(pyplot, "_backend_mod", None)) is not None and backend in gone:
        pyplot._backend_mod = None


def open_streams(numbers: list[int]) -> None:
    """New ``sys.stdin``, ``stdout``, ``stderr`` over the descriptors, of the old ones' encoding; None for what is closed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old: TextIO | None = getattr(sys, f"__{name}__")
        stream = _open_stream(number, name, old) if number in numbers else None
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _open_stream(number: int, name: str, old: TextIO | None) -> TextIO:
    """As CPython's ``create_stdio`` opens them (Python/pylifecycle.c)."""
    unbuffered = bool(getattr(old, "write_through", False))
    binary: Any = open(number, "wb" if number else "rb", buffering=0 if unbuffered else -1, closefd=False)  # noqa: SIM115
    getattr(binary, "raw", binary).name = f"<{name}>"
    stream = io.TextIOWrapper(
        binary,
        encoding=old.encoding if old is not None else None,
        errors=old.errors if old is not None else None,
        newline="\n",
        line_buffering=not unbuffered and (number == 2 or os.isatty(number)),
        write_through=unbuffered,
    )
    stream.__dict__["mode"] = "w" if number else "r"
    return stream


def _adapt_kernel(tell: Callable[[], None], born: float, writers: traces.Writers, veil: Veil) -> None:
    """Prepare ipykernel for a kernel that was forked. The class is as it was once the kernel has started.

    The kernel that starts next calls ``tell`` once it has opened its ports, minds its :class:`Peers`, and does not look after
    its parent: that is not who started it, and ipykernel would end it as soon as the zygote is gone. That it was started by
    Jupyter, it still knows. ``writers`` are those to the zygote's streams.
    """
    from ipykernel.kernelapp import IPKernelApp

    init_poller, peers = IPKernelApp.init_poller, Peers(born)

    def without_poller(self: IPKernelApp) -> None:
        IPKernelApp.init_poller = init_poller  # type: ignore[method-assign]
        self.parent_handle = int(os.environ.get("JPY_PARENT_PID") or 0)

    IPKernelApp.init_poller = without_poller  # type: ignore[method-assign]
    _after_next(IPKernelApp, "init_iopub", lambda app: peers.hold_back(app.iopub_thread))
    _after_next(IPKernelApp, "init_heartbeat", lambda app: tell())
    _after_next(IPKernelApp, "init_io", lambda app: writers.hand_over())
    _after_next(IPKernelApp, "init_kernel", lambda app: peers.mind(app.kernel))
    _after_next(IPKernelApp, "init_gui_pylab", lambda app: veil.settle(app.shell))


def _after_next(cls: type[Any], name: str, then: Callable[[Any], None]) -> None:
    """Have the next call of a class's method be followed by something. The class is as it was from that call on."""
    stock = getattr(cls, name)

    def once(self: object, *arguments: object) -> None:
        setattr(cls, name, stock)
        stock(self, *arguments)
        then(self)

    setattr(cls, name, once)


def run_kernel() -> int:
    """Run ``ipykernel_launcher`` as the main program; its exit status."""
    try:
        runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return (leaving.code or 0) & 0xFF
        print(leaving.code, file=sys.__stderr__)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc(file=sys.__stderr__)
        return 130
    except BaseException:  # noqa: BLE001 - as an interpreter does
        traceback.print_exc(file=sys.__stderr__)
        return 1
    return 0


def leave(status: int) -> NoReturn:
    """End as an interpreter does, in its order, but tear nothing down.

    With a GPU context that would take half a second, and the system does it anyway. Files that are open still are flushed, as
    they would be when they are torn down.
    """
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(BaseException):
            if stream is not None:
                stream.flush()
    with contextlib.suppress(BaseException):
        flush_files()
    ctypes.CDLL(None).fflush(None)  # what C libraries have printed
    os._exit(status)


def flush_files() -> None:
    """Write what files of this process's still buffer; compressed ones are closed, for they end with a mark."""
    kinds = {type(each) for each in gc.get_objects()}
    wanted = {
        kind for kind in kinds if issubclass(kind, io.IOBase) and not issubclass(kind, io.RawIOBase)
        and not str(kind.__module__).startswith("ipykernel.")
    }  # fmt: skip
    files: list[Any] = [each for each in gc.get_objects() if type(each) in wanted]
    compressed = [each for each in files if type(each).__module__ in ("gzip", "bz2", "lzma")]
    for file, end in (*((each, True) for each in compressed), *((each, False) for each in files)):
        with contextlib.suppress(BaseException):
            if not file.closed and file.writable():
                if end:
                    file.close()
                else:
                    file.flush()
