"""Directions to look at: how much each token moves, and how alike several directions are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from ..errors import PitError
from ..ip_adapter.token_picture import token_picture
from ..ip_adapter.tokens import IPTokens
from .direction import Direction


def direction_picture(directions: Sequence[Direction]) -> Image.Image:
    """For each the lengths of what it adds to each token, or CLIP state, and their similarities; RGB.

    Of several, a last panel compares them with each other. Raises PitError for directions of several shapes.
    """
    shapes = {tuple(each.vector.shape) for each in directions}
    if len(shapes) != 1:
        raise PitError(f"Directions of different shapes cannot share a picture: {_listed(shapes)}.")
    rows = torch.stack([each.vector.reshape(-1, each.vector.shape[-1]) for each in directions])
    return token_picture(IPTokens(rows, rows.shape[1]))


def similarities(directions: Sequence[Direction]) -> list[str]:
    """A line for each pair of one shape: its cosine, 0 for directions at right angles."""
    return [
        f"{one.title} and {two.title}: cosine {_cosine(one, two):+.2f}"
        for number, one in enumerate(directions)
        for two in directions[number + 1 :]
        if one.vector.shape == two.vector.shape and one.space == two.space
    ]


def _cosine(one: Direction, two: Direction) -> float:
    return float((one.vector * two.vector).sum() / (one.vector.norm() * two.vector.norm()))


def _listed(shapes: set[tuple[int, ...]]) -> str:
    return ", ".join(map(str, sorted(shapes))) or "none were given"
