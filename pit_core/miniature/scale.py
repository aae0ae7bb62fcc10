"""The whole training in small, to try it out: a share of its pictures and of its steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ..errors import PitError
from ..files import write_text_atomic
from ..train.loop import LoopConfig

LEAST_PICTURES, LEAST_STEPS = 6, 2


def set_scale(out: Path, scale: float) -> None:
    """Note the share that ``out`` is trained with, before its first stage.

    Raises PitError for a share outside (0, 1], and when the folder was begun with another one.
    """
    if not 0 < scale <= 1:
        raise PitError(f"Expected a scale above 0 and up to 1, got {scale}.")
    begun = (out / "pictures").exists()
    if begun and scale != scale_of(out):
        raise PitError(
            f"'{out}' was begun at scale {scale_of(out):g}; go on with that, or take another folder."
        )
    if scale != scale_of(out):
        write_text_atomic(_note(out), json.dumps({"scale": scale}))


def scale_of(out: Path) -> float:
    """The share that a folder is trained with; 1 unless noted otherwise."""
    note = _note(out)
    return float(json.loads(note.read_text("utf-8"))["scale"]) if note.exists() else 1.0


def _note(out: Path) -> Path:
    return out / "scale.json"


def scaled_count(out: Path, count: int) -> int:
    """How many of a set's groups are drawn."""
    return max(LEAST_PICTURES, round(count * scale_of(out)))


def scaled_config(out: Path, config: LoopConfig, examples: int | None = None) -> LoopConfig:
    """Fewer steps, and no batch larger than the set of ``examples``; unchanged at scale 1."""
    scale = scale_of(out)
    if scale == 1:
        return config
    steps = max(LEAST_STEPS, round(config.steps * scale))
    return replace(config, steps=steps, batch_size=min(config.batch_size, examples or config.batch_size))
