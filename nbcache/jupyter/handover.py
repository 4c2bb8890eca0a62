"""What a launcher and a zygote have in common: where they meet, who fits whom, and what is said.

A launcher is a process that Jupyter started; a zygote is one that has imported what kernels need, and forks them. They meet at
a socket whose name tells the interpreter and the environment, so that a kernel is only ever forked from what it would have
become itself. Imports the standard library alone, and little of it: a restart waits for every import here (typing: 10 ms).

The conversation, in packets: the launcher sends its :class:`Request` (as a memfd) with its open descriptors; the zygote
answers ``accepted``, or ``refused WHY``; the launcher says ``go``; then come ``started PID`` (with the kernel's pidfd),
``serving`` once the kernel is one, or ``failed WHY``, and at the end ``exited STATUS``. ``signal N`` asks for a signal. Until
``go`` the launcher may leave and start an ordinary kernel; a zygote that did not hear it has started nothing.
"""

from __future__ import annotations

import array
import os
import resource
import socket
import sys
import time
import zlib

from nbcache import __version__

MAX_PACKET_BYTES = 4096
MAX_REQUEST_BYTES = 16 << 20
MAX_DESCRIPTORS = 250
OWN_FLAGS = ("-I", "-P", "-S")
"""What kernelspecs put before the launcher for its own sake; the kernel's interpreter does not get it."""

READ_AT_IMPORT = (
    "PYTHON", "LD_", "LC_", "LANG", "TORCH", "PYTORCH_", "AOT", "INDUCTOR_", "ATEN_", "KINETO_", "CUTLASS_", "CUTEDSL_",
    "PARTITIONER_", "PT2_", "HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_", "ACCELERATE_", "TOKENIZERS_", "DATASETS_", "SM_",
    "OAUTH_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "OPENBLAS_", "GOTO_", "BLIS_", "NUMEXPR_", "NUMBA_", "NPY_",
    "NUMPY_", "SCIPY_", "SKLEARN_", "PANDAS_", "MODIN_", "POLARS_", "ARROW_", "SYMPY_", "MPMATH_", "JOBLIB_", "LOKY_", "DASK_",
    "RAY_", "FSSPEC_", "ZARR_", "HDF5_", "GDAL_", "PROJ_", "MPL", "MATPLOTLIB", "PLOTLY_", "PYVISTA_", "PILLOW_", "IMAGEIO_",
    "OPENCV_", "PYOPENGL_", "MUJOCO_", "SDL_", "PYGAME_", "TQDM_", "LOGURU_", "PYDANTIC_", "SQLALCHEMY_", "GRADIO_",
    "NLTK_", "JUPYTER_WIDGETS_", "IPYTHON_", "TRAITLETS_", "PYDEVD_", "DEBUGPY_", "GEVENT_", "PYZMQ_", "TORNADO_", "PSUTIL_",
    "CUDA_", "CUDNN_", "CUBLAS_", "NVIDIA_", "CUPY_", "NCCL_", "TRITON_", "XFORMERS_", "FLASH", "VLLM_", "DS_", "BNB_",
    "BITSANDBYTES_", "TF_", "JAX", "EQX_", "FLAX_", "XLA_", "KERAS_", "DGL", "PYTENSOR_", "THEANO_", "USE_",
    "PROTOCOL_BUFFERS_", "GRPC_", "OPENSSL_", "CRYPTOGRAPHY_", "SETUPTOOLS_", "GLIBC_", "MALLOC_", "XDG_CACHE", "XDG_CONFIG",
    "XDG_DATA", "CONDA_", "VIRTUAL_ENV",
)  # fmt: skip
"""Beginnings of the names of variables that libraries read when they are imported, or loaded."""
READ_AT_IMPORT_TOO = (
    "HOME", "USER", "LOGNAME", "PATH", "TZ", "TZDIR", "TMPDIR", "TMP", "TEMP", "DISABLE_TELEMETRY", "DO_NOT_TRACK",
    "JUPYTER_ALLOW_INSECURE_WRITES", "JUPYTER_PLATFORM_DIRS", "QT_API", "EAGER_IMPORT", "SPACE_ID", "OPENID_PROVIDER_URL",
    "FAKE_ALLOW_META", "FX_PATCH_GETITEM", "UNSAFE_SKIP_FSDP_MODULE_GUARDS",
)  # fmt: skip
READ_AT_STARTUP = ("COVERAGE_PROCESS_", "COV_CORE_", "AUTOWRAPT_", "PYTHONHUNTER", "PYTHONMANHOLE")
"""Beginnings of the names of variables that have packages do something in every interpreter that starts, by a ``.pth`` file."""
NOT_AT_IMPORT = ("CUDA_VISIBLE_DEVICES", "DEBUGPY_ADAPTER_ENDPOINTS")
"""Read when the GPU is first used, which a zygote never does, or when the debugger is; an editor sets it for each window."""
PATHS = ("HOME", "DIR", "BASE", "_CACHE", "TMP", "TEMP", "MATPLOTLIBRC")
"""Ends of the names of variables that hold a path."""
SWITCHES = ("0", "1", "true", "false", "on", "off", "yes", "no")
FOLLOWED = ("PATH", "PYTHONPATH")
"""Lists of paths that a forked kernel looks at itself, from its own directory."""
SETTINGS = ("NBCACHE_PRELOAD", "NBCACHE_STANDBY", "NBCACHE_ZYGOTE_IDLE_S")

ACCEPTED, GO, SERVING, LEAVE, REPORT = b"accepted", b"go", b"serving", b"leave", b"report"
REFUSED, FAILED, STARTED, EXITED, SIGNAL = b"refused ", b"failed ", b"started ", b"exited ", b"signal "
"""Packets; those of the second line go on with what they tell."""


class Request:
    """Everything that a kernel inherits from whoever started it.

    Attributes
    ----------
    born : when the launcher was started, in seconds since 1970
    arguments : of the kernel, as after ``-m ipykernel_launcher``
    ignored : signals that are ignored from the start, as ``nohup`` does
    descriptors : the numbers of those that come with the request
    """

    def __init__(
        self,
        identity: bytes,
        born: float,
        arguments: list[str],
        directory: str,
        environment: dict[bytes, bytes],
        umask: int,
        limits: dict[int, tuple[int, int]],
        nice: int,
        ignored: list[int],
        blocked: list[int],
        descriptors: list[int],
    ) -> None:
        self.identity = identity
        self.born = born
        self.arguments = arguments
        self.directory = directory
        self.environment = environment
        self.umask = umask
        self.limits = limits
        self.nice = nice
        self.ignored = ignored
        self.blocked = blocked
        self.descriptors = descriptors

    def encode(self) -> bytes:
        """As a Python literal."""
        return ascii(vars(self)).encode()

    @classmethod
    def decode(cls, text: bytes) -> Request:
        """Back from :meth:`encode`. ValueError or SyntaxError for what is none."""
        import ast  # a launcher has no use for it

        values = ast.literal_eval(text.decode("ascii"))
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a request: {error}") from error


def describe(flags: list[str], arguments: list[str], descriptors: list[int], ignored: list[int]) -> Request:
    """The request of this process for a kernel in its place. OSError as the system says."""
    mask = os.umask(0)
    os.umask(mask)
    return Request(
        identity=identity(flags),
        born=_birth(),
        arguments=arguments,
        directory=os.getcwd(),
        environment=dict(os.environb),
        umask=mask,
        limits={number: resource.getrlimit(number) for number in _limits()},
        nice=os.getpriority(os.PRIO_PROCESS, 0),
        ignored=ignored,
        blocked=_signals("SigBlk"),
        descriptors=descriptors,
    )


def _birth() -> float:
    """When this process was started, in seconds since 1970: up to a tick of the system (10 ms) too late, never too early."""
    with open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    since_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)  # first: what comes between the two makes it late, not early
    now = time.time()
    return min(now, now - since_boot_s + (ticks + 1) * tick_s)


def _limits() -> list[int]:
    return sorted({number for name, number in vars(resource).items() if name.startswith("RLIMIT_")})


def ignored_signals() -> list[int]:
    """Signals that this process was started to ignore, without those that every Python ignores."""
    python_ignores = {13, 25}  # SIGPIPE, SIGXFSZ
    return [number for number in _signals("SigIgn") if number not in python_ignores]


def _signals(kind: str) -> list[int]:
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(kind.encode()):
                mask = int(line.split()[1], 16)
                return [number for number in range(1, 65) if mask >> (number - 1) & 1]
    return []


def inherited_descriptors() -> list[int]:
    """Those that this process was given. To be asked before it opens any that it would pass on itself."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            continue  # the listing's own
    return sorted(found)


def interpreter_flags(program: str) -> list[str]:
    """The interpreter's flags that are meant for the kernel. ``program`` is a module, or a script as it was named."""
    given = sys.orig_argv[1:]
    for position, word in enumerate(given):
        if word == program or (word == "-m" and given[position + 1 : position + 2] == [program]):
            return [flag for flag in given[:position] if flag not in OWN_FLAGS]
    return []


def identity(flags: list[str]) -> bytes:
    """All that a forked kernel could not change: interpreter, flags, variables read at import, credentials, namespaces, CPUs.

    A launcher and a zygote of the same identity fit each other.
    """
    return ascii(
        (
            __version__,
            os.path.abspath(__file__),
            os.path.abspath(sys.executable),
            flags,
            sorted((name, value) for name, value in os.environb.items() if is_read_at_import(name.decode("ascii", "replace"))),
            (os.getresuid(), os.getresgid(), sorted(os.getgroups())),
            [os.readlink(f"/proc/self/ns/{kind}") for kind in ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")],
            os.stat("/").st_ino,
            _text_of("/proc/self/cgroup"),
            sorted(os.sched_getaffinity(0)),  # libgomp and torch count the processors when they are loaded
        )
    ).encode()


def is_read_at_import(name: str) -> bool:
    """Whether a library may have read this variable by the time that it is imported."""
    if name in NOT_AT_IMPORT:
        return False
    return name.startswith(READ_AT_IMPORT + READ_AT_STARTUP) or name in READ_AT_IMPORT_TOO or name in SETTINGS


def means_ordinary() -> str:
    """A variable for which each kernel must be a process that was started for it; empty if there is none.

    It is read by what runs whenever an interpreter starts; or when something is imported, and is a path from this directory.
    """
    for name, value in os.environ.items():
        if value and (name.startswith(READ_AT_STARTUP) or (_is_relative(name, value) and is_read_at_import(name))):
            return name
    return ""


def _is_relative(name: str, value: str) -> bool:
    if name in FOLLOWED:
        return False
    if name.endswith(PATHS) and value.lower() not in SWITCHES:
        return not value.startswith(("/", "~"))
    return value.startswith(("./", "../")) or value in (".", "..")


def _text_of(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


class Place:
    """Where the zygote of an identity is met: its socket, the lock of whoever starts it, its log and the note of a failure."""

    def __init__(self, identity: bytes, folder: str | None = None) -> None:
        self.folder = folder or zygote_folder()
        self.key = f"{zlib.crc32(identity):08x}{zlib.adler32(identity):08x}"

    @property
    def socket(self) -> str:
        """Where the zygote listens."""
        return f"{self.folder}/{self.key}.sock"

    @property
    def lock(self) -> str:
        """Locked by a zygote until it listens."""
        return f"{self.folder}/{self.key}.lock"

    @property
    def log(self) -> str:
        """What zygotes write about themselves."""
        return f"{self.folder}/{self.key}.log"

    @property
    def failure(self) -> str:
        """Why the last zygote could not serve; there only if it could not."""
        return f"{self.folder}/{self.key}.failed"


def zygote_folder() -> str:
    """Where this user's zygotes are met: below NBCACHE_RUNTIME_DIR, else below the user's runtime directory."""
    chosen = os.environ.get("NBCACHE_RUNTIME_DIR")
    if chosen:
        return os.path.join(os.path.abspath(os.path.expanduser(chosen)), "zygotes")
    for base in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{os.getuid()}"):
        if base and os.path.isabs(base) and os.access(base, os.W_OK):
            return os.path.join(base, "nbcache", "zygotes")
    return f"/tmp/nbcache-{os.getuid()}/zygotes"  # noqa: S108 - is_private() looks at whose it is


def is_private(folder: str) -> bool:
    """Whether a directory and the one it is in are this user's, and nobody else may write to them. OSError without it."""
    for found in (os.lstat(folder), os.stat(os.path.dirname(folder))):
        if found.st_uid != os.getuid() or found.st_mode & 0o022 or found.st_mode & 0o170000 != 0o040000:
            return False
    return True


class Address:
    """A socket's address for ``bind`` and ``connect``, however long its path; a context manager."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._folder = -1

    def __enter__(self) -> str:
        if len(os.fsencode(self._path)) <= 107:
            return self._path
        folder, name = os.path.split(self._path)
        self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._folder}/{name}"

    def __exit__(self, *_: object) -> None:
        if self._folder >= 0:
            os.close(self._folder)


def connect(path: str) -> socket.socket | None:
    """Connect to a zygote; None if there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        with Address(path) as address:
            sock.connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock


def send_request(sock: socket.socket, request: Request) -> None:
    """Send a request and the descriptors that it lists. OSError; ValueError if there are more than a packet carries."""
    if len(request.descriptors) > MAX_DESCRIPTORS:
        raise ValueError(f"{len(request.descriptors)} open descriptors")
    with open(os.memfd_create("nbcache-request", os.MFD_CLOEXEC), "r+b", buffering=0) as file:
        file.write(request.encode())
        socket.send_fds(sock, [b"request"], [file.fileno(), *request.descriptors])


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """The next packet, empty at the end, and its descriptors, which are the caller's. OSError as the socket says."""
    room = socket.CMSG_SPACE((MAX_DESCRIPTORS + 1) * array.array("i").itemsize)
    packet, ancillary, _, _ = sock.recvmsg(MAX_PACKET_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    found = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(payload[: len(payload) - len(payload) % found.itemsize])
    return packet, list(found)


def read_request(fd: int) -> Request:
    """The request in a memfd. ValueError or SyntaxError for what is none."""
    size = os.fstat(fd).st_size
    if size > MAX_REQUEST_BYTES:
        raise ValueError(f"a request of {size} bytes")
    text = b""
    while len(text) < size:
        part = os.pread(fd, size - len(text), len(text))
        if not part:
            break
        text += part
    return Request.decode(text)


def connection_file(arguments: list[str], directory: str) -> str:
    """The connection file that a kernel's arguments name, as a full path; empty if they name none."""
    found = ""
    for position, word in enumerate(arguments):
        if word == "-f" and position + 1 < len(arguments):
            found = arguments[position + 1]
        elif word.startswith(("--f=", "-f=", "--IPKernelApp.connection_file=")):
            found = word.partition("=")[2]
        elif word.startswith("-f") and not word.startswith("-f="):
            found = word[2:]
    return os.path.realpath(os.path.join(directory, found)) if found else ""
