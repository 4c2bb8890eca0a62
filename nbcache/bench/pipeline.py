"""A whole FLUX.1 pipeline of random numbers, as a folder: transformer, T5-XXL, CLIP-L, VAE, and tokenizers of the real size.

The configs are those that black-forest-labs publishes; names and shapes come from the libraries' own classes. ``small`` gives
the same folder at toy sizes, for a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import string
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from nbcache.bench.flux import ELEMENT_BYTES, SHARD_BYTES, Shapes, nbytes_of_shapes, write_random
from nbcache.bench.isolation import run_fresh
from nbcache.bench.room import check_disk
from nbcache.errors import BenchmarkFailed
from nbcache.units import format_size

FULL_BYTES = 33_749_000_000
SPREAD = 0.02
"""Standard deviation of the numbers: what is computed of them stays finite."""

CLIP_WORDS = 49408
T5_WORDS = 32128

TRANSFORMER: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "guidance_embeds": True,
}  # fmt: skip
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768,
    "vocab_size": CLIP_WORDS, "hidden_act": "quick_gelu", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    "torch_dtype": "bfloat16",
}  # fmt: skip
T5: dict[str, Any] = {
    "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64,
    "num_layers": 24, "num_decoder_layers": 24, "vocab_size": T5_WORDS, "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "transformer": {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
                    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
                    "axes_dims_rope": [4, 4, 8]},
    "vae": {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
            "block_out_channels": [16, 16], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "projection_dim": 32},
    "text_encoder_2": {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_heads": 4, "num_layers": 2},
}  # fmt: skip
INDEX: dict[str, Any] = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_pipeline(folder: str, small: bool = False) -> None:
    """Write the folder: 33.7 GB, or 13 MB if ``small``. Random numbers, from the GPU if there is one."""
    root = Path(folder)
    configs = {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": CLIP, "text_encoder_2": T5}
    for name, config in configs.items():
        config = config | (SMALL[name] if small else {})
        stem = "model" if "architectures" in config else "diffusion_pytorch_model"
        _write_json(root / name / "config.json", config)
        _write_shards(root / name, stem, shapes_of(config))
    scheduler = {"_class_name": INDEX["scheduler"][1], "shift": 3.0, "use_dynamic_shifting": True}
    _write_json(root / "scheduler" / "scheduler_config.json", scheduler)
    _write_clip_tokenizer(root / "tokenizer")
    _write_t5_tokenizer(root / "tokenizer_2")
    _write_json(root / "model_index.json", INDEX)


@contextlib.contextmanager
def pipeline_folder(small: bool = False, keep: str = "", on_step: Callable[[str], None] = lambda _: None) -> Iterator[str]:
    """A folder with the pipeline of :func:`write_pipeline`; a temporary one, or ``keep``, which stays.

    One that ``keep`` holds already is used as it is. BenchmarkFailed if there is no room.
    """
    with contextlib.ExitStack() as stack:
        if keep and Path(keep, "model_index.json").exists():
            on_step(f"the pipeline in {keep} is used")
            yield keep
            return
        parent = str(_parent_for(Path(keep).absolute())) if keep else None
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nbcache-flux-", dir=parent))
        written = Path(folder, "pipeline")
        if not small:
            check_disk(Path(folder), FULL_BYTES)
            on_step(f"writing a pipeline of {format_size(FULL_BYTES)} to {keep or folder}")
        run_fresh(partial(write_pipeline, str(written), small))
        on_step("the pipeline is written")
        yield str(written.rename(keep)) if keep else str(written)


def _parent_for(folder: Path) -> Path:
    """The folder's parent, made if need be. BenchmarkFailed if the folder has something in it."""
    if folder.exists() and any(folder.iterdir()):
        raise BenchmarkFailed(f"{folder} holds something else; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.parent


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that ``save_pretrained`` would write for a config."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        if "architectures" in config:
            settings = transformers.AutoConfig.for_model(**config)
            model = getattr(transformers, config["architectures"][0])(settings)
        else:
            model = getattr(diffusers, config["_class_name"]).from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a tied one counts once


def _write_shards(folder: Path, stem: str, shapes: Shapes) -> None:
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if nbytes_of_shapes(parts[-1]) + ELEMENT_BYTES * math.prod(shape) > SHARD_BYTES:
            parts.append({})
        parts[-1][name] = shape
    if len(parts) == 1:
        write_random(folder / f"{stem}.safetensors", shapes, SPREAD)
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
        write_random(folder / file, part, SPREAD)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": nbytes_of_shapes(shapes)}, "weight_map": weight_map}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value)))


def _write_clip_tokenizer(folder: Path) -> None:
    """A byte-pair vocabulary of the real size: letters, and merges of what there was before."""
    words = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    merges: list[str] = []
    for left, right in itertools.product(list(string.ascii_lowercase), repeat=2):
        merges.append(f"{left} {right}")
        words.append(left + right)
    for pair, last in itertools.product(words[54:], [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]):
        if len(words) == CLIP_WORDS:
            break
        merges.append(f"{pair} {last}")
        words.append(pair + last)
    _write_json(folder / "vocab.json", {word: number for number, word in enumerate(words)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})


def _write_t5_tokenizer(folder: Path) -> None:
    """A unigram vocabulary of the real size, as ``tokenizer.json``."""
    pieces = ("".join(letters) for size in (1, 2, 3, 4) for letters in itertools.product(string.ascii_lowercase, repeat=size))
    vocabulary: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(piece, -3.0 - number / 4000) for number, piece in enumerate(itertools.islice(pieces, T5_WORDS - 104))]
    special = [
        {"id": n, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for n, (word, _) in enumerate(vocabulary[:3])
    ]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    ending = {
        "type": "TemplateProcessing", "single": sequence, "pair": sequence,
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }  # fmt: skip
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": space, "post_processor": ending, "decoder": space,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocabulary, "byte_fallback": False},
    }  # fmt: skip
    _write_json(folder / "tokenizer.json", document)
    _write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "T5TokenizerFast", "model_max_length": 512, "extra_ids": 0}
    )
