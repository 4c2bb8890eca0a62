"""What a cell sets after the packages that read it were imported ahead: the kernel says so."""

from __future__ import annotations

import pytest

from tests.restart.test_fast_path import environment, installed, own_specs  # noqa: F401
from tests.support.kernels import Kernel
from tests.support.zygotes import is_forked, start_zygote


@pytest.fixture
def kernel(environment, own_specs, monkeypatch):  # noqa: F811
    """A forked kernel, with torch imported ahead, and a package ``thing``."""
    monkeypatch.setenv("NBCACHE_PRELOAD", "thing")
    installed(environment, "thing", "value = 'installed'")
    start_zygote(own_specs)
    with Kernel("nbcache", own_specs) as kernel:
        assert is_forked(kernel)
        yield kernel


def said(kernel: Kernel, code: str) -> str:
    outcome = kernel.try_run(code)
    assert not outcome.error, outcome.error
    return outcome.stderr


def test_a_variable_that_is_set_too_late_is_told_of_once(kernel):
    assert not said(kernel, "import os; os.environ['OF_NO_CONCERN'] = '1'; os.environ['HF_TOKEN'] = 'x'")
    assert not said(kernel, "os.environ['CUDA_VISIBLE_DEVICES'] = '0'; os.environ['HF_HOME'] = '/x'")  # nobody read it here
    text = said(kernel, "os.environ['OMP_NUM_THREADS'] = '1'")
    assert "SetTooLate: OMP_NUM_THREADS was set after torch" in text
    assert "ahead of this kernel, and has no effect on it" in text
    assert "kernelspec's env" in text
    assert not said(kernel, "os.environ['OMP_NUM_THREADS'] = '2'")
    kernel.restart()
    assert is_forked(kernel)
    assert "OMP_NUM_THREADS" in said(kernel, "%env OMP_NUM_THREADS=1")
    assert "error" in kernel.run(
        "import warnings; warnings.simplefilter('ignore'); import os; os.environ['MKL_X'] = '1'; 'error'"
    )
    assert not said(kernel, "os.environ['KMP_X'] = '1'")  # it is a warning, and can be told to be silent


@pytest.mark.parametrize("how", ["sys.path", "%cd"])
def test_a_module_of_ones_own_that_comes_too_late_is_told_of(kernel, tmp_path, how):
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "thing.py").write_text("value = 'my own'")
    (folder / "other.py").write_text("value = 'my own'")
    code = f"import sys; sys.path.insert(0, {str(folder)!r})" if how == "sys.path" else f"%cd -q {folder}"
    text = said(kernel, code)
    assert f"{folder}/thing.py is not what `import thing` gives here" in text
    assert kernel.run("import thing, other; thing.value, other.value") == "('installed', 'my own')"
    other = tmp_path / "behind"
    other.mkdir()
    (other / "thing.py").touch()
    assert not said(kernel, f"import sys; sys.path.append({str(other)!r})")  # where an ordinary kernel would not find it either
