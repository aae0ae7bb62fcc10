"""Training the miniature: `pit miniature train [stage]`, each stage resumable, on two CPU cores.

The stages reuse ``pit_core.train``: the loop for all of them, and the IP-Adapter's and the IP-Prior's own objectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..train.loop import Draws, Item, LoopConfig, Objective, Result, train
from . import data, models
from .data import PictureSet
from .tokenizer import WordTokenizer

WORLD_SEED, CHECK_SEED, CONCEPT_SEED, CORRUPT_SEED = 11, 12, 21, 31


def pictures(out: Path, name: str) -> PictureSet:
    """A picture set by name, drawn on first use."""
    make, count = {
        "world": (_world, 30000),
        "world-check": (_world_check, 500),
        "concepts": (_concepts, 20000),
    }[name]
    return data.draw_set(out / "pictures", name, make, count)


def _world(index: int) -> list[data.Picture]:
    return [data.world_picture(WORLD_SEED, index)]


def _world_check(index: int) -> list[data.Picture]:
    return [data.world_picture(CHECK_SEED, index, held_out=True)]


def _concepts(index: int) -> list[data.Picture]:
    return data.concept_pictures(CONCEPT_SEED, index)


def to_pixels(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return (
        torch.from_numpy(np.ascontiguousarray(images))
        .permute(0, 3, 1, 2)
        .contiguous()
        .float()
        .div(127.5)
        .sub(1.0)
    )


class Pictures:
    """Batches of pictures, whole or as square crops; of three random crops the liveliest is taken."""

    def __init__(self, pictures: PictureSet, crop: int | None = None) -> None:
        self.pictures, self.crop = pictures, crop

    def __len__(self) -> int:
        return len(self.pictures)

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        if self.crop is None:
            return {"pixels": to_pixels(self.pictures.pixels[[index for _, index in items]])}
        return {"pixels": to_pixels(np.stack([self._lively_crop(item) for item in items]))}

    def _lively_crop(self, item: Item) -> np.ndarray:
        rng = np.random.default_rng(item)
        picture = self.pictures.pixels[item[1]]
        corners = rng.integers(0, picture.shape[0] - self.crop + 1, (3, 2))
        crops = [picture[y : y + self.crop, x : x + self.crop] for y, x in corners]
        return max(crops, key=lambda crop: float(crop[::4, ::4].std()))


# ---------------------------------------------------------------------------------------------------------------------
# VAE


class VAEObjective(Objective):
    """Reconstruction (L1 and L2) with a light pull of the posterior towards the standard normal."""

    def __init__(self, vae: Any, kl: float = 5e-5) -> None:
        super().__init__()
        self.vae, self.kl = vae, kl

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        pixels = batch["pixels"]
        posterior = self.vae.encode(pixels).latent_dist
        noise = draws.randn(*posterior.mean.shape[1:])
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        mse, mae = F.mse_loss(decoded, pixels), F.l1_loss(decoded, pixels)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        return {"loss": mae + 5 * mse + self.kl * kl, "mse": mse, "kl": kl}


@torch.no_grad()
def reconstruction_db(vae: Any, pixels: Tensor) -> float:
    """Mean PSNR in dB over pictures (B, 3, H, W) in [-1, 1], through encode and decode."""
    values = []
    for chunk in pixels.split(20):
        decoded = vae.decode(vae.encode(chunk).latent_dist.mode()).sample.clamp(-1, 1)
        mse = ((decoded - chunk) / 2).pow(2).mean(dim=(1, 2, 3))
        values.append(-10 * torch.log10(mse))
    return float(torch.cat(values).mean())


def train_vae(out: Path, *, max_seconds: float | None = None) -> Result:
    vae = models.build_vae()
    check = to_pixels(pictures(out, "world-check").pixels[:100])
    config = LoopConfig(
        steps=6000, batch_size=8, lr=8e-4, schedule="cosine", warmup=200, weight_decay=0.0, betas=(0.9, 0.99),
        ema_decay=0.998, precision="bf16", seed=1, save_every=250,
    )  # fmt: skip
    objective = VAEObjective(vae)
    data_ = Pictures(pictures(out, "world"), crop=64)
    return train(
        objective, data_, config, out / "vae", description="vae", max_seconds=max_seconds,
        validate=lambda step: {"db": reconstruction_db(vae, check)},
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Text and image encoder


class Captioned:
    """Pictures of several sets with their captions as token ids and their labels; captions vary with the epoch."""

    def __init__(
        self, sets: Sequence[tuple[PictureSet, Callable[[int], list[data.Picture]]]], tokenizer: WordTokenizer
    ) -> None:
        self.sets, self.tokenizer = sets, tokenizer
        self.starts = np.cumsum([0, *(len(pictures) for pictures, _ in sets)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def describe(self, item: Item) -> tuple[np.ndarray, np.ndarray, str]:
        epoch, index = item
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        pictures, make = self.sets[which]
        row = index - int(self.starts[which])
        group = int(pictures.groups[row])
        place = row - int(np.searchsorted(pictures.groups, group))
        caption = make(group)[place].caption(np.random.default_rng([*item, 5]))
        return pictures.pixels[row], pictures.labels[row], caption

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        pixels, labels, captions = zip(*(self.describe(item) for item in items), strict=True)
        return {
            "pixels": to_pixels(np.stack(pixels)),
            "labels": torch.from_numpy(np.stack(labels)),
            "text": self.tokenizer(captions),
        }


# CLIP normalisation, as the full-size encoder's preprocessing applies it.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(pixels: Tensor) -> Tensor:
    """[-1, 1] -> CLIP's normalised pixels, (B, 3, H, W)."""
    mean = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(CLIP_STD).view(1, 3, 1, 1)
    return ((pixels + 1) / 2 - mean) / std


class ContrastiveObjective(Objective):
    """CLIP's symmetric loss, equal captions counted as matches, and a linear read-out of the attributes."""

    def __init__(self, image_encoder: Any, text_encoder: Any) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.readout = nn.Linear(models.PROJECTION, READER_OUTPUTS)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        image = self.image_encoder(clip_pixels(batch["pixels"])).image_embeds.float()
        text = self.text_encoder(batch["text"], attention_mask=None).text_embeds.float()
        scale = self.logit_scale.exp().clamp(max=100)
        logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        same = (batch["text"][:, None] == batch["text"][None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        read = reader_loss(self.readout(image), batch["labels"])
        right = same[torch.arange(len(same)), logits.argmax(1)].mean()
        return {"loss": contrast + read, "contrast": contrast, "read": read, "right": right}


def train_encoders(out: Path, *, max_seconds: float | None = None) -> Result:
    tokenizer = WordTokenizer(models.TEXT_LENGTH)
    objective = ContrastiveObjective(models.build_image_encoder(), models.build_text_encoder(len(tokenizer)))
    sets = [(pictures(out, "world"), _world), (pictures(out, "concepts"), _concepts)]
    config = LoopConfig(
        steps=2500, batch_size=128, lr=1.2e-3, schedule="cosine", warmup=100, weight_decay=0.02, betas=(0.9, 0.98),
        ema_decay=0.998, precision="bf16", seed=2, save_every=250,
    )  # fmt: skip
    return train(
        objective,
        Captioned(sets, tokenizer),
        config,
        out / "encoders",
        description="encoders",
        max_seconds=max_seconds,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Attribute readers

STATES = 7
COLOURS = len(data.COLOUR_NAMES)
READER_SPLIT = [STATES * len(data.KINDS), COLOURS * len(data.KINDS), len(data.STYLES), len(data.SCENES), 1]
READER_OUTPUTS = sum(READER_SPLIT)


def split_reading(outputs: Tensor) -> dict[str, Tensor]:
    """(B, READER_OUTPUTS) -> state (B, 5, 7), colour (B, 5, 8), style, scene logits and build (B,) in [0, 1]."""
    state, colour, style, scene, build = outputs.split(READER_SPLIT, dim=1)
    kinds = len(data.KINDS)
    return {
        "state": state.unflatten(1, (kinds, STATES)),
        "colour": colour.unflatten(1, (kinds, COLOURS)),
        "style": style,
        "scene": scene,
        "build": build[:, 0],
    }


def reader_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropies of all attributes and the build's squared error; absent colours do not count."""
    read, kinds = split_reading(outputs.float()), len(data.KINDS)
    state, colour, rest = labels[:, :kinds], labels[:, kinds : 2 * kinds], labels[:, 2 * kinds :]
    loss = F.cross_entropy(read["state"].flatten(0, 1), state.flatten())
    loss = loss + F.cross_entropy(read["colour"].flatten(0, 1), colour.flatten(), ignore_index=data.NO_COLOUR)
    loss = (
        loss
        + 0.2 * F.cross_entropy(read["style"], rest[:, 0])
        + 0.2 * F.cross_entropy(read["scene"], rest[:, 1])
    )
    return loss + F.mse_loss(read["build"], rest[:, 2].float() / 1000)
