"""Training the miniature: `pit miniature train [stage]`, each stage resumable, on two CPU cores.

The stages reuse ``pit_core.train``: its loop for all of them, and the objectives of the IP-Adapter and the
IP-Prior.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import PitError
from ..train.ip_prior import IPPriorObjective
from ..train.loop import Result, latest_checkpoint
from . import b4m, b4m_stages, flux_train, models, reader
from .batches import Captioned, Concepts, Conditioned, Pairs, Pictures, to_pixels
from .flux_trained import FILL_STAGES
from .objectives import ContrastiveObjective, DecoderObjective, ReaderObjective, UNetObjective, VAEObjective
from .recipes import RECIPES, SNR_LIMIT
from .scale import scale_of, scaled_config, set_scale
from .sets import (
    adapter_pictures,
    base_pictures,
    captioner,
    concept_pictures,
    everything,
    pair_prompts,
    pictures,
    vision_pictures,
)
from .stage import db_check, train_stage
from .tokenizer import WordTokenizer
from .trained import (
    ADAPTER_STAGES,
    IP_LORA_STAGES,
    PRIOR_STAGES,
    UNET_STAGES,
    adapter_objective,
    alphas_cumprod,
    base_features,
    base_latents,
    concept_tokens,
    first_vae,
    ip_lora_objective,
    pair_latents,
    pair_tokens,
    prior_before,
    start_from_shipped,
    trained_adapter,
    trained_encoders,
    trained_vae,
    unet_before,
    vision_objective,
)

SLOTS = 3  # parts that the prior is trained with, at most
LEAST_DB = 32.0  # what the VAE reaches before other models learn on its latents


def main(
    stage: str | None,
    out: Path,
    minutes: float | None = None,
    processes: int = 1,
    *,
    scale: float | None = None,
    from_shipped: bool = False,
) -> list[tuple[str, Result]]:
    """Train one stage, or all that ship, in order; one that takes over ``minutes`` stops and is the last.

    ``scale`` below 1 takes that share of pictures and steps, for a trial of the whole chain; a folder keeps
    its scale. ``from_shipped`` takes the shipped weights where an earlier stage was not trained in ``out``.
    Raises PitError for an unknown stage, for a folder begun at another scale, and as `require_good_vae`.
    """
    if stage is not None and stage not in STAGES:
        raise PitError(f"There is no stage '{stage}'; the stages are {', '.join(STAGES)}.")
    if scale is not None:
        set_scale(out, scale)
    if from_shipped:
        start_from_shipped(out)
    results = []
    in_order = [name for name in STAGES if name not in b4m.AT_HOME]
    for name in in_order if stage is None else [stage]:
        if name in (*UNET_STAGES, *ADAPTER_STAGES, *IP_LORA_STAGES, *b4m_stages.STAGES):
            require_good_vae(out)
        if name in FILL_STAGES:
            require_good_vae(out, ("flux-vae",))
        result = _run_stage(name, out, minutes) if processes == 1 else _shared(name, out, minutes, processes)
        results.append((name, result))
        if not result.finished:
            break
    return results


def _run_stage(name: str, out: Path, minutes: float | None) -> Result:
    return STAGES[name](out, max_seconds=None if minutes is None else 60 * minutes)


def _shared(name: str, out: Path, minutes: float | None, processes: int) -> Result:
    """A stage whose batches are shared by several processes of this machine, forked from this one."""
    if not hasattr(os, "fork"):
        raise PitError(
            f"Expected one process on this system, got {processes}; it cannot fork: use --processes 1."
        )
    from accelerate import debug_launcher

    debug_launcher(_run_stage, args=(name, out, minutes), num_processes=processes)
    newest = latest_checkpoint(out / name)
    step = int(newest.name.removeprefix("step-")) if newest else 0
    return Result(step, step >= scaled_config(out, RECIPES[name]).steps, {}, 0.0)


def train_encoders(out: Path, **options: Any) -> Result:
    """Text and image encoder, contrastive, on the world and on the concepts' parts."""
    torch.manual_seed(RECIPES["encoders"].seed)
    tokenizer = WordTokenizer(models.TEXT_LENGTH)
    objective = ContrastiveObjective(models.build_image_encoder(), models.build_text_encoder(len(tokenizer)))
    batches = Captioned(Pictures(everything(out)), captioner(out), tokenizer)
    return train_stage("encoders", objective, batches, out, **options)


def train_vision(out: Path, **options: Any) -> Result:
    """The image encoder further, mostly on whole critters, whose shapes take longest to tell apart."""
    torch.manual_seed(RECIPES["vision"].seed)
    batches = Captioned(vision_pictures(out), captioner(out), WordTokenizer(models.TEXT_LENGTH))
    check = pictures(out, "world-check")
    whole = check.labels[:, -1] == 0
    pixels, objective = to_pixels(check.pixels[whole]), vision_objective(out)

    def validate(step: int) -> dict[str, float]:
        readings = reader.read(objective.read_attributes, pixels)
        return _named("whole", reader.accuracy(readings, check.labels[whole]))

    return train_stage("vision", objective, batches, out, validate=validate, **options)


def _named(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in figures.items()}


def train_vae(out: Path, **options: Any) -> Result:
    """The VAE on lively crops."""
    torch.manual_seed(RECIPES["vae"].seed)
    vae = models.build_vae()
    batches = Pictures([pictures(out, "world")], crop=64)
    return train_stage("vae", VAEObjective(vae), batches, out, validate=db_check(out, vae), **options)


def train_decoder(out: Path, **options: Any) -> Result:
    """The VAE's decoder alone on whole pictures, while the latents that others learn on stay as they are."""
    vae = first_vae(out)
    batches = Pictures([pictures(out, "world")])
    return train_stage("decoder", DecoderObjective(vae), batches, out, validate=db_check(out, vae), **options)


def require_good_vae(out: Path, stages: tuple[str, ...] = ("vae", "decoder")) -> None:
    """Raise PitError when the VAE that these stages trained in ``out`` came out under LEAST_DB.

    The shipped one was accepted before; in a trial at a smaller scale no VAE gets that far.
    """
    newest = next((found for stage in stages[::-1] if (found := latest_checkpoint(out / stage))), None)
    if newest is None or scale_of(out) < 1:
        return
    db = json.loads((newest / "state.json").read_text("utf-8"))["metrics"]["db"]
    if not db >= LEAST_DB:
        raise PitError(
            f"The VAE in '{out}' reached {db:.2f} dB, but other models learn on its latents only from "
            f"{LEAST_DB:g} dB on; finish or redo {' and '.join(stages)}, or begin one --from-shipped."
        )


def train_reader(out: Path, name: str, **options: Any) -> Result:
    """The attribute reader ``name``: "tuning" (a transformer) or "judge" (convolutional)."""
    stage = f"reader-{name}"
    torch.manual_seed(RECIPES[stage].seed)
    model = models.build_reader(name)
    check = pictures(out, "reader-check")
    pixels = to_pixels(check.pixels[:])

    def validate(step: int) -> dict[str, float]:
        readings, even, odd = reader.read(model, pixels), slice(0, None, 2), slice(1, None, 2)
        clean = reader.accuracy(readings.rows(even), check.labels[even])
        damaged = reader.accuracy(readings.rows(odd), check.labels[odd])
        return _named("clean", clean) | _named("damaged", damaged)

    batches = Pictures([pictures(out, "reader")], moved=True)
    return train_stage(stage, ReaderObjective(model), batches, out, validate=validate, **options)


def train_unet(out: Path, stage: str, **options: Any) -> Result:
    """The SDXL-family UNet on cached latents and fresh captions.

    Its first stage learns to denoise, the later ones what is drawn where: wings, ears, scenes.
    """
    torch.manual_seed(RECIPES[stage].seed)
    limit = None if stage == UNET_STAGES[0] else SNR_LIMIT
    objective = UNetObjective(unet_before(out, stage), alphas_cumprod(), limit)
    return train_stage(stage, objective, _unet_batches(out), out, **options)


def _unet_batches(out: Path) -> Conditioned:
    return Conditioned(
        base_pictures(out),
        captioner(out, neutral=0.12),
        WordTokenizer(models.TEXT_LENGTH),
        trained_encoders(out)[1],
        {"latents": base_latents(out, trained_vae(out))},
    )


def train_adapter(out: Path, stage: str, **options: Any) -> Result:
    """IP-Adapter Plus: projection and image keys and values, on the frozen UNet."""
    torch.manual_seed(RECIPES[stage].seed)
    image, text = trained_encoders(out)
    batches = Conditioned(
        _ADAPTER_PICTURES[stage](out),
        captioner(out, neutral=0.3),
        WordTokenizer(models.TEXT_LENGTH),
        text,
        {"latents": base_latents(out, trained_vae(out)), "features": base_features(out, image)},
    )
    earlier = ADAPTER_STAGES[: ADAPTER_STAGES.index(stage)]
    dropout = 0.75 if stage == ADAPTER_STAGES[-1] else 0.4
    objective = adapter_objective(out, image, text, earlier, text_dropout=dropout)
    return train_stage(stage, objective, batches, out, **options)


_ADAPTER_PICTURES = dict(
    zip(ADAPTER_STAGES, (base_pictures, adapter_pictures, concept_pictures), strict=True)
)


def train_prior(out: Path, stage: str, **options: Any) -> Result:
    """The IP-Prior on the tokens of concepts and of their parts."""
    torch.manual_seed(RECIPES[stage].seed)
    image, _ = trained_encoders(out)
    adapter = trained_adapter(out)
    tokens = concept_tokens(out, image, adapter)
    with torch.no_grad():
        white = adapter(models.image_features(image, torch.ones(1, 3, models.CANVAS, models.CANVAS)))[0]
    objective = IPPriorObjective(prior_before(out, stage), white=white)
    batches = Concepts(pictures(out, "concepts"), tokens, white, SLOTS)
    return train_stage(stage, objective, batches, out, **options)


def train_ip_lora(out: Path, stage: str, **options: Any) -> Result:
    """An IP-LoRA: critters in scenes, or character sheets, with the prompt followed at full image weight."""
    torch.manual_seed(RECIPES[stage].seed)
    kind = IP_LORA_STAGES[stage]
    image, text = trained_encoders(out)
    objective = ip_lora_objective(out)
    batches = Pairs(
        pair_latents(out, kind, trained_vae(out)),
        pair_tokens(out, kind, image, trained_adapter(out)),
        pair_prompts(out, kind),
        WordTokenizer(models.TEXT_LENGTH),
        text,
    )
    return train_stage(stage, objective, batches, out, **options)


STAGES: dict[str, Callable[..., Result]] = {
    "encoders": train_encoders,
    "vision": train_vision,
    "vae": train_vae,
    "decoder": train_decoder,
    "reader-tuning": partial(train_reader, name="tuning"),
    "reader-judge": partial(train_reader, name="judge"),
    **{stage: partial(train_unet, stage=stage) for stage in UNET_STAGES},
    **{stage: partial(train_adapter, stage=stage) for stage in ADAPTER_STAGES},
    **{stage: partial(train_prior, stage=stage) for stage in PRIOR_STAGES},
    **{stage: partial(train_ip_lora, stage=stage) for stage in IP_LORA_STAGES},
    **flux_train.STAGES,
    **b4m_stages.STAGES,
}
