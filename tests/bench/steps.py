"""Where the time of one load goes: ``python -m tests.bench.steps [FILE] [--mb N] [--share S] [--resident] [--fresh]``.

Prints each step of the last of several loads with when it began and how long it took, indented by what it was part of. The
slab is dropped between loads (``--resident``: it is not), the host copy stays. With ``--fresh`` each load is the first of its
process, as after a restart. Without FILE, of a LoRA-shaped file of N MB. Timing the steps adds a few microseconds to each.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import nbcache
import nbcache.bench.kernel as bench
from nbcache.bench.flux import write_lora_sized
from nbcache.bench.isolation import own_daemon, run_fresh
from nbcache.client import api, device, fill, loading, slabs
from nbcache.client.session import Session
from nbcache.client.views import CudaViews
from nbcache.memory.driver import CudaDriver, _CudaMap
from tests.support.emulated import EmulatedDriver, EmulatedMap, EmulatedViews

SETTLE_S = 1.5
TOGETHER_MS = 0.05
"""Steps shorter than this are added up by name."""


class Steps:
    """What happened, in order: depth, name, start and end in seconds."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []
        self._depth = 0

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose calls are steps."""

        @wraps(work)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            said = next((type(a).__name__ for a in args if type(a).__module__.endswith("protocol.messages")), "")
            step = [self._depth, f"{name} {said}".strip(), time.perf_counter(), 0.0]
            self.seen.append(step)
            self._depth += 1
            try:
                return work(*args, **kwargs)
            finally:
                self._depth -= 1
                step[3] = time.perf_counter()

        return wrapped

    @contextmanager
    def watching(self, places: list[tuple[object, str]]) -> Iterator[None]:
        """Time the calls of these attributes meanwhile."""
        before = [(holder, name, holder.__dict__.get(name, self)) for holder, name in places]
        for holder, name in places:
            setattr(holder, name, self.timed(name.strip("_"), getattr(holder, name)))
        try:
            yield
        finally:
            for holder, name, old in before:
                if old is self:
                    delattr(holder, name)
                else:
                    setattr(holder, name, old)

    def lines(self) -> list[str]:
        """A line a step; short ones of one name and depth in one line, where the first of them was."""
        start, found, short = self.seen[0][2], [], {}
        for depth, name, began, ended in self.seen:
            ms = (ended - began) * 1000
            if ms >= TOGETHER_MS:
                found.append([(began - start) * 1000, ms, depth, name, 1])
            elif (depth, name) in short:
                short[depth, name][1] += ms
                short[depth, name][4] += 1
            else:
                short[depth, name] = [(began - start) * 1000, ms, depth, name, 1]
                found.append(short[depth, name])
        return [f"{at:9.2f} {ms:9.2f}  {'  ' * depth}{name}{f' x{n}' if n > 1 else ''}" for at, ms, depth, name, n in found]


PLACES: list[tuple[object, str]] = [
    *((Session, name) for name in ("request", "receive")),
    *((device.Device, name) for name in ("load", "_fill", "_attach", "_map", "_make", "_copy", "_cast")),
    *((kind, name) for kind in (CudaDriver, EmulatedDriver) for name in ("map_slab", "map_block_on", "copy")),
    *((kind, name) for kind in (CudaViews, EmulatedViews) for name in ("synchronize", "plain", "cow", "private")),
    *((kind, name) for kind in (_CudaMap, EmulatedMap) for name in ("protect", "close")),
    (device, "committed"), (loading, "find_device"), (device, "cast_manifest"), (slabs, "_lacking"), (slabs, "_reserve"),
    (fill, "meaning_of"), (fill, "is_unchanged"), (fill, "_decoded"),
]  # fmt: skip


def measure(path: str, share: str, runs: int, resident: bool) -> list[str]:
    """The steps of the last of ``runs`` loads; at the end the tensors are awaited."""
    bench.start_context()
    api.prepare()
    steps = Steps()
    for _ in range(runs):
        steps.seen.clear()
        with steps.watching(PLACES):
            weights = steps.timed("in all", lambda: awaited(path, share))()
        weights.release()
        del weights
        gc.collect()
        time.sleep(SETTLE_S)  # host blocks are unmapped in the background
        if not resident:
            api.free_gpu(path)
    return steps.lines()


def awaited(path: str, share: str) -> nbcache.Weights:
    """The weights, once they are there."""
    weights = nbcache.load(path, "cuda", share=share)
    bench.synchronize()
    return weights


def measure_fresh(path: str, share: str, runs: int, resident: bool) -> list[str]:
    """As :func:`measure`, but each load in a process of its own."""
    lines: list[str] = []
    for _ in range(runs):
        lines = run_fresh(partial(measure, path, share, 1, resident))
        print(lines[0])
    return lines


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?")
    parser.add_argument("--mb", type=int, default=328)
    parser.add_argument("--share", default="readonly")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    given = parser.parse_args()
    with own_daemon() as folder:
        path = given.file
        if path is None:
            path = str(Path(folder, "lora.safetensors"))
            write_lora_sized(path, given.mb * 10**6)
        run_fresh(partial(measure, path, given.share, 1, given.resident))
        print(f"{Path(path).name}, {given.share}{', resident' if given.resident else ''}: began ms, took ms, step")
        steps_of = measure_fresh if given.fresh else measure
        print(*steps_of(path, given.share, given.runs, given.resident), sep="\n")


if __name__ == "__main__":
    main()
