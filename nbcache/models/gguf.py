"""Weights of a GGUF file in the form that diffusers' quantized layers take."""

from __future__ import annotations

import torch

from nbcache.client.weights import Weights
from nbcache.errors import PackageMissing, UnsupportedFormat

PLAIN = (torch.float32, torch.float16)
"""What diffusers leaves as it is; everything else is a ``GGUFParameter`` over bytes (``load_gguf_checkpoint``)."""


def gguf_parameters(weights: Weights) -> dict[str, torch.Tensor]:
    """The tensors as ``diffusers``' own GGUF loader gives them, over the same memory: nothing is copied.

    Quantized ones are ``GGUFParameter`` with their ``quant_type``. A model takes them in the place of a file, and is built
    without copying: ``Model.from_single_file(gguf_parameters(weights), quantization_config=GGUFQuantizationConfig(...))``.
    A write to one is a write to the weights' tensor. PackageMissing without diffusers or gguf; UnsupportedFormat for a quant
    type that diffusers does not compute; WeightsReleased.
    """
    try:
        from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter
        from gguf import GGMLQuantizationType
    except ImportError as error:
        raise PackageMissing(f"{weights.name}: GGUF parameters need diffusers and gguf: pip install diffusers gguf") from error
    quant_types = weights.quant_types
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if name not in quant_types and tensor.dtype in PLAIN:
            found[name] = tensor
            continue
        kind = GGMLQuantizationType.__members__.get(quant_types.get(name) or _GGML_NAMES.get(tensor.dtype, ""))
        if kind not in SUPPORTED_GGUF_QUANT_TYPES:
            what = quant_types.get(name) or tensor.dtype
            raise UnsupportedFormat(f"{weights.name}: tensor {name!r} is {what}, which diffusers does not compute")
        found[name] = GGUFParameter(tensor.view(torch.uint8), quant_type=kind)
    return found


_GGML_NAMES = {torch.bfloat16: "BF16"}
