"""Part data as training examples: a whole, and slots of its parts, each a function of (seed, epoch, index).

White slots are no pictures: nothing is encoded for them, `fill_slots` puts white's tokens there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import PitError
from ..pictures import read_picture
from .augment import Augment, choose_parts, choose_siblings, item_chance, part_square
from .canvas import SIZE, on_white_square, reference_grid
from .manifest import Whole, path_below

Preprocess = Callable[[Sequence[Image.Image]], Tensor]


@dataclass(frozen=True)
class Example:
    """A target on its white square, and what each slot shows: a square picture, or None for white."""

    target: Image.Image
    slots: tuple[Image.Image | None, ...]


class PartData:
    """Examples made anew for every epoch, alike on any number of workers and processes.

    `wholes` are those of `scan.readable`, `folder` their manifest's, `canvas` the side in pixels of the
    squares. `preprocess` takes squares to the normalised pixels (N, 3, S, S) that the image encoder reads.
    """

    def __init__(
        self,
        wholes: Sequence[Whole],
        folder: Path,
        settings: Augment,
        preprocess: Preprocess,
        *,
        seed: int = 0,
        canvas: int = SIZE,
    ) -> None:
        if seed < 0:
            raise PitError(f"Expected a seed of at least 0, got {seed}.")
        self.wholes, self.folder, self.settings, self.preprocess = wholes, folder, settings, preprocess
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

    def fetch(self, items: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """The batch of these (epoch, index) items.

        "target" (B, 3, S, S); "parts" (N, 3, S, S), the N squares of the batch that are not white; "slots"
        (B, slots), the number of the square that a slot shows, -1 for white.
        """
        examples = [self.example(*item) for item in items]
        squares = [square for example in examples for square in example.slots if square is not None]
        numbers = iter(range(len(squares)))
        slots = [[-1 if square is None else next(numbers) for square in e.slots] for e in examples]
        targets = self.preprocess([example.target for example in examples])
        parts = self.preprocess(squares) if squares else targets.new_empty((0, *targets.shape[1:]))
        return {"target": targets, "parts": parts, "slots": torch.tensor(slots)}

    def _reference(self, siblings: Sequence[int]) -> list[Image.Image | None]:
        if not self.settings.use_ref:
            return []
        if not siblings:
            return [None]
        return [reference_grid([self._read(self.wholes[i].target) for i in siblings], self.canvas)]

    def _read(self, name: str) -> Image.Image:
        return read_picture(path_below(self.folder, name))


def fill_slots(tokens: Tensor, slots: Tensor, white: Tensor) -> Tensor:
    """The prior's condition (B, slots * T, D): each slot's tokens, white's where it is -1.

    tokens: (N, T, D), one for each square of the batch. slots: (B, slots). white: (T, D) or (1, T, D).
    """
    whole = torch.cat([white.reshape(1, *white.shape[-2:]).to(tokens), tokens])
    return whole[slots.to(tokens.device) + 1].flatten(1, 2)
