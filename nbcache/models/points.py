"""The table of names that ``nbcache.enable()`` replaces, and nothing else.

Owns the list of what nbcache counts on in safetensors, transformers, diffusers, accelerate and peft. Must not import any of
them. It exists so that a release that moves a name is noticed by one test (``tests/parity/test_points.py``) and mended in one
place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["load_file", "safe_open", "warmup", "convert", "fill", "place", "keep"]
"""What a name is replaced by.

``load_file`` and ``safe_open`` are safetensors' own, under whatever name they were imported. ``warmup`` allocates a model's
size on a GPU ahead of its loading. ``convert`` is given open slices, ``fill`` the name of a file, ``place`` a state dict, and
all three the devices that the tensors are to go to. ``keep`` is not replaced: it reads single weights, again for each use, that
were left on disk because memory does not hold them.
"""


@dataclass(frozen=True)
class Point:
    """One name: an attribute of a module. ``since`` and ``before`` bound the releases of its package that have it."""

    module: str
    name: str
    kind: Kind
    since: str = "0"
    before: str = ""

    @property
    def package(self) -> str:
        """The package that the module belongs to."""
        return self.module.partition(".")[0]


POINTS: tuple[Point, ...] = (
    # Where the two functions are. Modules that are imported later take the replacements from here.
    Point("safetensors", "safe_open", "safe_open"),
    Point("safetensors.torch", "safe_open", "safe_open"),
    Point("safetensors.torch", "load_file", "load_file"),
    # The names under which they were imported.
    Point("transformers.modeling_utils", "safe_open", "safe_open"),
    Point("transformers.modeling_utils", "safe_load_file", "load_file", before="5"),
    Point("transformers.modeling_layers", "safe_open", "safe_open", since="5.14"),
    Point("transformers.integrations.accelerate", "safe_open", "safe_open", since="5"),
    Point("transformers.quantizers.quantizer_torchao", "safe_open", "safe_open", since="4.57"),
    Point("transformers.trainer_utils", "safe_load_file", "load_file", since="5"),
    Point("transformers.models.wav2vec2.modeling_wav2vec2", "safe_load_file", "load_file"),
    Point("accelerate.utils.modeling", "safe_open", "safe_open"),
    Point("accelerate.utils.modeling", "safe_load_file", "load_file"),
    Point("accelerate.utils.offload", "safe_open", "keep"),
    Point("peft.peft_model", "safe_open", "safe_open"),
    Point("peft.utils.save_and_load", "safe_load_file", "load_file"),
    Point("peft.utils.loftq_utils", "safe_open", "safe_open"),
    Point("peft.tuners.shadow.model", "load_file", "load_file", since="0.21"),
    Point("diffusers.loaders.ip_adapter", "safe_open", "safe_open"),
    Point("diffusers.quantizers.torchao.torchao_quantizer", "safe_open", "safe_open", since="0.39"),
    # What decides where tensors go.
    Point("transformers.modeling_utils", "caching_allocator_warmup", "warmup", since="4.50"),
    Point("transformers.modeling_utils", "convert_and_load_state_dict_in_model", "convert", since="5"),
    Point("transformers.modeling_utils", "_load_state_dict_into_meta_model", "fill", since="4.50", before="5"),
    Point("diffusers.models.modeling_utils", "_caching_allocator_warmup", "warmup", since="0.35"),
    Point("diffusers.models.model_loading_utils", "load_model_dict_into_meta", "place"),
)


def watched() -> frozenset[str]:
    """The modules that have names in the table."""
    return frozenset(point.module for point in POINTS)
