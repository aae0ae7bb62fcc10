"""What an IP-Prior in training makes of the parts of wholes that it is not trained on, as pictures.

What draws is passed in: any decoder of the tokens serves; one that can read its own pictures measures, too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ..errors import PitError
from ..ip_adapter.adapter import IPAdapter
from ..ip_prior.info import PriorInfo
from ..ip_prior.model import IPPrior
from ..ip_prior.sample import sample_prior
from ..parts.joint import JointTokens
from ..pictures import SheetRow, Tile, contact_sheet, save_png


@dataclass(frozen=True)
class PriorPreview:
    """Concepts that are drawn at a save, with the averaged weights.

    model: what draws them, such as "miniature" or "sdxl"; empty: nothing. sdxl, sdxl_config, image_encoder,
    ip_adapter: its files, where it is not the miniature. count: how many of the wholes held out are shown.
    every: at every so many-th save, and at the last. seed: of the first one's noise. judged: on how many
    concepts a decoder that can read its own pictures measures the parts kept; 0 for none.
    """

    model: str = ""
    count: int = 4
    every: int = 1
    seed: int = 0
    judged: int = 32
    sdxl: Path | None = None
    sdxl_config: Path | None = None
    image_encoder: Path | None = None
    ip_adapter: Path | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.every < 1 or self.seed < 0 or self.judged < 0:
            raise PitError(
                "Expected preview with a count and an every of at least 1, and a seed and judged from 0, "
                f"got {self.count}, {self.every}, {self.seed} and {self.judged}."
            )


class Decoder(Protocol):
    """Draws tokens; may measure a prior by reading what it has drawn."""

    @property
    def adapter(self) -> IPAdapter:
        """Whose tokens it draws."""

    def draw(self, tokens: Tensor, seeds: Sequence[int]) -> list[Image.Image]:
        """A picture for each row of tokens (B, T, D), from its own seed's noise."""

    def measure(self, prior: IPPrior, info: PriorInfo) -> dict[str, float]:
        """Figures for the log, such as the share of parts kept; none where it cannot read pictures."""


LoadDecoder = Callable[[PriorPreview], Decoder]


class Previews:
    """Draws some of the wholes held out in `check`: their parts, the concept made of them, and the whole.

    A folder of tokens holds no pictures, so parts and wholes are drawn from their tokens, too: what the prior
    is given. Raises PitError for a decoder of another adapter, and where no whole with parts is held out.
    """

    def __init__(self, decoder: Decoder, check: JointTokens, info: PriorInfo, settings: PriorPreview) -> None:
        _check_adapter(decoder.adapter, check)
        self.decoder, self.info, self.settings = decoder, info, settings
        self.white = check.white
        self.examples = _with_parts(check, settings.count)
        self._given: list[tuple[list[Tile], Tile]] = []

    def make(self, prior: IPPrior, path: str | os.PathLike[str]) -> dict[str, float]:
        """Write the sheet and measure. What cannot be drawn is a warning: no reason to end a training."""
        try:
            save_png(self._sheet(prior), path)
            return self.decoder.measure(prior, self.info)
        except (PitError, OSError, RuntimeError) as error:  # too little memory among them
            warnings.warn(f"There is no preview {Path(path).name}: {error}", stacklevel=2)
            return {}

    def _sheet(self, prior: IPPrior) -> Image.Image:
        self._given = self._given or [self._draw_given(*example) for example in self.examples]
        device = next(prior.parameters()).device
        cond = torch.stack([cond for _, cond in self.examples]).float().to(device)
        negative = self.white.repeat(cond.shape[1] // len(self.white), 1)[None].to(device)
        seeds = self._seeds(len(cond))
        concepts = self.decoder.draw(sample_prior(prior, cond, negative, seeds=seeds), seeds)
        rows = [
            SheetRow(parts, [Tile(concept, "concept"), whole])
            for (parts, whole), concept in zip(self._given, concepts, strict=True)
        ]
        return contact_sheet(rows, columns=2)

    def _draw_given(self, target: Tensor, cond: Tensor) -> tuple[list[Tile], Tile]:
        """The parts and the whole (T, D), once: they stay as they are."""
        slots = cond.unflatten(0, (-1, len(self.white)))
        names = ["reference"] * self.info.use_ref + [f"part {n + 1}" for n in range(self.info.max_crops)]
        shown = [n for n, slot in enumerate(slots) if _is_picture(slot, self.white)]
        pictures = self.decoder.draw(
            torch.stack([*(slots[n] for n in shown), target]).float(), self._seeds(len(shown) + 1)
        )
        parts = [Tile(picture, names[n]) for n, picture in zip(shown, pictures[:-1], strict=True)]
        return parts, Tile(pictures[-1], "the whole")

    def _seeds(self, count: int) -> list[int]:
        return [self.settings.seed + number for number in range(count)]


def _check_adapter(adapter: IPAdapter, check: JointTokens) -> None:
    index = check.index
    drawn = (adapter.num_tokens, adapter.cross_attention_dim, adapter.content_hash)
    if drawn != (index.tokens, index.width, index.adapter):
        raise PitError(
            f"The preview's model draws the tokens of {adapter.name}, but '{check.folders[0].folder}' holds "
            "those of another adapter; give the preview the one that embedded them."
        )


def _with_parts(check: JointTokens, count: int) -> list[tuple[Tensor, Tensor]]:
    """(target, cond) of the first wholes of which parts are shown."""
    found = []
    for row in range(len(check)):
        batch = check.fetch([(0, row)])
        target, cond = batch["target"][0], batch["cond"][0]
        if any(_is_picture(slot, check.white) for slot in cond.split(len(check.white))):
            found.append((target, cond))
        if len(found) == count:
            break
    if not found:
        raise PitError(
            "A preview shows wholes that are held out, but none with parts is; hold out more under "
            "'validation' (at most a tenth of the set is), or leave the preview out."
        )
    return found


def _is_picture(slot: Tensor, white: Tensor) -> bool:
    return not torch.equal(slot, white.to(slot))
