"""Pictures of several shapes in one training set: a size for each shape, and batches of one size."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from .loop import Data, Item

LONGEST = 2.0  # long side by short side, at most
Size = tuple[int, int]
"""(width, height) in pixels."""


def bucket_sizes(resolution: int) -> list[Size]:
    """Sizes from 1:2 to 2:1 with at most resolution^2 pixels, in multiples of 64 at 1024.

    As SDXL was trained: Podell et al. 2023 (arXiv 2307.01952), section 2.3.
    """
    step = max(8, resolution // 128 * 8)
    found = set()
    for long in range(resolution, 2 * resolution + 1, step):
        short = resolution**2 // long // step * step
        if short and long <= LONGEST * short:
            found |= {(long, short), (short, long)}
    return sorted(found)


def nearest_size(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The size whose shape is most like a picture's, of equals the largest."""

    def unlike(size: Size) -> tuple[float, int]:
        return abs(math.log(size[0] * height / (size[1] * width))), -size[0] * size[1]

    return min(sizes, key=unlike)


class BySize:
    """Several data sets as one whose steps come from one of them each, so that sizes are never mixed.

    The first example of a step decides on the set; an example of another one is replaced by one of this set,
    drawn by (epoch, index) alone. So on average each is seen equally often, and a resumed run sees the same,
    on any number of processes.
    """

    def __init__(self, sets: Sequence[Data]) -> None:
        self.sets = list(sets)
        self.places = [(number, row) for number, data in enumerate(self.sets) for row in range(len(data))]

    def __len__(self) -> int:
        return len(self.places)

    def of_step(self, first: Item) -> Data:
        return _OneSize(self, self.places[first[1]][0])

    def fetch(self, items: Sequence[Item]) -> Any:
        """A step of its own."""
        return self.of_step(items[0]).fetch(items)


class _OneSize:
    """The whole with all examples taken from one of its sets."""

    def __init__(self, whole: BySize, chosen: int) -> None:
        self.whole, self.chosen = whole, chosen

    def __len__(self) -> int:
        return len(self.whole)

    def fetch(self, items: Sequence[Item]) -> Any:
        own = self.whole.sets[self.chosen]
        return own.fetch([(epoch, self._row(epoch, index, len(own))) for epoch, index in items])

    def _row(self, epoch: int, index: int, length: int) -> int:
        number, row = self.whole.places[index]
        return row if number == self.chosen else random.Random(f"{epoch} {index}").randrange(length)
