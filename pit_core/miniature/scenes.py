"""The critters' backgrounds: a sky, a ground and a few soft things, told apart at a glance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .geometry import Point, ellipse, stroke
from .world import CANVAS

Colour = tuple[int, int, int]

# The sky's colours at the top and low down, and the ground's.
_SKY_GROUND: dict[str, tuple[Colour, Colour, Colour]] = {
    "forest": ((188, 222, 190), (150, 196, 150), (92, 128, 78)),
    "beach": ((140, 206, 240), (210, 238, 246), (244, 220, 160)),
    "snow": ((176, 200, 226), (222, 232, 242), (246, 248, 252)),
    "night": ((22, 26, 66), (56, 52, 108), (38, 44, 62)),
    "desert": ((250, 206, 140), (252, 232, 190), (222, 164, 98)),
    "meadow": ((150, 208, 246), (226, 242, 250), (130, 196, 92)),
}


@dataclass(frozen=True)
class _Land:
    """A picture in progress: what to draw on, its scale, its horizon (canvas units), its ground colour."""

    draw: ImageDraw.ImageDraw
    rng: np.random.Generator
    unit: float
    horizon: float
    ground: Colour

    def shape(self, points: Sequence[Point], colour: Colour) -> None:
        self.draw.polygon([(x * self.unit, y * self.unit) for x, y in points], fill=colour)

    def hills(self, swing: float, horizon: float | None = None, colour: Colour | None = None) -> None:
        """Everything below a wavy line."""
        level = self.horizon if horizon is None else horizon
        ridge = [(x, level + swing * math.sin(x / 22 + level)) for x in range(-4, 136, 4)]
        self.shape([(-4.0, 140.0), *ridge, (136.0, 140.0)], colour or self.ground)


def draw_scene(scene: str, size: int, seed: int = 0) -> Image.Image:
    """The background alone: (size, size) RGB; the seed moves its trees, dunes and stars."""
    if scene == "plain":
        return Image.new("RGB", (size, size), (255, 255, 255))
    rng = np.random.default_rng(seed)
    wide = 2 * size
    high, low, ground = _SKY_GROUND[scene]
    image = _sky(high, low, wide)
    unit = wide / CANVAS
    land = _Land(ImageDraw.Draw(image), rng, unit, float(rng.uniform(78, 90)), ground)
    _SCENERY[scene](land)
    return image.filter(ImageFilter.GaussianBlur(0.8 * unit)).resize((size, size), Image.Resampling.BOX)


def _sky(high: Colour, low: Colour, wide: int) -> Image.Image:
    top, bottom = np.array(high, float), np.array(low, float)
    ramp = np.linspace(0, 1, wide)[:, None, None]
    sky = np.broadcast_to(top + (bottom - top) * ramp, (wide, wide, 3))
    return Image.fromarray(sky.astype(np.uint8))


def _forest(land: _Land) -> None:
    rng, horizon = land.rng, land.horizon
    for index in range(5):
        x, width, height = 8 + 28 * index + rng.uniform(-8, 8), rng.uniform(11, 16), rng.uniform(52, 78)
        trunk = [(x - 3, horizon + 6), (x - 3, horizon - 8), (x + 3, horizon - 8), (x + 3, horizon + 6)]
        land.shape(trunk, (112, 84, 60))
        land.shape([(x - width, horizon - 4), (x, horizon - height), (x + width, horizon - 4)], (58, 118, 74))
    land.hills(2)


def _beach(land: _Land) -> None:
    sea = land.horizon - 18
    land.shape(ellipse(land.rng.uniform(14, 114), 20, 11, 11), (255, 236, 130))
    land.shape([(-4, sea), (132, sea), (132, 140), (-4, 140)], (64, 156, 206))
    land.hills(3)


def _snow(land: _Land) -> None:
    horizon = land.horizon
    for index in range(3):
        x, height = 16 + 46 * index + land.rng.uniform(-10, 10), land.rng.uniform(44, 66)
        peak, snow_line = (x, horizon - height), horizon - height * 0.68
        land.shape([(x - 34, horizon + 6), peak, (x + 34, horizon + 6)], (150, 172, 204))
        land.shape([(x - 11, snow_line), peak, (x + 11, snow_line)], (250, 252, 255))
    land.hills(3)


def _night(land: _Land) -> None:
    rng = land.rng
    land.shape(ellipse(rng.uniform(16, 112), 20, 10, 10), (246, 242, 206))
    for _ in range(12):
        land.shape(ellipse(rng.uniform(2, 126), rng.uniform(4, 66), 1.5, 1.5), (236, 236, 250))
    land.hills(3)


def _desert(land: _Land) -> None:
    horizon, cactus = land.horizon, (86, 146, 92)
    land.hills(6, horizon - 10, (238, 190, 124))
    for side in (-1, 1):
        x = 64 + side * land.rng.uniform(42, 54)
        land.shape(stroke([(x, horizon + 8), (x, horizon - 34)], 9, 7), cactus)
        arm = [(x, horizon - 10), (x + 10, horizon - 12), (x + 10, horizon - 24)]
        land.shape(stroke(arm, 6, 5), cactus)
    land.hills(4)


def _meadow(land: _Land) -> None:
    rng = land.rng
    for _ in range(2):
        x, y = rng.uniform(10, 118), rng.uniform(12, 34)
        for dx, r in ((-9, 6), (0, 9), (9, 6)):
            land.shape(ellipse(x + dx, y, r + 2, r), (255, 255, 255))
    land.hills(4)
    for _ in range(9):
        x, y = rng.uniform(4, 124), rng.uniform(land.horizon + 10, 126)
        land.shape(ellipse(x, y, 2.6, 2.6), (250, 120 + int(rng.integers(120)), 120))


_SCENERY = {
    "forest": _forest,
    "beach": _beach,
    "snow": _snow,
    "night": _night,
    "desert": _desert,
    "meadow": _meadow,
}
