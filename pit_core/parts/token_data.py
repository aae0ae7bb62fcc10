"""Embedded part data as training examples: a whole's tokens, and slots of its parts' tokens.

Each example is a function of (seed, epoch, index). Which parts are shown, in which of their views, and
whether there is a reference is chosen here; what the views look like was settled when they were encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import PitError
from .augment import Augment, choose_parts, item_chance
from .shards import OPEN, Arrays, ShardFolder, as_tensor, read_index, read_white


class TokenData:
    """Examples out of a folder of `pit data embed`, alike on any number of workers and processes.

    `settings` None takes those that the folder was made with; of others only max_crops, empty_prob, use_ref
    and reference_prob matter here. `rows` are the numbers of the wholes to hand out, all by default. Among
    several folders, `first` is the number of its first whole, and `most_open` of its shards stay open.

    Raises PitError for a folder that is not finished or damaged, and for references that it does not hold.
    """

    def __init__(
        self,
        folder: Path,
        settings: Augment | None = None,
        *,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        first: int = 0,
        most_open: int = OPEN,
    ) -> None:
        self.folder, self.index = folder, read_index(folder)
        self.settings = settings or self.index.augment
        if self.settings.use_ref and not self.index.augment.use_ref:
            raise PitError(
                f"'{folder}' was embedded without references; embed it with use_ref, or leave it out."
            )
        self.white = read_white(folder, self.index)
        self.wholes = ShardFolder(folder, self.index, most_open)
        self.rows = range(len(self.index)) if rows is None else rows
        self.seed, self.first = seed, first

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, items: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Tokens "target" (B, T, D) and "cond" (B, T * slots, D) of these (epoch, index) items, float16."""
        targets, conds = zip(*(self._example(*item) for item in items), strict=True)
        return {"target": torch.stack(targets), "cond": torch.stack(conds)}

    def _example(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        number = self.rows[index]
        arrays = self.wholes[number]
        chance = item_chance(self.seed, epoch, self.first + number)
        slots = [*self._reference(arrays, chance), *self._parts(arrays, chance)]
        slots += [self.white] * (self.settings.slots - len(slots))
        target = as_tensor(arrays["target"])
        return target, torch.cat([slot.to(target.dtype) for slot in slots])

    def _reference(self, arrays: Arrays, chance: np.random.Generator) -> list[Tensor]:
        if not self.settings.use_ref:
            return []
        if "reference" not in arrays or chance.random() >= self.settings.reference_prob:
            return [self.white]
        grids = arrays["reference"]
        return [as_tensor(grids[chance.integers(len(grids))])]

    def _parts(self, arrays: Arrays, chance: np.random.Generator) -> list[Tensor]:
        parts = arrays.get("parts", ())
        shown = choose_parts(len(parts), self.settings, chance)
        return [as_tensor(parts[part][chance.integers(len(parts[part]))]) for part in shown]


def split_rows(count: int, held: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """The numbers 0..count-1 as (rows to train on, rows held out), the latter at random, both in order."""
    if not 0 <= held < count:
        raise PitError(f"Expected to hold out 0 to {count - 1} of {count} wholes, got {held}.")
    order = np.random.default_rng(seed).permutation(count).tolist()
    return sorted(order[held:]), sorted(order[:held])
