"""Training batches of the critter world: pictures, captions, and what frozen models made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..train.loop import Item
from . import models
from .critters import CANVAS
from .data import VIEWS, Picture, PictureSet
from .tokenizer import WordTokenizer

# Texts that say nothing of the picture: the renderer's default prompts mean "no text" to the miniature, too.
NEUTRAL = (
    "",
    "best quality, high quality",
    "monochrome, lowres, bad anatomy, worst quality, low quality",
)
TIME_IDS = (CANVAS, CANVAS, 0, 0, CANVAS, CANVAS)


def to_pixels(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return torch.from_numpy(channels_first).float().div(127.5).sub(1.0)


class Pictures:
    """Batches of pictures with labels: whole, as lively square crops, or moved a little.

    ``rows`` picks some of the sets' pictures, counted over all sets in order.
    """

    def __init__(
        self,
        sets: Sequence[PictureSet],
        crop: int | None = None,
        rows: np.ndarray | None = None,
        moved: bool = False,
    ) -> None:
        self.sets, self.crop, self.moved = sets, crop, moved
        self.starts = np.cumsum([0, *(len(pictures) for pictures in sets)])
        self.rows = np.arange(self.starts[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> tuple[PictureSet, int]:
        """The set and its row behind an index."""
        number = int(self.rows[index])
        which = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.sets[which], number - int(self.starts[which])

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        pixels, labels = [], []
        for item in items:
            pictures, row = self.place(item[1])
            picture = pictures.pixels[row]
            if self.moved:
                picture = _moved(picture, item)
            pixels.append(picture if self.crop is None else _lively_crop(picture, self.crop, item))
            labels.append(pictures.labels[row])
        return {"pixels": to_pixels(np.stack(pixels)), "labels": torch.from_numpy(np.stack(labels))}


def _lively_crop(picture: np.ndarray, size: int, item: Item) -> np.ndarray:
    """The most varied of three random crops, so that little time goes into empty paper."""
    corners = np.random.default_rng(item).integers(0, picture.shape[0] - size + 1, (3, 2))
    crops = [picture[y : y + size, x : x + size] for y, x in corners]
    return max(crops, key=lambda crop: float(crop[::4, ::4].std()))


def _moved(picture: np.ndarray, item: Item, most: int = 5) -> np.ndarray:
    """Mirrored half the time, and shifted by a few pixels; the edge goes on."""
    rng = np.random.default_rng([*item, 9])
    y, x = rng.integers(0, 2 * most + 1, 2)
    wide = np.pad(picture, ((most, most), (most, most), (0, 0)), mode="edge")
    shifted = wide[y : y + picture.shape[0], x : x + picture.shape[1]]
    return shifted[:, ::-1] if rng.random() < 0.5 else shifted


class Captioner:
    """Captions of pictures by set and row; they vary with the epoch, and some say nothing."""

    def __init__(self, makers: dict[Path, Callable[[int], list[Picture]]], neutral: float = 0.0) -> None:
        self.makers, self.neutral = makers, neutral

    def __call__(self, pictures: PictureSet, row: int, item: Item) -> str:
        rng = np.random.default_rng([*item, 5])
        if rng.random() < self.neutral:
            return str(rng.choice(NEUTRAL))
        return self.picture(pictures, row).caption(rng)

    def picture(self, pictures: PictureSet, row: int) -> Picture:
        """What a set shows in a row."""
        group = int(pictures.groups[row])
        place = row - int(np.searchsorted(pictures.groups, group))
        return self.makers[pictures.folder](group)[place]


class Captioned:
    """Pictures with labels and the token ids of their captions."""

    def __init__(self, pictures: Pictures, captioner: Captioner, tokenizer: WordTokenizer) -> None:
        self.pictures, self.captioner, self.tokenizer = pictures, captioner, tokenizer

    def __len__(self) -> int:
        return len(self.pictures)

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        texts = [self.captioner(*self.pictures.place(item[1]), item) for item in items]
        return {**self.pictures.fetch(items), "ids": self.tokenizer(texts)}


class Conditioned:
    """Cached latents (and image features) with freshly encoded captions, for the UNet and the adapter."""

    def __init__(
        self,
        pictures: Pictures,
        captioner: Captioner,
        tokenizer: WordTokenizer,
        text_encoder: Any,
        cached: dict[str, np.ndarray],
    ) -> None:
        self.pictures, self.captioner, self.tokenizer = pictures, captioner, tokenizer
        self.text_encoder, self.cached = text_encoder, cached

    def __len__(self) -> int:
        return len(self.pictures)

    @torch.no_grad()
    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        texts = [self.captioner(*self.pictures.place(item[1]), item) for item in items]
        text, pooled = models.encode_text(self.text_encoder, self.tokenizer(texts))
        rows = self.pictures.rows[[index for _, index in items]]
        batch = {name: torch.from_numpy(values[rows]).float() for name, values in self.cached.items()}
        time_ids = torch.tensor([TIME_IDS] * len(items), dtype=torch.float32)
        return {**batch, "text": text, "pooled": pooled, "time_ids": time_ids}


class Pairs:
    """Targets' latents with their references' image tokens and prompts, for an IP-LoRA."""

    def __init__(
        self,
        latents: np.ndarray,
        tokens: np.ndarray,
        prompts: Sequence[str],
        tokenizer: WordTokenizer,
        text_encoder: Any,
    ) -> None:
        self.latents, self.tokens, self.prompts = latents, tokens, prompts
        self.tokenizer, self.text_encoder = tokenizer, text_encoder

    def __len__(self) -> int:
        return len(self.prompts)

    @torch.no_grad()
    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        rows = [index for _, index in items]
        ids = self.tokenizer([self.prompts[row] for row in rows])
        text, pooled = models.encode_text(self.text_encoder, ids)
        return {
            "latents": torch.from_numpy(self.latents[rows]).float(),
            "tokens": torch.from_numpy(self.tokens[rows]).float(),
            "text": text,
            "pooled": pooled,
            "time_ids": torch.tensor([TIME_IDS] * len(rows), dtype=torch.float32),
        }


class Concepts:
    """Concepts' tokens with the tokens of one to three of their parts, padded with white; some with none."""

    def __init__(self, pictures: PictureSet, tokens: np.ndarray, white: Tensor, slots: int = 3) -> None:
        self.tokens, self.white, self.slots = tokens, white, slots
        views = pictures.labels[:, -1]
        self.targets = np.flatnonzero(views == VIEWS.index("whole"))
        self.parts = np.append(np.diff(self.targets), len(views) - self.targets[-1]) - 1

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        target = self.tokens[self.targets[[index for _, index in items]]]
        cond = torch.stack([self._given(item) for item in items])
        return {"target": torch.from_numpy(target).float(), "cond": cond}

    def _given(self, item: Item) -> Tensor:
        rng = np.random.default_rng([*item, 7])
        start, count = int(self.targets[item[1]]), int(self.parts[item[1]])
        kept = 0 if rng.random() < 0.1 else int(rng.integers(1, min(self.slots, count) + 1))
        rows = start + 1 + rng.permutation(count)[:kept]
        given = torch.from_numpy(self.tokens[rows]).float().flatten(0, 1)
        return torch.cat([given, self.white.repeat(self.slots - kept, 1)])
