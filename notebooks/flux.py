"""Which FLUX the notebook loads, and one image of it."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from nbcache.checkpoints.hub import is_complete
from nbcache.checkpoints.names import look_up

from tiny_flux import write_tiny_flux

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}  # what they lack is not needed here
warnings.filterwarnings("ignore", "IProgress not found")  # tqdm would like widgets


def _model() -> str:
    """The folder named by ``FLUX_DIR``; ``flux-dev``, if the hub's cache has all of it; else a toy, written once."""
    if chosen := os.environ.get("FLUX_DIR"):
        return chosen
    meaning = look_up("flux-dev")
    if torch.cuda.is_available() and Path(meaning.path).is_dir() and is_complete(meaning.path):
        return "flux-dev"
    folder = Path(tempfile.gettempdir(), f"nbcache-{os.getuid()}", "tiny-flux")
    if not (folder / "model_index.json").exists():
        write_tiny_flux(folder)
    return str(folder)


MODEL = _model()
"""What to give to ``%load_weights``."""


def image_of(pipe: Any, prompt: str = "a cat that waits for a kernel") -> Any:  # noqa: ANN401 - a diffusers pipeline, a PIL image
    """One small image, the same each time."""
    pipe.set_progress_bar_config(disable=True)
    size = 512 if pipe.transformer.config.num_layers > 2 else 64
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe(prompt, num_inference_steps=4, height=size, width=size, generator=generator).images[0]
