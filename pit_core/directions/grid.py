"""A sweep as one picture: a row for each concept, a column for each step."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ..errors import PitError
from ..pictures import SheetRow, Tile, contact_sheet


def sweep_grid(pictures: Sequence[Image.Image], labels: Sequence[str], title: str = "steps") -> Image.Image:
    """All pictures on one white sheet, RGB, `labels` below those of every row; the rows follow each other.

    Raises PitError unless the pictures fill the rows.
    """
    if not labels or not pictures or len(pictures) % len(labels):
        raise PitError(
            f"A grid of {len(labels)} labels a row takes a multiple of that many pictures, but got "
            f"{len(pictures)}."
        )
    rows = [pictures[start : start + len(labels)] for start in range(0, len(pictures), len(labels))]
    return contact_sheet(
        [
            SheetRow([], [Tile(*each) for each in zip(row, labels, strict=True)], "" if number else title)
            for number, row in enumerate(rows)
        ],
        columns=len(labels),
    )
