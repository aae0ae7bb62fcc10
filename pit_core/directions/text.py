"""What people write: masks of tokens, lists of steps, files with a step."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import PitError

MOST_STEPS = 64


def parse_mask(text: str, count: int) -> Tensor | None:
    """ "0-3, 8: 0.5" -> how much each of `count` tokens moves, (count,); what is not named stays.

    An empty text is None: all of them. Raises PitError for anything else, and for tokens that there are not.
    """
    entries = list(filter(None, (piece.strip() for piece in re.split(r"[,;\n]", text))))
    if not entries:
        return None
    mask = torch.zeros(count)
    for entry in entries:
        match = re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?(?:\s*:\s*(\d*\.?\d+))?", entry)
        if match is None:
            raise PitError(f"A token mask reads '0-3, 8' or '0-3: 0.5', but got '{entry[:60]}'.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < count:
            raise PitError(f"The mask names tokens {entry[:60]}, but they are numbered 0 to {count - 1}.")
        mask[first : last + 1] = float(match[3] or 1)
    return mask


def parse_steps(text: str) -> list[float]:
    """ "-1, -0.5, 0" -> numbers, split at commas, semicolons and space. Raises PitError for others."""
    pieces = [piece for piece in re.split(r"[,;\s]+", text) if piece]
    try:
        steps = [float(piece) for piece in pieces]
    except ValueError as error:
        raise PitError(f"Steps are numbers such as -1, -0.5, 0, 0.5, 1, but got '{text[:60]}'.") from error
    if not all(map(math.isfinite, steps)):
        raise PitError(f"Steps are finite numbers such as -1, 0, 1, but got '{text[:60]}'.")
    if not 1 <= len(steps) <= MOST_STEPS:
        raise PitError(f"Expected 1 to {MOST_STEPS} steps, got {len(steps)}.")
    return steps


def step_labels(steps: Sequence[float]) -> list[str]:
    """What to write below the pictures of a sweep."""
    return [f"step {step:+g}" if step else "step 0" for step in steps]


def parse_move(text: str) -> tuple[Path, float]:
    """ "FILE:0.8" -> (FILE, 0.8); without a number the step is 1. Raises PitError for a step that is none."""
    name, colon, step = text.rpartition(":")
    if not colon or Path(text).is_file() or step.startswith(("\\", "/")):  # a drive letter is no step
        return Path(text), 1.0
    try:
        value = float(step)
    except ValueError as error:
        raise PitError(f"Expected FILE:0.8, a file and a step, but got '{text[:200]}'.") from error
    if not name or not math.isfinite(value):
        raise PitError(f"Expected FILE:0.8, a file and a finite step, but got '{text[:200]}'.")
    return Path(name), value
