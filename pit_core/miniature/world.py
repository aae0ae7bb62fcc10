"""What there is in the critter world: part kinds, shapes, colours, and the critters made of them.

A critter has a body, eyes, and perhaps ears, wings and a tail, each with a shape and a colour; a build from
thin to wide, a pose, a surface style and a scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

CANVAS = 128
KINDS = ("body", "eyes", "ears", "wings", "tail")
MANDATORY = ("body", "eyes")
SHAPES: dict[str, tuple[str, ...]] = {
    "body": ("round", "box", "pear", "turnip"),
    "eyes": ("round", "cyclops", "sleepy", "slit"),
    "ears": ("cat", "bunny", "horn", "antenna"),
    "wings": ("bat", "feather", "butterfly", "leaf"),
    "tail": ("bushy", "curl", "arrow", "fin"),
}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (250, 214, 70),
    "green": (72, 166, 84),
    "cyan": (80, 200, 214),
    "blue": (48, 88, 196),
    "purple": (138, 76, 186),
    "pink": (246, 156, 196),
}
COLOUR_NAMES = tuple(COLOURS)
STYLES = ("flat", "sketch", "paper", "stripes", "pixel")
SCENES = ("plain", "forest", "beach", "snow", "night", "desert", "meadow")

PRESENCE = 0.85  # how often a critter has each of the parts that it may lack


@dataclass(frozen=True)
class Part:
    """One part: its shape and its colour, both by name."""

    shape: str
    colour: str


@dataclass(frozen=True)
class Pose:
    """Where the critter stands: offset in canvas units, scale, rotation in degrees, mirrored or not."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    rotation: float = 0.0
    mirror: bool = False


@dataclass(frozen=True)
class Critter:
    """A whole creature; ``build`` runs from 0 (thin) to 1 (wide)."""

    body: Part
    eyes: Part
    ears: Part | None = None
    wings: Part | None = None
    tail: Part | None = None
    build: float = 0.5
    pose: Pose = field(default_factory=Pose)
    style: str = "flat"
    scene: str = "plain"
    scene_seed: int = 0

    def part(self, kind: str) -> Part | None:
        """Its part of one kind, None where it has none."""
        return getattr(self, kind)

    def having(self, kind: str, part: Part) -> Critter:
        """This critter with one part replaced."""
        changes: dict[str, Any] = {kind: part}
        return replace(self, **changes)

    def parts(self) -> dict[str, Part]:
        """The parts that this critter has, by kind."""
        return {kind: part for kind in KINDS if (part := self.part(kind)) is not None}


# The order in which the functions below draw their random numbers is part of the shipped weights' recipe.


def random_critter(
    rng: np.random.Generator,
    *,
    styles: Sequence[str] = ("flat",),
    scenes: Sequence[str] = ("plain",),
    posed: float = 1.0,
    held_out: bool | None = False,
) -> Critter:
    """Draw a critter of the training combinations, or of those held out (True), or of any (None).

    ``posed`` scales the pose's jitter: 0 stands upright in the middle.
    """
    while True:
        critter = Critter(
            body=_random_part(rng, "body"),
            eyes=_random_part(rng, "eyes"),
            ears=_perhaps_part(rng, "ears"),
            wings=_perhaps_part(rng, "wings"),
            tail=_perhaps_part(rng, "tail"),
            build=float(rng.random()),
            pose=random_pose(rng, posed),
            style=str(rng.choice(styles)),
            scene=str(rng.choice(scenes)),
            scene_seed=int(rng.integers(1 << 30)),
        )
        if held_out is None or is_held_out(critter) == held_out:
            return critter


def _random_part(rng: np.random.Generator, kind: str) -> Part:
    return Part(str(rng.choice(SHAPES[kind])), str(rng.choice(COLOUR_NAMES)))


def _perhaps_part(rng: np.random.Generator, kind: str) -> Part | None:
    return _random_part(rng, kind) if rng.random() < PRESENCE else None


def random_pose(rng: np.random.Generator, amount: float = 1.0) -> Pose:
    """A pose near the upright one; ``amount`` scales how near."""
    dx, dy = rng.uniform(-6, 6, 2) * amount
    scale = 1 + rng.uniform(-0.12, 0.04) * amount
    rotation = rng.uniform(-8, 8) * amount
    return Pose(float(dx), float(dy), float(scale), float(rotation), bool(rng.random() < 0.5 * amount))


def is_held_out(critter: Critter) -> bool:
    """True for the seventh of all shape combinations that only the readers are trained on (see `sets`)."""
    total = 0
    for weight, kind in zip((1, 2, 5, 3, 4), KINDS, strict=True):
        part = critter.part(kind)
        total += weight * (len(SHAPES[kind]) if part is None else SHAPES[kind].index(part.shape))
    return total % 7 == 3
