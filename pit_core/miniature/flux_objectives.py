"""What the miniature's Flux-family models learn by."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..flow import interpolate, velocity_target
from ..train.loop import Draws, Objective
from . import flux_models

KNOWN_WEIGHT = 0.2  # of the loss where nothing is masked: there the model only copies


class FluxVAEObjective(Objective):
    """Reconstruction (mostly L2), a light pull towards the standard normal, and means of zero.

    The means matter, as Flux's VAE has no layer in which they could be taken off afterwards.
    """

    def __init__(self, vae: Any, kl: float = 1e-4, centre: float = 0.03) -> None:
        super().__init__()
        self.vae, self.kl, self.centre = vae, kl, centre

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """Batch: "pixels" (B, 3, H, W) in [-1, 1]."""
        pixels = batch["pixels"]
        posterior = self.vae.encode(pixels).latent_dist
        noise = draws.randn(*posterior.mean.shape[1:])
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        mse, mae = F.mse_loss(decoded, pixels), F.l1_loss(decoded, pixels)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        off = posterior.mean.float().mean(dim=(0, 2, 3)).pow(2).mean()
        loss = 0.5 * mae + 10 * mse + self.kl * kl + self.centre * off
        return {"loss": loss, "mse": mse, "kl": kl, "off": off}


class FillObjective(Objective):
    """Rectified flow on diptychs, parts of which are masked: the velocity, mostly there.

    Times are uniform before Flux's shift, so they lie as densely as the sampler's steps do. The guidance that
    Flux is told is drawn at random: the miniature was not distilled, and takes any value.
    """

    image_ids: Tensor

    def __init__(self, fill: Any) -> None:
        super().__init__()
        self.fill = fill
        rows, columns = (side // 16 for side in flux_models.CANVAS_SIZE)
        self.register_buffer("image_ids", flux_models.image_ids(rows, columns), persistent=False)
        self.shift = math.exp(flux_models.flux_shift(rows * columns))

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """Batch: "latents" and "known" (B, 16, h, w) scaled, the latter of the canvas with its mask grey,
        "mask" (B, 8 h, 8 w), "text" (B, T, C), "pooled" (B, P).
        """
        u = draws.rand()
        noise, guidance = draws.randn(*batch["latents"].shape[1:]), 1 + 49 * draws.rand()
        velocity, masked = self.velocity(batch, noise, self.shift * u / (1 + (self.shift - 1) * u), guidance)
        target = flux_models.pack(velocity_target(batch["latents"], noise))
        error = (velocity.float() - target).pow(2).mean(-1)
        weight = KNOWN_WEIGHT + (1 - KNOWN_WEIGHT) * masked
        filled = (error * masked).sum() / masked.sum()
        # Each process divides by its own rows' weight, which is close to the others'.
        return {"loss": (error * weight).sum() / weight.sum(), "filled": filled}

    def velocity(
        self, batch: dict[str, Tensor], noise: Tensor, t: Tensor, guidance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the model predicts at times t (B,), (B, tokens, 64); how much of each token is masked."""
        mask = flux_models.pack_mask(batch["mask"])
        noisy = flux_models.pack(interpolate(batch["latents"], noise, t))
        known = flux_models.pack(batch["known"])
        predicted = self.fill(
            hidden_states=torch.cat([noisy, known, mask], -1),
            timestep=t,
            guidance=guidance,
            pooled_projections=batch["pooled"],
            encoder_hidden_states=batch["text"],
            img_ids=self.image_ids,
            txt_ids=self.image_ids.new_zeros(batch["text"].shape[1], 3),
        ).sample
        return predicted, mask.mean(-1)
