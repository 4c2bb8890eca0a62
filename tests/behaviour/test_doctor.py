"""``nbcache doctor`` where things are broken on purpose: it says what, and the remedy that it prints then works."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import nbcache
from nbcache.jupyter.experience import revise
from tests.support.checkpoints import raw_checkpoint, write_checkpoint
from tests.support.kernels import Kernel
from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


def shell(line: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a line in a shell whose ``nbcache`` is this one."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=90, env={**os.environ, "PATH": path}, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def diagnose(prefix: str = "", part: str = "") -> tuple[int, dict[str, dict[str, str]]]:
    """The exit status and the findings by subject."""
    done = shell(f"{prefix} nbcache doctor {part} --json", check=False)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["version"] == nbcache.__version__
    assert report["healthy"] is (done.returncode == 0)
    findings = {finding["subject"]: finding for finding in report["findings"]}
    assert len(findings) == len(report["findings"])
    for finding in findings.values():
        assert finding["state"] in ("ok", "warning", "broken")
        assert bool(finding["remedy"]) is (finding["state"] != "ok")
    return done.returncode, findings


def remedy(finding: dict[str, str]) -> str:
    """The commands that a remedy quotes, to be run one after the other."""
    commands = re.findall(r"`([^`]+)`", finding["remedy"])
    assert commands, finding
    return "; ".join(commands)


@pytest.fixture
def checkpoint(runtime_dir: Path, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors")


@pytest.fixture
def large(runtime_dir: Path, tmp_path: Path) -> Path:
    """A checkpoint of 4 MB, sparse on disk."""
    size = 4 << 20
    path = raw_checkpoint(tmp_path / "large.safetensors", {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    os.truncate(path, path.stat().st_size + size)
    return path


def test_a_machine_without_faults(runtime_dir):
    code, findings = diagnose()
    assert code == 0
    assert {"interpreter", "torch", "memory", "control group", "host tier", "locked memory limit", "daemon"} <= set(findings)
    assert sys.executable in findings["interpreter"]["message"]
    assert findings["daemon"]["message"] == "none runs; the first load starts one"
    assert not runtime_dir.exists()  # it started nothing, and made nothing


def test_one_part(runtime_dir):
    code, findings = diagnose(part="daemon")
    assert (code, set(findings)) == (0, {"runtime directory", "daemon"})
    assert "'brain': doctor knows machine" in shell("nbcache doctor brain", check=False).stderr


def test_in_words(runtime_dir):
    lines = shell("nbcache doctor machine").stdout.splitlines()
    assert lines[0].startswith("ok       interpreter")
    assert lines[-1].startswith(f"nbcache {nbcache.__version__}: ")


def test_tiny_limits(large):
    tiny = "ulimit -Sf 1024;"
    assert "File too large" in shell(f"{tiny} nbcache load {large}", check=False).stderr
    nbcache_pid = nbcache.status().pid  # it inherited the limit, and is told of too
    code, findings = diagnose(tiny)
    assert code == 1
    found = findings["file size limit"]
    assert found["state"] == "broken" and "1.0 MB a file or a memfd may have" in found["message"]
    assert findings["daemon's file size limit"]["state"] == "broken"
    answer = shell(f"{tiny} {remedy(found)}; nbcache load {large} --json")
    assert json.loads(answer.stdout[answer.stdout.index("{") :])["bytes"] == 4 << 20
    assert nbcache.status().pid != nbcache_pid
    code, findings = diagnose()
    assert code == 0 and findings["file size limit"]["state"] == "ok"


def test_too_little_to_map(runtime_dir):
    _, findings = diagnose("ulimit -Sv 9000000; NBCACHE_HOST_LIMIT=10G", "machine")
    assert findings["address space limit"]["state"] == "warning"
    assert "9.2 GB may be mapped, entries may take 10.0 GB" in findings["address space limit"]["message"]
    _, findings = diagnose(
        f"ulimit -Sv 9000000; {findings['address space limit']['remedy'].split('`')[1]}; NBCACHE_HOST_LIMIT=10G"
    )
    assert findings["address space limit"]["state"] == "ok"


def test_few_descriptors(runtime_dir):
    _, findings = diagnose("ulimit -n 512;", "machine")
    assert findings["open files limit"]["state"] == "warning"
    assert "4096" in findings["open files limit"]["remedy"]


def test_a_host_tier_larger_than_the_machine(runtime_dir):
    _, findings = diagnose("NBCACHE_HOST_LIMIT=900T", "machine")
    assert findings["host tier"]["state"] == "warning"
    setting = findings["host tier"]["remedy"].split(",")[0]
    assert diagnose(setting, "machine")[1]["host tier"]["state"] == "ok"


def test_nonsense_in_the_settings(runtime_dir):
    code, findings = diagnose("NBCACHE_HOST_LIMIT=lots", "machine")
    assert code == 1
    assert "'lots' is not a size" in findings["host tier"]["message"]


def test_a_stale_socket(checkpoint, runtime_dir):
    nbcache.load(str(checkpoint), device="cpu").release()
    pid = nbcache.status().pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    code, findings = diagnose(part="daemon")
    assert code == 0
    assert findings["socket"]["state"] == "warning"
    assert "is stale" in findings["socket"]["message"]
    shell(findings["socket"]["remedy"].split(",")[0])
    assert diagnose(part="daemon")[1]["daemon"]["message"] == "none runs; the first load starts one"
    shell(f"nbcache load {checkpoint}")
    assert f"process {nbcache.status().pid}," in diagnose(part="daemon")[1]["daemon"]["message"]


def test_a_daemon_that_cannot_be_reached(checkpoint, runtime_dir):
    nbcache.load(str(checkpoint), device="cpu").release()
    pid = nbcache.status().pid
    os.kill(pid, signal.SIGSTOP)  # or it would notice, and make its socket anew
    try:
        (runtime_dir / "daemon.sock").unlink()
        code, findings = diagnose(part="daemon")
        assert code == 1
        assert findings["daemon"]["message"].startswith(f"process {pid} holds ")
        assert findings["daemon"]["remedy"].startswith(f"kill {pid}")
    finally:
        shell(f"kill {pid}; kill -CONT {pid}")
        eventually(lambda: not Path(f"/proc/{pid}").exists())
    shell(f"nbcache load {checkpoint}")
    assert diagnose(part="daemon")[0] == 0


def test_a_daemon_with_other_options(checkpoint):
    nbcache.load(str(checkpoint), device="cpu").release()
    code, findings = diagnose("NBCACHE_HOST_LIMIT=1G", part="daemon")
    assert code == 0
    assert findings["daemon"]["state"] == "warning"
    assert "was started with host_limit = -, which is set otherwise now" in findings["daemon"]["message"]
    assert diagnose("NBCACHE_HOST_LIMIT=much", part="daemon")[1]["daemon"]["state"] == "ok"  # a restart would mend nothing
    assert diagnose("NBCACHE_GPU_LOW_WATERMARK=much", part="machine")[1]["settings"]["state"] == "broken"
    shell(f"NBCACHE_HOST_LIMIT=1G {remedy(findings['daemon'])}")
    assert diagnose("NBCACHE_HOST_LIMIT=1G", part="daemon")[1]["daemon"]["state"] == "ok"
    assert nbcache.status().host.limit_bytes == 10**9


def test_a_daemon_that_hangs(checkpoint):
    nbcache.load(str(checkpoint), device="cpu").release()
    pid = nbcache.status().pid
    os.kill(pid, signal.SIGSTOP)
    try:
        code, findings = diagnose(part="daemon")
        assert code == 1
        assert findings["daemon"]["message"].startswith("no answer within ")
    finally:
        os.kill(pid, signal.SIGCONT)
    shell(remedy(findings["daemon"]))
    assert diagnose(part="daemon")[0] == 0


def serve_from(folder: Path) -> subprocess.Popen[str]:
    """A daemon of the package in another folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-P", "-m", "nbcache", "serve"]
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd="/")
    assert "serving on" in server.stderr.readline()
    return server


@pytest.mark.parametrize(("protocol", "code"), [(0, 1), (None, 0)], ids=["protocol", "version"])
def test_an_old_daemon(checkpoint, tmp_path, protocol, code):
    old = tmp_path / "old" / "nbcache"
    shutil.copytree(ROOT / "nbcache", old, ignore=shutil.ignore_patterns("__pycache__"))
    init, messages = old / "__init__.py", old / "protocol" / "messages.py"
    init.write_text(init.read_text().replace(f'"{nbcache.__version__}"', '"0.0.9"'))
    if protocol is not None:
        messages.write_text(
            re.sub(r"^PROTOCOL_VERSION = \d+", f"PROTOCOL_VERSION = {protocol}", messages.read_text(), flags=re.MULTILINE)
        )
    with serve_from(old.parent) as server:
        try:
            seen, findings = diagnose(part="daemon")
            assert seen == code
            assert findings["daemon"]["state"] == ("broken" if code else "warning")
            assert "0.0.9" in findings["daemon"]["message"]
            shell(remedy(findings["daemon"]))
            server.wait(20)
        finally:
            server.kill()
    code, findings = diagnose(part="daemon")
    assert code == 0 and f"nbcache {nbcache.__version__}" in findings["daemon"]["message"]
    shell(f"nbcache load {checkpoint}")


def test_a_directory_that_others_may_write_to(checkpoint, runtime_dir):
    runtime_dir.mkdir()
    runtime_dir.chmod(0o777)
    code, findings = diagnose(part="daemon")
    assert code == 1
    assert "others may write to" in shell(f"nbcache load {checkpoint}", check=False).stderr
    shell(findings["runtime directory"]["remedy"])
    assert diagnose(part="daemon")[0] == 0
    shell(f"nbcache load {checkpoint}")


def test_no_torch(runtime_dir, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    code, findings = diagnose(f"PYTHONPATH={tmp_path}", "gpu")
    assert code == 1
    assert "libcudart.so.13" in findings["torch"]["message"]


@pytest.fixture
def jupyter(runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's Jupyter folder, for the test alone, and kernels that start the ordinary way."""
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    monkeypatch.setenv("NBCACHE_ZYGOTE_IDLE_S", "0")
    return tmp_path / "data"


def environment_without_kernelspec(folder: Path) -> str:
    """A new environment with the packages of this one, and ``nbcache``; what to put before a line for it to be used."""
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "packages.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    script = folder / "bin" / "nbcache"
    script.write_text(f"#!{folder}/bin/python\nfrom nbcache.cli import main\nmain()\n")
    script.chmod(0o755)
    return f"PATH={folder}/bin:$PATH"


def test_no_kernelspec(jupyter, tmp_path):
    new = environment_without_kernelspec(tmp_path / "new")
    code, findings = diagnose(new, "jupyter")
    assert code == 0
    assert findings["kernelspec"]["state"] == "warning"
    assert findings["kernelspec"]["message"].startswith("no kernel 'nbcache'")
    shell(f"{new} {remedy(findings['kernelspec'])}")
    found = diagnose(new, "jupyter")[1]["kernelspec"]
    assert (found["state"], found["message"]) == ("ok", str(jupyter / "kernels" / "nbcache"))
    assert "another environment" in diagnose(part="jupyter")[1]["kernelspec"]["message"]
    with Kernel("nbcache") as kernel:
        assert kernel.run("import sys; sys.prefix") == repr(str(tmp_path / "new"))
        assert kernel.try_run("%weights").error.startswith("UsageError: no daemon runs")


@pytest.mark.parametrize("name", ["nbcache", "mine"])
def test_a_kernelspec_whose_interpreter_is_gone(jupyter, name):
    shell(f"nbcache kernelspec install --name {name}")
    file = jupyter / "kernels" / name / "kernel.json"
    file.write_text(file.read_text().replace(sys.executable, "/gone/bin/python"))
    subject = "kernelspec" if name == "nbcache" else "kernelspec mine"
    found = diagnose(part="jupyter")[1][subject]
    assert found["state"] == "warning"
    assert "there is no interpreter /gone/bin/python" in found["message"]
    shell(remedy(found))
    assert diagnose(part="jupyter")[1][subject]["state"] == "ok"
    with Kernel(name) as kernel:
        assert kernel.run("import sys; sys.executable") == repr(sys.executable)


def test_a_broken_kernelspec_of_an_environment(jupyter, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "an env" / "share" / "jupyter"))
    shell(f"nbcache kernelspec install --name mine --prefix '{tmp_path}/an env'")
    file = tmp_path / "an env" / "share" / "jupyter" / "kernels" / "mine" / "kernel.json"
    file.write_text(file.read_text().replace(sys.executable, "/gone/bin/python"))
    found = diagnose(part="jupyter")[1]["kernelspec mine"]
    assert found["state"] == "warning"
    shell(remedy(found))
    found = diagnose(part="jupyter")[1]["kernelspec mine"]
    assert (found["state"], found["message"]) == ("ok", str(file.parent))


def test_a_broken_kernelspec_elsewhere(jupyter, tmp_path, monkeypatch):
    """One in a folder of JUPYTER_PATH goes before the user's own, so it is removed."""
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "shared"))
    folder = tmp_path / "shared" / "kernels" / "mine"
    folder.mkdir(parents=True)
    argv = ["/gone/bin/python", "-m", "nbcache.jupyter.launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Mine", "language": "python"}))
    found = diagnose(part="jupyter")[1]["kernelspec mine"]
    assert found["state"] == "warning"
    shell(remedy(found))
    assert diagnose(part="jupyter")[1]["kernelspec mine"] == {
        "subject": "kernelspec mine",
        "state": "ok",
        "message": str(jupyter / "kernels" / "mine"),
        "remedy": "",
    }


def test_what_is_imported_ahead(runtime_dir, monkeypatch):
    assert "switched off" in diagnose(part="jupyter")[1]["imports ahead"]["message"]
    monkeypatch.setenv("NBCACHE_ZYGOTE_IDLE_S", "600")
    assert diagnose(part="jupyter")[1]["imports ahead"]["message"] == "torch, and as learned: nothing yet"
    with revise() as known:
        known.learned = {"diffusers": 1.5, "diffusers.models": 5.5, "pandas": 0.5}
        known.broken = {"tensorflow": "starts threads"}
    said = diagnose(part="jupyter")[1]["imports ahead"]["message"]
    assert said == "torch, and as learned: diffusers 7.0 s, pandas 500.0 ms; left out: tensorflow (starts threads)"
    named = diagnose("NBCACHE_PRELOAD=peft,gguf", "jupyter")[1]["imports ahead"]
    assert named["message"] == "as NBCache.preload names: peft, gguf"
    named = diagnose("NBCACHE_PRELOAD=peft,tensorflow.keras", "jupyter")[1]["imports ahead"]
    assert named["message"] == "as NBCache.preload names: peft, tensorflow.keras; left out: tensorflow (starts threads)"


def test_what_a_configuration_file_says_of_imports_ahead(runtime_dir, monkeypatch, tmp_path):
    monkeypatch.delenv("NBCACHE_ZYGOTE_IDLE_S", raising=False)
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    file = tmp_path / "jupyter_nbcache_config.py"
    file.write_text("c.NBCache.preload = ['peft']")
    found = diagnose(part="jupyter")[1]
    assert found["imports ahead"]["message"] == "as NBCache.preload names: peft"
    assert found["zygote"]["message"] == "none runs; the first kernel starts one"
    found = diagnose("HF_HOME=cache", "jupyter")[1]
    assert found["zygote"]["message"] == "none runs while HF_HOME is set as it is"
    file.write_text("c.NBCache.zygote_idle_s = 0")
    found = diagnose(part="jupyter")[1]
    assert "switched off" in found["imports ahead"]["message"]
    assert "zygote" not in found


def test_a_zygote_that_could_not_serve(runtime_dir):
    folder = runtime_dir / "zygotes"
    folder.mkdir(parents=True)
    (folder / "0a1b.failed").write_text("tensorflow: starts threads\n")
    found = diagnose(part="jupyter")[1]["zygote failure 1"]
    assert (found["state"], found["message"]) == ("warning", "0a1b: tensorflow: starts threads")


EMULATED = f"PYTHONPATH={ROOT} NBCACHE_TEST_DRIVER=tests.support.emulated:make"


REFUSALS = {
    "export": {"fd export of GPU memory, GPU 0": "export refused", "fd export of pinned memory": "export refused"},
    "import": {"fd import, GPU 1": "import refused"},
    "memory": {"fd export of GPU memory, GPU 1": "no 2097152 bytes"},
}


@pytest.mark.parametrize("failure", REFUSALS)
def test_a_gpu_driver_that_refuses(runtime_dir, tmp_path, failure):
    """The step that fails is named, and those before it are not; loads would copy, so nothing counts as broken."""
    failures = tmp_path / "failures.json"
    failures.write_text(json.dumps([failure]))
    code, findings = diagnose(f"{EMULATED} NBCACHE_TEST_FAILURES={failures}", "gpu")
    assert code == 0
    for subject, words in REFUSALS[failure].items():
        assert findings[subject]["state"] == "warning"
        assert words in findings[subject]["message"]
    assert findings["cuInit"]["state"] == findings["NVML, GPU 0"]["state"] == "ok"
    assert ("CuPy" in findings) is (findings["fd export of pinned memory"]["state"] == "ok"), "else it has nothing to stand on"


def test_a_gpu_driver_that_does_all(runtime_dir):
    _, findings = diagnose(EMULATED, "gpu")
    assert {"fd import, GPU 0", "fd export of pinned memory", "CuPy"} <= set(findings)
    assert all(found["state"] == "ok" for found in findings.values())


def test_a_driver_that_crashes_or_says_no(runtime_dir, tmp_path):
    (tmp_path / "bad.py").write_text("import os\ndef crash(): os.abort()\ndef refuse(): raise RuntimeError('no libcuda.so.1')")
    _, findings = diagnose(f"PYTHONPATH={tmp_path} NBCACHE_TEST_DRIVER=bad:crash", "gpu")
    assert findings["GPU driver"]["message"] == "crashed: SIGABRT"
    _, findings = diagnose(f"PYTHONPATH={tmp_path} NBCACHE_TEST_DRIVER=bad:refuse", "gpu")
    assert findings["cuInit"]["message"] == "no libcuda.so.1"
    assert "libcuda.so.1" in findings["cuInit"]["remedy"]
