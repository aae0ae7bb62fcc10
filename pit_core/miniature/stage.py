"""What the stages of the miniature's training share: how one is run, and how good a VAE is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..train.loop import Data, Objective, Result, train
from .batches import to_pixels
from .recipes import RECIPES, quick_precision
from .scale import scaled_config
from .sets import pictures

CHECKED = 100  # pictures that a VAE's figure is measured on


def train_stage(name: str, objective: Objective, batches: Data, out: Path, **options: Any) -> Result:
    """Train by the stage's recipe, or go on where it stopped."""
    config = quick_precision(scaled_config(out, RECIPES[name], len(batches)))
    return train(objective, batches, config, out / name, description=name.replace("-", " "), **options)


def db_check(out: Path, vae: Any) -> Callable[[int], dict[str, float]]:
    """What to note of a VAE at every save."""
    check = to_pixels(pictures(out, "world-check").pixels[:CHECKED])
    return lambda step: {"db": reconstruction_db(vae, check)}


@torch.no_grad()
def reconstruction_db(vae: Any, pixels: Tensor) -> float:
    """Mean PSNR in dB over pictures (B, 3, H, W) in [-1, 1], through encode and decode."""
    values = []
    for chunk in pixels.split(20):
        decoded = vae.decode(vae.encode(chunk).latent_dist.mode()).sample.clamp(-1, 1)
        mse = ((decoded - chunk) / 2).pow(2).mean(dim=(1, 2, 3))
        values.append(-10 * torch.log10(mse))
    return float(torch.cat(values).mean())
