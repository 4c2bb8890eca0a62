"""What doctor makes of GPUs, drivers and machines that are not here: fed with what such a machine would answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbcache.doctor import gpus, machine
from nbcache.doctor.companion import lock_holder
from nbcache.doctor.findings import Report, broken, ok, render_report, warning
from nbcache.doctor.gpus import Hardware, judge_driver, judge_torch, judge_visibility
from nbcache.doctor.probes import Silent, TorchProbe
from nbcache.memory import features as f
from nbcache.memory.features import DriverProbe, Feature, Seen

NONE = Hardware(0, "")
NEW = Hardware(1, "580.65.06")
OLD = Hardware(1, "550.54.15")
H100 = Seen("GPU-a", "H100", 85 * 10**9)


def started(*steps: Feature, seen=(H100,)) -> DriverProbe:
    return DriverProbe((Feature(f.BINDINGS, True, "13.0.1"), Feature(f.START, True, "for CUDA 13.0"), *steps), tuple(seen))


def only(findings):
    (found,) = [each for each in findings if each.state != "ok"]
    return found


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_hardware_is_read_from_the_system(tmp_path):
    assert Hardware.find(tmp_path) == NONE
    for number, (vendor, kind) in enumerate([("0x10de", "0x030200"), ("0x10de", "0x040300"), ("0x8086", "0x030000")]):
        write(tmp_path, f"sys/bus/pci/devices/{number}/vendor", f"{vendor}\n")
        write(tmp_path, f"sys/bus/pci/devices/{number}/class", f"{kind}\n")
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    write(tmp_path, "proc/driver/nvidia/version", version)
    assert Hardware.find(tmp_path) == NEW
    assert (NEW.extra, OLD.extra, Hardware(1, "").extra) == ("cuda13", "cuda12", "cuda13")


def test_a_machine_without_a_gpu_is_well():
    (found,) = judge_driver(DriverProbe((Feature(f.BINDINGS, False, "No module named 'cuda'"),)), NONE)
    assert (found.state, found.subject) == ("ok", "GPU")


def test_a_card_without_a_driver():
    found = only(judge_driver(DriverProbe((Feature(f.BINDINGS, False, "No module named 'cuda'"),)), Hardware(2, "")))
    assert "2 NVIDIA card(s), but no driver" in found.message
    assert "--gpus all" in found.remedy and "install the NVIDIA driver" in found.remedy


@pytest.mark.parametrize(("hardware", "extra"), [(NEW, "nbcache[cuda13]"), (OLD, "nbcache[cuda12]")])
def test_bindings_that_fit_the_driver_are_recommended(hardware, extra):
    assert extra in only(judge_driver(DriverProbe((Feature(f.BINDINGS, False, "No module named 'cuda'"),)), hardware)).remedy


@pytest.mark.parametrize(
    ("detail", "word"),
    [
        ("cuInit: no CUDA-capable device is detected (100)", "CUDA_VISIBLE_DEVICES"),
        ("cuInit: system not yet initialized (802)", "nvidia-fabricmanager"),
        ("cuInit: system has unsupported display driver / cuda driver combination (803)", "reboot"),
        ("cuInit: forward compatibility was attempted on non supported HW (804)", "newer driver"),
        ("cuInit: unknown error (999)", "nvidia-modprobe"),
        ("cuInit: Failed to dlopen libcuda.so.1", "libcuda.so.1 is found, or pip install 'nbcache[cuda12]' to fit driver 550"),
    ],
)
def test_a_driver_that_does_not_start(detail, word):
    probe = DriverProbe((Feature(f.BINDINGS, True, "13.0.1"), Feature(f.START, False, detail)))
    assert word in only(judge_driver(probe, OLD)).remedy


@pytest.mark.parametrize(
    ("step", "word"),
    [
        (Feature(f.MANAGEMENT, False, "CU_DEVICE_ATTRIBUTE_... is 0", "GPU-a"), "WSL"),
        (Feature(f.EXPORT, False, "cuMemExportToShareableHandle: not supported (801)", "GPU-a"), "sandbox"),
        (Feature(f.EXPORT, False, "cuMemCreate: out of memory (2)", "GPU-a"), "%weights free-gpu"),
        (Feature(f.IMPORT, False, "invalid value (1)", "GPU-a"), "sandbox"),
        (Feature(f.PINNED, False, "operation not permitted (800)"), "SYS_NICE"),
        (Feature(f.CUPY, False, "CuPy is not installed"), "pip install 'nbcache[cuda13]'"),
        (Feature(f.FREE, False, "nvidia-ml-py is not installed", "GPU-a"), "pip install nvidia-ml-py"),
        (Feature(f.DEVICES, False, "0 visible"), "nvidia-smi -L"),
    ],
)
def test_a_feature_that_is_refused(step, word):
    found = only(judge_driver(started(step), NEW))
    assert (found.subject, found.message) == (step.name, step.detail)
    assert found.state == "warning"  # loads copy then
    assert word in found.remedy


def test_gpus_are_numbered_where_there_are_several():
    steps = [Feature(f.FREE, True, "5000000000 bytes free", uuid) for uuid in ("GPU-a", "GPU-b")]
    found = {each.subject: each.message for each in judge_driver(started(*steps, seen=(H100, Seen("GPU-b", "B", 1))), NEW)}
    assert found["NVML, GPU 0"] == found["NVML, GPU 1"] == "5.0 GB free"
    assert found["GPU 0"] == "H100, 85.0 GB, GPU-a"


def test_a_driver_that_does_not_answer():
    assert "nvidia-smi" in only(judge_driver(Silent("no answer within 60 s"), NEW)).remedy


@pytest.mark.parametrize(
    ("torch", "hardware", "state"),
    [
        (TorchProbe("2.11.0+cu130", "13.0", 1), NEW, "ok"),
        (TorchProbe("2.13.0+cpu"), NONE, "ok"),
        (TorchProbe("2.13.0+cpu"), NEW, "warning"),
        (TorchProbe("2.11.0", "13.0", 1, ("_lazy_clone",)), NEW, "warning"),
        (TorchProbe("2.5.1", "12.4", 1), NEW, "broken"),
        (TorchProbe(error="ModuleNotFoundError: No module named 'torch'"), NONE, "broken"),
        (Silent("crashed: SIGSEGV"), NONE, "broken"),
    ],
)
def test_torch(torch, hardware, state):
    assert judge_torch(torch, hardware).state == state


def test_what_visible_devices_hide():
    one, two = DriverProbe((), (H100,)), DriverProbe((), (H100, Seen("GPU-b", "B", 1)))
    (found,) = judge_visibility(one, two, "0")
    assert (found.state, found.message) == ("ok", "'0' shows 1 GPU(s) here, the daemon sees 2")
    assert only(judge_visibility(DriverProbe(()), two, "")).remedy.startswith("unset CUDA_VISIBLE_DEVICES")
    mig = DriverProbe((), (Seen("GPU-second-instance", "H100 MIG 1g", 1),))
    assert "first MIG instance" in only(judge_visibility(mig, one, "MIG-x")).remedy
    assert list(judge_visibility(one, None, "")) == list(judge_visibility(DriverProbe(()), DriverProbe(()), "")) == []


def test_strict_accounting(tmp_path):
    assert list(machine.check_overcommit(1, tmp_path)) == []
    write(tmp_path, "proc/sys/vm/overcommit_memory", "2\n")
    write(tmp_path, "proc/meminfo", "CommitLimit:  2000 kB\nCommitted_AS:  1000 kB\n")
    assert list(machine.check_overcommit(1000 << 10, tmp_path)) == []
    assert "vm.overcommit_memory=0" in only(machine.check_overcommit(2000 << 10, tmp_path)).remedy
    write(tmp_path, "proc/sys/vm/overcommit_memory", "0\n")
    assert list(machine.check_overcommit(2000 << 10, tmp_path)) == []


def test_who_holds_a_lock(tmp_path):
    lock = tmp_path / "daemon.lock"
    assert lock_holder(lock) == 0
    lock.touch()
    found = lock.stat()
    name = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    write(tmp_path, "proc/locks", f"1: POSIX  ADVISORY  WRITE 5 {name} 0 EOF\n")
    assert lock_holder(lock, tmp_path) == 0
    write(tmp_path, "proc/locks", f"1: FLOCK  ADVISORY  WRITE 4321 {name} 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 9 {name} 0 EOF\n")
    assert lock_holder(lock, tmp_path) == 4321


def test_a_report_counts_and_aligns():
    report = Report.of("1", [ok("a", "fine"), warning("long subject", "slow", "do this"), broken("b", "gone", "do that")])
    assert not report.healthy
    lines = render_report(report).splitlines()
    assert lines[:2] == ["ok       a             fine", "warning  long subject  slow"]
    assert lines[2].strip() == "-> do this"
    assert lines[-1] == "nbcache 1: 1 broken, 1 to look at"
    assert render_report(Report.of("1", [ok("a", "fine")])).endswith("nbcache 1: all is well")


def test_the_oldest_torch_is_the_one_the_package_asks_for():
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert f'"torch>={".".join(map(str, gpus.OLDEST_TORCH))}"' in project
