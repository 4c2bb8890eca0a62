"""What a notebook sets before its first import of a package counts in a forked kernel, though it was imported ahead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kernels import Kernel, value
from tests.support.zygotes import installed, is_forked, start_zygote


def said(kernel: Kernel, code: str) -> str:
    outcome = kernel.try_run(code)
    assert not outcome.error, outcome.error
    return outcome.stderr


def test_what_was_imported_ahead_is_seen_once_it_is_imported(start):
    kernel = start(thing="import json, other\nvalue = object()", other="def f(): pass")
    look = "import sys; [name in sys.modules for name in ('thing', 'other', 'torch', 'numpy', 'nbcache', 'json')]"
    assert value(kernel, look) == [False, False, False, False, True, True]
    find = "import importlib.util; s = importlib.util.find_spec('thing')\n"
    find += "s.origin.endswith('thing.py'), 'object' in s.loader.get_source('thing'), 'thing' in sys.modules"
    assert value(kernel, find) == (True, True, False)
    assert value(
        kernel,
        "import thing, other; thing.__spec__.loader is thing.__loader__, type(thing.__loader__).__name__, other is thing.other",
    ) == (True, "SourceFileLoader", True)
    assert value(kernel, look) == [True, True, False, False, True, True]
    assert value(
        kernel, "from torch.nn import functional as F; import torch; torch.nn.functional is F, torch.ones(2).sum().item()"
    ) == (True, 2.0)
    assert value(kernel, "import importlib; importlib.reload(thing) is thing") is True
    assert value(kernel, "import pickle; pickle.loads(pickle.dumps(torch.nn.Linear(2, 2))).weight.shape == (2, 2)") is True
    assert value(kernel, "import copy, importlib.util; copy.copy(importlib.util.find_spec('sympy').loader) is not None") is True
    assert value(kernel, "import numpy; numpy.ones(3).sum().item(), torch.from_numpy(numpy.ones(3)).sum().item()") == (3.0, 3.0)


def test_nbcache_itself_brings_what_it_needs(start):
    kernel = start()
    look = "import sys; [n in sys.modules for n in ('nbcache.client.loading', 'nbcache.client.tensors', 'torch.nn', 'numpy')]"
    assert value(kernel, look) == [False, False, False, False]
    assert value(kernel, "import nbcache; import nbcache.client.loading as loading; loading is nbcache.client.loading") is True
    assert value(kernel, look) == [True, True, True, True]
    assert value(kernel, "import torch; loading.torch is torch") is True


def test_a_variable_that_is_set_before_the_import_counts(start):
    kernel = start(
        hub="import os\nhome = os.environ.get('HUB_HOME')\ndef later(): return os.getenv('HUB_TOKEN')",
        above="import hub\nhome = hub.home",
        beside="import os\nvalue, all_of_it, gpus = object(), dict(os.environ), os.environ.get('CUDA_VISIBLE_DEVICES')",
    )
    code = "import os, beside; one = beside.value; os.environ['HUB_HOME'] = '/somewhere'; os.environ['HUB_TOKEN'] = 'x'"
    assert not said(kernel, code)
    code = "import above, hub, beside; above.home, hub.home, hub.later(), beside.value is one"
    assert value(kernel, code) == ("/somewhere", "/somewhere", "x", True)
    kernel.restart()
    code = "import os; os.environ |= {'HUB_HOME': '/somewhere', 'CUDA_VISIBLE_DEVICES': '1'}; import above, beside\n"
    code += "from nbcache.jupyter.veil import has_come_back; [has_come_back(name) for name in ('above', 'hub', 'beside')]"
    assert value(kernel, code) == [False, False, True]
    kernel.restart()
    assert is_forked(kernel)
    assert value(kernel, "import above; [above.home]") == [None]
    assert value(kernel, "import os; os.environ['HUB_HOME'] = '/late'; import hub; [hub.home]") == [None]  # as ever
    kernel.restart()
    assert kernel.run("%env HUB_HOME=/there") and value(kernel, "from hub import home; home, __import__('above').home") == (
        "/there",
        "/there",
    )


def test_a_variable_that_is_set_too_late_for_compiled_modules_is_told_of_once(start):
    kernel = start()
    assert not said(kernel, "import os; os.environ |= {'OF_NO_CONCERN': '1', 'CUDA_VISIBLE_DEVICES': '0', 'HF_HOME': '/x'}")
    assert not said(kernel, "os.environ['OMP_NUM_THREADS'] = '1'")
    text = said(kernel, "import torch")
    assert text.count("SetTooLate: OMP_NUM_THREADS had another value when numpy and torch came to be imported") == 1
    assert "kernelspec's env" in text
    assert not said(kernel, "import torch, numpy, nbcache; nbcache.load")
    kernel.restart()
    assert is_forked(kernel)
    silent = "import warnings; warnings.simplefilter('ignore'); import os; os.environ['OMP_NUM_THREADS'] = '1'; import torch"
    assert not said(kernel, silent)  # it is a warning, and can be told to be silent
    kernel.restart()
    error = "import warnings; warnings.simplefilter('error'); import os; os.environ['OMP_NUM_THREADS'] = '1'; import torch"
    assert "nbcache: SetTooLate: OMP_NUM_THREADS" in said(kernel, error)  # an import is none


def test_what_is_set_after_the_import_is_told_of_if_it_counted_then(start, tmp_path):
    kernel = start(early="import os\nvalue = os.environ.get('EARLY')", late="import early, os\nvalue = os.environ.get('LATE')")
    assert not said(kernel, "import early, os; os.environ['LATE'] = '1'")
    text = said(kernel, "os.environ['EARLY'] = '1'")
    assert "SetTooLate: EARLY was set after early had been imported, which goes on with what it has read" in text
    assert not said(kernel, "os.environ['EARLY'] = '1'; EARLY = 2")
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "early.py").touch()
    text = said(kernel, f"import sys; sys.path.insert(0, {str(tmp_path / 'checkout')!r})")
    assert f"{tmp_path}/checkout/early.py is not what `import early` gives: another was imported before" in text
    assert not said(kernel, "sys.path.insert(0, '/nowhere')")
    assert value(kernel, "import late; late.value, [early.value]") == ("1", [None])


def test_what_a_kernel_is_started_with_counts_where_its_zygote_had_something_else(start, own_specs, monkeypatch):
    kernel = start(acme="import os\nhome = os.environ.get('ACME_HOME')")
    assert value(kernel, "import acme; [acme.home]") == [None]
    monkeypatch.setenv("ACME_HOME", "/here")
    with Kernel("nbcache", own_specs) as other:
        assert is_forked(other)
        assert value(other, "import acme; [acme.home]") == ["/here"]


def test_a_variable_that_is_read_for_another_package_counts_for_both(start):
    kernel = start(
        lib="import functools, os\n@functools.cache\ndef home(): return os.environ.get('LIB_HOME')",
        above="import lib\nhome = lib.home()",
    )
    code = "import os; os.environ['LIB_HOME'] = '/x'; import above, lib; above.home, lib.home()"
    assert value(kernel, code) == ("/x", "/x")


@pytest.mark.parametrize("how", ["sys.path", "%cd", "%run"])
def test_a_module_of_ones_own_that_comes_first_is_what_is_imported(start, tmp_path, how):
    kernel = start(thing="value = 'installed'", zabove="import thing\nvalue = thing.value", above="from zabove import value")
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "thing.py").write_text("value = 'my own'")
    (folder / "script.py").write_text("import thing\nprint(thing.value)")
    if how == "%run":
        assert kernel.run(f"%run {folder}/script.py") == "my own"
        return
    kernel.run(f"import sys; sys.path.insert(0, {str(folder)!r})" if how == "sys.path" else f"%cd -q {folder}")
    assert value(kernel, "import above; above.value") == "my own"
    kernel.restart()
    kernel.run(f"import sys; sys.path.append({str(folder)!r})")  # where an ordinary kernel would not find it either
    assert value(kernel, "import above; above.value") == "installed"


@pytest.mark.parametrize("how", ["edited", "another", "written"])
def test_what_is_installed_or_written_meanwhile_counts(start, environment, tmp_path, how):
    kernel = start(
        thing="value = 'installed'",
        probes="import importlib.util\nhas_extra = importlib.util.find_spec('extra') is not None",
        above="import thing, probes\nvalue = thing.value, probes.has_extra",
    )
    if how == "edited":
        installed(environment, "thing", "value = 'edited'")
    elif how == "another":
        installed(environment, "extra", "")
    else:
        kernel.run(f"%cd -q {tmp_path}")
        kernel.run("%%writefile thing.py\nvalue = 'written'")
    expected = {"edited": ("edited", False), "another": ("installed", True), "written": ("written", False)}
    assert value(kernel, "import above; above.value") == expected[how]


def test_what_somebody_put_in_the_place_of_a_package_is_what_is_used(start):
    kernel = start(
        optional="value = 'here'",
        uses="try:\n    import optional\nexcept ImportError:\n    value = 'none'\nelse:\n    value = optional.value",
    )
    assert value(kernel, "import sys; sys.modules['optional'] = None; import uses; uses.value") == "none"
    kernel.restart()
    code = "import sys, types; sys.modules['optional'] = stub = types.ModuleType('optional'); stub.value = 'stub'\n"
    assert value(kernel, code + "import uses; uses.value") == "stub"


def test_modules_that_are_none(start):
    kernel = start(
        single="import sys\nclass Single:\n    __slots__ = ()\n    value = 42\nsys.modules[__name__] = Single()",
        nothing="import sys\nsys.modules['absent_on_purpose'] = None",
        makes="import sys, types\nsys.modules['makes_inner'] = types.ModuleType('makes_inner')\n"
        "def inner():\n    return sys.modules['makes_inner'].__name__",
        half="class Base: pass\nimport half_state\nhalf_state.tries.append(1)\nif len(half_state.tries) == 1: raise OSError",
        half_state="tries = []",
    )
    assert value(kernel, "import single; single.value, type(single).__name__") == (42, "Single")
    assert value(kernel, "import makes; makes.inner()") == "makes_inner"
    code = (
        "import nothing, importlib\ntry:\n    import absent_on_purpose\nexcept ImportError as error:\n    found = str(error)\n"
    )
    assert "None in sys.modules" in value(kernel, code + "found")


def test_packages_that_need_each_other_come_back_as_they_were(start, environment):
    folder = Path(environment) / "one"
    folder.mkdir()
    (folder / "__init__.py").write_text("import two\nfrom one import sub\nclass Base: pass")
    (folder / "sub.py").write_text("value = object()")
    kernel = start(two="def get():\n    import one\n    return one.Base\nimport one", uses="import one, two")
    code = "import one, two, one.sub; from nbcache.jupyter.veil import has_come_back\n"
    code += "one.two is two, two.one is one, two.get() is one.Base, all(map(has_come_back, ('one', 'two', 'one.sub')))"
    assert value(kernel, code) == (True, True, True, True)


def test_an_import_that_is_interrupted_can_be_made_again(start):
    kernel = start()
    interrupts = """
import sys
class Interrupts:
    times = 0
    def find_spec(self, *_): return None
    def came_back(self, modules):
        self.times += 1
        if self.times == 3: raise KeyboardInterrupt
sys.meta_path.append(Interrupts())
try:
    import torch
except KeyboardInterrupt:
    found = "interrupted", "torch" in sys.modules, "torch.nn" in sys.modules
"""
    assert value(kernel, interrupts + "found") == ("interrupted", False, False)
    assert value(kernel, "import torch; float(torch.ones(2).sum())") == 2.0


def test_a_library_says_once_what_it_says_though_it_is_imported_anew(start):
    source = "import logging, os\nos.environ.get('TALKS')\nlog = logging.getLogger('talks')\nlog.setLevel(logging.INFO)\n"
    source += "log.addHandler(logging.StreamHandler())\nlog.propagate = False"
    kernel = start(talks=source)
    said_once = said(kernel, "import os; os.environ['TALKS'] = '1'; import talks; talks.log.info('hello')")
    assert said_once.count("hello") == 1
    kernel.restart()
    configure = "import logging.config; logging.config.dictConfig({'version': 1}); import talks; talks.log.info('hello')"
    assert said(kernel, configure).count("hello") == 1


def test_a_compiled_package_of_ones_own_that_comes_first_is_told_of(start, tmp_path):
    kernel = start()
    (tmp_path / "checkout" / "numpy").mkdir(parents=True)
    (tmp_path / "checkout" / "numpy" / "__init__.py").touch()
    text = said(kernel, f"import sys; sys.path.insert(0, {str(tmp_path / 'checkout')!r}); import numpy; numpy.ones(1)")
    assert f"{tmp_path}/checkout/numpy/__init__.py is not what `import numpy` gives" in text


CHANGES = """
import builtins, decimal, gc, locale, logging, os, signal, sys, threading, warnings
import numpy
warnings.simplefilter("ignore")
warnings.filterwarnings("error", category=BytesWarning, append=True)
os.environ["SET_BY_THING"] = "1"
os.environ.setdefault("SET_BY_BOTH", "thing's")
sys.setrecursionlimit(4321)
sys.path.append("/of/thing")
decimal.getcontext().prec = 7
numpy.set_printoptions(precision=2)
numpy.seterr(divide="ignore")
logging.basicConfig(level=logging.ERROR)
logging.root.addHandler(logging.NullHandler())
builtins.of_thing = 1
signal.signal(signal.SIGUSR2, lambda *_: None)
gc.set_threshold(701, 11, 11)
threading.excepthook = print
warnings.filterwarnings("ignore", category=DeprecationWarning)
logging.captureWarnings(True)
"""
LOOK = """
def look():
    import builtins, decimal, gc, locale, logging, os, signal, sys, threading, warnings
    return (
        [(each[0], each[2].__name__) for each in (*warnings.filters[:3], warnings.filters[-1])],
        os.environ.get("SET_BY_THING"), os.environ.get("SET_BY_BOTH"), sys.getrecursionlimit(), sys.path[-1] == "/of/thing",
        str(decimal.Decimal(1) / 3), [type(each).__name__ for each in logging.root.handlers], logging.root.level,
        hasattr(builtins, "of_thing"), callable(signal.getsignal(signal.SIGUSR2)), gc.get_threshold(),
        threading.excepthook is print, locale.setlocale(locale.LC_ALL), logging._warnings_showwarning is None,
        warnings.showwarning.__module__,
    )
def numbers():
    import numpy
    return repr(numpy.array([1.23456])), numpy.geterr()["divide"]
"""


def test_what_an_import_changes_in_the_whole_process_is_changed_once_it_is_imported(start, own_specs):
    kernel = start(thing=CHANGES)
    seen = []
    with Kernel("ordinary", own_specs) as ordinary:
        for each in (kernel, ordinary):
            each.run(LOOK)
            before = value(each, "look()")
            each.run("import os; os.environ['SET_BY_BOTH'] = 'mine'")
            numbers = value(each, "numbers()")
            each.run("import thing")
            seen.append((before, numbers, value(each, "look()"), value(each, "numbers()")))
    assert seen[0] == seen[1]
    before, numbers, after, numbers_after = seen[0]
    assert numbers == ("array([1.23456])", "warn")
    assert numbers_after == ("array([1.23])", "ignore")
    assert before[1:3] == (None, None)
    assert before[3] != 4321
    assert after[1:5] == ("1", "mine", 4321, True)
    assert [after[0][0], after[0][-1]] == [("ignore", "DeprecationWarning"), ("error", "BytesWarning")]


def test_what_a_failing_import_changes_is_changed_where_somebody_does_without_it(start):
    kernel = start(
        bad="import builtins, warnings\nwarnings.simplefilter('ignore')\nbuiltins.of_bad = 1\nraise ImportError",
        tries="try:\n    import bad\nexcept ImportError:\n    pass",
    )
    look = "import builtins, warnings; hasattr(builtins, 'of_bad'), ('ignore', None, Warning, None, 0) in warnings.filters"
    assert value(kernel, look) == (False, False)
    assert value(kernel, f"import tries; {look}") == (True, True)


def test_what_was_set_in_the_notebook_before_is_changed_as_an_import_would(start, own_specs):
    kernel = start(thing="import logging, numpy\nnumpy.set_printoptions(threshold=7)\nlogging.basicConfig(level=logging.ERROR)")
    code = "import logging, numpy; numpy.set_printoptions(precision=3); logging.basicConfig(level=logging.INFO); import thing\n"
    code += "o = numpy.get_printoptions(); o['precision'], o['threshold'], len(logging.root.handlers), logging.root.level"
    with Kernel("ordinary", own_specs) as ordinary:
        assert value(kernel, code) == value(ordinary, code) == (3, 7, 1, 20)


def test_what_is_served_from_the_cache_is_also_what_was_imported_ahead(start):
    kernel = start(takes="from safetensors.torch import load_file as load\nfrom safetensors import safe_open as opens")
    kernel.run("import nbcache; nbcache.enable()")
    code = "import takes, safetensors, safetensors.torch as st\n"
    code += "takes.load is st.load_file, takes.opens is safetensors.safe_open, hasattr(st.load_file, '__wrapped__')"
    assert value(kernel, code) == (True, True, True)
    kernel.run("nbcache.disable()")
    assert value(kernel, code) == (True, True, False)


def test_an_import_that_takes_long_once_more_is_told_of(start):
    kernel = start(slow="import os, time\ntime.sleep(0.6)\nhome = os.environ.get('SLOW_HOME')")
    assert not said(kernel, "import os; os.environ['SLOW_HOME'] = '/x'")
    text = said(kernel, "import slow")
    assert "ImportedAnew: SLOW_HOME had another value when this was imported ahead, so it is imported anew: slow" in text
    assert not said(kernel, "import slow")


def test_a_lazy_loader_finds_what_is_hidden(start):
    """As importlib's documentation writes it."""
    kernel = start(thing="value = 42")
    kernel.run("""
import importlib.util, sys
spec = importlib.util.find_spec("thing")
spec.loader = importlib.util.LazyLoader(spec.loader)
thing = importlib.util.module_from_spec(spec)
sys.modules["thing"] = thing
spec.loader.exec_module(thing)
""")
    assert value(kernel, "thing.value, thing.__spec__.loader is thing.__loader__, __import__('thing') is thing") == (
        42, True, True,
    )  # fmt: skip


def test_threads_that_import_at_once_find_the_same(start):
    kernel = start()
    code = """
import importlib, threading
found, names = [], ["torch.nn", "numpy", "torch", "torch.utils.data", "nbcache.client.api", "numpy.linalg", "torch.optim"] * 3
gate = threading.Barrier(len(names))
def find(name):
    gate.wait()
    found.append((name, id(importlib.import_module(name))))
threads = [threading.Thread(target=find, args=(name,)) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
import torch, numpy
len(found) == len(names), len(set(found)) == 7, float(torch.from_numpy(numpy.ones(4)).sum())
"""
    for _ in range(4):
        assert value(kernel, code) == (True, True, 4.0)
        kernel.restart()
        assert is_forked(kernel)


OPERATOR = """
import os, torch
home = os.environ.get("OPERATOR_HOME")
torch.library.define("operators::twice", "(Tensor x) -> Tensor")

@torch.library.impl("operators::twice", "CPU")
def twice(x):
    return 2 * x
"""
CUSTOM = """
import os, torch
home = os.environ.get("OPERATOR_HOME")

@torch.library.custom_op("customs::thrice", mutates_args=())
def thrice(x: torch.Tensor) -> torch.Tensor:
    return 3 * x
"""


def test_what_has_registered_operators_with_torch_is_not_executed_twice(start):
    kernel = start(operators=OPERATOR, customs=CUSTOM)
    text = said(kernel, "import os; os.environ['OPERATOR_HOME'] = '/x'; import operators, customs, torch")
    assert "SetTooLate: OPERATOR_HOME had another value when operators came to be imported" in text
    code = "x = torch.ones(1); [operators.home, customs.home, torch.ops.operators.twice(x).item(), customs.thrice(x).item()]"
    assert value(kernel, code) == [None, "/x", 2.0, 3.0]


def test_a_variable_that_a_package_sets_is_no_change_for_another_that_has_read_it_before(start):
    """As KMP_INIT_AT_FORK, which scikit-learn sets and torch's libraries read."""
    reads = "import os\nvalue = os.environ.get('SHARED_LIMIT')"
    sets = "import os\nos.environ.setdefault('SHARED_LIMIT', '1')\nimport below"
    code = f"{reads}\nimport torch\ntorch.library.Library('{{}}', 'DEF').define('f() -> int')"
    kernel = start(reads=code.format("one"), sets=sets, below=code.format("two"))
    assert not said(kernel, "import sets, reads, below, os")
    assert value(kernel, "[reads.value, below.value, os.environ['SHARED_LIMIT']]") == [None, "1", "1"]
    kernel.restart()
    text = said(kernel, "import os; os.environ['SHARED_LIMIT'] = '2'; import reads, below")
    for name in ("reads", "below"):
        assert f"SetTooLate: SHARED_LIMIT had another value when {name} came to be imported" in text


ONCE = """
import os, below
if below.registry.get("once"):
    raise KeyError("once is registered")
below.registry["once"] = True
home = os.environ.get("ONCE_HOME")
"""


def test_what_cannot_be_executed_twice_comes_as_it_was(start):
    """As datasets, which registers types with pyarrow."""
    below = "registry = {}; import os; home = os.environ.get('BELOW_HOME')"
    kernel = start(below=below, once=ONCE, above="import once, os\nhome = os.environ.get('ONCE_HOME')")
    text = said(kernel, "import os; os.environ['ONCE_HOME'] = '/x'; import above, once, below")
    assert "SetTooLate: once cannot be imported anew (KeyError: 'once is registered'); it is as before" in text
    assert value(kernel, "[once.home, above.home, above.once is once, below.registry]") == [None, "/x", True, {"once": True}]
    kernel.restart()
    assert not said(kernel, "import above, once")
    kernel.restart()
    text = said(kernel, "import os; os.environ['ONCE_HOME'] = '/x'; import once")
    assert "SetTooLate: once cannot be imported anew" in text
    assert value(kernel, "import above; [once.home, above.home]") == [None, "/x"]


def test_a_finder_that_a_package_puts_second_brings_no_other_along(start, tmp_path):
    kernel = start(second="import sys\nclass Finder:\n    find_spec = lambda *_: None\nsys.meta_path.insert(1, Finder())")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "own.py").write_text("value = 3")
    look = "[type(f).__name__ for f in sys.meta_path]"
    kinds = value(kernel, f"import sys; sys.path.insert(0, {str(folder)!r}); import own; {look} if own.value == 3 else []")
    assert not {"InstalledOnly", "Finder"} & set(kinds)
    kinds = value(kernel, f"import second; {look}")
    assert "InstalledOnly" not in kinds
    assert kinds.count("Finder") == 1


DRAWS = """
import matplotlib.pyplot as plt, sys
drawn = plt.plot([1, 2], [3, 4])
"""
SHOWS = """
import matplotlib
shell = get_ipython()
inline = sys.modules["matplotlib_inline.config"].InlineBackend.instance()
print(matplotlib.get_backend(), inline.shell is shell, shell.configurables.count(inline), matplotlib.is_interactive(),
      sorted(getattr(f, "__name__", "") for f in shell.events.callbacks["post_execute"]), plt.get_fignums())
"""


@pytest.mark.parametrize("imported", ["matplotlib.pyplot", "matplotlib.pyplot,matplotlib_inline.backend_inline"])
def test_figures_are_drawn_as_in_an_ordinary_kernel(environment, own_specs, monkeypatch, imported):
    """The inline backend wants the shell itself when it is imported."""
    monkeypatch.setenv("NBCACHE_PRELOAD", imported)
    start_zygote(own_specs)
    found = []
    for spec in ("nbcache", "ordinary"):
        with Kernel(spec, own_specs) as kernel:
            assert is_forked(kernel) is (spec == "nbcache")
            for _ in range(2):
                outcome = kernel.try_run(DRAWS)
                assert not outcome.error, outcome.error
                found.append(([sorted(shown) for shown in outcome.displays], kernel.try_run(SHOWS).stdout))
                kernel.restart()
    assert found[0][0] == [["image/png", "text/plain"]]
    assert found.count(found[0]) == 4, found
