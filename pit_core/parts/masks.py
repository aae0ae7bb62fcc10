"""From masks of a picture to pictures of its parts: which masks are parts, cleaned, and cut out on white.

The numbers are those of "Piece it Together" (arXiv 2503.10365).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..cutout import on_white
from ..errors import PitError
from .manifest import Box

REFERENCE = 1024  # pixels: the size of picture that `kernel` is given for


@dataclass(frozen=True)
class MaskFilter:
    """Which masks of a picture are kept as parts, and how they are cleaned.

    min_area, max_area: as shares of the picture. kernel: side in pixels of the square that closes gaps and
    then opens specks, for a picture of 1024 px; smaller ones take a smaller square. fill: holes are filled.
    overlap: a mask goes when smaller ones cover more of it than this share. least, most: how many parts a
    picture has to have, and how many are kept, the smallest first. drop_largest, drop_border: leave out the
    largest mask, and those that touch the picture's border, which are background more often than not.
    """

    min_area: float = 0.015
    max_area: float = 0.30
    kernel: int = 15
    fill: bool = True
    overlap: float = 0.05
    least: int = 1
    most: int = 8
    drop_largest: bool = False
    drop_border: bool = False

    def __post_init__(self) -> None:
        for name in ("fill", "drop_largest", "drop_border"):
            if not isinstance(getattr(self, name), bool):
                raise PitError(f"Expected {name} to be true or false, got {getattr(self, name)!r}.")
        for name in ("kernel", "least", "most"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PitError(f"Expected {name} to be a whole number from 1, got {value!r}.")
        for name in ("min_area", "max_area", "overlap"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise PitError(f"Expected {name} to be a share from 0 to 1, got {value!r}.")
        if self.min_area > self.max_area or self.least > self.most:
            raise PitError("Expected min_area up to max_area and least up to most, got them the other way.")


@dataclass(frozen=True, eq=False)
class Found:
    """A part in a picture: its kind, and where it is, (H, W) bool."""

    kind: str
    mask: np.ndarray


@dataclass(frozen=True, eq=False)
class Piece:
    """A part cut out: its kind, the picture of it, and its box in the whole's pixels where that is known."""

    kind: str
    image: Image.Image
    box: Box | None = None


def choose_masks(found: Sequence[Found], settings: MaskFilter) -> list[Found]:
    """The masks that are parts, cleaned, the smallest first; those of one picture, so of one size."""
    candidates = sorted(found, key=lambda each: int(each.mask.sum()))
    if settings.drop_largest:
        candidates = candidates[:-1]
    if settings.drop_border:
        candidates = [each for each in candidates if not touches_border(each.mask)]
    candidates = [each for each in candidates if _fits(each.mask, settings)]
    cleaned = [Found(each.kind, clean(each.mask, settings)) for each in candidates]
    kept: list[Found] = []
    for each in sorted(cleaned, key=lambda each: int(each.mask.sum())):
        if len(kept) < settings.most and _fits(each.mask, settings) and _is_free(each, kept, settings):
            kept.append(each)
    return kept


def clean(mask: np.ndarray, settings: MaskFilter) -> np.ndarray:
    """(H, W) bool: gaps closed, then specks opened, then holes filled."""
    scaled = settings.kernel * max(mask.shape) / REFERENCE
    kernel = 2 * math.floor(scaled / 2) + 1  # odd, so that nothing moves
    closed = _eroded(_dilated(mask, kernel), kernel)
    opened = _dilated(_eroded(closed, kernel), kernel)
    return fill_holes(opened) if settings.fill else opened


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool with everything set that cannot be reached from outside by steps up, down and sideways."""
    free = ~np.pad(mask, 1)
    rows = np.cumsum(~free).reshape(free.shape)  # cells of one run share a number
    columns = np.cumsum(~free.T).reshape(free.T.shape).T
    outside = np.zeros_like(free)
    outside[0] = True
    before = 0
    while (reached := int(outside.sum())) > before:
        before = reached
        for runs in (rows, columns):
            hit = np.zeros(int(runs.max()) + 1, dtype=bool)
            hit[runs[outside]] = True
            outside = free & hit[runs]
    return ~outside[1:-1, 1:-1]


def touches_border(mask: np.ndarray) -> bool:
    """Whether a mask (H, W) reaches the picture's border."""
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def cut_out(image: Image.Image, found: Found) -> Piece:
    """The part on white, cropped tightly. Raises PitError for an empty mask and one of another size."""
    try:
        cut = on_white(image, found.mask, crop=True)
    except PitError as error:
        raise PitError(f"The part '{found.kind}' cannot be cut out: {error}") from error
    return Piece(found.kind, cut, Image.fromarray(found.mask).getbbox())


def _fits(mask: np.ndarray, settings: MaskFilter) -> bool:
    return bool(mask.any()) and settings.min_area <= mask.mean() <= settings.max_area


def _is_free(each: Found, kept: Sequence[Found], settings: MaskFilter) -> bool:
    if not kept:
        return True
    taken = np.logical_or.reduce([other.mask for other in kept])
    return int((each.mask & taken).sum()) <= settings.overlap * int(each.mask.sum())


def _dilated(mask: np.ndarray, kernel: int) -> np.ndarray:
    return _box_sum(np.pad(mask, kernel // 2), kernel) > 0


def _eroded(mask: np.ndarray, kernel: int) -> np.ndarray:
    """What is beyond the border counts as set, so that parts there are not gnawed at."""
    return _box_sum(np.pad(mask, kernel // 2, constant_values=True), kernel) == kernel * kernel


def _box_sum(values: np.ndarray, side: int) -> np.ndarray:
    """How many are set in each square of `side`: (H, W) -> (H - side + 1, W - side + 1)."""
    sums = np.pad(values.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
