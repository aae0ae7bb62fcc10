"""An attribute against the step along its direction: found in IP+ space, and in CLIP's beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..concepts import Stack, picture_seed
from ..directions.direction import SPACES, Direction
from ..directions.edit import STEPS, sweep
from ..directions.find import find_direction
from ..directions.grid import sweep_grid
from ..directions.run import Models, encode_pictures, features_of
from ..directions.text import step_labels
from ..errors import PitError
from ..ip_adapter.encode import tokens_from_features
from ..miniature import reader
from ..miniature.attributes import ATTRIBUTES, POSED, Attribute
from ..miniature.critters import SCENES, STYLES, random_critter
from ..miniature.data import ABSENT, Picture, concept_critter
from ..miniature.painting import from_captions
from ..pictures import save_png
from .common import EVALUATION, MOST, check_whole, drawn, margin, pixels_of, write_table

PILE = 50  # pictures a side, as in the paper
HALF = 0.5  # the step at which everything else should be as it was
ERRORS = 3  # that the attribute should have gone up by, of the reader's mean ones
CLEAN = 300  # drawn critters on which the reader's mean error is measured
SHOWN = 6  # critters in the pictures


@dataclass(frozen=True)
class Row:
    """How one direction did. follows: share of critters whose attribute never falls by more than the reader's
    mean error and goes up by three of them at least. kept: share of other attributes that are at step 0.5 as
    at step 0. seen: the attribute's mean at each step. accuracy: held-out pictures told apart.
    """

    attribute: str
    space: str
    method: str
    accuracy: float
    follows: float
    follows_margin: float
    kept: float
    kept_margin: float
    error: float
    seen: tuple[float, ...]


def run(
    stack: Stack,
    judge: torch.nn.Module,
    *,
    attributes: Sequence[str] = tuple(ATTRIBUTES),
    count: int = 100,
    seed: int = 0,
    pile: int = PILE,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Directions between piles that the miniature draws from captions, on held-out critters' own tokens.

    With ``out`` a table (directions.json, directions.txt) and a grid of pictures a direction are written.
    Raises PitError for an unknown attribute, and for a count, a seed or a pile out of range.
    """
    check_whole("count", count, 1, MOST)
    check_whole("seed", seed, 0, 2**32)
    check_whole("pile", pile, 3, MOST)
    unknown = [name for name in attributes if name not in ATTRIBUTES]
    if unknown:
        raise PitError(f"There is no attribute '{unknown[0]}'; there are {', '.join(ATTRIBUTES)}.")
    shown = _Shown(stack, judge, count, seed)
    rows, grids = [], {}
    for attribute in (ATTRIBUTES[name] for name in attributes):
        progress(f"drawing two piles of {pile}: {attribute.title}")
        features = pile_features(stack, attribute, pile, seed)
        error = mean_error(judge, attribute, seed)
        for space in SPACES:
            progress(f"drawing {count} critters at {len(STEPS)} steps: {attribute.title}, {space}")
            direction = found(stack, features, attribute, space)
            pictures = shown.at_steps(direction)
            rows.append(shown.row(attribute, direction, pictures, error))
            grids[f"{attribute.field}-{space}"] = (pictures[: SHOWN * len(STEPS)], direction.title)
    if out is not None:
        _write(out, rows, grids, count, seed, pile)
    return rows


def pile_features(stack: Stack, attribute: Attribute, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """What the adapter reads of both piles' pictures: (count, N, W) or (count, W) each."""
    piles = [pile_pictures(stack, attribute, end, count, seed) for end in (0, 1)]
    first, second = (features_of(stack.encoder, stack.adapter, pictures) for pictures in piles)
    return first, second


def pile_pictures(stack: Stack, attribute: Attribute, end: int, count: int, seed: int) -> list[Image.Image]:
    """A pile of pictures that the miniature draws from captions."""
    critters = attribute.pile(end, count, EVALUATION + seed)
    return from_captions(stack, critters, [picture_seed(MOST * seed + end * count + i) for i in range(count)])


def found(stack: Stack, features: tuple[Tensor, Tensor], attribute: Attribute, space: str) -> Direction:
    """The direction between two piles' features, in tokens or in CLIP's features."""
    first, second = features
    if space == "tokens":
        first, second = (tokens_from_features(stack.adapter, rows).cpu() for rows in features)
    hashes = {"adapter": stack.adapter.content_hash, "encoder": stack.encoder.content_hash}
    return find_direction(first, second, space=space, names=attribute.names, **hashes)


def mean_error(judge: torch.nn.Module, attribute: Attribute, seed: int) -> float:
    """How far the reader is off on clean drawings, on average."""
    rngs = [np.random.default_rng([EVALUATION + seed, index, 5]) for index in range(CLEAN)]
    critters = [random_critter(rng, styles=STYLES, scenes=SCENES, posed=POSED, held_out=True) for rng in rngs]
    pixels = pixels_of([Image.fromarray(Picture(critter).draw()) for critter in critters])
    seen = attribute.seen(reader.shares(judge, pixels))
    return float(np.abs(seen - [attribute.true(critter) for critter in critters]).mean())


class _Shown:
    """Held-out critters that are moved along directions, each from the same noise at every step."""

    def __init__(self, stack: Stack, judge: torch.nn.Module, count: int, seed: int) -> None:
        self.stack, self.judge, self.count = stack, judge, count
        critters = [concept_critter(EVALUATION + seed, index, held_out=True) for index in range(count)]
        pictures = [Image.fromarray(Picture(critter).draw()) for critter in critters]
        models = Models(stack.encoder, stack.adapter, stack.renderer, stack.defaults)
        self.tokens, self.source = encode_pictures(models, pictures)
        self.seeds = [picture_seed(MOST * seed + index) for index in range(count) for _ in STEPS]

    def at_steps(self, direction: Direction) -> list[Image.Image]:
        """Every critter at every step, a critter's steps side by side."""
        moved = sweep(self.tokens, direction, STEPS, source=self.source)
        return drawn(self.stack, list(moved.tokens), self.seeds)

    def row(
        self, attribute: Attribute, direction: Direction, pictures: Sequence[Image.Image], error: float
    ) -> Row:
        pixels = pixels_of(pictures)
        seen = attribute.seen(reader.shares(self.judge, pixels)).reshape(self.count, len(STEPS))
        follows = followed(seen, error)
        kept = others_kept(reader.read(self.judge, pixels), self.count, attribute.field)
        evidence = direction.evidence
        return Row(
            attribute.title,
            direction.space,
            evidence.method if evidence else "",
            evidence.accuracy or 0.0 if evidence else 0.0,
            float(follows.mean()),
            margin(follows),
            float(kept.mean()),
            margin(kept),
            error,
            tuple(round(float(value), 4) for value in seen.mean(0)),
        )


def followed(seen: np.ndarray, error: float) -> np.ndarray:
    """(N,) bool of an attribute (N, steps): it never falls by more than ``error``, and goes up by three."""
    never_falls = (np.diff(seen, axis=1) >= -error).all(1)
    return never_falls & (seen[:, -1] - seen[:, 0] >= ERRORS * error)


def others_kept(readings: reader.Readings, count: int, field: str) -> np.ndarray:
    """Bools: is each attribute but ``field`` read at step 0.5 as at step 0; colours where there are parts."""

    def steps(values: np.ndarray) -> np.ndarray:
        return values.reshape(count, len(STEPS), -1)

    before, after = STEPS.index(0.0), STEPS.index(HALF)
    named = {"style": readings.style, "scene": readings.scene}
    flags = [_same(steps(readings.state), before, after).ravel()]
    flags += [_same(steps(values), before, after).ravel() for name, values in named.items() if name != field]
    there = steps(readings.state)[:, before] < ABSENT
    flags.append(_same(steps(readings.colour), before, after)[there])
    return np.concatenate(flags)


def _same(values: np.ndarray, before: int, after: int) -> np.ndarray:
    return values[:, before] == values[:, after]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, for a terminal and for a file."""
    steps = "".join(f"{step:>+7g}" for step in STEPS)
    lines = [
        f"{'direction':18}{'space':8}{'method':8}{'held out':>9}{'follows':>16}{'others kept':>16}{steps}"
    ]
    for row in rows:
        follows, kept = (
            f"{row.follows:.2f} +- {row.follows_margin:.2f}",
            f"{row.kept:.3f} +- {row.kept_margin:.3f}",
        )
        seen = "".join(f"{value:>7.2f}" for value in row.seen)
        lines.append(
            f"{row.attribute:18}{row.space:8}{row.method:8}{row.accuracy:>9.3f}{follows:>16}{kept:>16}{seen}"
        )
    return "\n".join(lines)


def _write(
    out: Path,
    rows: Sequence[Row],
    grids: dict[str, tuple[list[Image.Image], str]],
    count: int,
    seed: int,
    pile: int,
) -> None:
    heading = f"{count} held-out critters, directions of {pile} and {pile} pictures, seed {seed}"
    settings = {"count": count, "seed": seed, "pile": pile, "steps": STEPS}
    write_table(out, "directions", settings, rows, f"{heading}\n{table(rows)}")
    for name, (pictures, title) in grids.items():
        save_png(sweep_grid(pictures, step_labels(STEPS), title), out / f"directions-{name}.png")
