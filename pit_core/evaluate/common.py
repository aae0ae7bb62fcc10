"""What the tables share: seeds, pictures of tokens, and the margins of shares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..concepts import Stack
from ..errors import PitError
from ..files import write_text_atomic
from ..miniature.batches import to_pixels
from ..miniature.critters import Critter
from ..miniature.data import Picture

EVALUATION = 9_000  # added to the user's seed, away from the training sets' seeds
MOST = 10_000  # cases; two seeds' noises never overlap


def check_whole(name: str, value: int, least: int, most: int) -> None:
    """Raise PitError unless the value is a whole number in that range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise PitError(f"Expected the {name} as a whole number from {least} to {most}, got {value!r}.")


def own_tokens(stack: Stack, critters: Sequence[Critter]) -> list[Tensor]:
    """The tokens (T, D) of each critter's own picture."""
    return list(stack.encode([Image.fromarray(Picture(critter).draw()) for critter in critters]))


def drawn(stack: Stack, tokens: Sequence[Tensor], seeds: Sequence[int]) -> list[Image.Image]:
    """Pictures of token rows (T, D) of any lengths, in order; rows of equal length share batches."""
    images: dict[int, Image.Image] = {}
    for length in sorted({len(row) for row in tokens}):
        rows = [index for index, row in enumerate(tokens) if len(row) == length]
        made = stack.renderer.render(
            torch.stack([tokens[index] for index in rows]),
            stack.null("grey"),
            stack.defaults,
            seeds=[seeds[index] for index in rows],
        )
        images |= dict(zip(rows, made, strict=True))
    return [images[index] for index in range(len(tokens))]


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as a reader takes them: (B, 3, H, W) in [-1, 1]."""
    return to_pixels(np.stack([np.asarray(image.convert("RGB")) for image in images]))


def margin(flags: np.ndarray) -> float:
    """Half width of the 95% interval of a share (normal approximation)."""
    share = float(flags.mean())
    return 1.96 * (share * (1 - share) / len(flags)) ** 0.5


def write_table(out: Path, name: str, settings: dict[str, Any], rows: Sequence[Any], text: str) -> None:
    """A table as name.json, its settings and dataclass rows, and as the text name.txt, into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    record = {**settings, "rows": [asdict(row) for row in rows]}
    write_text_atomic(out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_text_atomic(out / f"{name}.txt", text + "\n")
