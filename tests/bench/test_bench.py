"""The benchmarks at tiny size, over the emulated driver: that they run, and that what they print is complete. Not how fast."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgspec
import pytest
from multiprocess import resource_tracker

import nbcache
from nbcache.bench import disk, flux, kernel
from nbcache.bench.gpu import GpuReport, measure_gpu
from nbcache.bench.host import Attach, Stage, measure_attach, measure_stage, render_attach, render_stage
from nbcache.bench.isolation import own_daemon, run_fresh, run_fresh_telling
from nbcache.bench.lora import measure_lora
from nbcache.bench.lora_files import Shape
from nbcache.bench.lora_report import LoraReport, render_lora
from nbcache.bench.models import measure_models, render_models
from nbcache.bench.peers import RIVALS, Peer, Rival, measure_peers
from nbcache.bench.pipeline import CLIP, FULL_BYTES, T5, TRANSFORMER, VAE, shapes_of, write_pipeline
from nbcache.bench.tables import render_gpu
from nbcache.client.session import Session
from nbcache.config import NBCache
from nbcache.errors import BenchmarkFailed, CheckpointNotFound, InvalidOption
from tests.support.checkpoints import write_checkpoint
from tests.support.kernels import REPOSITORY

TINY = 64
"""FLUX's dimensions divided by this: 5.9 MB."""


@pytest.fixture(scope="module", autouse=True)
def tracker() -> None:
    """The process that multiprocess keeps for the life of ours is no leak."""
    resource_tracker.ensure_running()


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    flux.write_flux(str(folder), TINY)
    return folder


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBCACHE_TEST_DRIVER", "tests.support.emulated:make")
    monkeypatch.setenv("NBCACHE_TEST_GPU_BYTES", str(1 << 30))
    monkeypatch.setenv("NBCACHE_GPU_LOW_WATERMARK", "1MB")


def shard_paths(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(map(str, folder.glob("*.safetensors"))))


# A whole pipeline


def test_models_are_measured_over_the_emulated_gpu(emulated, tmp_path):
    write_pipeline(str(tmp_path / "flux"), small=True)
    steps, reports = [], []
    report = measure_models(str(tmp_path / "flux"), 1, True, steps.append, reports.append)
    assert [step.split(":")[0] for step in steps] == ["first", "cached", "stock"]
    assert [(len(each.cached), len(each.stock_s), each.complete) for each in reports] == [
        (0, 0, False), (1, 0, False), (1, 1, False), (1, 1, True),
    ]  # fmt: skip
    assert reports[-1] == report
    assert "after a restart" not in render_models(reports[0])
    assert report.first.hit is False
    assert report.first.beyond_imports_s >= report.first.map_s + report.first.build_s > 0
    (cached,) = report.cached
    assert cached.hit
    assert (cached.tensors, cached.nbytes) == (report.first.tensors, report.first.nbytes)
    assert cached.private_bytes == 0
    assert report.stock_cached == 1.0
    text = render_models(report)
    assert "after a restart" in text
    assert "100% of the files in the page cache" in text


def test_the_pipeline_has_the_published_counts():
    counts = {"transformer": (TRANSFORMER, 1160, 11_901_408_320), "text_encoder_2": (T5, 219, 4_762_310_656)}
    counts |= {"text_encoder": (CLIP, 196, 123_060_480), "vae": (VAE, 244, 83_819_683)}
    for name, (config, tensors, elements) in counts.items():
        shapes = shapes_of(config)
        assert (len(shapes), sum(map(math.prod, shapes.values()))) == (tensors, elements), name
    assert shapes_of(TRANSFORMER) == flux.flux_shapes()
    assert sum(2 * elements for _, _, elements in counts.values()) < FULL_BYTES


# FLUX by formula


def test_flux_has_the_published_counts():
    shapes = flux.flux_shapes()
    assert len(shapes) == 1160
    assert sum(map(math.prod, shapes.values())) == 11_901_408_320
    assert flux.nbytes_of_shapes(shapes) == 23_802_816_640
    assert shapes["time_text_embed.text_embedder.linear_1.weight"] == (3072, 768)
    assert shapes["single_transformer_blocks.37.proj_out.weight"] == (3072, 15360)
    assert shapes["transformer_blocks.18.norm1_context.linear.bias"] == (18432,)


def test_flux_shards_are_those_of_the_published_files():
    published = (9_983_040_304, 9_949_328_904, 3_870_584_832)
    shapes = flux.flux_shapes()
    cut = [flux.nbytes_of_shapes({name: shapes[name] for name in names}) for names in flux.shards()]
    assert sum(cut) == 23_802_816_640
    for body, whole in zip(cut, published, strict=True):
        assert 0 < whole - body < 100_000  # the header


@pytest.mark.parametrize("divide_by", [2, 64])
def test_small_flux_has_the_same_tensors(divide_by):
    assert flux.flux_shapes(divide_by).keys() == flux.flux_shapes().keys()
    assert all(min(shape) >= 1 for shape in flux.flux_shapes(divide_by).values())


def test_flux_refuses_a_divisor_that_leaves_fractions():
    with pytest.raises(ValueError, match="divide_by=3"):
        flux.flux_shapes(3)


def test_written_flux_is_read_by_safetensors(tiny_flux):
    from safetensors.torch import load_file

    assert [path.name for path in sorted(tiny_flux.iterdir())] == [
        *(f"diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
        "diffusion_pytorch_model.safetensors.index.json",
    ]
    index = json.loads((tiny_flux / "diffusion_pytorch_model.safetensors.index.json").read_text())
    tensors = {}
    for path in shard_paths(tiny_flux):
        part = load_file(path)
        assert {index["weight_map"][name] for name in part} == {Path(path).name}
        tensors |= part
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == flux.flux_shapes(TINY)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert len({tensor.flatten()[:8].double().sum().item() for tensor in tensors.values()}) > 900  # not one block repeated


@pytest.mark.parametrize("nbytes", [328_000_000, 642_000_000, 1_200_000_000, 2_000_000_000])
def test_lora_shapes_come_near_the_size(nbytes):
    shapes = flux.lora_shapes(nbytes)
    assert len(shapes) == 988
    assert abs(flux.nbytes_of_shapes(shapes) / nbytes - 1) < 0.02


# Files and the page cache


def test_pages_just_written_are_in_the_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(100_000))
    assert disk.cached_share([str(path)]) == 1.0
    assert disk.read_plainly([str(path)]) > 0
    disk.drop_pages([str(path)])  # a tmpfs keeps them, so what is left is not known here
    assert 0.0 <= disk.cached_share([str(path)]) <= 1.0


def test_an_empty_file_has_no_pages(tmp_path):
    path = tmp_path / "empty"
    path.touch()
    assert disk.cached_share([str(path)]) == 1.0


# Fresh processes


def test_a_fresh_process_is_another_one():
    assert run_fresh(os.getpid) != os.getpid()


def test_errors_of_a_fresh_process_are_raised_here(tmp_path):
    with pytest.raises(CheckpointNotFound):
        run_fresh(partial(_resolve, str(tmp_path / "none.safetensors")))
    with pytest.raises(BenchmarkFailed, match="ZeroDivisionError: "):
        run_fresh(partial(divmod, 1, 0))


def test_a_fresh_process_that_dies_or_hangs_is_an_error():
    with pytest.raises(BenchmarkFailed, match="exit code 7"):
        run_fresh(partial(os._exit, 7))
    with pytest.raises(BenchmarkFailed, match="longer than"):
        run_fresh(_hang, timeout_s=0.01)


def test_what_a_fresh_process_prints_is_not_on_stdout(capfd):
    run_fresh(partial(print, "a library talks"))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "a library talks" in captured.err


def test_what_a_fresh_process_tells_comes_before_it_ends():
    told = []
    assert run_fresh_telling(_tell, told.append) == "end"
    assert told == [1, "two"]
    with pytest.raises(BenchmarkFailed, match="ZeroDivisionError"):
        run_fresh_telling(_tell_and_fail, told.append)
    assert told == [1, "two", 3]


def test_the_daemon_of_a_benchmark_has_room_for_what_is_measured(runtime_dir, monkeypatch):
    default = NBCache().host_limit_bytes()
    with own_daemon(default - 1):
        Session.open().close()
        assert nbcache.status().host.limit_bytes == default
    with own_daemon(2 * default):
        Session.open().close()
        assert nbcache.status().host.limit_bytes == 2 * default
    assert "NBCACHE_HOST_LIMIT" not in os.environ
    monkeypatch.setenv("NBCACHE_HOST_LIMIT", "1GB")
    with own_daemon(2 * default):
        Session.open().close()
        assert nbcache.status().host.limit_bytes == 10**9


def test_own_daemon_is_gone_afterwards(runtime_dir):
    with own_daemon() as directory:
        assert os.environ["NBCACHE_RUNTIME_DIR"] == str(directory)
        Session.open().close()
        assert (directory / "daemon.sock").exists()
    assert os.environ["NBCACHE_RUNTIME_DIR"] == str(runtime_dir)
    assert not directory.exists()
    assert not runtime_dir.exists()


def _resolve(path: str) -> None:
    from nbcache.checkpoints.catalog import resolve

    resolve(path)


def _tell(tell) -> str:
    tell(1)
    tell("two")
    return "end"


def _tell_and_fail(tell) -> float:
    tell(3)
    return 1 / 0


def _hang() -> None:
    os.read(os.pipe()[0], 1)  # its other end stays open


# The commands


def test_attach(tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors")
    (result,) = measure_attach(str(path), processes=1, loads=2)
    assert (result.tensors, result.nbytes) == (4, (64 * 64 + 7 + 1) * 4)
    assert math.isfinite(result.stock_median_s / result.median_s)
    assert "a.safetensors" in render_attach([result])
    assert msgspec.json.decode(msgspec.json.encode(result), type=Attach) == result


def test_stage(tmp_path):
    result = measure_stage(1 << 20, rounds=1, directory=str(tmp_path))
    assert math.isfinite(result.ratio)
    assert "ratio" in render_stage(result)
    assert msgspec.json.decode(msgspec.json.encode(result), type=Stage) == result
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(("command", "kind"), [(("attach",), list[Attach]), (("stage", "--size", "1MB"), Stage)])
def test_commands_on_the_cpu_print_one_document(tmp_path, command, kind):
    file = [str(write_checkpoint(tmp_path / "a.safetensors"))] if command == ("attach",) else []
    done = _nbcache(*command, *file, "--json")
    assert done.returncode == 0, done.stderr
    msgspec.json.decode(done.stdout, type=kind)


def finite(report: GpuReport) -> bool:
    numbers = [report.card.link_per_s, report.card.copy_per_s, *report.disk_per_s]
    for load in (*report.loads, *report.loras):
        numbers += [load.median_s, load.per_s, load.per_tensor_s, *load.runs_s, *load.floors_s]
        numbers += [load.ratio] if load.floor else []
    return all(map(math.isfinite, numbers))


@pytest.mark.timeout(300)
def test_gpu_report_is_complete(tiny_flux, emulated):
    steps: list[str] = []
    reports: list[GpuReport] = []
    report = measure_gpu(
        str(tiny_flux), 1, loras=True, probe_bytes=1 << 20, lora_bytes=(10_000_000,), idle_s=0.01, on_step=steps.append,
        on_report=reports.append,
    )  # fmt: skip
    assert [len(each.loads) for each in reports] == [1, 1, 2, 5, 6, 6, 6, 6, 6]
    assert [each.complete for each in reports] == [False] * 8 + [True]
    assert reports[-1] == report
    assert all("first load, cold" in render_gpu(each) for each in reports)
    assert [(load.share, load.floor) for load in report.loads] == [
        ("cow", "disk"),
        ("cow", "link"),
        ("readonly", ""),
        ("cow", ""),
        ("private", "device copy"),
        ("cow", "link"),
    ]
    assert {load.tensors for load in report.loads} == {1160}
    assert {load.nbytes for load in report.loads} == {flux.nbytes_of_shapes(flux.flux_shapes(TINY))}
    assert [load.private_bytes for load in report.loads if load.share == "private"] == [report.loads[0].nbytes]
    assert [(load.what, load.share, load.tensors) for load in report.loras] == [
        ("LoRA 10.0 MB: from pinned host, again", "readonly", 988),
        ("LoRA 10.0 MB: from pinned host, again", "cow", 988),
    ]
    assert finite(report)
    assert len(report.disk_per_s) == 1
    assert report.compared == kernel.Compared(1160, ())
    assert report.peers == ()
    cost = report.footprint
    assert min(cost.rss_anon_bytes, cost.rss_beside_bytes, cost.host_tier_bytes, cost.slab_bytes) > 0
    assert cost.gpu_beside_bytes is None  # the emulation does not count over processes
    assert len(steps) == 8
    assert msgspec.json.decode(msgspec.json.encode(report), type=GpuReport) == report
    text = render_gpu(report)
    assert "content: 1160 of 1160 tensors as safetensors reads them" in text
    assert "from pinned host" in text


@pytest.mark.timeout(300)
def test_gpu_command_prints_one_document(tmp_path, emulated):
    path = write_checkpoint(tmp_path / "a.safetensors")
    done = _nbcache("gpu", str(path), "--runs", "1", "--peers", "--no-cold", "--json")
    assert done.returncode == 0, done.stderr
    report = msgspec.json.decode(done.stdout, type=GpuReport)
    assert [load.what for load in report.loads] == ["first load, hot", *["attach"] * 3, "from pinned host"]
    assert report.compared is not None and report.compared.equal
    assert report.disk_per_s == ()
    assert {peer.name for peer in report.peers} == {rival.name for rival in RIVALS}
    assert all(peer.sound or peer.remark for peer in report.peers)
    assert "other loaders" in render_gpu(report)


@pytest.mark.parametrize("arguments", [[], ["a.safetensors", "--flux"], ["a.safetensors", "--runs", "0"]])
def test_gpu_command_called_wrongly(arguments):
    done = _nbcache("gpu", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_temporary_flux_is_removed():
    with flux.temporary_flux(TINY) as folder:
        assert len(shard_paths(Path(folder))) == 3
    assert not os.path.exists(folder)


def test_gpu_without_a_gpu_says_so(tiny_flux):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InvalidOption, match="sees no GPU"):
        measure_gpu(str(tiny_flux))


def _nbcache(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "nbcache", "bench", *arguments], capture_output=True, text=True)


# Peers: the installed ones are run by the command above


def _open_right(files, device, stack):
    from safetensors.torch import load_file

    return lambda: {name: tensor for path in files for name, tensor in load_file(path, device=device).items()}


def _open_wrong(files, device, stack):
    load = _open_right(files, device, stack)
    return lambda: {name: tensor + 1 for name, tensor in load().items()}


def _open_failing(files, device, stack):
    def load():
        raise RuntimeError("out of\nluck")

    return load


def _open_dying(files, device, stack):
    return lambda: os._exit(3)


def _open_nothing(files, device, stack):
    return None


def _convert(files, target):
    with open(target, "wb") as file:
        file.write(Path(files[0]).read_bytes())


def test_peers_that_fail_are_listed_with_their_error(tmp_path, emulated):
    files = [str(write_checkpoint(tmp_path / "a.safetensors"))]
    rivals = [
        Rival("absent", "no-such-distribution", _open_right),
        Rival("failing", "safetensors", _open_failing),
        Rival("dying", "safetensors", _open_dying),
        Rival("older", "safetensors", _open_nothing),
        Rival("wrong", "safetensors", _open_wrong),
        Rival("right", "safetensors", _open_right),
        Rival("own format", "safetensors", _open_right, _convert),
    ]
    found = {peer.name: peer for peer in measure_peers(files, 1, 1e9, rivals)}
    assert found["absent"] == Peer("absent", "", remark="not installed")
    assert found["failing"].remark == "RuntimeError: out of luck"
    assert "exit code 3" in found["dying"].remark
    assert found["older"].remark.startswith("not offered by version")
    assert found["wrong"].remark.startswith("wrong bytes in layer.")
    assert [name for name, peer in found.items() if peer.sound] == ["right", "own format"]
    assert found["right"].cached == 1.0
    assert found["right"].ratio is not None and math.isfinite(found["right"].ratio)


def test_comparison_finds_a_missing_and_a_changed_tensor(tmp_path):
    from safetensors.torch import load_file

    path = str(write_checkpoint(tmp_path / "a.safetensors"))
    tensors = load_file(path)
    assert kernel.compare(tensors, [path]).equal
    tensors["layer.0"] = tensors["layer.0"].flip(0)
    del tensors["layer.1"]
    assert kernel.compare(tensors, [path]).differing == ("layer.0", "layer.1")
    assert not kernel.compare({}, []).equal


TINY_FLUX = Shape(heads=2, head=16, double_blocks=2, single_blocks=2, channels=8, text=32, pooled=32, axes=(4, 4, 8))


def test_lora_is_measured_beside_the_stock_loader_and_equals_it(emulated, monkeypatch):
    """One of them fails, for two of it are never hot at once; the others are measured all the same."""
    monkeypatch.setenv("NBCACHE_LORA_GPU_LIMIT", "200kB")
    steps, reports = [], []
    report = measure_lora((95_000, 190_000, 60_000), TINY_FLUX, 3, 12, 1 << 20, steps.append, reports.append)
    assert [row.name for row in report.rows] == ["rank 10", "rank 7", "kohya"]
    for row in report.rows:
        assert row.equal
        assert min(row.stock_load_s, row.first_converted_s, row.first_pinned_s, row.first_hot_s) > 0
        assert (len(row.stock_hotswap_s), len(row.swap_pinned_s), len(row.swap_hot_s)) == (3, 3, 3)
    assert report.rows[0].tensors == report.rows[1].tensors
    assert report.churn.equal
    assert report.churn.cache_bytes == 0
    assert 0 < report.churn.hot < 12  # some had to leave for others
    assert sum(": swap " in step for step in steps) == 3
    assert "is the GPU short of memory?" in report.failed["rank 21"]
    assert [each.complete for each in reports] == [False] * 5 + [True]
    text = render_lora(report)
    assert text.count("as stock") == 3
    assert "12 random swaps among 3" in text
    assert "not measured: rank 21" in text
    assert reports[-1] == report
    assert [(len(each.rows), len(each.failed), each.churn is not None) for each in reports] == [
        (1, 0, False), (1, 1, False), (2, 1, False), (3, 1, False), (3, 1, True), (3, 1, True),
    ]  # fmt: skip
    assert "rank 10" in render_lora(reports[0])
    assert msgspec.json.decode(msgspec.json.encode(report), type=LoraReport) == report


def test_the_steps_of_a_load(emulated, tmp_path):
    """What is printed names the steps that a fill and a hit are made of."""
    for flags, wanted in (
        ([], ("in all", "request Find", "copy", "protect", "committed")),
        (["--resident"], ("attach", "map_slab")),
    ):
        command = [sys.executable, "-m", "tests.bench.steps", "--mb", "4", "--runs", "2", *flags]
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
        assert all(re.search(rf"^ +[\d.]+ +[\d.]+ +{step}", said, re.MULTILINE) for step in wanted), said
