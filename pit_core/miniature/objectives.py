"""What the miniature's base models learn by; adapter and prior have ``pit_core.train``'s own objectives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Linear
from torch.nn import functional as F

from ..train.ip_adapter import add_noise, noise_loss
from ..train.loop import Draws, Objective
from . import models, reader


class VAEObjective(Objective):
    """Reconstruction (L1 and L2) with a light pull of the posterior towards the standard normal."""

    def __init__(self, vae: Any, kl: float = 5e-5) -> None:
        super().__init__()
        self.vae, self.kl = vae, kl

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """Batch: "pixels" (B, 3, H, W) in [-1, 1]."""
        pixels = batch["pixels"]
        posterior = self.vae.encode(pixels).latent_dist
        noise = draws.randn(*posterior.mean.shape[1:])
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        mse, mae = F.mse_loss(decoded, pixels), F.l1_loss(decoded, pixels)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        return {"loss": mae + 5 * mse + self.kl * kl, "mse": mse, "kl": kl}


class DecoderObjective(Objective):
    """The decoder alone, on whole pictures, once the latent space is fixed."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """Batch: "pixels" (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            latents = self.vae.encode(batch["pixels"]).latent_dist.mode()
        decoded = self.vae.decode(latents).sample.float()
        mse, mae = F.mse_loss(decoded, batch["pixels"]), F.l1_loss(decoded, batch["pixels"])
        return {"loss": 0.3 * mae + 10 * mse, "mse": mse}


class ContrastiveObjective(Objective):
    """CLIP's symmetric loss, equal captions counted as matches, and a linear read-out of the attributes."""

    def __init__(self, image_encoder: Any, text_encoder: Any, read_weight: float = 1.0) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.read_weight = read_weight
        self.readout = Linear(models.PROJECTION, reader.OUTPUTS)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def read_attributes(self, pixels: Tensor) -> Tensor:
        """(B, 3, 128, 128) in [-1, 1] -> (B, reader.OUTPUTS)."""
        return self.readout(self.image_encoder(models.clip_pixels(pixels)).image_embeds)

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """Batch: "pixels" (B, 3, 128, 128) in [-1, 1], "ids" (B, T), "labels" (B, LABELS)."""
        image = self.image_encoder(models.clip_pixels(batch["pixels"])).image_embeds.float()
        text = self.text_encoder(batch["ids"]).text_embeds.float()
        scale = self.logit_scale.exp().clamp(max=100)
        logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        same = (batch["ids"][:, None] == batch["ids"][None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        read = reader.loss(self.readout(image), batch["labels"])
        right = same[torch.arange(len(same)), logits.argmax(1)].mean()
        return {
            "loss": contrast + self.read_weight * read,
            "contrast": contrast,
            "read": read,
            "right": right,
        }


class ReaderObjective(Objective):
    """Attributes off pictures that are slightly blurred and noisy, as generated ones are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """Batch: "pixels" (B, 3, 128, 128) in [-1, 1], "labels" (B, LABELS)."""
        pixels = self._worn(batch["pixels"], draws) if self.training else batch["pixels"]
        return {"loss": reader.loss(self.model(pixels), batch["labels"])}

    @staticmethod
    def _worn(pixels: Tensor, draws: Draws) -> Tensor:
        soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        amount = draws.rand(1, 1, 1) * (draws.rand(1, 1, 1) < 0.6)
        tint = 0.06 * draws.randn(3, 1, 1) * (draws.rand(1, 1, 1) < 0.5)
        noise = 0.05 * draws.rand(1, 1, 1) * draws.randn(*pixels.shape[1:])
        return torch.lerp(pixels, soft, amount) + tint + noise


class UNetObjective(Objective):
    """The epsilon loss at uniform steps, text from the frozen encoder; ``snr_limit`` as in ``noise_loss``."""

    alphas_cumprod: Tensor

    def __init__(self, unet: Any, alphas_cumprod: Tensor, snr_limit: float | None = None) -> None:
        super().__init__()
        self.unet, self.snr_limit = unet, snr_limit
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """Batch: "latents" (B, 4, h, w) scaled, "text" (B, T, C), "pooled" (B, P), "time_ids" (B, 6)."""
        latents = batch["latents"]
        noise, t = draws.randn(*latents.shape[1:]), draws.randint(len(self.alphas_cumprod))
        alphas = self.alphas_cumprod[t]
        predicted = self.unet(
            add_noise(latents, noise, alphas),
            t,
            encoder_hidden_states=batch["text"],
            added_cond_kwargs={"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]},
        ).sample
        return {"loss": noise_loss(predicted, noise, alphas, self.snr_limit)}
