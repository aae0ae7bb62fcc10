"""Attributes of critters that a semantic direction can change, each with its two ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .critters import SCENES, STYLES, Critter, random_critter

POSED = 0.35  # as concepts are


@dataclass(frozen=True)
class Attribute:
    """What sets two piles of critters apart. names: of the piles. ends: values of the critter's field.

    An end of the field "build" is a range; the others are names.
    """

    field: str
    names: tuple[str, str]
    ends: tuple[Any, Any]

    @property
    def title(self) -> str:
        return " to ".join(self.names)

    def pile(self, end: int, count: int, seed: int) -> list[Critter]:
        """Random critters of the training combinations at the end 0 or 1, alike in nothing else."""
        rngs = [np.random.default_rng([seed, end, index]) for index in range(count)]
        return [self._set(random_critter(rng, posed=POSED), end, rng) for rng in rngs]

    def _set(self, critter: Critter, end: int, rng: np.random.Generator) -> Critter:
        value = self.ends[end]
        changes: dict[str, Any] = {self.field: rng.uniform(*value) if self.field == "build" else value}
        return replace(critter, **changes)

    def true(self, critter: Critter) -> float:
        """How far along a critter is: its build, or 1 at the second end and 0 anywhere else."""
        return critter.build if self.field == "build" else float(getattr(critter, self.field) == self.ends[1])

    def seen(self, shares: Mapping[str, np.ndarray]) -> np.ndarray:
        """The same as a reader sees it in pictures, (B,); ``shares`` as from `reader.shares`."""
        if self.field == "build":
            return shares["build"]
        names = {"style": STYLES, "scene": SCENES}[self.field]
        return shares[self.field][:, names.index(self.ends[1])]


ATTRIBUTES = {
    "build": Attribute("build", ("thin", "wide"), ((0.0, 0.2), (0.8, 1.0))),
    "style": Attribute("style", ("flat", "sketch"), ("flat", "sketch")),
    "scene": Attribute("scene", ("plain", "night"), ("plain", "night")),
}
