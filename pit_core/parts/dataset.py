"""Part data as training sees it, in pictures: a whole, and slots of its parts, for contact sheets.

Each example is a function of (seed, epoch, index). Training itself reads tokens that were encoded once
(`token_data`), which are chosen in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import PitError
from ..pictures import read_picture
from .augment import Augment, choose_parts, choose_siblings, item_chance, part_square
from .canvas import SIZE, on_white_square, reference_grid
from .manifest import Whole, path_below


@dataclass(frozen=True)
class Example:
    """A target on its white square, and what each slot shows: a square picture, or None for white."""

    target: Image.Image
    slots: tuple[Image.Image | None, ...]


class PartData:
    """Examples made anew for every epoch, in any order alike.

    `folder` is the manifest's of the `wholes`, `canvas` the side in pixels of the squares.
    """

    def __init__(
        self,
        wholes: Sequence[Whole],
        folder: Path,
        settings: Augment,
        *,
        seed: int = 0,
        canvas: int = SIZE,
    ) -> None:
        if seed < 0:
            raise PitError(f"Expected a seed of at least 0, got {seed}.")
        self.wholes, self.folder, self.settings = wholes, folder, settings
        self.seed, self.canvas = seed, canvas
        self._members: dict[str, list[int]] = {}
        for index, whole in enumerate(wholes):
            self._members.setdefault(whole.set, []).append(index)

    def __len__(self) -> int:
        return len(self.wholes)

    def example(self, epoch: int, index: int) -> Example:
        """The pictures of one item. Raises PitError for a file that can no longer be read."""
        whole, settings = self.wholes[index], self.settings
        chance = item_chance(self.seed, epoch, index)
        reference = self._reference(choose_siblings(index, self._members[whole.set], settings, chance))
        parts: list[Image.Image | None] = [
            part_square(self._read(whole.parts[i]), settings, chance, self.canvas)
            for i in choose_parts(len(whole.parts), settings, chance)
        ]
        parts += [None] * (settings.max_crops - len(parts))
        target = on_white_square(self._read(whole.target), self.canvas, fill=1.0)
        return Example(target, (*reference, *parts))

    def _reference(self, siblings: Sequence[int]) -> list[Image.Image | None]:
        if not self.settings.use_ref:
            return []
        if not siblings:
            return [None]
        return [reference_grid([self._read(self.wholes[i].target) for i in siblings], self.canvas)]

    def _read(self, name: str) -> Image.Image:
        return read_picture(path_below(self.folder, name))
