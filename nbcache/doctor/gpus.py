"""What the answers about GPU, driver and torch mean, and what to do about them. Pure: asks nothing itself but the file system.

Whatever fails here costs speed alone: weights are then copied to the GPU the ordinary way. So nothing is worse than a warning,
but a torch that does not import.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbcache.doctor.findings import Finding, broken, ok, warning
from nbcache.doctor.probes import Silent, TorchProbe
from nbcache.memory import features as f
from nbcache.units import format_size

NVIDIA = "0x10de"
DISPLAY_CLASSES = ("0x0300", "0x0302")
OLDEST_TORCH = (2, 6)
CUDA_13_DRIVER = 580
"""The first driver branch that CUDA 13, and so cuda-bindings 13, works with."""


@dataclass(frozen=True)
class Hardware:
    """NVIDIA GPUs on the PCI bus, and the version of the kernel module, or empty."""

    cards: int
    module: str

    @classmethod
    def find(cls, root: Path = Path("/")) -> Hardware:
        """Read ``/sys`` and ``/proc``."""
        cards = 0
        for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
            kind = vendor.with_name("class")
            if vendor.read_text().strip() == NVIDIA and kind.is_file():
                cards += kind.read_text().startswith(DISPLAY_CLASSES)
        try:
            found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", (root / "proc/driver/nvidia/version").read_text())
        except OSError:
            found = None
        return cls(cards, found[1] if found else "")

    @property
    def extra(self) -> str:
        """Which extra of nbcache fits the driver."""
        return "cuda12" if self.module and int(self.module.split(".")[0]) < CUDA_13_DRIVER else "cuda13"


def judge_torch(torch: TorchProbe | Silent, hardware: Hardware) -> Finding:
    """Torch is there, new enough, and built for the GPU that is there."""
    if isinstance(torch, Silent):
        return broken("torch", f"importing it: {torch.reason}", "python -c 'import torch' shows more; install torch again")
    if torch.error:
        return broken("torch", torch.error, "pip install 'torch>=2.6'")
    seen = f"{torch.version}, " + (f"CUDA {torch.cuda}, {torch.gpus} GPU(s)" if torch.cuda else "without CUDA")
    if tuple(int(number) for number in re.findall(r"\d+", torch.version)[:2]) < OLDEST_TORCH:
        return broken("torch", seen, "pip install --upgrade 'torch>=2.6'")
    if torch.lacks:
        return warning("torch", f"{seen}, lacks {', '.join(torch.lacks)}: share='cow' copies", "use share='readonly'")
    if hardware.module and not torch.cuda:
        return warning("torch", f"{seen}, but there is a GPU", "install a torch that is built for CUDA (pytorch.org)")
    return ok("torch", seen)


def judge_driver(probe: f.DriverProbe | Silent, hardware: Hardware, emulated: bool = False) -> Iterator[Finding]:
    """The driver's features, one by one."""
    if isinstance(probe, Silent):
        yield warning("GPU driver", probe.reason, "`nvidia-smi` in a terminal; if it hangs too, reboot the machine")
        return
    if not (hardware.cards or hardware.module or emulated or probe.gpus):
        yield ok("GPU", "none here; weights are served on the CPU")
        return
    if not (hardware.module or emulated or probe.gpus):
        what = "start the container with its GPUs (`--gpus all`), or install the NVIDIA driver"
        yield warning("GPU driver", f"{hardware.cards} NVIDIA card(s), but no driver is loaded", what)
        return
    if hardware.module:
        yield ok("GPU driver", hardware.module)
    names = {gpu.uuid: f"GPU {number}" for number, gpu in enumerate(probe.gpus)}
    for gpu in probe.gpus:
        yield ok(names[gpu.uuid], f"{gpu.name}, {format_size(gpu.total_bytes)}, {gpu.uuid}")
    for step in probe.features:
        subject = step.name + (f", {names[step.gpu]}" if len(names) > 1 and step.gpu else "")
        yield ok(subject, _in_words(step)) if step.works else warning(subject, step.detail, remedy_for(step, hardware))


def _in_words(step: f.Feature) -> str:
    number = step.detail.partition(" ")[0]
    return f"{format_size(int(number))} free" if step.name == f.FREE and number.isdigit() else step.detail


def remedy_for(step: f.Feature, hardware: Hardware) -> str:
    """What to do about a step that failed."""
    again = "; loads copy to the GPU until then"
    match step.name:
        case f.BINDINGS:
            return f"pip install 'nbcache[{hardware.extra}]'{again}"
        case f.START:
            return _remedy_for_start(step.detail, hardware)
        case f.DEVICES:
            return "unset CUDA_VISIBLE_DEVICES, or name a GPU that `nvidia-smi -L` lists"
        case f.FREE:
            return "pip install nvidia-ml-py; if it is there, `nvidia-smi` says more"
        case f.CUPY:
            return f"pip install 'nbcache[{hardware.extra}]', and no other cupy package beside it{again}"
        case f.PINNED:
            return (
                "a driver of 535 or newer; in a container allow NUMA calls (`docker run --cap-add SYS_NICE`) and "
                f"`--ulimit memlock=-1`{again}"
            )
        case f.MANAGEMENT:
            return "a newer driver; some virtual GPUs and WSL have none: loads copy to the GPU there"
        case _:
            if "out of memory" in step.detail.lower():
                return "free GPU memory: `%weights free-gpu`, or end what `nvidia-smi` lists"
            return (
                "run outside the sandbox or virtual GPU that refuses it, with a newer driver; loads copy to the GPU until then"
            )


def _remedy_for_start(detail: str, hardware: Hardware) -> str:
    """By the number in ``cuInit: text (number)``, and by what the bindings say when they find no library."""
    code = re.search(r"\((\d+)\)$", detail)
    known = {
        "100": "unset CUDA_VISIBLE_DEVICES, or name a GPU that `nvidia-smi -L` lists; in a container, `--gpus all`",
        "101": "unset CUDA_VISIBLE_DEVICES, or name a GPU that `nvidia-smi -L` lists",
        "802": "start the fabric manager: `systemctl start nvidia-fabricmanager`",
        "803": "reboot: the driver's library and its kernel module are of different versions",
        "804": "a newer driver: this GPU has no forward compatibility",
        "999": "`nvidia-modprobe -u -c=0` as root, or reboot: the module nvidia-uvm is not loaded, or has failed",
    }
    if code and code[1] in known:
        return known[code[1]]
    newer = f", or pip install 'nbcache[{hardware.extra}]' to fit driver {hardware.module}" if hardware.module else ""
    return f"install the NVIDIA driver so that libcuda.so.1 is found{newer}; in a container, `--gpus all`"


def judge_visibility(mine: f.DriverProbe | Silent, daemons: f.DriverProbe | Silent | None, visible: str) -> Iterator[Finding]:
    """What ``CUDA_VISIBLE_DEVICES`` hides here, and whether the daemon, which ignores it, can reach what it shows."""
    if daemons is None or isinstance(mine, Silent) or isinstance(daemons, Silent):
        return
    reachable = {gpu.uuid for gpu in daemons.gpus}
    if not reachable and not mine.gpus:
        return
    subject = "CUDA_VISIBLE_DEVICES"
    seen = f"{visible!r} shows {len(mine.gpus)} GPU(s) here, the daemon sees {len(reachable)}"
    if not mine.gpus:
        yield warning(subject, seen, "unset CUDA_VISIBLE_DEVICES, or name a GPU that `nvidia-smi -L` lists")
    elif strangers := [gpu.uuid for gpu in mine.gpus if gpu.uuid not in reachable]:
        what = "use the first MIG instance here, or ordinary copies: a process without CUDA_VISIBLE_DEVICES sees one instance"
        yield warning(subject, f"{seen}, not {', '.join(strangers)}", what)
    else:
        yield ok(subject, seen)
