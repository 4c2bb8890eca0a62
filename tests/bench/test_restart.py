"""The restart benchmark at tiny size: that it runs, and that what it prints is complete. Not how fast.

Its other client, over a Jupyter server, is what ``tests/restart/test_server.py`` drives.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

import nbcache
from nbcache.bench import restart
from nbcache.bench.clients import answer_of
from nbcache.bench.restart import measure_restart
from nbcache.bench.restart_report import RestartReport, render_restart
from nbcache.errors import BenchmarkFailed, CheckpointNotFound
from nbcache.jupyter.experience import Experience
from nbcache.units import format_duration
from tests.support.checkpoints import write_checkpoint

MISSING = "import nothing_of_the_kind"


def test_both_kernels_are_restarted_in_turns(tmp_path):
    path = write_checkpoint(tmp_path / "model.safetensors")
    steps: list[str] = []
    reports: list[RestartReport] = []
    report = measure_restart(str(path), "cpu", ["", MISSING], "manager", 2, steps.append, reports.append)
    assert [step for step in steps if step.startswith("restart ")] == [
        f"restart {n + 1} of 2 with torch alone: python3 {format_duration(report.restarts[0].stock.runs_s[n])}, "
        f"nbcache {format_duration(report.restarts[0].ours.runs_s[n])}"
        for n in range(2)
    ]
    assert [(len(each.restarts[0].ours.runs_s), each.complete) for each in reports] == [(1, False), (2, False), (2, True)]
    assert reports[-1] == report
    (restarts,) = report.restarts
    assert len(restarts.stock.runs_s) == len(restarts.ours.runs_s) == 2
    assert restarts.forked == 2
    assert 0 < restarts.ours_median_s <= restarts.ours_worst_s == max(restarts.ours.runs_s)
    assert restarts.ratio == restarts.stock_median_s / restarts.ours_median_s
    assert report.tensors == 4
    assert report.preloaded["torch"] > 0
    text = render_restart(report)
    assert f"{restarts.ratio:.1f}x" in text
    assert "2 of 2 forked" in text
    assert "nothing_of_the_kind" in report.failed[MISSING]
    assert f"not measured: {MISSING}: a cell raised ModuleNotFoundError" in text
    assert msgspec.json.decode(msgspec.json.encode(report), type=RestartReport) == report


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointNotFound):
        measure_restart(str(tmp_path / "none.safetensors"), "cpu", [""])


def test_a_run_without_any_figure_is_an_error(tmp_path):
    path = write_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(BenchmarkFailed, match="nothing_of_the_kind"):
        measure_restart(str(path), "cpu", [MISSING], runs=1)


def test_wrong_options_are_told():
    command = [sys.executable, "-m", "nbcache", "bench", "restart", "--client", "pigeon"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "manager, rest" in run.stderr


def test_kernels_find_nbcache_where_the_benchmark_has_found_it(tmp_path, monkeypatch):
    root = str(Path(nbcache.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", f"/carried:{root}")
    monkeypatch.setattr(restart, "installed_folders", list)
    assert restart._environment(tmp_path)["PYTHONPATH"] == f"{root}:/carried"  # which may hold another nbcache
    monkeypatch.setattr(restart, "installed_folders", lambda: [root])
    assert restart._environment(tmp_path)["PYTHONPATH"] == f"/carried:{root}"


def test_what_cannot_be_imported_ahead_is_not_waited_for(monkeypatch):
    known = Experience(learned={"slow": 1.0, "fragile.part": 1.0})
    zygote = SimpleNamespace(ready=True, preloaded={"slow": 1.0})
    monkeypatch.setattr(restart, "recall", lambda: known)
    monkeypatch.setattr(restart, "examine", lambda: SimpleNamespace(zygotes=(zygote,)))
    assert not restart._has_learned()
    known.broken = {"fragile": "it starts threads"}
    assert restart._has_learned()
    known.candidates = ["new"]
    assert not restart._has_learned()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"status": "error", "ename": "ValueError", "evalue": "no"}, "ValueError: no"),
        ({"status": "ok", "user_expressions": {"answer": {"data": {"text/plain": "<object>"}}}}, "answered"),
        ({"status": "ok", "user_expressions": {"answer": {"status": "error"}}}, "answered"),
    ],
)
def test_a_cell_that_fails_is_no_measurement(content, said):
    with pytest.raises(BenchmarkFailed, match=said):
        answer_of(content)
