"""What training does to a set of parts before the prior sees it: which parts, how cut, turned, placed, drawn.

"Piece it Together" (arXiv 2503.10365); the defaults are the released settings. Every choice is drawn from the
random numbers that are passed in, so equal ones give equal pictures.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import PitError
from .canvas import SIZE, WHITE, crop_transparent, flatten, on_white_square
from .sketch import sketch

REFERENCES = 4  # cells of the reference grid


@dataclass(frozen=True)
class Augment:
    """How parts are chosen and changed; a name in `_prob` is a probability, each part's own unless said.

    max_crops: the most parts of an example. empty_prob: examples without any part.
    crop_prob, crop_share: parts cropped at random to this share of their sides, lowest and highest.
    rotate_prob, degrees: parts turned by up to so many degrees, either way.
    fill: the part's long side as a share of the canvas, lowest and highest; the place is random.
    sketch_prob: parts shown as sketches.
    use_ref: a slot in front holds a grid of four siblings; reference_prob: examples whose grid is not white.
    reference_targets: the fewest targets of a set that gives references.
    """

    max_crops: int = 3
    empty_prob: float = 0.1
    crop_prob: float = 0.2
    crop_share: tuple[float, float] = (0.8, 1.0)
    rotate_prob: float = 0.2
    degrees: float = 30.0
    fill: tuple[float, float] = (0.8, 0.95)
    sketch_prob: float = 0.5
    use_ref: bool = False
    reference_prob: float = 1.0
    reference_targets: int = 9

    def __post_init__(self) -> None:
        for name in ("empty_prob", "crop_prob", "rotate_prob", "sketch_prob", "reference_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise PitError(f"Expected {name} to be a probability from 0 to 1, got {getattr(self, name)}.")
        for name in ("crop_share", "fill"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise PitError(f"Expected {name} as two shares above 0 and up to 1, got {low} and {high}.")
        if not (math.isfinite(self.degrees) and self.degrees >= 0):
            raise PitError(f"Expected degrees of at least 0, got {self.degrees}.")
        if self.max_crops < 1:
            raise PitError(f"Expected max_crops of at least 1, got {self.max_crops}.")
        if self.reference_targets <= REFERENCES:
            raise PitError(
                f"Expected reference_targets of at least {REFERENCES + 1}, a target and its {REFERENCES} "
                f"siblings, got {self.reference_targets}."
            )

    @property
    def slots(self) -> int:
        """Slots of an example: the reference's, if there is one, and then the parts'."""
        return self.max_crops + self.use_ref


def item_chance(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one example: a function of these three and of nothing else."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, index)))


def choose_parts(count: int, settings: Augment, chance: np.random.Generator) -> list[int]:
    """Which of `count` parts an example shows, in a random order: 1 to all, capped; at times none."""
    if not count or chance.random() < settings.empty_prob:
        return []
    shown = min(int(chance.integers(1, count + 1)), settings.max_crops)
    return [int(part) for part in chance.permutation(count)[:shown]]


def choose_siblings(
    index: int, members: Sequence[int], settings: Augment, chance: np.random.Generator
) -> list[int]:
    """Four others out of the set's ascending `members`, or none: without use_ref, where the set is too small,
    and where chance leaves them out. The cost does not grow with the set."""
    if (
        not settings.use_ref
        or len(members) < settings.reference_targets
        or chance.random() >= settings.reference_prob
    ):
        return []
    own = bisect_left(members, index)
    drawn = chance.choice(len(members) - 1, REFERENCES, replace=False)
    return [members[i + (i >= own)] for i in drawn]


def part_square(
    part: Image.Image, settings: Augment, chance: np.random.Generator, size: int = SIZE
) -> Image.Image:
    """The part, changed by chance, on a white square of `size` pixels, RGB.

    A part too pale to be drawn stays as it is, since its sketch would be white.
    Raises PitError for a part that is wholly transparent.
    """
    part = flatten(crop_transparent(part))
    if chance.random() < settings.crop_prob:
        part = _cropped(part, settings.crop_share, chance)
    if chance.random() < settings.rotate_prob:
        angle = chance.uniform(-settings.degrees, settings.degrees)
        part = part.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=WHITE)
    fill, place = float(chance.uniform(*settings.fill)), int(chance.integers(2**63))
    square = on_white_square(part, size, fill, "random", place)
    if chance.random() < settings.sketch_prob:
        drawn = sketch(square, seed=place)
        return square if is_white(drawn) else drawn
    return square


def is_white(image: Image.Image) -> bool:
    """Whether the picture shows nothing but white, with transparency laid on white."""
    return np.asarray(flatten(image)).min() == 255


def _cropped(part: Image.Image, share: tuple[float, float], chance: np.random.Generator) -> Image.Image:
    """A random window whose sides are one random share of the picture's."""
    scale = chance.uniform(*share)
    width, height = (max(1, round(side * scale)) for side in part.size)
    left = int(chance.integers(part.width - width + 1))
    top = int(chance.integers(part.height - height + 1))
    return part.crop((left, top, left + width, top + height))
