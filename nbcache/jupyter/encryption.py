"""Whether this kernel can talk to a client that encrypts.

The wheel's kernelspec says that its kernels can, for it cannot know which ipykernel there will be. One that cannot would open
its ports for a client that it never understands: it has to end, and to say why, or the client waits for ever.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

FIRST_ABLE = (7, 3)
"""The first version of ipykernel that can."""


def end_if_unable(shell: Any) -> None:  # noqa: ANN401 - IPython's, of a kernel or not
    """End the process if it is a kernel whose connection file has keys, and its ipykernel has no use for them."""
    app = getattr(getattr(shell, "kernel", None), "parent", None)
    if app is None:
        return
    from ipykernel._version import __version__, version_info  # a kernel has imported it

    if version_info[:2] >= FIRST_ABLE or not _has_keys(app.abs_connection_file):
        return
    remedy = "install ipykernel 7.3 or newer, or set transport_encryption to 'disabled'"
    print(f"nbcache: ipykernel {__version__} cannot encrypt; {remedy}", file=sys.__stderr__, flush=True)
    os._exit(1)  # IPython would catch anything that is raised


def _has_keys(connection_file: str) -> bool:
    try:
        return "curve_secretkey" in json.loads(Path(connection_file).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
