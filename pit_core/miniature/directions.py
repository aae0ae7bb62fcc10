"""The miniature's own directions: each found between two piles of pictures that it draws from captions.

Piles and directions are made as anybody makes them: pictures in two folders, and what `pit direction find`
does with those.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..concepts import Stack, picture_seed
from ..directions.checkpoint import save_direction
from ..directions.direction import Direction
from ..directions.find import LEAST
from ..directions.piles import Encoders, find_between, pile_of
from ..errors import PitError
from ..pictures import save_png
from .assets import DIRECTIONS, WEIGHTS
from .attributes import ATTRIBUTES, Attribute
from .export import LIMIT, add_files, file_entry
from .painting import from_captions

PILE = 50  # pictures a side, as in the paper
MOST = 10_000  # pictures a side; two seeds' noises never overlap
SEED = 51  # of the piles' critters and noise, away from those of training and of evaluation

Progress = Callable[[str, int, int], None]


def export_directions(
    stack: Stack,
    weights: Path = WEIGHTS,
    *,
    piles: Path | None = None,
    count: int = PILE,
    seed: int = SEED,
    progress: Progress = lambda what, done, total: None,
    limit: int = LIMIT,
) -> dict[str, Any]:
    """Find a direction for each attribute, write them to ``weights`` and note them in its manifest.

    piles: where the pictures are kept, in a folder for each pile; without it they are thrown away. Returns
    the manifest. Raises PitError for too few pictures, for a folder of piles that exists, and when the
    weights outgrow their limit; then nothing is changed.
    """
    if isinstance(count, bool) or not LEAST <= count <= MOST:
        raise PitError(f"Expected pictures a side as a whole number from {LEAST} to {MOST}, got {count!r}.")
    if piles is not None and piles.exists():
        raise PitError(f"'{piles}' exists already; name a new folder for the piles.")
    return add_files(partial(_written, stack, piles, count, seed, progress), weights, limit)


def _written(
    stack: Stack, piles: Path | None, count: int, seed: int, progress: Progress, folder: Path
) -> dict[str, Any]:
    """Find and write all of them; the manifest's entries."""
    made = {"pictures": count, "seed": seed}
    (folder / "directions").mkdir()
    entries = {}
    for attribute in ATTRIBUTES.values():
        name = DIRECTIONS[attribute.title.replace(" ", "_")]
        with _pile_folder(piles) as place:
            direction = find_own(stack, attribute, place, count, seed, progress)
        save_direction(folder / name, direction, made)
        about = {"stages": [], "piles": made, "figures": _figures(direction)}
        entries[name] = {**file_entry(folder / name), **about}
    return entries


def find_own(
    stack: Stack, attribute: Attribute, folder: Path, count: int, seed: int, progress: Progress
) -> Direction:
    """The direction between an attribute's piles, whose pictures are written to ``folder``."""
    piles = []
    for end, name in enumerate(attribute.names):
        place = folder / f"{attribute.field}_{name}"
        place.mkdir(parents=True)
        noise = [picture_seed(MOST * seed + end * count + index) for index in range(count)]
        told = _counting(progress, f"drawing {name} critters", count)
        pictures = from_captions(stack, attribute.pile(end, count, seed), noise, told)
        for index, picture in enumerate(pictures):
            save_png(picture, place / f"{index:03d}.png")
        piles.append(pile_of([place], name))
    first, second = piles
    return find_between(first, second, Encoders(stack.encoder, stack.adapter), progress=progress)


def _counting(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    return lambda done: progress(what, done, total)


@contextmanager
def _pile_folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory() as thrown_away:
        yield Path(thrown_away)


def _figures(direction: Direction) -> dict[str, float]:
    """What is known of it, as far as pictures could be held out."""
    known = direction.evidence
    found = {} if known is None else {"accuracy": known.accuracy, "confirmed": known.confirmed}
    return {name: round(value, 4) for name, value in found.items() if value is not None}
