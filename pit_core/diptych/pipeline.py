"""Diptychs drawn with diffusers: through Flux Fill, or through FLUX.1-dev with an inpainting ControlNet.

The ControlNet path is Diptych Prompting's own (arXiv 2411.15466): true guidance against an empty negative,
and a control input of 68 features a token, 64 of the picture whose masked pixels are black and 4 of the mask,
which diffusers' pipelines do not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PitError
from .attention import MODES
from .hook import Look, looking
from .layout import DiptychLayout

Encode = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Texts -> (embeddings (B, T, C), pooled (B, P))."""

Progress = Callable[[int, int], None]
"""(steps done, of how many)."""

FILL_GUIDANCE, GUIDANCE = 30.0, 3.5
MASK_FEATURES = 4


@dataclass(frozen=True)
class DiptychModel:
    """pipe: diffusers' FluxFillPipeline, or with a ControlNet its FluxPipeline. encode: its text encoders."""

    pipe: Any
    encode: Encode
    controlnet: Any = None


@dataclass(frozen=True)
class DiptychSettings:
    """Steps, guidance (30 for Fill, 3.5 with a ControlNet if None), and how hard the right panel looks.

    true_cfg and control (the ControlNet's strength) are of the ControlNet path alone. strength, mode, start,
    end, cond_only: as in `Look`. Raises PitError for numbers out of range.
    """

    steps: int = 30
    guidance: float | None = None
    true_cfg: float = 3.5
    control: float = 0.95
    strength: float = 1.3
    mode: str = MODES[0]
    start: float = 0.0
    end: float = 1.0
    cond_only: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise PitError(f"Expected steps from 1 to 1000, got {self.steps}.")
        for name in ("guidance", "true_cfg", "control"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and 0 <= value <= 100):
                raise PitError(f"Expected a {name} from 0 to 100, got {value}.")
        self.look(DiptychLayout())

    def look(self, layout: DiptychLayout) -> Look:
        return Look(
            layout.grid, layout.columns, self.strength, self.mode, self.start, self.end, self.cond_only
        )


@torch.no_grad()
def draw_diptych(
    model: DiptychModel,
    layout: DiptychLayout,
    canvas: Tensor,
    mask: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: DiptychSettings | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Canvases (B, H, W, 3) in 0-1 with what their masks (B, H, W) mark drawn anew; one row each.

    canvas, mask: as `DiptychLayout.compose` makes them. Each row's noise is its own seed's, whatever the
    batch. Raises PitError for rows that do not match, a canvas that is not the layout's, and a model that is
    neither Fill nor with a ControlNet that reads the mask.
    """
    settings = settings or DiptychSettings()
    _check_rows(layout, canvas, mask, prompts, seeds)
    check_model(model)
    look = settings.look(layout)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draw = _filled if model.controlnet is None else _controlled
    with ExitStack() as stack:
        if look.changes:  # at 1 nothing differs from the stock pipeline
            stack.enter_context(looking(model.pipe.transformer, look))
        return draw(model, canvas, mask, list(prompts), generators, settings, look, progress)


def check_model(model: DiptychModel) -> None:
    """Raise PitError unless the model's inputs are those of its path."""
    channels = 4 * model.pipe.vae.config.latent_channels
    pixels = 4 * model.pipe.vae_scale_factor**2
    wanted = 2 * channels + pixels if model.controlnet is None else channels
    found = model.pipe.transformer.config.in_channels
    if found != wanted:
        kind = (
            "Flux Fill, or name an inpainting ControlNet beside it" if model.controlnet is None else "FLUX.1"
        )
        raise PitError(f"This Flux model reads {found} features a token, not {wanted}; take {kind}.")
    if model.controlnet is not None:
        reads = model.controlnet.controlnet_x_embedder.in_features
        if reads != channels + MASK_FEATURES:
            raise PitError(
                f"This ControlNet reads {reads} features a token, not {channels + MASK_FEATURES}; take one "
                "for inpainting that reads the mask, such as alimama's."
            )


def control_input(pipe: Any, canvas: Tensor, mask: Tensor) -> Tensor:
    """(B, tokens, 4 C + 4): latents of the canvas with masked pixels at -1; the mask, 1 where it is kept."""
    pixels = canvas.movedim(-1, 1) * 2 - 1
    pixels = torch.where(mask[:, None] > 0.5, -torch.ones_like(pixels), pixels).to(
        pipe.vae.device, pipe.vae.dtype
    )
    config = pipe.vae.config
    latents = (pipe.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    kept = 1 - F.interpolate(mask[:, None].float(), size=latents.shape[-2:])
    return pack(torch.cat([latents, kept.to(latents)], 1))


# paths


def _filled(
    model: DiptychModel,
    canvas: Tensor,
    mask: Tensor,
    prompts: list[str],
    generators: list[torch.Generator],
    settings: DiptychSettings,
    look: Look,
    progress: Progress | None,
) -> Tensor:
    def after_step(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        look.at_step(step + 1, settings.steps)
        if progress is not None:
            progress(step + 1, settings.steps)
        return values

    context, pooled = model.encode(prompts)
    look.at_step(0, settings.steps)
    made = model.pipe(
        image=canvas.movedim(-1, 1),
        mask_image=mask[:, None],
        prompt_embeds=context,
        pooled_prompt_embeds=pooled,
        height=canvas.shape[1],
        width=canvas.shape[2],
        num_inference_steps=settings.steps,
        guidance_scale=FILL_GUIDANCE if settings.guidance is None else settings.guidance,
        generator=generators,
        callback_on_step_end=after_step,
        output_type="pt",
    ).images
    return made.movedim(1, -1).float().cpu()


def _controlled(
    model: DiptychModel,
    canvas: Tensor,
    mask: Tensor,
    prompts: list[str],
    generators: list[torch.Generator],
    settings: DiptychSettings,
    look: Look,
    progress: Progress | None,
) -> Tensor:
    """Euler steps with true guidance, both halves in one batch, the conditional one first."""
    pipe, rows = model.pipe, len(prompts)
    halves = 1 if settings.true_cfg == 1 else 2
    context, pooled = model.encode(prompts if halves == 1 else prompts + [""] * rows)
    control = control_input(pipe, canvas, mask).repeat(halves, 1, 1)
    height, width = (side // pipe.vae_scale_factor for side in canvas.shape[1:3])
    shape = (1, pipe.vae.config.latent_channels, height, width)
    latents = pack(torch.cat([torch.randn(shape, generator=each) for each in generators])).to(control)
    ids = _image_ids(height // 2, width // 2).to(control)
    guidance = GUIDANCE if settings.guidance is None else settings.guidance
    shared = {
        "encoder_hidden_states": context,
        "pooled_projections": pooled,
        "txt_ids": ids.new_zeros(context.shape[1], 3),
        "img_ids": ids,
    }

    scheduler = pipe.scheduler
    sigmas = torch.linspace(1, 1 / settings.steps, settings.steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=flux_shift(len(ids), scheduler.config), device=control.device)
    for step, time in enumerate(scheduler.timesteps):
        look.at_step(step, settings.steps, [True] * rows + [False] * (halves - 1) * rows)
        noisy = latents.repeat(halves, 1, 1)
        inputs = {"hidden_states": noisy, "timestep": (time / 1000).expand(len(noisy)).to(noisy), **shared}
        doubles, singles = model.controlnet(
            controlnet_cond=control,
            conditioning_scale=settings.control,
            guidance=_guidance(model.controlnet, guidance, noisy),
            return_dict=False,
            **inputs,
        )
        velocity = pipe.transformer(
            controlnet_block_samples=doubles,
            controlnet_single_block_samples=singles,
            guidance=_guidance(pipe.transformer, guidance, noisy),
            return_dict=False,
            **inputs,
        )[0]
        if halves == 2:
            cond, uncond = velocity.chunk(2)
            velocity = uncond + settings.true_cfg * (cond - uncond)
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
        if progress is not None:
            progress(step + 1, settings.steps)
    config = pipe.vae.config
    decoded = pipe.vae.decode(
        unpack(latents, height, width) / config.scaling_factor + config.shift_factor
    ).sample
    return (decoded.float().cpu() / 2 + 0.5).clamp(0, 1).movedim(1, -1)


def _guidance(model: Any, value: float, rows: Tensor) -> Tensor | None:
    """What a distilled model is told; others take none."""
    return rows.new_full((len(rows),), value) if model.config.guidance_embeds else None


# tokens and times


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> tokens (B, h / 2 * w / 2, 4 C), as Flux packs 2 x 2 patches."""
    patches = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # (B, C, h / 2, 2, w / 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The other way: tokens (B, h / 2 * w / 2, 4 C) -> latents (B, C, height, width)."""
    patches = tokens.unflatten(1, (height // 2, width // 2)).unflatten(-1, (-1, 2, 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _image_ids(height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()


def flux_shift(tokens: int, config: Any) -> float:
    """mu for this many tokens, on a line through the two points that the scheduler's config names."""
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - least) / (most - least)


def _check_rows(
    layout: DiptychLayout, canvas: Tensor, mask: Tensor, prompts: Sequence[str], seeds: Sequence[int]
) -> None:
    shape = (len(seeds), *layout.canvas)
    if canvas.shape != (*shape, 3) or mask.shape != shape or len(prompts) != len(seeds) or not len(seeds):
        raise PitError(
            f"{len(seeds)} diptychs of this layout are canvases of shape {(*shape, 3)}, masks of {shape} and "
            f"as many prompts, but got {tuple(canvas.shape)}, {tuple(mask.shape)} and {len(prompts)}."
        )
