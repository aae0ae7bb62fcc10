"""What an IP-LoRA in training draws for some examples, beside their references and targets, on one sheet."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PitError
from ..pictures import SheetRow, Tile, contact_sheet, read_picture, save_png
from ..render import Renderer, RenderSettings, for_ip_lora, load_part
from .buckets import Size
from .ip_lora import IPLoRAObjective
from .ip_lora_data import Example


@dataclass(frozen=True)
class Preview:
    """Pictures that are drawn at every save, with the averaged weights and the image at weight 1.0.

    count: how many of the examples, spread evenly; 0 for none. seed: of the first one's noise.
    """

    count: int = 2
    steps: int = 30
    guidance: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 0 or self.steps < 1 or self.seed < 0:
            raise PitError(
                "Expected preview with a count from 0, at least 1 step and a seed from 0, "
                f"got {self.count}, {self.steps} and {self.seed}."
            )


@dataclass(frozen=True)
class Shown:
    """One example of a preview. encoded: its "text" (T, D), "pooled" (P,) and "tokens" (T', D)."""

    example: Example
    size: Size
    encoded: dict[str, Tensor]


class Previews:
    """Draws with the UNet and adapter in training, the base model's VAE, and the scheduler in its folder."""

    def __init__(
        self, base: Path, vae: Any, objective: IPLoRAObjective, shown: Sequence[Shown], settings: Preview
    ) -> None:
        self.vae, self.objective, self.shown, self.settings = vae, objective, list(shown), settings
        self.scheduler = sampling_scheduler(base)

    def draw(self, path: Path) -> None:
        """Write the sheet. A picture that cannot be drawn is a warning: it is no reason to end a training."""
        try:
            rows = [self._row(shown, self.settings.seed + n) for n, shown in enumerate(self.shown)]
        except (PitError, OSError, RuntimeError) as error:  # too little memory among them
            warnings.warn(f"There is no preview {path.name}: {error}", stacklevel=2)
            return
        save_png(contact_sheet(rows, columns=3), path)

    def _row(self, shown: Shown, seed: int) -> SheetRow:
        objective, settings = self.objective, self.settings
        pipe = pipe_without_text(objective.unet, self.vae, self.scheduler)
        renderer = Renderer(pipe, objective.adapter, encode_prompt=_prompt_of(shown))
        drawing = RenderSettings(
            shown.example.text, steps=settings.steps, guidance=settings.guidance, size=shown.size
        )
        objective.context.clear()  # the tokens of the last step
        tokens = shown.encoded["tokens"][None]
        picture = renderer.render(tokens, None, for_ip_lora(drawing), seeds=[seed])[0]
        tiles = [
            Tile(read_picture(shown.example.ref), "reference"),
            Tile(read_picture(shown.example.path), "target"),
            Tile(picture, "drawn"),
        ]
        return SheetRow([], tiles, shown.example.text or "(no text)")


def pipe_without_text(unet: Any, vae: Any, scheduler: Any) -> Any:
    """SDXL without its text encoders, which are no longer there; the VAE follows the UNet."""
    from diffusers import StableDiffusionXLPipeline

    none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    vae = vae.to(unet.device, unet.dtype)
    return StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, add_watermarker=False, **none)


def sampling_scheduler(folder: Path) -> Any:
    """The Euler sampler with the settings in a base model's folder."""
    from diffusers import EulerDiscreteScheduler

    return load_part(EulerDiscreteScheduler, folder / "scheduler")


def _prompt_of(shown: Shown) -> Any:
    """In the text encoders' place: the example's prompt, and zeros for the negative one."""

    def encode(_texts: list[str]) -> tuple[Tensor, Tensor]:
        text, pooled = shown.encoded["text"], shown.encoded["pooled"]
        return torch.stack([text, torch.zeros_like(text)]), torch.stack([pooled, torch.zeros_like(pooled)])

    return encode
