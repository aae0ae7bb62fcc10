"""Text-to-image models for part data: FLUX.1 and SDXL through diffusers, from local files alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..errors import PitError
from ..render import load_folder, load_part, load_single_file
from .generate import Order, Rejected

BLANK = 8  # so many pictures of one colour, and none before them: it is the model, not chance
FLUX_TEXT = 256  # tokens of text that schnell was distilled with; others take twice as many


@dataclass(frozen=True)
class PaintSettings:
    """Denoising steps, guidance, and the pictures' side in pixels."""

    steps: int
    guidance: float
    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise PitError(f"Expected steps from 1 to 1000, got {self.steps}.")
        if not 0 <= self.guidance <= 100:
            raise PitError(f"Expected a guidance from 0 to 100, got {self.guidance}.")


class DiffusersPainter:
    """A diffusers pipeline as a painter: each picture's noise is its own seed's, whatever the batch.

    A picture of one colour is left out. pipe: FluxPipeline or StableDiffusionXLPipeline. Raises PitError for
    a size that the model cannot draw, and when the first pictures are all of one colour.
    """

    def __init__(self, pipe: Any, settings: PaintSettings) -> None:
        step = 2 * pipe.vae_scale_factor  # Flux packs latents two by two
        if settings.size < step or settings.size % step:
            raise PitError(f"Expected a picture size in multiples of {step} px, got {settings.size}.")
        self.pipe, self.settings = pipe, settings
        self.drawn = self.blank = 0
        pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, orders: Sequence[Order]) -> list[Image.Image | Rejected]:
        settings = self.settings
        images = self.pipe(
            prompt=[order.prompt for order in orders],
            generator=[torch.Generator().manual_seed(order.seed) for order in orders],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            height=settings.size,
            width=settings.size,
            **self._own_options(orders),
        ).images
        made = [Rejected("It came out in one colour.") if is_blank(image) else image for image in images]
        self._count(made)
        return made

    def _count(self, made: Sequence[Image.Image | Rejected]) -> None:
        self.drawn += len(made)
        self.blank += sum(isinstance(each, Rejected) for each in made)
        if self.blank == self.drawn >= BLANK:
            half = self.pipe.dtype == torch.float16
            advice = (
                "numbers overflow in float16, so begin again with --dtype bfloat16 and another --out."
                if half
                else "the model's files may be damaged, or --steps and --guidance do not suit it."
            )
            raise PitError(f"The first {self.drawn} pictures all came out in one colour: {advice}")

    def _own_options(self, orders: Sequence[Order]) -> dict[str, Any]:
        if is_flux(self.pipe):
            return {"max_sequence_length": FLUX_TEXT if _is_schnell(self.pipe) else 2 * FLUX_TEXT}
        return {"negative_prompt": [order.negative for order in orders]}


def is_blank(image: Image.Image) -> bool:
    """Whether the picture is of one colour: what NaN turns into, and what shows nothing."""
    return all(low == high for low, high in image.convert("RGB").getextrema())  # type: ignore[misc]


def load_painter(
    path: str | os.PathLike[str],
    *,
    config: Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> DiffusersPainter:
    """A diffusers folder of FLUX.1 or SDXL, or an SDXL file, with the settings that suit it.

    FLUX.1-schnell: 4 steps, guidance 0; FLUX.1-dev: 28 and 3.5; SDXL: 30 and 5. The size is the model's own.
    `offload` keeps on the GPU only the part that is at work. Raises PitError as the loaders do.
    """
    path = Path(path)
    flux = path.is_dir() and _class_of(path) == "FluxPipeline"
    if flux:
        pipe = load_flux(path, dtype)
    else:
        pipe = load_folder(path, dtype) if path.is_dir() else load_single_file(path, config, dtype)
    usual = _usual(pipe)
    settings = PaintSettings(
        usual.steps if steps is None else steps,
        usual.guidance if guidance is None else guidance,
        usual.size if size is None else size,
    )
    painter = DiffusersPainter(pipe, settings)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return painter


def load_flux(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The FLUX.1 pipeline in a diffusers folder. Raises PitError when it is incomplete."""
    import diffusers
    import transformers

    ours: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True}
    theirs: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    return diffusers.FluxPipeline(
        scheduler=load_part(diffusers.FlowMatchEulerDiscreteScheduler, folder / "scheduler"),
        vae=load_part(diffusers.AutoencoderKL, folder / "vae", **ours),
        text_encoder=load_part(transformers.CLIPTextModel, folder / "text_encoder", **theirs),
        tokenizer=load_part(transformers.CLIPTokenizer, folder / "tokenizer"),
        text_encoder_2=load_part(transformers.T5EncoderModel, folder / "text_encoder_2", **theirs),
        tokenizer_2=load_part(transformers.AutoTokenizer, folder / "tokenizer_2"),
        transformer=load_part(diffusers.FluxTransformer2DModel, folder / "transformer", **ours),
    )


def is_flux(pipe: Any) -> bool:
    return type(pipe).__name__ == "FluxPipeline"


def wants_bfloat16(path: Path) -> bool:
    """Whether half precision means bfloat16: FLUX.1's text encoder overflows in float16."""
    return path.is_dir() and _class_of(path) == "FluxPipeline"


def _is_schnell(pipe: Any) -> bool:
    """Guidance is an input of the other FLUX.1 models; schnell knows none."""
    return not pipe.transformer.config.guidance_embeds


def _usual(pipe: Any) -> PaintSettings:
    size = pipe.default_sample_size * pipe.vae_scale_factor
    if not is_flux(pipe):
        return PaintSettings(30, 5.0, size)
    return PaintSettings(4, 0.0, size) if _is_schnell(pipe) else PaintSettings(28, 3.5, size)


def _class_of(folder: Path) -> str:
    try:
        return str(json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PitError(
            f"'{folder}' is no diffusers folder: its model_index.json is missing or damaged."
        ) from error
