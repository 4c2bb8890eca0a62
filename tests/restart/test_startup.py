"""What an interpreter finds when it starts, by its directory and environment: a kernel is as if it did, or is not forked."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import timeit
import types
from pathlib import Path

import pytest

from nbcache.jupyter import handover, installed
from nbcache.jupyter.kernelspec import examine
from tests.support.kernels import REPOSITORY, Kernel
from tests.support.waiting import eventually
from tests.support.zygotes import is_forked, processes_of, start_zygote, zygote


@pytest.fixture
def with_user_site(environment, own_specs, monkeypatch, tmp_path) -> Path:
    """The site folder of a virtual environment that has a user's one too, and whose kernel is ``nbcache`` for the test."""
    monkeypatch.setenv("NBCACHE_PRELOAD", "")
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path / "user"))
    command = [sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(tmp_path / "venv")]
    subprocess.run(command, check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (site / "all_that_this_one_has.pth").write_text("\n".join(filter(os.path.isdir, [str(REPOSITORY), *sys.path])))
    spec = own_specs / "nbcache" / "kernel.json"
    spec.write_text(spec.read_text().replace(sys.executable, str(tmp_path / "venv" / "bin" / "python")))
    return site


def test_a_first_installation_for_the_user_is_seen(with_user_site, own_specs, tmp_path):
    users = Path(sysconfig.get_path("purelib", "posix_user", vars={"userbase": str(tmp_path / "user")}))
    _comes_later(own_specs, users)


def test_a_folder_that_a_pth_file_names_is_seen_when_it_is_made(with_user_site, own_specs, tmp_path):
    (with_user_site / "later.pth").write_text("# none\n\nimport sys\n../../../../later\n")
    _comes_later(own_specs, tmp_path / "later")


def _comes_later(specs: Path, folder: Path) -> None:
    """A folder of modules is made while a kernel runs, and the next one has them."""
    first = start_zygote(specs)
    with Kernel("nbcache", specs) as kernel:
        assert is_forked(kernel)
        assert kernel.try_run("import late").error.startswith("ModuleNotFoundError")
        folder.mkdir(parents=True)
        (folder / "late.py").write_text("value = 1")
        for is_second in (False, True):
            kernel.restart()
            assert is_forked(kernel) is is_second
            assert kernel.run("import late; late.value") == "1"
            assert zygote().pid != first.pid


@pytest.mark.parametrize("line", ["late", "../late  ", "/no/such/late", "\0", "\udcff"])
def test_a_snapshot_watches_what_is_not_there(tmp_path, monkeypatch, line):
    site, on_path = tmp_path / "site", tmp_path / "on_path"
    site.mkdir()
    (site / "late.pth").write_text(f"import nothing\n# nor this\n{line}\n", errors="surrogateescape")
    monkeypatch.setattr(installed.site, "getsitepackages", lambda: [str(site), str(tmp_path / "site2")])
    monkeypatch.syspath_prepend(str(on_path))
    for late in (on_path, tmp_path / "site2", *([site / line.rstrip()] if "late" in line[:7] else [])):
        snapshot = installed.Snapshot()
        assert snapshot.changed() is None
        late.mkdir()
        assert snapshot.changed() in (str(late), os.path.normpath(late), str(site))


@pytest.fixture
def projects(environment, own_specs, monkeypatch, tmp_path) -> list[Path]:
    """Two directories with a module each, which PYTHONPATH names relative to them; and a zygote that is ready."""
    monkeypatch.setenv("NBCACHE_PRELOAD", "")
    monkeypatch.setenv("PYTHONPATH", f"src:{environment}:lib/../.:")
    found = [tmp_path / "one", tmp_path / "two"]
    for project in found:
        (project / "src").mkdir(parents=True)
        (project / "src" / "mine.py").write_text(f"value = {project.name!r}")
    start_zygote(own_specs)
    return found


def test_a_relative_path_is_one_from_the_kernels_directory(projects, own_specs):
    with Kernel("nbcache", own_specs) as kernel, Kernel("ordinary", own_specs) as ordinary:
        for project in projects:
            for each in (kernel, ordinary):
                each.restart_in(project)
            assert is_forked(kernel) and not is_forked(ordinary)
            paths = [each.run("import sys; sys.path") for each in (kernel, ordinary)]
            assert paths[0] == paths[1]
            assert str(project / "src") in paths[0]
            assert kernel.run("import mine; mine.value") == repr(project.name)


@pytest.mark.parametrize(
    ("name", "source"),
    [("sitecustomize", "import sys\nsys.mine = True"), ("timeit", Path(timeit.__file__).read_text() + "\nsys.mine = True\n")],
)
def test_a_relative_path_comes_before_all_that_an_interpreter_imports(projects, own_specs, name, source):
    with Kernel("nbcache", own_specs) as kernel:
        (projects[0] / "src" / f"{name}.py").write_text(source)
        kernel.restart_in(projects[0])
        assert not is_forked(kernel)
        assert kernel.run(f"import sys, {name}; sys.mine") == "True"
        kernel.restart_in(projects[1])
        assert is_forked(kernel)


@pytest.mark.parametrize(
    ("name", "path"), [("HF_HOME", "cache"), ("MPLCONFIGDIR", "./mpl"), ("COVERAGE_PROCESS_START", "/no/such/coveragerc")]
)
def test_some_settings_mean_an_ordinary_kernel(
    environment,
    own_specs,
    monkeypatch,
    tmp_path,
    name,
    path,
):
    monkeypatch.setenv(name, path)
    with Kernel("nbcache", own_specs) as kernel:
        kernel.restart()
        assert not is_forked(kernel)
        assert not processes_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("HF_HOME", "cache", True),
        ("HF_HOME", "/cache", False),
        ("HF_HOME", "~/cache", False),
        ("HF_HOME", "", False),
        ("MPLCONFIGDIR", "mpl", True),
        ("PYTHONUSERBASE", "..", True),
        ("LD_LIBRARY_PATH", "./lib:/usr/lib", True),
        ("LD_LIBRARY_PATH", "/usr/lib:", False),
        ("HF_ENDPOINT", "https://here", False),
        ("TORCHINDUCTOR_FX_GRAPH_CACHE", "1", False),
        ("TORCHINDUCTOR_FX_GRAPH_CACHE", "True", False),
        ("OMP_PROC_BIND", "close", False),
        ("TZ", "Europe/Berlin", False),
        ("PYTHONPATH", "./src", False),
        ("PATH", "./bin:/bin", False),
        ("NOT_READ_AT_IMPORT_DIR", "./here", False),
        ("COVERAGE_PROCESS_START", "/here/coveragerc", True),
        ("COVERAGE_PROCESS_START", "", False),
        ("COV_CORE_SOURCE", "here", True),
    ],
)
def test_which_settings_mean_an_ordinary_kernel(monkeypatch, name, value, expected):
    for other in list(os.environ):
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    assert handover.means_ordinary() == (name if expected else "")


@pytest.mark.parametrize(
    ("name", "value", "look", "expected"),
    [
        (
            "PYDEVD_WARN_EVALUATION_TIMEOUT",
            "99",
            "import _pydevd_bundle.pydevd_constants as c; c.PYDEVD_WARN_EVALUATION_TIMEOUT",
            "99.0",
        ),
        ("MPMATH_STRICT", "yes", "import mpmath.libmp.backend as b; b.STRICT", "True"),
    ],
)
def test_a_variable_that_a_library_has_read_is_read_by_the_kernel(
    environment,
    own_specs,
    monkeypatch,
    name,
    value,
    look,
    expected,
):
    monkeypatch.setenv("NBCACHE_PRELOAD", "mpmath")
    start_zygote(own_specs)
    with Kernel("nbcache", own_specs, **{name: value}) as kernel:
        assert kernel.run(look) == expected


def test_start_up_code_of_ones_own_is_run_by_each_kernel(environment, own_specs, monkeypatch, tmp_path):
    """It may ask for the directory, as here, or the time, or begin to measure."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("import os, sys\nsys.started_in = os.getpid(), os.getcwd()")
    monkeypatch.setenv("PYTHONPATH", f"{environment}:{tmp_path / 'own'}")
    with Kernel("nbcache", own_specs) as kernel:
        (failure,) = eventually(lambda: examine().failures, 60)
        assert f"{tmp_path}/own/sitecustomize.py is to run" in failure
        kernel.restart()
        assert kernel.run("import os, sys; sys.started_in == (os.getpid(), os.getcwd())") == "True"


def test_whose_start_up_code_is_ones_own(monkeypatch, tmp_path):
    for name in installed.STARTUP:
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert installed.own_startup_code() == ""
    site = sysconfig.get_path("purelib")
    for name, folder, is_own in (
        ("sitecustomize", site, False),
        ("sitecustomize", str(tmp_path), True),
        ("usercustomize", site, True),
    ):
        with monkeypatch.context() as patch:
            module = types.ModuleType(name)
            module.__file__ = f"{folder}/{name}.py"
            patch.setitem(sys.modules, name, module)
            assert installed.own_startup_code() == (module.__file__ if is_own else "")
