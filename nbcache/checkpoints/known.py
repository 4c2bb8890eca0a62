"""Short names that everybody has: what people call a model, to the hub's id of it. The one table of them."""

from __future__ import annotations

KNOWN: dict[str, str] = {
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "flux-krea": "black-forest-labs/FLUX.1-Krea-dev",
    "flux-kontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "flux-fill": "black-forest-labs/FLUX.1-Fill-dev",
    "flux2-dev": "black-forest-labs/FLUX.2-dev",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd35-large": "stabilityai/stable-diffusion-3.5-large",
    "sd35-large-turbo": "stabilityai/stable-diffusion-3.5-large-turbo",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl-refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "qwen-image": "Qwen/Qwen-Image",
    "qwen-image-edit": "Qwen/Qwen-Image-Edit",
    "wan22": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "wan22-i2v": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "wan22-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "z-image-turbo": "Tongyi-MAI/Z-Image-Turbo",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
}
"""A user's own alias of the same name goes before one of these."""
