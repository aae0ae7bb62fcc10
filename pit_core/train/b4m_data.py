"""Training data of B4M: folders of pictures with one fixed prompt each, and rows that pair their pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import PitError
from ..parts.look import Skipped
from ..pictures import picture_files
from .captioned import Picture, Row, scan
from .ip_lora_prompts import PLACE
from .loop import Data, Item


@dataclass(frozen=True)
class PictureFolder:
    """Pictures of one content or of one style, and what the model reads with them.

    prompt: the same for all, with a rare word for what is new to the model ("a photo of snq teddybear"). With
    {caption} in it, it holds what stands in NAME.txt beside NAME.png ("{caption} in w@z yarn art style").
    """

    images: Path
    prompt: str

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise PitError(f"prompt must say what '{self.images}' shows, got an empty text.")


def read_folder(
    folder: PictureFolder, index: Path, *, quiet: bool = False
) -> tuple[list[Picture], list[Skipped]]:
    """The pictures that can be read, with their prompts, and those that cannot, with a warning.

    index: a file that remembers the pictures, see `scan`. Raises PitError for a folder that is missing or
    without readable pictures, and for a caption that is needed but missing.
    """
    if not folder.images.is_dir():
        raise PitError(f"There is no folder '{folder.images}'; images should name one with pictures.")
    files = picture_files(folder.images)
    if not files:
        raise PitError(f"'{folder.images}' holds no pictures; expected a few of one content or one style.")
    rows = [Row(file.name, _prompt(folder.prompt, file)) for file in files]
    return scan(rows, folder.images, index, quiet=quiet)


def _prompt(prompt: str, file: Path) -> str:
    if PLACE not in prompt:
        return prompt
    try:
        caption = file.with_suffix(".txt").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PitError(
            f"The prompt '{prompt[:80]}' needs a caption of '{file.name}': write it into "
            f"'{file.with_suffix('.txt').name}' beside it."
        ) from error
    return prompt.replace(PLACE, " ".join(caption.split()))


class Rows:
    """A picture of the own set, and one of each other set: entries (B, 1 + others, ...).

    The own set sets the order; the others' pictures are drawn by (epoch, index) alone, so that a resumed run
    sees the same.
    """

    def __init__(self, own: Data, others: Sequence[Data]) -> None:
        self.own, self.others = own, list(others)

    def __len__(self) -> int:
        return len(self.own)

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        columns = [self.own.fetch(items)]
        for place, other in enumerate(self.others):
            drawn = [(epoch, _drawn(epoch, index, place, len(other))) for epoch, index in items]
            columns.append(other.fetch(drawn))
        return {name: torch.stack([column[name] for column in columns], dim=1) for name in columns[0]}


def _drawn(epoch: int, index: int, place: int, length: int) -> int:
    return random.Random(f"{epoch} {index} {place}").randrange(length)
