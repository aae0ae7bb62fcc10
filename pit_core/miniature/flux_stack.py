"""The miniature's second half as one: its shipped files as a model that draws diptychs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..diptych.layout import DiptychLayout
from ..diptych.pipeline import DiptychModel, DiptychSettings
from . import flux_models, models
from .assets import WEIGHTS
from .critters import CANVAS

FILES = (
    "flux_vae/diffusion_pytorch_model.safetensors",
    "flux_vae/config.json",
    "flux_fill/diffusion_pytorch_model.safetensors",
    "flux_fill/config.json",
    "text_encoder.safetensors",
)
LAYOUT = DiptychLayout(CANVAS, CANVAS, margin=0)
DEFAULTS = DiptychSettings(steps=20)


def load_flux(
    weights: Path = WEIGHTS, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[DiptychModel, dict[str, str]]:
    """The model, and the SHA-256 of each of its files by name.

    Raises PitError when a file is missing or is not what the manifest says.
    """
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    hashes = models.check_weights(weights, FILES)
    options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True}
    pipe = flux_models.fill_pipeline(
        AutoencoderKL.from_pretrained(weights / "flux_vae", **options),
        FluxTransformer2DModel.from_pretrained(weights / "flux_fill", **options),
    )
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    text = models.load_text_encoder(weights / "text_encoder.safetensors").to(device, dtype)
    return DiptychModel(pipe, models.prompt_encoder(text)), hashes
