"""Diptychs of the critter world, for the fill model: a critter on the left, and what is filled in from it.

In part of them both panels show the same critter, in another pose and scene; in the others they do not, and
the prompt is the same. So how much the right panel follows the left one is left to the attention between
them, which is what Diptych Prompting turns up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diptych.prompt import subject_prompt
from ..train.loop import Item
from . import models
from .critters import CANVAS, SCENE_PHRASES, SCENES, Critter, random_critter, random_pose, render
from .data import Drawn, PictureSet, labels_of
from .tokenizer import WordTokenizer

SAME = 0.6  # how often both panels show one critter
CUT_OUT = 0.65  # how often the left one stands on white
NO_TEXT, PLAIN_TEXT = 0.1, 0.2  # how often nothing is said, and how often the scene alone


@dataclass(frozen=True)
class Diptych:
    """Two critters side by side; ``box`` (left, top, right, bottom) in pixels of the canvas is masked."""

    left: Critter
    right: Critter
    box: tuple[int, int, int, int]

    @property
    def same(self) -> bool:
        """Whether both panels show the same critter."""
        kept = replace(self.left, pose=self.right.pose, scene=self.right.scene)
        return replace(kept, scene_seed=self.right.scene_seed) == self.right

    def mask(self) -> np.ndarray:
        """(CANVAS, 2 CANVAS) uint8, 255 where to fill."""
        mask = np.zeros((CANVAS, 2 * CANVAS), dtype=np.uint8)
        left, top, right, bottom = self.box
        mask[top:bottom, left:right] = 255
        return mask

    def drawn(self) -> list[Drawn]:
        """Left and right panel with their labels."""
        return [(np.asarray(render(critter)), labels_of(critter)) for critter in (self.left, self.right)]


def random_diptych(seed: int, index: int, *, held_out: bool = False) -> Diptych:
    """The diptych of this number, of training combinations or of those held out."""
    rng = np.random.default_rng([seed, index])
    behind = SCENES[:1] if rng.random() < CUT_OUT else SCENES[1:]
    left = random_critter(rng, scenes=behind, posed=float(rng.random()), held_out=held_out)
    other = random_critter(rng, scenes=SCENES, held_out=held_out)
    if rng.random() < SAME:
        right = replace(left, pose=random_pose(rng), scene=other.scene, scene_seed=other.scene_seed)
    else:
        right = other
    return Diptych(left, right, _random_box(rng))


def _random_box(rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Mostly the right panel; sometimes the left one, or a part of either."""
    kind = rng.random()
    start = 0 if kind < 0.1 else CANVAS
    if kind < 0.85:
        return start, 0, start + CANVAS, CANVAS
    start = int(rng.integers(2)) * CANVAS
    width, height = (int(side) for side in rng.integers(CANVAS // 4, CANVAS, 2))
    x, y = start + int(rng.integers(CANVAS - width)), int(rng.integers(CANVAS - height))
    return x, y, x + width, y + height


def full_prompt(scene: str) -> str:
    """What Diptych Prompting says of a critter that is to be seen in a scene."""
    return subject_prompt("a critter", f"a critter {SCENE_PHRASES[scene]}")


def plain_prompt(scene: str) -> str:
    """The scene in a caption's words."""
    return f"a critter, {SCENE_PHRASES[scene]}"


class Canvases(PictureSet):
    """Diptychs as pictures of four channels, (N, 128, 256, 4) uint8: both panels, and the mask, 0 or 255."""

    def __init__(self, panels: PictureSet, diptychs: Sequence[Diptych]) -> None:
        self.folder = panels.folder
        self.pixels: Any = _CanvasPixels(panels, diptychs)
        self.labels, self.groups = panels.labels[::2], panels.groups[::2]


class _CanvasPixels:
    """Canvases put together as they are asked for."""

    def __init__(self, panels: PictureSet, diptychs: Sequence[Diptych]) -> None:
        self.panels, self.diptychs = panels, diptychs

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        if isinstance(rows, slice):
            return np.stack([self[row] for row in range(*rows.indices(len(self.diptychs)))])
        both = np.concatenate(self.panels.pixels[2 * rows : 2 * rows + 2], axis=1)
        return np.concatenate([both, self.diptychs[rows].mask()[..., None]], axis=2)


class DiptychBatches:
    """Cached latents of canvases, whole and masked, (N, 32, 16, 32), with their masks and encoded prompts."""

    def __init__(
        self,
        diptychs: Sequence[Diptych],
        latents: np.ndarray,
        tokenizer: WordTokenizer,
        text_encoder: Any,
    ) -> None:
        self.diptychs, self.latents = diptychs, latents
        prompts = ["", *map(full_prompt, SCENES), *map(plain_prompt, SCENES)]
        self._row = {prompt: row for row, prompt in enumerate(prompts)}
        with torch.no_grad():
            self._text, self._pooled = models.encode_text(text_encoder, tokenizer(prompts))

    def __len__(self) -> int:
        return len(self.diptychs)

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        rows = [index for _, index in items]
        latents, known = torch.from_numpy(self.latents[rows]).float().chunk(2, dim=1)
        masks = np.stack([self.diptychs[row].mask() for row in rows])
        said = [self._row[self.prompt(item)] for item in items]
        return {
            "latents": latents,
            "known": known,
            "mask": torch.from_numpy(masks).float() / 255,
            "text": self._text[said],
            "pooled": self._pooled[said],
        }

    def prompt(self, item: Item) -> str:
        """What is said of a diptych in an epoch: where the panel with the mask is, if anything."""
        diptych, chance = self.diptychs[item[1]], np.random.default_rng([*item, 3]).random()
        if chance < NO_TEXT:
            return ""
        if diptych.box[0] < CANVAS:
            return plain_prompt(diptych.left.scene)
        say = plain_prompt if chance < NO_TEXT + PLAIN_TEXT else full_prompt
        return say(diptych.right.scene)
