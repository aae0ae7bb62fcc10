"""The pictures of a run on white paper: cut out by given masks, or by a local segmentation model.

IP-LoRAs and priors learned from subjects on white; a background that is left in comes back in the concepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .cutout import Foreground, load_foreground, on_white, read_mask
from .errors import PitError
from .parts.canvas import flatten
from .runs import JobFiles

__all__ = ["CutOut", "load_cut_out", "on_paper"]


@dataclass(frozen=True, eq=False)
class CutOut:
    """A segmentation model that tells subjects from backgrounds, and the folder that it is in."""

    folder: Path
    model: Foreground


def load_cut_out(folder: Path, device: torch.device | str = "cpu") -> CutOut:
    """Raises PitError as load_foreground, for other models and damaged folders."""
    return CutOut(folder, load_foreground(folder, device=device))


def on_paper(
    files: JobFiles, pictures: Mapping[Path, Image.Image], cut_out: CutOut | None = None
) -> list[Image.Image]:
    """The pictures of a job in the order of its files; parts are cropped to what is left of them.

    Without masks and model they are as they were. Raises PitError, which names the file, for a mask that is
    empty or of another size than its picture, and where no subject is found.
    """
    if cut_out is None and not files.masks:
        return [pictures[path] for path in files.files()]
    shown = []
    for number, path in enumerate(files.files()):
        try:
            mask = _subject(cut_out, pictures[path]) if cut_out else read_mask(files.masks[number])
            shown.append(on_white(pictures[path], mask, crop=number < len(files.parts)))
        except PitError as error:
            raise PitError(f"'{path.name}': {error}") from error
    return shown


def _subject(cut_out: CutOut, picture: Image.Image) -> np.ndarray:
    mask = cut_out.model.mask(flatten(picture))
    if not mask.any():
        raise PitError("The segmentation model found no subject in it; give a mask instead.")
    return mask
