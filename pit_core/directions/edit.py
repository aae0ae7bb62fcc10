"""Editing tokens along directions: one or several at once, of some tokens or all.

edited = tokens + step * direction ("Piece it Together", arXiv 2503.10365). A direction in CLIP features
changes the features of the picture that the tokens were made of, and its tokens by as much as they change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PitError
from ..ip_adapter.adapter import IPAdapter
from ..ip_adapter.tokens import IPTokens
from .direction import Direction

STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # the published ones
PARALLEL = 0.02  # of the directions' products, below which nothing is left to set them apart by

Move = tuple[Direction, float]
"""A direction and how many steps to go along it."""


@dataclass(frozen=True)
class Source:
    """What tokens were made of, for directions in CLIP features.

    features: (B, N, W) or (B, W), one row per row of tokens. project: features -> tokens (B, T, D).
    """

    features: Tensor
    project: Callable[[Tensor], Tensor]


def edit(
    tokens: IPTokens,
    moves: Sequence[Move],
    *,
    mask: Tensor | None = None,
    orthogonal: bool = False,
    source: Source | None = None,
) -> IPTokens:
    """The tokens moved along all directions at once; nulls and origin stay.

    mask: (unit,), how much each token of a picture moves; None moves all of them. Pictures side by side move
    alike. orthogonal: see `orthogonalised`; directions of one space are set apart from each other. Raises
    PitError for directions that do not fit the tokens, a step that is not finite, and a direction in CLIP
    features without its source.
    """
    for direction, step in moves:
        if not math.isfinite(step):
            raise PitError(f"Expected a finite step along '{direction.title}' (1 is usual), got {step!r}.")
        check_fits(direction, tokens, source)
    own = [move for move in moves if move[0].space == "tokens"]
    clip = [move for move in moves if move[0].space == "clip"]
    change = shifted(own, (tokens.unit, tokens.width), mask=mask, orthogonal=orthogonal)
    if clip and source is not None:
        change = change + _through_projection(clip, mask, orthogonal, source)
    sides = tokens.tokens.shape[1] // tokens.unit
    return tokens.with_tokens(tokens.tokens + change.repeat(*[1] * (change.ndim - 2), sides, 1))


def check_fits(direction: Direction, tokens: IPTokens, source: Source | None = None) -> None:
    """Raise PitError unless the direction can be added to these tokens, or to what they were made of."""
    found = tuple(direction.vector.shape)
    if direction.space == "tokens":
        check_shape(direction, tokens.unit, tokens.width)
        return
    if source is None:
        raise PitError(
            f"'{direction.title}' is a direction in CLIP features, so tokens alone cannot move along it: "
            "give the picture that they were made of with its image encoder and adapter, or find the "
            "direction in tokens."
        )
    features = source.features
    if len(features) != tokens.rows or tokens.tokens.shape[1] != tokens.unit:
        raise PitError(
            "A direction in CLIP features needs one picture per row of tokens, but there are "
            f"{len(features)} pictures and {tokens}."
        )
    if found not in (tuple(features.shape[1:]), (features.shape[-1],)):
        raise PitError(
            f"'{direction.title}' changes features of shape {found}, but this image encoder gives "
            f"{tuple(features.shape[1:])}; use the one that it was found with."
        )


def check_shape(direction: Direction, count: int, width: int) -> None:
    """Raise PitError unless a direction in tokens is one for pictures of `count` tokens of that width."""
    found = tuple(direction.vector.shape)
    if found != (count, width):
        raise PitError(
            f"'{direction.title}' moves {found[0]} tokens of width {found[1]}, but a picture has {count} of "
            f"width {width}; use a direction that was found with the same adapter."
        )


def shifted(
    moves: Sequence[Move], shape: Sequence[int], *, mask: Tensor | None = None, orthogonal: bool = False
) -> Tensor:
    """What the moves add up to, of that shape: (T, D) for tokens. mask and orthogonal: see `edit`.

    The mask comes first, so that what is added along each direction is orthogonal.
    """
    vectors = [_masked(direction.vector, mask).expand(*shape) for direction, _ in moves]
    if orthogonal and len(vectors) > 1:
        vectors = orthogonalised(vectors)
    zero = torch.zeros(*shape)
    return sum((step * vector for vector, (_, step) in zip(vectors, moves, strict=True)), zero)


def sweep(
    tokens: IPTokens,
    direction: Direction,
    steps: Sequence[float] = STEPS,
    *,
    mask: Tensor | None = None,
    source: Source | None = None,
) -> IPTokens:
    """Every row of tokens at every step: rows * steps rows, the steps of the first row first."""
    return swept(tokens, [(direction, 1.0)], steps, mask=mask, source=source)


def swept(tokens: IPTokens, moves: Sequence[Move], factors: Sequence[float], **options: Any) -> IPTokens:
    """As `edit`, once with the steps times each factor: rows * factors rows, those of the first row first."""
    if not factors:
        raise PitError("There are no steps to take; write some, such as -1, 0, 1.")
    made = [edit(tokens, [(each, step * factor) for each, step in moves], **options) for factor in factors]
    return tokens.with_tokens(torch.stack([each.tokens for each in made], dim=1).flatten(0, 1))


def picture_features(
    encoder: Callable[[Tensor], tuple[Tensor, Tensor]], adapter: IPAdapter, pixels: Tensor, chunk: int = 8
) -> Tensor:
    """Normalised pixels -> the features that the adapter reads, float32 on the CPU: see Source.

    Hidden states for Plus adapters, image embeddings for base ones; at most `chunk` pictures at a time.
    """
    part = 0 if adapter.kind == "plus" else 1
    with torch.no_grad():
        return torch.cat([encoder(rows)[part].float().cpu() for rows in pixels.split(chunk)])


# several directions


def orthogonalised(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Vectors of any one shape, bent apart evenly until each is at right angles to all others.

    Loewdin's symmetric orthogonalisation (J. Chem. Phys. 18, 365, 1950): of all orthogonal sets the nearest,
    whatever the order. Lengths stay. Raises PitError for vectors that nearly are sums of each other.
    """
    flat = torch.stack([vector.double().flatten() for vector in vectors])
    lengths = flat.norm(dim=1, keepdim=True)
    unit = flat / lengths
    values, basis = torch.linalg.eigh(unit @ unit.T)
    if values[0] < PARALLEL:
        raise PitError(
            "Some of these directions nearly are the same, or the sum of others, so they cannot be set at "
            "right angles; leave one out."
        )
    bent = basis @ torch.diag(values.rsqrt()) @ basis.T @ unit * lengths
    return [row.float().view(vector.shape) for row, vector in zip(bent, vectors, strict=True)]


def _masked(vector: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return vector
    if tuple(mask.shape) != (len(vector),):
        raise PitError(f"The mask is for {len(mask)} tokens, but a picture has {len(vector)}.")
    masked = vector * mask[:, None]
    if not masked.any():
        raise PitError("The mask leaves no token of the direction to move; name at least one that moves.")
    return masked


def _through_projection(
    moves: Sequence[Move], mask: Tensor | None, orthogonal: bool, source: Source
) -> Tensor:
    """(B, T, D): tokens of the changed features less those of the unchanged ones, as the mask lets them."""
    shift = shifted(moves, source.features.shape[1:], orthogonal=orthogonal)
    with torch.no_grad():
        before = source.project(source.features).cpu()
        change = source.project(source.features + shift).cpu() - before
    return change if mask is None else change * mask[:, None]
