"""Finding a direction: from a pile of pictures to another one.

The difference of means is the published direction ("Piece it Together", arXiv 2503.10365). Of few pictures it
carries along what they differ in by chance, which is most where pictures vary most. Ridge LDA,
(S + r I)^-1 (mean 2 - mean 1) with the covariance S within the piles, damps those places; it is also the
posterior mean of the true difference under a Gaussian prior on it, and goes to the difference of means as r
grows. Held-out pictures choose: the largest r that keeps most of the best separation, because less of it buys
the rest by turning to places where pictures hardly vary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PitError
from ..files import check_finite
from .direction import Direction, Evidence

CHOICES = ("auto", "mean", "ridge")
MEAN = math.inf  # the ridge under which nothing is left but the difference of means
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)  # in mean variances within the piles
ENOUGH = 0.75  # of the best separation
FOLDS = 5
SMALL, REPEATS = 200, 4  # up to so many pictures, folds are drawn so many times
LEAST = 3  # a side, to hold any out
SAME = 1e-6  # of a picture's length
ROUNDING, TINY = 1e-9, 1e-300  # a pile of one and the same picture varies by rounding alone


@dataclass(frozen=True)
class Trial:
    """How one ridge did on held-out pictures.

    separation: the gap between the piles along the direction, in standard deviations of either.
    """

    separation: float
    accuracy: float
    confirmed: float
    spread: float


def find_direction(
    first: Tensor,
    second: Tensor,
    *,
    space: str = "tokens",
    method: str = "auto",
    names: tuple[str, str] = ("", ""),
    adapter: str = "",
    encoder: str = "",
) -> Direction:
    """The direction from the first pile to the second, (N, ...) each, of one shape: see Direction.

    method: "mean" is the published difference of means; "ridge" the ridge LDA that held-out pictures choose;
    "auto" lets them choose between all. Deterministic. Raises PitError for empty piles, other shapes, NaN,
    equal means, an unknown method, and for "ridge" with fewer than 3 pictures a side.
    """
    _check(first, second, method)
    mean_gap = (second.double().mean(0) - first.double().mean(0)).float()
    rows = torch.cat([first, second]).detach().to("cpu", torch.float32).flatten(1)
    length = float(rows.norm(dim=1).mean())
    if float(mean_gap.norm()) <= SAME * length:
        raise PitError("Both piles have the same mean, so no direction leads from one to the other.")
    rows = rows - rows.mean(0)
    gram = (rows @ rows.T).double()
    sides = torch.tensor([False] * len(first) + [True] * len(second))
    ridge, trial = _chosen(gram, sides, method)
    vector = mean_gap if ridge == MEAN else (_weights(gram, sides, ridge).float() @ rows)
    evidence = Evidence(
        (len(first), len(second)),
        "mean" if ridge == MEAN else "ridge",
        ridge,
        gap=float(mean_gap.norm()),
        length=length,
        accuracy=None if trial is None else trial.accuracy,
        confirmed=None if trial is None else trial.confirmed,
        spread=None if trial is None else trial.spread,
    )
    return Direction(vector.view(first.shape[1:]), space, names, evidence, adapter, encoder)


def _check(first: Tensor, second: Tensor, method: str) -> None:
    if method not in CHOICES:
        raise PitError(f"Expected the method to be one of {', '.join(CHOICES)}, got '{method}'.")
    if not len(first) or not len(second):
        raise PitError(f"Both piles need pictures, but there are {len(first)} and {len(second)}.")
    if first.shape[1:] != second.shape[1:]:
        raise PitError(
            f"The piles hold {tuple(first.shape[1:])} and {tuple(second.shape[1:])} numbers a picture; "
            "encode both with the same adapter."
        )
    check_finite({"first": first, "second": second}, "The piles")
    if method == "ridge" and min(len(first), len(second)) < LEAST:
        raise PitError(
            f"Ridge LDA needs at least {LEAST} pictures a side, but there are {len(first)} and "
            f"{len(second)}; add some, or take the method 'mean'."
        )


def _chosen(gram: Tensor, sides: Tensor, method: str) -> tuple[float, Trial | None]:
    """The ridge, and how it did; the mean where nothing separates, and where there are too few to ask."""
    if min(int(sides.sum()), int((~sides).sum())) < LEAST:
        return MEAN, None
    ridges = {"mean": (MEAN,), "ridge": RIDGES[::-1], "auto": (MEAN, *RIDGES[::-1])}[method]
    folds = list(_folds(sides))
    trials = {ridge: _held_out(gram, sides, ridge, folds) for ridge in ridges}
    most = max(trial.separation for trial in trials.values())
    enough = (ridge for ridge in ridges if trials[ridge].separation >= ENOUGH * most)
    ridge = next(enough) if most > 0 else ridges[0]
    return ridge, trials[ridge]


def _weights(gram: Tensor, sides: Tensor, ridge: float) -> Tensor:
    """How much of each row the direction is made of, (N,): all there is to know is in the rows' products.

    By the Woodbury identity the inverse is taken between rows, of which there are few, and the length is such
    that step 1 covers the gap of the means along the direction.
    """
    difference = sides.double() / sides.sum() - (~sides).double() / (~sides).sum()
    if ridge == MEAN:
        return difference
    same = (sides[:, None] == sides).double()
    eye = torch.eye(len(sides), dtype=torch.float64)
    centring = eye - same / same.sum(1)
    within = centring @ gram @ centring
    strength = ridge * within.trace() / (len(sides) - 2) + ROUNDING * gram.trace() + TINY
    damped = torch.linalg.solve(within + strength * eye, centring @ gram @ difference)
    weights = difference - centring @ damped
    return weights * (difference @ gram @ weights) / (weights @ gram @ weights).clamp_min(TINY)


def _folds(sides: Tensor) -> Iterator[Tensor]:
    """Which pictures are held out, (N,) booleans: an equal share of both piles each time."""
    count = min(FOLDS, int(sides.sum()), int((~sides).sum()))
    chance = torch.Generator().manual_seed(0)
    for _ in range(REPEATS if len(sides) <= SMALL else 1):
        numbers = torch.empty(len(sides), dtype=torch.int64)
        for side in (sides, ~sides):
            numbers[side] = torch.randperm(int(side.sum()), generator=chance) % count
        yield from (numbers == number for number in range(count))


def _held_out(gram: Tensor, sides: Tensor, ridge: float, folds: list[Tensor]) -> Trial:
    gaps, shares, right, lower, upper = [], [], [], [], []
    for held in folds:
        weights = torch.zeros(len(sides), dtype=torch.float64)
        weights[~held] = _weights(gram[~held][:, ~held], sides[~held], ridge)
        along = gram @ weights / (weights @ gram @ weights).sqrt().clamp_min(TINY)
        one, two = along[~held & ~sides].mean(), along[~held & sides].mean()
        low, high = along[held & ~sides], along[held & sides]
        gaps.append(high.mean() - low.mean())
        shares.append(gaps[-1] / (two - one).clamp_min(1e-12))
        right.append((_share(low < (one + two) / 2) + _share(high > (one + two) / 2)) / 2)
        lower.append(low)
        upper.append(high)
    variance = (torch.cat(lower).var(correction=0) + torch.cat(upper).var(correction=0)) / 2
    spread = float(variance.sqrt())
    return Trial(_mean(gaps) / max(spread, 1e-12), _mean(right), _mean(shares), spread)


def _share(flags: Tensor) -> Tensor:
    return flags.double().mean()


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())
