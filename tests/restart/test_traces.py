"""What imports leave in a process: each forked kernel has its own, or what it would have had it imported the package itself."""

from __future__ import annotations

import time

from nbcache.jupyter.experience import recall
from tests.support.kernels import Kernel, value
from tests.support.waiting import eventually
from tests.support.zygotes import installed, is_forked, start_zygote, zygote


def test_a_generator_that_a_module_makes_gives_each_kernel_numbers_of_its_own(start):
    kernel = start(thing="import random\nown, seeded = random.Random(), random.Random(3)\nseeded.random()")
    look = "import thing, random; right = random.Random(3); right.random()\n"
    look += "thing.own.random(), thing.seeded.random() == right.random(), random.random()"
    seen = []
    for _ in range(3):
        seen.append(value(kernel, look))
        kernel.restart()
        assert is_forked(kernel)
    assert all(is_as_seeded for _, is_as_seeded, _ in seen)
    assert len({drawn for drawn, _, _ in seen}) == len({drawn for _, _, drawn in seen}) == 3


def test_dummy_symbols_of_two_kernels_differ(environment, own_specs, monkeypatch):
    """sympy tells them apart by a number that it draws when it is imported; pickled ones meet."""
    monkeypatch.setenv("NBCACHE_PRELOAD", "sympy")
    start_zygote(own_specs)
    drawn = set()
    with Kernel("nbcache", own_specs) as kernel:
        for _ in range(2):
            assert is_forked(kernel)
            drawn.add(value(kernel, "import sympy; sympy.Dummy().dummy_index"))
            kernel.restart()
    assert len(drawn) == 2


def test_a_package_that_makes_a_temporary_directory_is_left_to_the_kernel(start):
    """The first kernel that ended would remove it for all."""
    kernel = start(thing="import tempfile\nfolder = tempfile.TemporaryDirectory()")
    assert "temporary directory" in recall().broken["thing"]
    for _ in range(2):
        assert kernel.run("import os, thing; os.path.isdir(thing.folder.name)") == "True"
        kernel.restart()
        assert is_forked(kernel)


def test_who_logs_writes_to_the_kernels_own_streams(start):
    kernel = start(
        thing="import logging, sys\nlog = logging.getLogger('thing')\nhandler = logging.StreamHandler()\n"
        "handler.flush = sys.stderr.flush\nlog.addHandler(handler)\nlog.addHandler(logging.StreamHandler(sys.stdout))"
    )
    kernel.run("import sys, thing; err, out = thing.log.handlers")
    outcome = kernel.try_run("thing.log.warning('well')")
    assert (outcome.stdout, outcome.stderr) == ("well\n", "well\n")
    assert (
        kernel.run("err.stream is sys.stderr, out.stream is sys.stdout, err.flush.__self__ is sys.stderr")
        == "(True, True, True)"
    )


def test_log_records_count_from_the_kernels_start(start):
    kernel = start(thing="")
    before = time.time()
    kernel.restart()
    look = "import logging, time; time.time() - logging.LogRecord('', 20, '', 1, '', (), None).relativeCreated / 1000"
    assert value(kernel, look) > before - 0.1


def test_workers_are_sent_the_warnings_of_what_was_imported_here(start):
    """scikit-learn pickles the filters for each; whoever unpickles one imports its package, torch say."""
    kernel = start(thing="import warnings\nclass Own(UserWarning): pass\nwarnings.simplefilter('ignore', Own)")
    sent = (
        "import pickle, warnings; sent = pickle.dumps(warnings.filters); b'thing' in sent, b'torch' in sent, b'IPython' in sent"
    )
    assert value(kernel, sent) == (False, False, True)
    assert value(kernel, f"import thing; {sent}") == (True, False, True)


def test_a_file_of_settings_that_a_package_reads_where_it_is_imported(environment, own_specs, monkeypatch, tmp_path):
    """A stand-in for matplotlib: in the notebook's folder, and the user's."""
    monkeypatch.setenv("NBCACHE_PRELOAD", "matplotlib")
    (tmp_path / "settings").mkdir()
    installed(environment, "matplotlib", f"def get_configdir(): return {str(tmp_path / 'settings')!r}")
    first = start_zygote(own_specs)
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()

    def restart(kernel: Kernel, folder: str) -> None:
        kernel._runner.run(kernel._kernel.shutdown_kernel())
        kernel._runner.run(kernel._kernel.start_kernel(env=kernel._environment, cwd=folder))
        kernel._runner.run(kernel._connect())

    with Kernel("nbcache", own_specs) as kernel:
        assert is_forked(kernel)
        restart(kernel, str(notebooks))
        assert is_forked(kernel)
        (notebooks / "matplotlibrc").write_text("figure.dpi: 42")
        restart(kernel, str(notebooks))
        assert not is_forked(kernel)
        assert zygote().pid == first.pid
        (tmp_path / "settings" / "matplotlibrc").write_text("figure.dpi: 42")
        restart(kernel, str(tmp_path))
        assert not is_forked(kernel)
        eventually(lambda: zygote().pid != first.pid, 60)
        restart(kernel, str(tmp_path))
        assert is_forked(kernel)
