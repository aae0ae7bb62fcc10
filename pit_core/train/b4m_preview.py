"""What B4M in training draws for a few prompts, as one sheet."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PitError
from ..pictures import SheetRow, Tile, contact_sheet, save_png
from .b4m import B4MObjective
from .buckets import Size
from .ip_lora_preview import pipe_without_text, sampling_scheduler


@dataclass(frozen=True)
class Preview:
    """Pictures that are drawn at every save, with the averaged weights.

    prompts: what they show; name the joint prompt ("a photo of snq teddybear in w@z yarn art style"). Without
    any, each set's own. count: pictures for each prompt, 0 for none. seed: of the first one's noise.
    """

    prompts: tuple[str, ...] = ()
    count: int = 2
    steps: int = 30
    guidance: float = 7.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 0 or self.steps < 1 or self.seed < 0:
            raise PitError(
                "Expected preview with a count from 0, at least 1 step and a seed from 0, "
                f"got {self.count}, {self.steps} and {self.seed}."
            )


class Previews:
    """Draws with the UNet in training, the base model's VAE, and the scheduler in its folder.

    encoded: the prompts' "text" (N, T, D) and "pooled" (N, P).
    """

    def __init__(
        self,
        base: Path,
        vae: Any,
        objective: B4MObjective,
        prompts: Sequence[str],
        encoded: Mapping[str, Tensor],
        size: Size,
        settings: Preview,
    ) -> None:
        self.vae, self.objective, self.size, self.settings = vae, objective, size, settings
        self.prompts, self.encoded = list(prompts), encoded
        self.scheduler = sampling_scheduler(base)

    def draw(self, path: Path) -> None:
        """Write the sheet, a row for each prompt; with a count of 0 nothing.

        A picture that cannot be drawn is a warning: it is no reason to end a training.
        """
        if not self.settings.count:
            return
        self.objective.draws_alone()
        try:
            pipe = pipe_without_text(self.objective.unet, self.vae, self.scheduler)
            pipe.set_progress_bar_config(disable=True)
            rows = [self._row(pipe, number, prompt) for number, prompt in enumerate(self.prompts)]
            save_png(contact_sheet(rows, columns=max(2, self.settings.count)), path)
        except (PitError, OSError, RuntimeError) as error:  # too little memory among them
            warnings.warn(f"There is no preview {path.name}: {error}", stacklevel=2)

    def _row(self, pipe: Any, number: int, prompt: str) -> SheetRow:
        settings = self.settings
        text = self.encoded["text"][number][None].to(pipe.device, pipe.unet.dtype)
        pooled = self.encoded["pooled"][number][None].to(pipe.device, pipe.unet.dtype)
        seeds = [settings.seed + n for n in range(settings.count)]
        pictures = [
            pipe(
                prompt_embeds=text,
                pooled_prompt_embeds=pooled,
                negative_prompt_embeds=torch.zeros_like(text),
                negative_pooled_prompt_embeds=torch.zeros_like(pooled),
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                width=self.size[0],
                height=self.size[1],
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
            for seed in seeds
        ]
        return SheetRow([], [Tile(p, f"seed {s}") for p, s in zip(pictures, seeds, strict=True)], prompt)
