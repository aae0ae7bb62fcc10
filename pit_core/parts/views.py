"""What is made of a whole before it is encoded: its square, augmented views of its parts, reference grids.

The first stages of `pit data embed`: `decode`, then `crop`. They are functions of plain values and hold
nothing, so that they can run in worker processes as they are. What they make depends on the pictures'
content and the recipe, not on names, order, or who does the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import PitError
from ..ip_adapter.pixels import preprocess
from ..pictures import read_picture
from .augment import Augment, choose_siblings, part_square
from .canvas import SIZE, on_white_square, reference_grid
from .manifest import Whole, path_below

FULL_ENCODER = 224  # pixels: the released encoder, whose parts are placed on a canvas of 1024
AT_TRAINING = ("max_crops", "empty_prob", "reference_prob")  # settings of `Augment` that views do not need


@dataclass(frozen=True)
class Recipe:
    """How the pictures of a set are prepared.

    pixels: side of what the encoder sees. views: augmented views of each part, and reference grids of each
    whole. Raises PitError for less than one view and a negative seed.
    """

    pixels: int = FULL_ENCODER
    augment: Augment = field(default_factory=Augment)
    views: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.views < 1:
            raise PitError(f"Expected at least 1 view of each part, got {self.views}.")
        if self.seed < 0:
            raise PitError(f"Expected a seed of at least 0, got {self.seed}.")

    @property
    def canvas(self) -> int:
        """Side of the white square that parts are placed on, in pixels."""
        return SIZE if self.pixels >= FULL_ENCODER else self.pixels

    def settings(self) -> dict[str, Any]:
        """All that the views depend on, as plain values."""
        augment = {name: value for name, value in asdict(self.augment).items() if name not in AT_TRAINING}
        return {"pixels": self.pixels, "views": self.views, "seed": self.seed, "augment": augment}


@dataclass(frozen=True)
class Source:
    """A picture file below the manifest's folder, and the SHA-256 of its content."""

    name: str
    content: str


@dataclass(frozen=True)
class Job:
    """One whole to embed: its target, its parts, and the siblings that each reference grid shows."""

    target: Source
    parts: tuple[Source, ...] = ()
    references: tuple[tuple[Source, ...], ...] = ()

    def content(self) -> str:
        """What the job's tokens depend on, besides recipe and models: equal content, equal tokens."""
        pictures = [[self.target], self.parts, *self.references]
        listed = "\n".join(" ".join(source.content for source in row) for row in pictures)
        return sha256(listed.encode()).hexdigest()


def make_jobs(wholes: Sequence[Whole], hashes: Mapping[str, str], recipe: Recipe) -> list[Job]:
    """A job for each whole, in order; `hashes` are the files' SHA-256 (see `scan.scan`)."""
    members: dict[str, list[int]] = {}
    for index, whole in enumerate(wholes):
        members.setdefault(whole.set, []).append(index)

    def source(name: str) -> Source:
        return Source(name, hashes[name])

    jobs = []
    for index, whole in enumerate(wholes):
        siblings = _siblings(index, members[whole.set], hashes[whole.target], recipe)
        references = tuple(tuple(source(wholes[i].target) for i in row) for row in siblings)
        jobs.append(Job(source(whole.target), tuple(map(source, whole.parts)), references))
    return jobs


def decode(job: Job, folder: Path) -> dict[str, Image.Image]:
    """The job's pictures by name. Raises PitError for a file that can no longer be read."""
    sources = [job.target, *job.parts, *(source for row in job.references for source in row)]
    names = dict.fromkeys(source.name for source in sources)
    return {name: read_picture(path_below(folder, name)) for name in names}


def crop(job: Job, pictures: Mapping[str, Image.Image], recipe: Recipe) -> Tensor:
    """The job's squares as the encoder sees them, uint8 (N, 3, S, S).

    First the target, then every part's views, one part after the other, then the reference grids.
    """
    squares = [on_white_square(pictures[job.target.name], recipe.canvas, fill=1.0)]
    for part in job.parts:
        for view in range(recipe.views):
            chance = _chance(recipe.seed, part.content, view)
            squares.append(part_square(pictures[part.name], recipe.augment, chance, recipe.canvas))
    for row in job.references:
        squares.append(reference_grid([pictures[source.name] for source in row], recipe.canvas))
    plain = preprocess(squares, recipe.pixels, mean=(0.0,) * 3, std=(1.0,) * 3)
    return (plain * 255).round().to(torch.uint8)


def sort_tokens(job: Job, tokens: Tensor, views: int) -> dict[str, Tensor]:
    """Tokens (N, T, D) in the order of `crop` -> "target" (T, D), "parts" (parts, views, T, D), "reference"
    (grids, T, D); the last two only where there are any."""
    ends = 1 + len(job.parts) * views
    found = {"target": tokens[0]}
    if job.parts:
        found["parts"] = tokens[1:ends].unflatten(0, (len(job.parts), views))
    if job.references:
        found["reference"] = tokens[ends:]
    return found


def _siblings(index: int, members: Sequence[int], content: str, recipe: Recipe) -> list[list[int]]:
    """The siblings of each reference grid; how often a grid is shown is decided in training."""
    if not recipe.augment.use_ref:
        return []
    always = replace(recipe.augment, reference_prob=1.0)
    chances = (_chance(recipe.seed, content, view) for view in range(recipe.views))
    return [row for chance in chances if (row := choose_siblings(index, members, always, chance))]


def _chance(seed: int, content: str, view: int) -> np.random.Generator:
    return np.random.default_rng([seed, int(content[:16], 16), view])
