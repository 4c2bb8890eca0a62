"""Benchmarks on a borrowed machine: what is asked before the first byte is written, and what a run leaves that is cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
from multiprocess import resource_tracker

from nbcache.bench import room
from nbcache.bench.models import ModelReport
from nbcache.bench.pipeline import pipeline_folder
from nbcache.bench.saving import TERMINATED, Results, write_document
from nbcache.errors import BenchmarkFailed, DriverError
from nbcache.output import steps_from_now
from tests.support.waiting import eventually


class Figure(msgspec.Struct, frozen=True):
    """A report."""

    number: int


def render(figure: Figure) -> str:
    return f"number {figure.number}"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "nbcache", "bench", *arguments]


@pytest.fixture(scope="module", autouse=True)
def tracker() -> None:
    """The process that multiprocess keeps for the life of ours is no leak."""
    resource_tracker.ensure_running()


# Results


def test_the_latest_report_is_in_the_file_and_on_stdout(tmp_path, capsys):
    results: Results[Figure] = Results(tmp_path / "figure.json")
    with results.shown(render, as_json=False):
        for number in (1, 2):
            results.keep(Figure(number))
            assert msgspec.json.decode((tmp_path / "figure.json").read_bytes()) == {"number": number}
        assert capsys.readouterr().out == ""
    assert capsys.readouterr().out == "number 2\n"
    assert os.listdir(tmp_path) == ["figure.json"]


@pytest.mark.parametrize("error", [BenchmarkFailed("no"), KeyboardInterrupt()])
def test_what_fails_prints_what_there_is(tmp_path, capsys, error):
    results: Results[Figure] = Results(None)
    with pytest.raises(type(error)), results.shown(render, as_json=True):
        results.keep(Figure(1))
        raise error
    assert msgspec.json.decode(capsys.readouterr().out) == {"number": 1}


def test_what_fails_before_any_figure_prints_nothing(capsys):
    results: Results[Figure] = Results(None)
    with pytest.raises(BenchmarkFailed), results.shown(render, as_json=False):
        raise BenchmarkFailed("no")
    assert capsys.readouterr() == ("", "")


def test_a_document_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "figure.json"
    write_document(path, Figure(1))
    with pytest.raises(TypeError):
        write_document(path, object())
    assert msgspec.json.decode(path.read_bytes()) == {"number": 1}
    assert os.listdir(tmp_path) == ["figure.json"]


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "figure.json"):
        with pytest.raises(BenchmarkFailed, match="no file can be written there"):
            Results(path)
    done = subprocess.run(command("lora", "--save", str(tmp_path / "none" / "a.json")), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1


def test_steps_tell_how_many_seconds_have_gone(capsys):
    steps_from_now()("a step")
    seconds, rest = capsys.readouterr().err.split(" s  ")
    assert 0 <= float(seconds) < 60
    assert rest == "a step\n"


# Room


def test_a_disk_without_room_is_told(tmp_path):
    room.check_disk(tmp_path, 1)
    with pytest.raises(BenchmarkFailed, match=r"has no room for 1000000\.0 TB, .* are free; set TMPDIR"):
        room.check_disk(tmp_path, 10**18)


def test_a_gpu_without_room_is_told(monkeypatch):
    monkeypatch.setenv("NBCACHE_TEST_DRIVER", "tests.support.emulated:make")
    room.check_gpu(10**18)  # the emulation does not count over processes
    monkeypatch.setattr(room, "free_gpu_bytes", lambda uuid: 10)
    room.check_gpu(10)
    with pytest.raises(BenchmarkFailed, match=r"has 10 B of .* free, and 11 B are wanted"):
        room.check_gpu(11)


def test_memory_that_may_not_suffice_is_told():
    steps: list[str] = []
    room.note_host(1, steps.append)
    assert steps == []
    room.note_host(10**18, steps.append)
    assert "1000000.0 TB will be used" in steps[0]


@pytest.mark.parametrize("arguments", [("models",), ("restart", "--flux", "--device", "cuda"), ("lora",)])
def test_without_a_gpu_nothing_is_written(tmp_path, arguments):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("nbcache: ")
    assert os.listdir(tmp_path) == []


def test_no_driver_is_no_room(monkeypatch):
    def no_driver():
        raise DriverError("no driver")

    monkeypatch.setattr(room, "open_driver", no_driver)
    with pytest.raises(DriverError):
        room.check_gpu(0)


# A pipeline that is kept, and a run that is cut off


def test_a_pipeline_is_kept_used_again_and_measured_until_the_run_is_cut_off(tmp_path):
    kept, saved, scratch = tmp_path / "flux", tmp_path / "models.json", tmp_path / "tmp"
    scratch.mkdir()
    emulation = {"NBCACHE_TEST_DRIVER": "tests.support.emulated:make", "NBCACHE_TEST_GPU_BYTES": str(1 << 30)}
    environment = {**os.environ, **emulation, "NBCACHE_GPU_LOW_WATERMARK": "1MB", "TMPDIR": str(scratch)}
    arguments = ("models", "--small", "--keep", str(kept), "--runs", "1000", "--save", str(saved))
    with subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        eventually(lambda: saved.exists() or process.poll() is not None, timeout_s=100)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == TERMINATED, err
    report = msgspec.json.decode(saved.read_bytes(), type=ModelReport)
    assert not report.complete
    assert "first load: " in out
    assert "cut off" in err
    assert "the pipeline is written" in err
    assert [name for name in os.listdir(scratch) if name.startswith("nbcache")] == []
    eventually(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))

    steps: list[str] = []
    before = (kept / "model_index.json").stat()
    with pipeline_folder(small=True, keep=str(kept), on_step=steps.append) as folder:
        assert Path(folder) == kept
    assert steps == [f"the pipeline in {kept} is used"]
    assert (kept / "model_index.json").stat() == before


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(BenchmarkFailed, match="holds something else"), pipeline_folder(small=True, keep=str(tmp_path)):
        pass
    assert os.listdir(tmp_path) == ["mine"]
