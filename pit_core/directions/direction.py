"""A direction in memory: the change itself, what it was found from, and what is to be said of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import PitError
from ..files import check_finite

SPACES = ("tokens", "clip")
SHAPES = {"tokens": "(tokens, width)", "clip": "(positions, width) or (width,)"}
METHODS = ("mean", "ridge")
FEW = 8  # pictures a side, below which chance decides what the piles have in common
DOUBTFUL = 0.6  # of the held-out pictures told apart


@dataclass(frozen=True)
class Evidence:
    """What a direction was found from, and how well it holds for pictures that it was not found from.

    counts: pictures of the first and of the second pile. method: "mean" or "ridge". ridge: its strength, in
    mean variances within the piles; infinite for the mean. accuracy: share of held-out pictures told apart,
    the piles weighing the same. confirmed: how much of the gap along the direction held-out pictures show,
    1 for all of it. spread: standard deviation of held-out pictures of one pile along the direction. All
    three are None where there were too few to hold any out. gap: length of the difference of the means.
    length: mean length of what was averaged.
    """

    counts: tuple[int, int]
    method: str
    ridge: float
    gap: float
    length: float
    accuracy: float | None = None
    confirmed: float | None = None
    spread: float | None = None

    def __post_init__(self) -> None:
        numbers = [self.gap, self.length]
        numbers += [x for x in (self.accuracy, self.confirmed, self.spread) if x is not None]
        if self.method not in METHODS or min(self.counts) < 1 or not all(map(math.isfinite, numbers)):
            raise PitError(f"The evidence of a direction makes no sense: {self}.")


@dataclass(frozen=True)
class Direction:
    """What to add to a picture, once for step 1, float32 on the CPU.

    vector: (T, D) in the space "tokens", the IP tokens of one picture; in the space "clip" what an adapter
    reads of the image encoder: hidden states (N, W), or (W,) for an embedding and for every state alike.
    Step 1 takes the first pile's mean as far as the second's, seen along the direction, however it was found.
    names: of the two piles, "" where unknown. evidence: None for a bare tensor. adapter, encoder: content
    hashes, "" where unknown. file: name of the file that it was read from. Raises PitError for another shape
    or space, for NaN, and for a direction of no length.
    """

    vector: Tensor
    space: str = "tokens"
    names: tuple[str, str] = ("", "")
    evidence: Evidence | None = None
    adapter: str = ""
    encoder: str = ""
    file: str = ""

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise PitError(f"Expected a direction's space to be {' or '.join(SPACES)}, got '{self.space}'.")
        shape = tuple(self.vector.shape)
        if not 1 <= len(shape) <= 2 or 0 in shape or (self.space == "tokens" and len(shape) == 1):
            raise PitError(
                f"A direction in {self.space} has the shape {SHAPES[self.space]}, but got {shape}."
            )
        vector = self.vector.detach().to("cpu", torch.float32)
        check_finite({"direction": vector}, "The direction")
        if not vector.any():
            raise PitError("The direction is zero everywhere, so it would change nothing.")
        object.__setattr__(self, "vector", vector)
        object.__setattr__(self, "names", tuple(map(plain, self.names)))

    @property
    def norm(self) -> float:
        """Length of a step of 1."""
        return float(self.vector.norm())

    @property
    def title(self) -> str:
        """What to call it in messages and pictures."""
        if any(self.names):
            return " to ".join(name or "another" for name in self.names)
        return plain(self.file) or "a direction without names"

    def named(self, first: str, second: str) -> Direction:
        """The same with other names; "" keeps what is there."""
        return replace(self, names=(first or self.names[0], second or self.names[1]))

    def __str__(self) -> str:
        return f"{self.title}: {_place(self)}"


def plain(text: str) -> str:
    """A short line of printable characters: names come from strangers' files."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:60]


def describe(direction: Direction) -> str:
    """A few lines: what it is, what it was found from, how well it holds, how long a step is."""
    lines = [str(direction)]
    found = direction.evidence
    if found is not None:
        how = (
            "the difference of means" if found.method == "mean" else f"ridge LDA of strength {found.ridge:g}"
        )
        lines.append(f"found from {found.counts[0]} and {found.counts[1]} pictures by {how}")
        if found.accuracy is not None and found.confirmed is not None:
            lines.append(
                f"held out: {found.accuracy:.0%} of the pictures told apart, {found.confirmed:.0%} of a step "
                "confirmed"
            )
    lines.append(f"step 1: length {direction.norm:.3g}{_compared(direction.norm, found)}")
    hashes = {"adapter": direction.adapter, "image encoder": direction.encoder}
    known = [f"{name} {value[:8]}" for name, value in hashes.items() if value]
    lines.append(f"made with {' and '.join(known)}" if known else "made with an unknown adapter")
    return "\n".join(lines)


def notes(direction: Direction) -> list[str]:
    """What to know before relying on it, one sentence each."""
    found = direction.evidence
    if found is None:
        return ["It does not say what it was found from, so nothing says how well it holds."]
    said = []
    if min(found.counts) < FEW:
        said.append(
            f"It was found from {found.counts[0]} and {found.counts[1]} pictures; below {FEW} a side, what "
            "they have in common by chance goes along."
        )
    if found.accuracy is None:
        said.append("There were too few pictures to hold some out, so nothing says that it holds for others.")
    elif found.accuracy < doubtful_below(found.counts):
        said.append(
            f"It tells apart {found.accuracy:.0%} of held-out pictures, which is near chance (50%); take "
            "more pictures, or piles that differ in one thing only."
        )
    return said


def doubtful_below(counts: tuple[int, int]) -> float:
    """The accuracy that chance alone stays below in 95 of 100 cases, and 0.6 at least."""
    return max(DOUBTFUL, 0.5 + 1.64 * 0.25 * math.sqrt(1 / counts[0] + 1 / counts[1]))


def fit_notes(direction: Direction, adapter: str) -> list[str]:
    """A sentence where the adapter in use, by content hash, is another than the direction's."""
    if not adapter or not direction.adapter or adapter == direction.adapter:
        return []
    return [
        f"'{direction.title}' was found with adapter {direction.adapter[:8]}, these tokens are made with "
        f"{adapter[:8]}; unless both files hold the same adapter, it means nothing here."
    ]


def _place(direction: Direction) -> str:
    shape = direction.vector.shape
    if direction.space == "tokens":
        return f"{shape[0]} IP tokens of width {shape[1]}"
    if len(shape) == 1:
        return f"CLIP features of width {shape[0]}"
    return f"CLIP features, {shape[0]} states of width {shape[1]}"


def _compared(norm: float, found: Evidence | None) -> str:
    if found is None:
        return ""
    text = f", {norm / found.length:.2f} of a picture's" if found.length else ""
    return text + (f", {norm / found.spread:.1f} spreads of a pile" if found.spread else "")
