"""Reading attributes off pictures: a critter's parts, their colours, and whether it is whole at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .critters import COLOUR_NAMES, KINDS, MANDATORY, SCENES, SHAPES, STYLES, Critter
from .data import ABSENT, DOUBLED, GARBLED, NO_COLOUR

STATES = 7  # four shapes, absent, doubled, garbled
SPLIT = [STATES * len(KINDS), len(COLOUR_NAMES) * len(KINDS), len(STYLES), len(SCENES), 1]
OUTPUTS = sum(SPLIT)


def split(outputs: Tensor) -> dict[str, Tensor]:
    """(B, OUTPUTS) -> logits: state (B, 5, 7), colour (B, 5, 8), style (B, 5), scene (B, 7); build (B,)."""
    state, colour, style, scene, build = outputs.split(SPLIT, dim=1)
    return {
        "state": state.unflatten(1, (len(KINDS), STATES)),
        "colour": colour.unflatten(1, (len(KINDS), len(COLOUR_NAMES))),
        "style": style,
        "scene": scene,
        "build": build[:, 0],
    }


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropies of all attributes and the build's squared error; absent colours do not count."""
    read, kinds = split(outputs.float()), len(KINDS)
    state, colour, rest = labels[:, :kinds], labels[:, kinds : 2 * kinds], labels[:, 2 * kinds :]
    value = F.cross_entropy(read["state"].flatten(0, 1), state.flatten())
    value = value + F.cross_entropy(read["colour"].flatten(0, 1), colour.flatten(), ignore_index=NO_COLOUR)
    value = value + 0.2 * F.cross_entropy(read["style"], rest[:, 0])
    value = value + 0.2 * F.cross_entropy(read["scene"], rest[:, 1])
    return value + F.mse_loss(read["build"], rest[:, 2].float() / 1000)


@dataclass(frozen=True)
class Readings:
    """What a reader saw: per picture and kind a state (0-3 shapes, absent, doubled, garbled) and a colour."""

    state: np.ndarray  # (B, 5)
    colour: np.ndarray  # (B, 5)
    style: np.ndarray  # (B,)
    scene: np.ndarray  # (B,)
    build: np.ndarray  # (B,)

    def __len__(self) -> int:
        return len(self.state)

    def rows(self, which: slice) -> Readings:
        """The readings of some pictures."""
        return Readings(*(getattr(self, field.name)[which] for field in fields(self)))

    def valid(self) -> np.ndarray:
        """(B,) bool: mandatory parts present exactly once, and nothing doubled or garbled."""
        whole = (self.state != DOUBLED).all(1) & (self.state != GARBLED).all(1)
        for kind in MANDATORY:
            whole &= self.state[:, KINDS.index(kind)] != ABSENT
        return whole

    def matches(
        self, critters: Sequence[Critter], given: Sequence[Sequence[str]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shape found again, colour found again: bool each, one entry per given part, row by row."""
        shapes, colours = [], []
        for row, (critter, kinds) in enumerate(zip(critters, given, strict=True)):
            for kind in kinds:
                part, slot = critter.parts()[kind], KINDS.index(kind)
                shapes.append(self.state[row, slot] == SHAPES[kind].index(part.shape))
                colours.append(self.colour[row, slot] == COLOUR_NAMES.index(part.colour))
        return np.array(shapes, dtype=bool), np.array(colours, dtype=bool)

    def kept(self, critters: Sequence[Critter], given: Sequence[Sequence[str]]) -> np.ndarray:
        """Shape and colour both found again: bool, one entry per given part, row by row."""
        shapes, colours = self.matches(critters, given)
        return shapes & colours


@torch.no_grad()
def read(reader: Callable[[Tensor], Tensor], pixels: Tensor, chunk: int = 64) -> Readings:
    """Read pictures (B, 3, 128, 128) in [-1, 1]."""
    joined = _outputs(reader, pixels, chunk)
    arrays = {name: joined[name].argmax(-1).numpy() for name in ("state", "colour", "style", "scene")}
    return Readings(**arrays, build=joined["build"].numpy())


@torch.no_grad()
def shares(reader: Callable[[Tensor], Tensor], pixels: Tensor, chunk: int = 64) -> dict[str, np.ndarray]:
    """How much of each style (B, 5) and scene (B, 7) a reader sees, in [0, 1], and the build (B,)."""
    joined = _outputs(reader, pixels, chunk)
    seen = {name: joined[name].softmax(-1).numpy() for name in ("style", "scene")}
    return {**seen, "build": joined["build"].numpy()}


def _outputs(reader: Callable[[Tensor], Tensor], pixels: Tensor, chunk: int) -> dict[str, Tensor]:
    parts = [split(reader(rows).float()) for rows in pixels.split(chunk)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def accuracy(readings: Readings, labels: np.ndarray) -> dict[str, float]:
    """Shares of right answers, of colours among parts that are there; for the build the mean error."""
    kinds = len(KINDS)
    state, colour = labels[:, :kinds], labels[:, kinds : 2 * kinds]
    seen = colour != NO_COLOUR
    return {
        "state": float((readings.state == state).mean()),
        "colour": float((readings.colour == colour)[seen].mean()),
        "style": float((readings.style == labels[:, 2 * kinds]).mean()),
        "scene": float((readings.scene == labels[:, 2 * kinds + 1]).mean()),
        "build_error": float(np.abs(readings.build - labels[:, 2 * kinds + 2] / 1000).mean()),
    }
