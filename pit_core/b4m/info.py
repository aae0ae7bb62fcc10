"""How much each quadrant of a B4M file changes each block, and which basis it was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ..files import hash_tensors
from .blocks import block_name
from .factors import Factors


class Norms(NamedTuple):
    """Frobenius norms of the quadrants A C, A D, B C and B D, over all layers together."""

    base: float
    content: float
    style: float
    both: float


def quadrant_norms(factors: Mapping[str, Factors]) -> dict[str, Norms]:
    """Block -> how strong each quadrant is in it, in the file's order of blocks; for linear layers."""
    squares: dict[str, list[float]] = {}
    for name, layer in factors.items():
        a, b, c, d = (half.float() for half in layer.halves())
        mine = squares.setdefault(block_name(name), [0.0] * 4)
        for i, (up, down) in enumerate(((a, c), (a, d), (b, c), (b, d))):
            mine[i] += _squared_norm(up, down)
    return {block: Norms(*map(math.sqrt, found)) for block, found in squares.items()}


def basis_of(factors: Mapping[str, Factors], metadata: Mapping[str, str]) -> str:
    """The frozen halves in one sentence: the seed that they were drawn from, if it is known, and their hash.

    The hash is that of `SplitAdapter.metadata`, taken of the numbers as they are in the file.
    """
    frozen: dict[str, Tensor] = {}
    for name, layer in factors.items():
        halves = layer.halves()
        frozen |= {f"{name}.a": halves.a, f"{name}.c": halves.c}
    seed = metadata.get("basis_seed")
    return f"basis {hash_tensors(frozen)[:12]}, " + (f"seed {seed[:20]}" if seed else "seed unknown")


def _squared_norm(up: Tensor, down: Tensor) -> float:
    """|U V|^2 = sum(U'U * VV'), without making U V."""
    return max(0.0, ((up.mT @ up).double() * (down @ down.mT).double()).sum().item())
