"""Part data to look at: wholes and their parts on a contact sheet, as they are or as training sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from ..errors import PitError
from ..pictures import SheetRow, Tile, contact_sheet, read_picture
from .dataset import PartData
from .manifest import path_below


def choose_rows(count: int, shown: int, seed: int = 0) -> list[int]:
    """`shown` of `count` wholes (or all, if fewer), drawn by `seed`, in order. PitError for none."""
    if shown < 1 or not count:
        raise PitError(f"Expected at least one whole to show, got {min(shown, count)}.")
    return sorted(int(i) for i in np.random.default_rng(seed).permutation(count)[:shown])


def part_sheet(data: PartData, chosen: Sequence[int], *, augmented: bool = False) -> Image.Image:
    """The wholes of these numbers, at least one: parts left, targets right, RGB.

    `augmented` shows the slots of epoch 0 instead of the part files, white ones left out.
    Raises PitError for a picture that cannot be read.
    """
    rows = [_augmented_row(data, index) if augmented else _row(data, index) for index in chosen]
    return contact_sheet([SheetRow(rows[0].parts, rows[0].concepts, "targets"), *rows[1:]])


def _row(data: PartData, index: int) -> SheetRow:
    whole = data.wholes[index]
    return SheetRow([_tile(data, name) for name in whole.parts], [_tile(data, whole.target)])


def _augmented_row(data: PartData, index: int) -> SheetRow:
    example = data.example(0, index)
    shown = [Tile(square, f"slot {i}") for i, square in enumerate(example.slots) if square is not None]
    return SheetRow(shown, [Tile(example.target, _caption(data.wholes[index].target))])


def _tile(data: PartData, name: str) -> Tile:
    return Tile(read_picture(path_below(data.folder, name)), _caption(name))


def _caption(name: str) -> str:
    return PurePosixPath(name).name
