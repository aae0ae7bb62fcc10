"""Several folders of embedded part data as one: which folder, and which of its wholes, each example shows.

An epoch is as long as all folders together. Without weights it shows every whole once; with weights each
folder has its share of it, so that a small folder's wholes come several times and those of a large one in
turns, over several epochs. Each example is a function of (seed, epoch, index).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..errors import PitError
from .augment import Augment
from .shards import Index
from .token_data import TokenData, split_rows
from .views import AT_TRAINING

AT_ONCE = (*AT_TRAINING, "use_ref")  # what all examples of a batch have to share
ORDERS = 2  # of each folder that are kept in memory


class JointTokens:
    """Examples out of several `TokenData`, alike on any number of workers and processes.

    weights: how often each folder comes, in any unit; none: by its size. seed: of the order in which weighted
    folders hand out their wholes.

    Raises PitError for folders of different models or settings, and for weights that do not fit them.
    """

    def __init__(self, folders: Sequence[TokenData], weights: Sequence[float] = (), *, seed: int = 0) -> None:
        self.folders = tuple(folders)
        self.weighted, self.seed = bool(weights), seed
        for other in self.folders[1:]:
            _check_alike(self.folders[0], other)
        sizes = [len(folder) for folder in self.folders]
        if weights:
            _check_weights(self.folders, weights)
        self.counts = shares(sum(sizes), weights) if weights else sizes
        self._starts = np.cumsum([0, *self.counts])
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def white(self) -> Tensor:
        """A white slot's tokens (T, D)."""
        return self.folders[0].white

    @property
    def index(self) -> Index:
        """The first folder's, for what all have in common."""
        return self.folders[0].index

    @property
    def settings(self) -> Augment:
        """The folders' own; sketches as often as where they are most frequent."""
        sketches = max(folder.settings.sketch_prob for folder in self.folders)
        return replace(self.folders[0].settings, sketch_prob=sketches)

    @property
    def shards(self) -> list[str]:
        """The names of all shards, which say what is in them."""
        return [name for folder in self.folders for name, _ in folder.index.shards]

    def fetch(self, items: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Tokens "target" (B, T, D) and "cond" (B, T * slots, D) of these (epoch, index) items, float16."""
        examples = []
        for item in items:
            folder, epoch, row = self.place(*item)
            examples.append(self.folders[folder].fetch([(epoch, row)]))
        return {name: torch.cat([example[name] for example in examples]) for name in ("target", "cond")}

    def place(self, epoch: int, index: int) -> tuple[int, int, int]:
        """Where an example comes from: (folder, that folder's own epoch, row in it)."""
        folder = int(np.searchsorted(self._starts, index, side="right")) - 1
        position = epoch * self.counts[folder] + index - int(self._starts[folder])
        own, place = divmod(position, len(self.folders[folder]))
        return folder, own, int(self._order(folder, own)[place]) if self.weighted else place

    def _order(self, folder: int, epoch: int) -> np.ndarray:
        """A share of a folder is a random one, whatever the order of its wholes."""
        if (folder, epoch) not in self._orders:
            while len(self._orders) >= ORDERS * len(self.folders):
                self._orders.pop(next(iter(self._orders)))
            chance = np.random.default_rng([self.seed, folder, epoch])
            self._orders[folder, epoch] = chance.permutation(len(self.folders[folder]))
        return self._orders[folder, epoch]


def split_folders(sizes: Sequence[int], held: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """For each folder (rows to train on, rows held out); the `held` are chosen out of all by `split_rows`."""
    trained, out = split_rows(sum(sizes), held, seed)
    starts = [sum(sizes[:number]) for number in range(len(sizes) + 1)]

    def own(rows: list[int], number: int) -> list[int]:
        first, end = (bisect_left(rows, starts[edge]) for edge in (number, number + 1))
        return [row - starts[number] for row in rows[first:end]]

    return [(own(trained, number), own(out, number)) for number in range(len(sizes))]


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in proportion to the weights, in whole numbers; what is left over goes to the largest rests."""
    exact = total * np.asarray(weights, dtype=np.float64) / math.fsum(weights)
    counts = np.floor(exact).astype(np.int64)
    for number in np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]:
        counts[number] += 1
    return [int(count) for count in counts]


def _check_alike(first: TokenData, other: TokenData) -> None:
    one, two = first.index, other.index
    if (one.tokens, one.width, one.encoder, one.adapter) != (two.tokens, two.width, two.encoder, two.adapter):
        raise PitError(
            f"'{first.folder}' and '{other.folder}' were embedded with different models; embed one of them "
            "again with the other's."
        )
    for name in AT_ONCE:
        if getattr(first.settings, name) != getattr(other.settings, name):
            raise PitError(
                f"'{first.folder}' and '{other.folder}' were embedded with different {name}; set {name} for "
                "both in the training's settings."
            )


def _check_weights(folders: Sequence[TokenData], weights: Sequence[float]) -> None:
    if len(weights) != len(folders) or not all(math.isfinite(each) and each > 0 for each in weights):
        raise PitError(
            f"Expected a weight above 0 for each of the {len(folders)} folders of tokens, got "
            f"{', '.join(f'{each:g}' for each in weights)}."
        )
    for folder in folders:
        if not len(folder):
            raise PitError(f"'{folder.folder}' has no whole to train on; leave it out, or hold out fewer.")
