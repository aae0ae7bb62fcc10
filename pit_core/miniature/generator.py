"""The miniature as a source of part data: critters drawn by its UNet from captions, or by the world itself.

The miniature has no detector. Its pictures show what their captions say, upright on white, so their parts are
found by the world's geometry: the pose in which the captioned critter covers the picture best, and each
coloured pixel given to the part that is nearest there. What the UNet got wrong (a wing of another shape or
colour) is cut out as it was drawn. A picture in which no pose fits is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from ..parts.canvas import flatten
from ..parts.generate import Order, Rejected
from ..parts.masks import Found, MaskFilter, Piece, choose_masks, cut_out, fill_holes
from ..parts.sketch import foreground
from ..parts.sources import noise_seed
from ..render import NEGATIVE
from .critters import BACK_TO_FRONT, CANVAS, Critter, Pose, caption, cut_out_part, draw_layer, render
from .data import concept_critter
from .models import DEFAULTS, WEIGHTS, check_weights, load_stack, load_text_encoder, prompt_encoder

FIT = 0.6  # intersection over union of critter and picture below which the caption was not drawn
DRAWN = 0.4  # share of a part's place that has to be coloured
REACH = 8  # pixels from its place in the world beyond which nothing belongs to a part
MASKS = MaskFilter(min_area=0.003, max_area=0.6, kernel=1, overlap=1.0)
POSES = [
    Pose(dx, dy, scale, mirror=mirror)
    for mirror, scale, dx, dy in product((False, True), (1.0, 0.94), (0.0, -4.0, 4.0), (0.0, -4.0, 4.0))
]


class DrawnCritters:
    """Wholes and parts as the world draws them: exact, and the parts complete where others cover them."""

    def __init__(self, seed: int, batch: int = 16) -> None:
        self.seed, self.batch = seed, batch
        self.entry: Mapping[str, Any] = {"domain": "critters", "seed": seed, "model": "the drawn world"}

    def order(self, index: int) -> Order:
        text = caption(concept_critter(self.seed, index))
        return Order(index, text, noise_seed(self.seed, index), "critters", f"{index:06d}")

    def draw(self, orders: Sequence[Order]) -> list[Image.Image]:
        return [render(concept_critter(self.seed, order.index)) for order in orders]

    def find(self, image: Image.Image, order: Order) -> list[Piece]:
        critter = concept_critter(self.seed, order.index)
        return [
            Piece(kind, flatten(cut_out_part(critter, kind, 2 * CANVAS, supersample=1)))
            for kind in critter.parts()
        ]


class PaintedCritters(DrawnCritters):
    """Wholes by the miniature's UNet from the critters' captions, and the parts cut out of them."""

    def __init__(self, seed: int, batch: int = 16, *, device: torch.device | str = "cpu") -> None:
        super().__init__(seed, batch)
        hashes = check_weights(WEIGHTS)
        self.entry = {"domain": "critters", "seed": seed, "model": hashes}
        self._pipe = load_stack(device=device).renderer.pipe
        self._encode = prompt_encoder(load_text_encoder(WEIGHTS / "text_encoder.safetensors").to(device))

    @torch.no_grad()
    def draw(self, orders: Sequence[Order]) -> list[Image.Image]:
        texts, pooled = self._encode([order.prompt for order in orders])
        empty, empty_pooled = self._encode([NEGATIVE] * len(orders))
        return self._pipe(
            prompt_embeds=texts,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=empty,
            negative_pooled_prompt_embeds=empty_pooled,
            num_inference_steps=DEFAULTS.steps,
            guidance_scale=DEFAULTS.guidance,
            height=CANVAS,
            width=CANVAS,
            generator=[torch.Generator().manual_seed(order.seed) for order in orders],
        ).images

    def find(self, image: Image.Image, order: Order) -> list[Piece] | Rejected:  # type: ignore[override]
        critter = concept_critter(self.seed, order.index)
        shown = fill_holes(_largest(foreground(image)))  # the white of an eye is foreground, too
        pose, fit = fitted_pose(critter, shown)
        if fit < FIT:
            return Rejected(f"The picture does not show '{order.prompt}' (it fits to {fit:.2f}).")
        found = part_masks(replace(critter, pose=pose), shown)
        chosen = choose_masks(found, MASKS)
        if not chosen:
            return Rejected(f"No part of '{order.prompt}' is to be seen.")
        bare = without_eyes(image, {each.kind: each.mask for each in found})
        return [cut_out(bare if each.kind == "body" else image, each) for each in chosen]


def fitted_pose(critter: Critter, shown: np.ndarray) -> tuple[Pose, float]:
    """The pose in which the critter covers `shown` (H, W) bool best, and how well, 0 to 1."""
    best, fit = POSES[0], -1.0
    for pose in POSES:
        drawn = label_map(replace(critter, pose=pose)) > 0
        shared = float((drawn & shown).sum() / (drawn | shown).sum())
        if shared > fit:
            best, fit = pose, shared
    return best, fit


def label_map(critter: Critter) -> np.ndarray:
    """Which part is in front, (CANVAS, CANVAS): its place in BACK_TO_FRONT plus 1, or 0 for none."""
    labels = np.zeros((CANVAS, CANVAS), dtype=np.int64)
    for number, kind in enumerate(BACK_TO_FRONT, start=1):
        labels[_alpha(critter, kind)] = number
    return labels


def part_masks(critter: Critter, shown: np.ndarray) -> list[Found]:
    """The parts of a critter in a picture where `shown` (H, W) bool is not white: each pixel to the nearest.

    A body keeps what its eyes cover. Of a pair of wings only one is taken, as an artist would cut it out.
    A part that covers little of its place in the world was not drawn.
    """
    labels = label_map(critter)
    far, nearest = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    places = np.where(shown & (far <= REACH), labels[tuple(nearest)], 0)
    covered = _alpha(critter, "body")
    found = []
    for number, kind in enumerate(BACK_TO_FRONT, start=1):
        mask = places == number
        if critter.part(kind) is None or mask.sum() < DRAWN * (labels == number).sum():
            continue
        if kind == "wings":
            mask = mask & (np.arange(CANVAS) >= CANVAS // 2 + critter.pose.dx)
        if kind != "eyes":  # two of them; of all else specks are left out
            mask = _largest(mask)
        if kind == "body":
            mask = mask | (covered & (places == BACK_TO_FRONT.index("eyes") + 1))
        found.append(Found(kind, mask))
    return found


def without_eyes(image: Image.Image, masks: Mapping[str, np.ndarray]) -> Image.Image:
    """The picture with the body's own colour where its eyes are, a little beyond their edges."""
    if not {"body", "eyes"} <= masks.keys():
        return image
    pixels = np.array(image.convert("RGB"))
    eyes = ndimage.binary_dilation(masks["eyes"], iterations=2) & masks["body"]
    skin = masks["body"] & ~eyes
    if skin.any():
        pixels[eyes] = np.median(pixels[skin], axis=0)
    return Image.fromarray(pixels)


def _alpha(critter: Critter, kind: str) -> np.ndarray:
    """Where a part is, covered or not, (CANVAS, CANVAS) bool."""
    return np.asarray(draw_layer(critter, kind, CANVAS, 1).getchannel("A")) > 127


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected area, and all that is at least a quarter of it (ears come in pairs)."""
    areas, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(areas.ravel())
    sizes[0] = 0
    return np.isin(areas, np.flatnonzero(sizes * 4 >= sizes.max()))
