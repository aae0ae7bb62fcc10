"""What the stages of the miniature's second half left behind, put back into models; see ``trained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import load_tensors, save_tensors
from . import flux_models
from .batches import to_pixels
from .cache import cached
from .diptychs import Canvases
from .flux_objectives import FillObjective, FluxVAEObjective
from .sets import diptychs, pictures
from .trained import MEASURED, load_stage, newest_of, shipped_file, weights_of

FILL_STAGES = ("flux-fill", "flux-fill-further")  # the second starts from the average of the first


def trained_flux_vae(out: Path) -> Any:
    """The 16-channel VAE, its latents scaled as Flux's, frozen."""
    shipped = shipped_file(out, "flux-vae")
    if shipped:
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(shipped.parent, local_files_only=True).requires_grad_(False)
    vae = flux_models.build_flux_vae()
    load_stage(FluxVAEObjective(vae), out, "flux-vae")
    vae.requires_grad_(False)
    flux_models.normalise_flux_latents(vae, _latent_deviation(out, vae))
    return vae.eval()


@torch.no_grad()
def _latent_deviation(out: Path, vae: Any) -> Tensor:
    """Deviation (C,) of the latents, their posteriors' included, so that an unused channel stays quiet.

    It is measured once for each encoder and kept beside it.
    """
    path, encoder = out / "flux-vae" / "latents.safetensors", weights_of(out, "flux-vae")
    if path.exists():
        measured, metadata = load_tensors(path)
        if metadata["of"] == encoder:
            return measured["std"]
    pixels = to_pixels(pictures(out, "world").pixels[:MEASURED])
    posteriors = [vae.encode(rows).latent_dist for rows in pixels.split(50)]
    means = torch.cat([posterior.mean for posterior in posteriors])
    spread = torch.cat([posterior.var for posterior in posteriors]).mean(dim=(0, 2, 3))
    std = (means.var(dim=(0, 2, 3)) + spread).sqrt()
    save_tensors(path, {"std": std}, {"of": encoder})
    return std


def diptych_latents(out: Path, name: str, vae: Any) -> np.ndarray:
    """Scaled latents (N, 32, 16, 32) of a set's diptychs: of the canvas, and of it with its mask grey."""

    def make(canvases: Tensor) -> Tensor:
        whole, masked = canvases[:, :3], (canvases[:, 3:] > 0).float()
        both = (whole, whole * (1 - masked))  # grey is zero, as in Flux Fill
        return torch.cat([_encoded(vae, pixels) for pixels in both], dim=1)

    canvases = Canvases(pictures(out, name), diptychs(out, name))
    return cached(out / "cache", f"{name}-latents", [canvases], make, of=weights_of(out, "flux-vae"))


def _encoded(vae: Any, pixels: Tensor) -> Tensor:  # a few at a time is twice as fast on a CPU
    return torch.cat([flux_models.encode_flux(vae, few) for few in pixels.split(4)])


def fill_before(out: Path, stage: str) -> Any:
    """The fill model that a stage starts from: new for the first, else of the newest stage before it."""
    earlier = FILL_STAGES[: FILL_STAGES.index(stage)]
    return _newest_fill(out, earlier) if earlier else flux_models.build_fill()


def trained_fill(out: Path) -> Any:
    """The fill model of its newest stage, frozen."""
    return _newest_fill(out, FILL_STAGES).eval().requires_grad_(False)


def _newest_fill(out: Path, stages: tuple[str, ...]) -> Any:
    newest, shipped = newest_of(out, stages), shipped_file(out, "flux-fill")
    if shipped and not newest:
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel.from_pretrained(shipped.parent, local_files_only=True)
    fill = flux_models.build_fill()
    load_stage(FillObjective(fill), out, newest or stages[0])
    return fill
