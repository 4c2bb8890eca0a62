"""What the kernelspec starts: it has a kernel forked in its place and stands in for it, or becomes an ordinary kernel itself.

Jupyter knows this process alone. It passes signals on to the kernel, learns from the zygote how the kernel ended, and ends the
same way. Where there is no zygote that fits, or anything at all goes wrong, ``ipykernel_launcher`` takes its place, as soon as
its ports are free.
The standard library alone, and little of it: imports are most of what a launcher costs.

``python -P -m nbcache.jupyter.launcher -f CONNECTION_FILE ...``, or this file as a script (with ``-I -S``, which is quicker).
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

if not __package__:  # as a script: nbcache is found beside all else, not before it
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from nbcache.jupyter import handover

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

PROGRAM = "nbcache.jupyter.launcher" if __package__ else sys.argv[0]
KERNEL = "ipykernel_launcher"
ZYGOTE = "nbcache.jupyter.zygote"
PASSED_ON = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
    signal.SIGWINCH,
)  # fmt: skip
ANSWER_TIMEOUT_S = 3.0
"""For a zygote's first answer: a second is spent on what an ordinary kernel needs anyway."""
SERVING_TIMEOUT_S = 30.0
"""For a kernel that was forked to open its ports."""
SETTLING_TIMEOUT_S = 5.0
PORTS_TIMEOUT_S = 30.0
"""For the ports of a kernel's connection file to be free: their last holder may be dying."""
LEAST_DESCRIPTORS = 1024
"""A zygote keeps the limits of who started it, whatever those of its kernels are."""
MOST_ZYGOTES = 4
"""Each has a copy of torch; an environment that is different in every run must not fill the memory."""
FAILURE_REST_S = 600.0
"""How long no new zygote is tried after one that could not serve."""


class Unavailable(Exception):
    """No kernel can be forked here and now; the message says why."""


class StandIn:
    """This process, from the request to the kernel's end.

    Notes
    -----
    Signals come at any time: until there is a kernel they wait, then they go to its process group, by way of the zygote while
    that lives, which cannot hit a stranger that got the kernel's number. An interrupt is for a cell: before there is a kernel
    there is none, and a kernel ignores it until it has one.
    """

    def __init__(self, flags: list[str], arguments: list[str]) -> None:
        self._flags = flags
        self._arguments = arguments
        self._signals: list[int] = []
        self._kernel = 0
        self._pidfd = -1
        self._serving = False
        for number in PASSED_ON:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._pass_on)

    def run(self, descriptors: list[int], ignored: list[int]) -> int:
        """Have a kernel forked, wait for its end, and return its status as ``waitpid`` gives it. Unavailable, OSError."""
        request = handover.describe(self._flags, self._arguments, descriptors, ignored)
        self.place = handover.Place(request.identity)
        if not handover.is_private(self.place.folder):
            raise Unavailable(f"others may write to {self.place.folder}")
        connection = handover.connect(self.place.socket)
        if connection is None:
            raise Unavailable("no zygote runs")
        with connection:
            self._connection = connection
            connection.settimeout(ANSWER_TIMEOUT_S)
            handover.send_request(connection, request)
            try:
                answer, _ = handover.receive(connection)
            except TimeoutError:
                os.unlink(self.place.socket)  # it hangs: let it not be asked again, and leave when it can
                raise
            if answer != handover.ACCEPTED:
                raise Unavailable(answer.decode(errors="replace") or "the zygote is gone")
            connection.send(handover.GO)
            return self._stand_in()

    def _stand_in(self) -> int:
        parent = _parent_to_watch()
        waiting = select.poll()
        waiting.register(self._connection, select.POLLIN)
        if parent >= 0:
            waiting.register(parent, select.POLLIN)
        self._connection.settimeout(SETTLING_TIMEOUT_S)
        deadline = time.monotonic() + SERVING_TIMEOUT_S
        while True:
            left_ms = None if self._serving else max(0.0, deadline - time.monotonic()) * 1000
            ready = [fd for fd, _ in waiting.poll(left_ms)]
            if not ready:
                raise Unavailable(f"the kernel opened no port in {SERVING_TIMEOUT_S:g} s")
            if parent in ready:
                os._exit(1)  # and the zygote ends the kernel: nobody is left to talk to it
            status = self._hear()
            if status is not None:
                return status

    def _hear(self) -> int | None:
        """Take in what the zygote says; the kernel's status once it is known."""
        try:
            packet, descriptors = handover.receive(self._connection)
        except ConnectionError:
            packet, descriptors = b"", []
        if packet.startswith(handover.STARTED):
            self._kernel, (self._pidfd,) = int(packet.split()[1]), descriptors
            for number in self._signals:
                self._deliver(number)
        elif packet == handover.SERVING:
            self._serving = True
        elif packet.startswith(handover.EXITED):
            status = int(packet.split()[1])
            if not self._serving and not self._signals and status:
                raise Unavailable(f"the kernel ended before it served, status {status}")
            return status
        elif packet.startswith(handover.FAILED):
            raise Unavailable(packet.decode(errors="replace"))
        elif not packet:
            return self._outlive_the_zygote()
        return None

    def _outlive_the_zygote(self) -> int:
        """Without its zygote a kernel lives on; how it ends stays unknown."""
        if self._pidfd < 0:
            raise Unavailable("the zygote went away")
        parent = _parent_to_watch()
        ready, _, _ = select.select([self._pidfd, *([parent] if parent >= 0 else [])], [], [])
        if self._pidfd not in ready:
            os.killpg(self._kernel, signal.SIGKILL)
        return 0 if self._serving else 1 << 8

    def _pass_on(self, number: int, _frame: object) -> None:
        if number != signal.SIGINT:
            self._signals.append(number)
        if self._kernel:
            self._deliver(number)

    def _deliver(self, number: int) -> None:
        try:
            self._connection.send(handover.SIGNAL + b"%d" % number)
        except OSError:  # no zygote any more
            if not select.select([self._pidfd], [], [], 0)[0]:
                os.killpg(self._kernel, number)

    def end_kernel(self) -> None:
        """See to it that no kernel of ours is left. The zygote ends it once the connection is closed."""
        if self._pidfd >= 0:
            select.select([self._pidfd], [], [], SETTLING_TIMEOUT_S)

    @property
    def asked_to_end(self) -> int:
        """The first signal, if any came before there was a kernel to take it."""
        return next((number for number in self._signals if number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)), 0)


def _parent_to_watch() -> int:
    """The process without which this one is not wanted, as a pidfd, if Jupyter said so; else -1."""
    wanted = os.environ.get("JPY_PARENT_PID", "")
    if not wanted.isdigit() or int(wanted) in (0, 1) or os.getppid() != int(wanted):
        return -1
    return os.pidfd_open(int(wanted))


def end_as(status: int) -> NoReturn:
    """End this process the way that another one did."""
    if not os.WIFSIGNALED(status):
        os._exit(os.waitstatus_to_exitcode(status))
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the kernel's core is the one to look at
    number = os.WTERMSIG(status)
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def become_ordinary(flags: list[str], arguments: list[str]) -> NoReturn:
    """Become the kernel that Python's own kernelspec would have started."""
    os.execv(sys.executable, [sys.executable, *flags, "-m", KERNEL, *arguments])  # noqa: S606 - on purpose


def await_ports(arguments: list[str]) -> None:
    """Wait until the ports of the connection file are free: a kernel that was killed with its memory full still holds them."""
    import errno
    import json
    import socket

    try:
        with open(handover.connection_file(arguments, os.getcwd()), encoding="utf-8") as file:
            known = json.load(file)
        ip = known.get("ip", "").replace("*", "")  # empty: any
        ports = [port for name, port in known.items() if name.endswith("_port") and port in range(1, 1 << 16)]
        if known.get("transport", "tcp") != "tcp":
            return
    except (OSError, ValueError, TypeError, AttributeError):
        return  # the kernel will say what is wrong
    deadline = time.monotonic() + PORTS_TIMEOUT_S
    for port in ports:
        while time.monotonic() < deadline:
            with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ZeroMQ does
                try:
                    probe.bind((ip, port))
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        time.sleep(0.02)
                        continue
            break


def start_zygote(place: handover.Place, flags: list[str]) -> None:
    """Start a zygote for the next kernels, out of this process's tree and session, unless one is there or it is off."""
    if os.environ.get("NBCACHE_ZYGOTE_IDLE_S", "").strip() in ("0", "0.0") or handover.means_ordinary():
        return
    try:
        os.makedirs(place.folder, mode=0o700, exist_ok=True)
        if not handover.is_private(place.folder) or time.time() - _modified(place.failure) < FAILURE_REST_S:
            return
        if _zygotes_in(place.folder) >= MOST_ZYGOTES or _is_confined():
            return
        pid = os.fork()
        if not pid:
            _become_zygote(place, flags)
        os.waitpid(pid, 0)
    except OSError:
        return


def _zygotes_in(folder: str) -> int:
    """How many zygotes listen. Sockets of those that were killed are removed."""
    count = 0
    for name in os.listdir(folder):
        if name.endswith(".sock"):
            connection = handover.connect(f"{folder}/{name}")
            if connection is None:
                os.unlink(f"{folder}/{name}")
            else:
                connection.close()
                count += 1
    return count


def _is_confined() -> bool:
    """Whether this process has limits that a zygote cannot live with: it would have them for good.

    Limits of memory are no such: whoever has none, or others, gets an ordinary kernel where the zygote's are in the way.
    """
    import resource

    descriptors, seconds = resource.getrlimit(resource.RLIMIT_NOFILE)[1], resource.getrlimit(resource.RLIMIT_CPU)[0]
    return 0 <= descriptors < LEAST_DESCRIPTORS or seconds != resource.RLIM_INFINITY


def _modified(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _become_zygote(place: handover.Place, flags: list[str]) -> NoReturn:
    """In a forked child: leave, and become a zygote. Never returns."""
    try:
        if os.fork():
            os._exit(0)
        os.setsid()
        nothing, log = os.open(os.devnull, os.O_RDWR), os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for target, source in ((0, nothing), (1, log), (2, log)):
            os.dup2(source, target)
        os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
        os.chdir(place.folder)  # Python puts it first on its path: it is ours, and holds no code
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JPY_")}
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
        os.execve(sys.executable, [sys.executable, *flags, "-m", ZYGOTE, place.key], environment)  # noqa: S606
    finally:
        os._exit(1)


def main() -> NoReturn:
    """Stand in for a kernel, or become one."""
    descriptors, ignored = handover.inherited_descriptors(), handover.ignored_signals()
    flags, arguments = handover.interpreter_flags(PROGRAM), sys.argv[1:]
    stand_in = StandIn(flags, arguments)
    try:
        status = stand_in.run(descriptors, ignored)
    except Exception as error:  # noqa: BLE001 - whatever it was: an ordinary kernel
        if os.environ.get("NBCACHE_LAUNCHER_LOG"):
            os.write(2, f"nbcache: an ordinary kernel: {type(error).__name__}: {error}\n".encode(errors="replace"))
    else:
        end_as(status)
    stand_in.end_kernel()
    if stand_in.asked_to_end:
        end_as(stand_in.asked_to_end)
    start_zygote(handover.Place(handover.identity(flags)), flags)
    await_ports(arguments)
    become_ordinary(flags, arguments)


if __name__ == "__main__":
    main()
