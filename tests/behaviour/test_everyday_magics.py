"""Magics that help, in real kernels: completion, suggestions, silence, release, progress, and what they show as HTML."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

import nbcache
from nbcache.checkpoints import aliases
from tests.behaviour.test_magics import LEASES, assert_usage_error
from tests.support.checkpoints import raw_checkpoint, write_checkpoint
from tests.support.kernels import Interpreter, Kernel
from tests.support.waiting import eventually


@pytest.fixture
def checkpoint(runtime_dir: Path, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors")


@pytest.fixture
def kernel(runtime_dir, tmp_path):
    with Kernel(JPY_SESSION_NAME="/home/me/first.ipynb") as kernel:
        kernel.run(f"%load_ext nbcache\n%cd -q {tmp_path}")
        yield kernel


@pytest.mark.parametrize("use_jedi", [True, False])
def test_completion_through_the_kernel(checkpoint, kernel, tmp_path, use_jedi):
    kernel.run(f"%config IPCompleter.use_jedi = {use_jedi}")
    aliases.add("mini", str(checkpoint))
    nbcache.put("probe-one", torch.ones(2)).release()
    (tmp_path / "sub folder").mkdir()
    for other in ("old.pt", "tiny.gguf"):
        (tmp_path / other).touch()
    expected = {
        "%load_weights mi": "%load_weights mini",
        "%load_weights qwen": "%load_weights qwen-image",
        "%load_weights mod": "%load_weights model.safetensors",
        "%load_weights pro": "%load_weights probe-one",
        "%load_weights ol": "%load_weights old.pt",
        "%load_weights tin": "%load_weights tiny.gguf",
        f"w = %load_weights {tmp_path}/mod": f"w = %load_weights {checkpoint}",
        '%load_weights "sub': '%load_weights "sub folder/',
        '%load_weights "sub f': '%load_weights "sub folder/',
        "%load_weights model.safetensors --sh": "%load_weights model.safetensors --share",
        "%load_weights model.safetensors --share read": "%load_weights model.safetensors --share readonly",
        "%load_weights model.safetensors --dtype bf": "%load_weights model.safetensors --dtype bfloat16",
        "%load_weights --device cp": "%load_weights --device cpu",
        "%weights ev": "%weights evict",
        "%weights evict pro": "%weights evict probe-one",
        "%weights release pro": "%weights release probe-one",
        "%save_weights pro": "%save_weights probe-one",
    }
    for code, whole in expected.items():
        assert whole in kernel.complete(code), code
    kernel.run("embeddings = 1")
    assert "%save_weights x embeddings" in kernel.complete("%save_weights x emb")
    assert "%load_weights x --as embeddings" in kernel.complete("%load_weights x --as emb")
    every = kernel.complete("%load_weights ")
    assert {"%load_weights mini", "%load_weights probe-one", "%load_weights model.safetensors"} <= set(every)
    assert kernel.complete("%load_weights bf") == []


def test_quotes_hold_the_words_of_every_option_together(runtime_dir, kernel, tmp_path):
    (tmp_path / "sp ace" / "in ner").mkdir(parents=True)
    write_checkpoint(tmp_path / "sp ace" / "in ner" / "model.safetensors")
    kernel.run('w = %load_weights "sp ace" --subfolder "in ner" --dtype "float16"')
    assert kernel.run("len(w), str(w['layer.0'].dtype)") == "(4, 'torch.float16')"
    kernel.run("""%load_weights 'sp ace' --subfolder 'in ner' --as "again" """)
    assert kernel.run("len(again)") == "4"


def test_completion_goes_with_the_extension(checkpoint, kernel):
    assert "%load_weights model.safetensors" in kernel.complete("%load_weights mode")
    kernel.run("%unload_ext nbcache")
    assert kernel.run("len(get_ipython().strdispatchers['complete_command'].regexs)") == kernel.run(
        "sum('load_weights' not in key.pattern for key in get_ipython().strdispatchers['complete_command'].regexs)"
    )


def test_completion_starts_no_daemon(kernel, runtime_dir):
    kernel.complete("%weights evict ")
    assert not (runtime_dir / "daemon.sock").exists()


def test_did_you_mean(checkpoint, kernel):
    aliases.add("flux-dev", str(checkpoint))
    nbcache.put("embeddings", torch.ones(2)).release()
    assert_usage_error(kernel.try_run("%load_weights embedings"), "did you mean embeddings?")
    assert_usage_error(kernel.try_run("%load_weights flux-dv"), "did you mean flux-dev?")
    assert_usage_error(kernel.try_run("%load_weights ./modle.safetensors"), "did you mean", "model.safetensors?")
    assert_usage_error(kernel.try_run("%load_weights qwen-imag"), "did you mean qwen-image?")  # built in
    assert_usage_error(kernel.try_run("%weights evict embeding"), "did you mean embeddings?")
    assert_usage_error(kernel.try_run("%weights relese embeddings"), "did you mean release?")
    assert_usage_error(kernel.try_run("%load_weights flux-dev --devcie cpu"), "did you mean --device?")
    assert_usage_error(kernel.try_run("%nbcache onn"), "did you mean on?")
    for line in (
        "%load_weights zzzzzz",
        "%load_weights zzzzzz.safetensors",
        "%weights evict model",
        "%load_weights x --zzz 3",
    ):
        outcome = kernel.try_run(line)
        assert_usage_error(outcome)
        assert "did you mean" not in outcome.stderr


def test_a_semicolon_silences(checkpoint, kernel):
    outcome = kernel.try_run(f"%load_weights {checkpoint};")
    assert (outcome.results, outcome.stdout, outcome.error) == ([], "", "")
    assert kernel.run("len(Out)") == "0"
    assert kernel.run(f"%load_weights {checkpoint} --as w;") == ""
    assert kernel.run("len(w)") == "4"
    assert kernel.run(f"v = %load_weights {checkpoint};") == ""
    assert kernel.run("len(v)") == "4"
    assert kernel.run("%save_weights kept w;") == ""
    assert kernel.run("%save_weights kept w").endswith("(saved)")
    assert kernel.run("%nbcache off;") == ""
    assert kernel.run("%nbcache") == "nbcache is off"


def test_release(checkpoint, kernel):
    kernel.run("import torch, sys")
    kernel.run(f"w = %load_weights {checkpoint}")
    kernel.run("w")
    kernel.run("w['layer.0']")
    kernel.try_run("1 / 0")
    kernel.run("del w")
    assert kernel.run(LEASES) == "1"
    said = kernel.run(f"%weights release {checkpoint}")
    assert said.endswith("no variable refers to it any more")
    assert kernel.run(LEASES) == "0"
    assert kernel.run("hasattr(sys, 'last_traceback'), [v for v in Out.values() if 'Weights' in str(type(v))]") == "(False, [])"


def test_release_says_what_still_refers_to_a_tensor(checkpoint, kernel):
    kernel.run(f"import torch\n%load_weights {checkpoint} --as w")
    kernel.run("model = torch.nn.Linear(64, 64, bias=False)\nmodel.load_state_dict({'weight': w['layer.0']}, assign=True);")
    kernel.run("view = w['layer.1'][1:]\nkept = {'a': [w['layer.1']]}\nunrelated = torch.ones(3)")
    said = kernel.run(f"%weights release {checkpoint}")
    assert "still hold tensors of it: kept['a'][0], model.weight, view; delete them" in said
    assert kernel.run(LEASES) == "1"
    assert "no weights of that name; it holds none" in kernel.try_run(f"%weights release {checkpoint}").stderr
    kernel.run("del model, view, kept")
    assert kernel.run(LEASES) == "0"


def test_the_line_says_who_shares(checkpoint, kernel):
    assert kernel.run(f"%load_weights {checkpoint} --as w").endswith("(read from disk)")
    with Kernel() as second:
        second.run("%load_ext nbcache")
        assert second.run(f"%load_weights {checkpoint} --as w").endswith("(cached, shared with 1 notebook, 0 B private)")


def test_weights_as_html(checkpoint, kernel):
    kernel.run(f"%load_weights {checkpoint} --as v\n%load_weights {checkpoint} --as w --dtype bfloat16\n%save_weights probe w")
    outcome = kernel.try_run("%weights")
    html = outcome.displays[-1]["text/html"]
    for words in ("model.safetensors", "probe", "me/first.ipynb", "layer.0", "64&times;64", "saved", 'class="bar"', "private"):
        assert words in html
    assert f"(pid {kernel.pid})" in html
    before = [entry.last_used_s for entry in nbcache.status().entries]
    kernel.run("%weights")
    assert all(now >= then for now, then in zip((e.last_used_s for e in nbcache.status().entries), before, strict=True))
    shown = kernel.try_run("w").displays[-1]["text/html"]
    assert "bfloat16" in shown and "<details>" in shown
    assert "released" in kernel.try_run("w.release()\nw").displays[-1]["text/html"]


def test_names_are_escaped(kernel):
    nbcache.put("<script>alert(1)<", {"<b>": torch.ones(1)}).release()
    html = kernel.try_run("%weights").displays[-1]["text/html"]
    assert "<script>" not in html and "<b>&lt;b" not in html and "&lt;script&gt;" in html


def test_progress_in_a_notebook(kernel, tmp_path, monkeypatch):
    """A slow load is shown in one display that is updated, and that ends as the summary."""
    size = 1 << 20
    path = raw_checkpoint(tmp_path / "big.safetensors", {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    os.truncate(path, path.stat().st_size + size)
    slow = (
        "import time\nfrom nbcache.client import api\nreal = api.load\n"
        "def slow(*a, on_progress=None, **k):\n"
        "    for part in (0, 1, 2, 3):\n        on_progress(part * 10**9, 4 * 10**9); time.sleep(0.3)\n"
        "    return real(*a, on_progress=on_progress, **k)\n"
        "api.load = slow"
    )
    kernel.run(slow)
    outcome = kernel.try_run(f"w = %load_weights {path} --device cpu")
    assert outcome.stdout == ""
    (shown,) = [display["text/plain"] for display in outcome.displays]
    assert "GB of 4.0 GB, " in shown and "GB/s" in shown and "left" in shown
    assert outcome.updates[-1]["text/plain"].startswith(f"{tmp_path.name}/big.safetensors: 1 tensor, 1.0 MB on cpu in ")
    quiet = kernel.try_run(f"import os\nos.environ['NBCACHE_PROGRESS'] = '0'\nw = %load_weights {path}")
    assert (quiet.displays, quiet.updates, quiet.stdout) == ([], [], "")


def pace(daemon_pid: int, path: Path, pauses: int = 8) -> None:
    """Hold the daemon up while it stages a file, as a slow disk would: between two pauses it answers one question."""
    key = eventually(lambda: next((entry.key for entry in nbcache.status().entries if entry.name == str(path)), None))
    for _ in range(pauses):
        if next(entry.host for entry in nbcache.status().entries if entry.key == key) == "staged":
            return
        os.kill(daemon_pid, signal.SIGSTOP)
        try:
            time.sleep(0.2)  # this is the slowness; nothing is waited for
        finally:
            os.kill(daemon_pid, signal.SIGCONT)


def test_progress_of_a_slow_load(checkpoint, kernel, tmp_path):
    """What a bar tells of a real load is what the daemon has staged: it grows, with a speed, and makes way for the summary."""
    size = 768 << 20
    path = raw_checkpoint(tmp_path / "big.safetensors", {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    os.truncate(path, path.stat().st_size + size)
    kernel.run(f"small = %load_weights {checkpoint} --device cpu")
    cell = kernel.begin(f"w = %load_weights {path} --device cpu")
    pace(nbcache.status().pid, path)
    outcome = kernel.finish(cell)
    assert (outcome.error, outcome.stdout) == ("", "")
    *drawn, last = [shown["text/plain"] for shown in (*outcome.displays, *outcome.updates)]
    told = [re.search(r"big\.safetensors: ([\d.]+) (M?B) of 805 MB(, [\d.]+ GB/s, .* left)?$", text) for text in drawn]
    assert told and all(told), drawn
    staged = [float(each[1]) for each in told]
    assert staged == sorted(staged) and staged[-1] <= 805
    assert any(each[3] for each in told)
    assert [text.count("█") for text in drawn] == sorted(text.count("█") for text in drawn)
    assert last.startswith(f"{tmp_path.name}/big.safetensors: 1 tensor, 805 MB on cpu in ") and "(read from disk" in last
    assert kernel.run("w['w'].sum().item()") == "0"


def test_config(kernel):
    outcome = kernel.try_run("%config NBCache.host_limt = '1G'")
    assert "did you mean host_limit?" in outcome.stderr + outcome.stdout
    kernel.run("%config NBCache.host_limit = '1G'")
    assert kernel.run("import os\nos.environ['NBCACHE_HOST_LIMIT']") == "'1G'"


TERMINAL = """
from IPython.core.completer import provisionalcompleter
from IPython.terminal.interactiveshell import TerminalInteractiveShell
shell = TerminalInteractiveShell.instance()
shell.run_line_magic("load_ext", "nbcache")
def complete(code):
    with provisionalcompleter():
        return [code[: each.start] + each.text for each in shell.Completer.completions(code, len(code))]
"""


def test_completion_in_a_terminal(checkpoint, tmp_path):
    with Interpreter(IPYTHONDIR=str(tmp_path / "ipython")) as terminal:
        terminal.run(TERMINAL)
        assert "%weights evict" in terminal.run("complete('%weights ev')")
        assert f"%load_weights {checkpoint}" in terminal.run(f"complete('%load_weights {tmp_path}/mod')")
        assert "w = %load_weights x --share readonly" in terminal.run("complete('w = %load_weights x --share re')")
