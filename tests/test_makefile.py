"""``make gpu``: that it fails where there is no GPU, rather than passing with everything skipped, and forgets no test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "NBCACHE_REQUIRE_GPU": "1"}
MARK = re.compile(r"^pytestmark = .*mark\.gpu|@pytest\.mark\.gpu|marks=.*mark\.gpu", re.MULTILINE)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=100)


def test_without_a_gpu_it_fails_and_says_so():
    done = run("make", "gpu", f"PYTHON={sys.executable}", **NO_GPU)
    assert done.returncode == 2
    assert "no GPU: torch" in done.stderr
    assert "passed" not in done.stdout


@pytest.mark.parametrize("named", [True, False], ids=["PYTHON", "no PYTHON"])
def test_a_python_that_is_named_is_taken_as_it_is(named):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS")}
    command = ["make", "--dry-run", "--always-make", "gpu", *(["PYTHON=/some/python"] if named else [])]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    chosen = "/some/python" if named else ".venv/bin/python"
    assert done.stdout.count(f"{chosen} -m pytest") == 2
    assert ("-m venv" in done.stdout) is not named


@pytest.mark.parametrize(("failing", "status"), [("not alone", 2), ("gpu and alone", 2), ("nothing", 0)])
def test_both_parts_run_and_either_may_fail_it(tmp_path, failing, status):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in *\'{failing}\'*) exit 1;; esac\n')
    python.chmod(0o755)
    assert run("make", "gpu", f"PYTHON={python}").returncode == status
    check, shared, alone = (tmp_path / "calls").read_text().splitlines()
    assert "cuda.is_available" in check
    assert "-m gpu and not alone and not long -n 4" in shared
    assert alone.endswith("-m gpu and alone and not long")


def test_a_test_that_needs_a_gpu_fails_where_one_is_required():
    done = run(sys.executable, "-m", "pytest", "tests/unit/test_driver.py", "-m", "gpu", "-k", "unmapping", **NO_GPU)
    assert done.returncode == 1
    assert "NBCACHE_REQUIRE_GPU is set, and torch sees no GPU" in done.stdout


def test_all_tests_that_need_a_gpu_are_among_its():
    (line,) = re.findall(r"^GPU_TESTS := (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    places = [REPOSITORY / place for place in line.split()]
    marked = [path for path in (REPOSITORY / "tests").rglob("test_*.py") if MARK.search(path.read_text())]
    assert REPOSITORY / "tests/gpu/test_gpu.py" in marked
    assert [path for path in marked if not any(path.is_relative_to(place) for place in places)] == []
