"""The formats that are served: by which names their files are known, and who reads them.

Names alone decide, and a reader is imported when a file is described: a hit knows no format's inside. Client side only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from nbcache.checkpoints.content import Content, OpenFile

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclass(frozen=True)
class Format:
    """One format. ``read`` describes a file; it raises CheckpointInvalid, CheckpointUnreadable or UnsupportedFormat.

    ``in_folders`` says which of its files a folder may be loaded by: those of one of these suffixes whose stem is none of
    ``beside``, the names of what trainers put beside weights.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[OpenFile], Content]
    index_suffixes: tuple[str, ...] = ()
    in_folders: tuple[str, ...] = ()
    beside: re.Pattern[str] = re.compile("(?!)")
    split: bool = False

    @property
    def whole(self) -> str:
        """What to call the file that stands for all shards."""
        return " or ".join(f"*{suffix}" for suffix in self.index_suffixes) or "first part"

    def may_stand_for_a_folder(self, name: str) -> bool:
        """Whether a folder that holds a file of this name may be loaded by it, shards included."""
        return name.endswith(self.in_folders + self.index_suffixes) and not self.beside.match(name)

    def is_shard(self, name: str) -> bool:
        """Whether a file is a part that does not stand for the whole."""
        found = _SHARD.search(stem_of(name))
        return found is not None and not (self.split and int(found[1]) == 1)

    def split_parts(self, name: str) -> list[str]:
        """The names of all parts of which this file is the first; the name alone where it is no first part."""
        found = _SHARD.search(stem_of(name)) if self.split else None
        if found is None or int(found[1]) != 1:
            return [name]
        stem, suffix = stem_of(name)[: found.start()], name[len(stem_of(name)) :]
        return [f"{stem}-{number:05}-of-{found[2]}{suffix}" for number in range(1, int(found[2]) + 1)]


def _read_safetensors(file: OpenFile) -> Content:
    from nbcache.checkpoints import safetensors

    header = safetensors.read_header(file.fd, file.path, file.size_bytes)
    return Content(tuple(safetensors.extent(tensor, 0, file.path) for tensor in header.tensors), header.metadata)


def _read_pickled(file: OpenFile) -> Content:
    from nbcache.checkpoints import pickled

    return pickled.read(file)


def _read_gguf(file: OpenFile) -> Content:
    from nbcache.checkpoints import gguf

    return gguf.read(file)


def _read_array(file: OpenFile) -> Content:
    from nbcache.checkpoints import arrays

    return arrays.read_array(file)


def _read_arrays(file: OpenFile) -> Content:
    from nbcache.checkpoints import arrays

    return arrays.read_archive(file)


FORMATS = (
    Format("safetensors", (".safetensors",), _read_safetensors, (".safetensors.index.json",), (".safetensors",)),
    Format(
        "torch",
        (".bin", ".pt", ".pth", ".ckpt"),
        _read_pickled,
        (".bin.index.json",),
        (".bin",),
        re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.bin$"),
    ),
    Format("GGUF", (".gguf",), _read_gguf, (), (".gguf",), split=True),
    Format("NumPy array", (".npy",), _read_array),
    Format("NumPy archive", (".npz",), _read_arrays),
)
"""In the order in which a folder is asked for them."""


def format_of(path: str) -> Format | None:
    """The format of a file or an index of this name."""
    for kind in FORMATS:
        if path.endswith(kind.suffixes + kind.index_suffixes):
            return kind
    return None


def stem_of(name: str) -> str:
    """A file's name without what tells its format."""
    for kind in FORMATS:
        for suffix in kind.index_suffixes + kind.suffixes:
            if name.endswith(suffix):
                return name.removesuffix(suffix)
    return name


def served() -> str:
    """What is served, in words."""
    suffixes = [suffix for kind in FORMATS for suffix in kind.suffixes]
    indexes = [f"*{suffix}" for kind in FORMATS for suffix in kind.index_suffixes]
    return ", ".join([*suffixes, *indexes])
