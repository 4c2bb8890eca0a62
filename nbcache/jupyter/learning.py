"""In a kernel: notes which modules a cell imported that took long, for the next zygote to import ahead."""

from __future__ import annotations

import contextlib
import os
import sys
import time

from nbcache.config import NBCache
from nbcache.jupyter.experience import MAX_CANDIDATES, SLOW_S, recall, revise
from nbcache.jupyter.installed import installed_folders, is_below
from nbcache.jupyter.veil import has_come_back


class Learner:
    """Looks at ``sys.modules`` after each cell of a kernel. Costs nothing where a cell was quick or imported nothing.

    Notes
    -----
    Does nothing where ``NBCache.preload`` is set, be it to an empty list, and never fails a cell.
    """

    def __init__(self, settings: NBCache) -> None:
        self._settings = settings
        self._started_s = 0.0
        self._known = 0

    def before_cell(self, *_: object) -> None:
        """IPython calls this before each cell."""
        self._started_s = time.perf_counter()
        self._known = len(sys.modules)

    def after_cell(self, *_: object) -> None:
        """IPython calls this after each cell."""
        if not self._started_s or len(sys.modules) <= self._known or time.perf_counter() - self._started_s < SLOW_S:
            return
        if self._settings.preload is None and self._settings.zygote_idle_s > 0:
            self._note(list(sys.modules)[self._known :])

    def _note(self, names: list[str]) -> None:
        stdlib, folders = sys.stdlib_module_names, installed_folders()
        files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
        found = [
            name
            for name, file in files.items()
            if not has_come_back(name)
            and name.partition(".")[0] not in stdlib
            and isinstance(file, str)
            and is_below(os.path.abspath(file), folders)
        ]
        known = recall()
        seen = {*known.learned, *known.candidates, *known.quick}
        fresh = [name for name in found if name not in seen and not known.is_broken(name)]
        if not fresh or len(known.candidates) > MAX_CANDIDATES:
            return
        with contextlib.suppress(OSError), revise() as known:
            known.candidates += [name for name in fresh if name not in set(known.candidates)]
