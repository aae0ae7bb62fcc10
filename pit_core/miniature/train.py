"""Training the miniature: `pit miniature train [stage]`, each stage resumable, on two CPU cores.

The stages reuse ``pit_core.train``: the loop for all of them, and the IP-Adapter's and the IP-Prior's own objectives.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import PitError
from ..files import load_tensors, save_tensors
from ..ip_adapter.adapter import IPAdapter, new_ip_adapter
from ..ip_prior.model import IPPrior
from ..train.ip_adapter import Dropout, IPAdapterObjective
from ..train.ip_prior import IPPriorObjective
from ..train.loop import LoopConfig, Objective, Result, latest_checkpoint, load_average, train
from . import data, models, reader
from .batches import Captioned, Captioner, Concepts, Conditioned, Pictures, to_pixels
from .cache import cached
from .corrupt import corrupt
from .critters import STYLES, random_critter
from .data import PictureSet
from .objectives import (
    ContrastiveObjective,
    DecoderObjective,
    ReaderObjective,
    UNetObjective,
    VAEObjective,
)
from .tokenizer import WordTokenizer

# Seeds of the picture sets; the check sets hold combinations that no training set contains.
WORLD, WORLD_CHECK, CONCEPTS, READER, READER_CHECK = 11, 12, 21, 31, 32
SLOTS = 3  # parts that the prior is trained with, at most


# ---------------------------------------------------------------------------------------------------------------------
# Picture sets


def _world(index: int) -> list[data.Picture]:
    return [data.world_picture(WORLD, index)]


def _concepts(index: int) -> list[data.Picture]:
    return data.concept_pictures(CONCEPTS, index)


def _draw_world(index: int) -> list[data.Drawn]:
    return [picture.drawn() for picture in _world(index)]


def _draw_world_check(index: int) -> list[data.Drawn]:
    return [data.world_picture(WORLD_CHECK, index, held_out=True).drawn()]


def _draw_concepts(index: int) -> list[data.Drawn]:
    return [picture.drawn() for picture in _concepts(index)]


def _draw_reader(index: int) -> list[data.Drawn]:
    return [_reader_picture(np.random.default_rng([READER, index]), False)]


def _draw_reader_check(index: int) -> list[data.Drawn]:
    """Clean pictures at even places, damaged ones at odd places."""
    return [_reader_picture(np.random.default_rng([READER_CHECK, index]), True, damaged=index % 2 == 1)]


def _reader_picture(rng: np.random.Generator, held_out: bool, damaged: bool | None = None) -> data.Drawn:
    styles = STYLES if rng.random() < 0.25 else ("flat",)
    scenes = data.SCENES if rng.random() < 0.3 else ("plain",)
    critter = random_critter(
        rng, styles=styles, scenes=scenes, posed=float(rng.random()), held_out=True if held_out else None
    )
    if damaged is None:
        damaged = bool(rng.random() < 0.5)
    return corrupt(critter, rng) if damaged else (data.Picture(critter).drawn())


def pictures(out: Path, name: str) -> PictureSet:
    """A picture set by name, drawn on first use."""
    make, count = {
        "world": (_draw_world, 30000),
        "world-check": (_draw_world_check, 500),
        "concepts": (_draw_concepts, 20000),
        "reader": (_draw_reader, 30000),
        "reader-check": (_draw_reader_check, 2000),
    }[name]
    return data.draw_set(out / "pictures", name, make, count)


def captioner(out: Path, neutral: float = 0.0) -> Captioner:
    folder = out / "pictures"
    return Captioner({folder / "world": _world, folder / "concepts": _concepts}, neutral)


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def load_stage(objective: Objective, out: Path, stage: str) -> int:
    """Put a stage's averaged weights into its objective; returns the step that they were taken at."""
    step, tensors = load_average(out / stage)
    named = dict(objective.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            named[name].copy_(value)
    objective.eval()
    return step


def train_encoders(out: Path, **options: Any) -> Result:
    """Text and image encoder, contrastive, on the world and on the concepts' parts."""
    torch.manual_seed(2)
    tokenizer = WordTokenizer(models.TEXT_LENGTH)
    objective = ContrastiveObjective(models.build_image_encoder(), models.build_text_encoder(len(tokenizer)))
    batches = Captioned(
        Pictures([pictures(out, "world"), pictures(out, "concepts")]), captioner(out), tokenizer
    )
    config = LoopConfig(
        steps=900,
        batch_size=128,
        lr=1.2e-3,
        schedule="cosine",
        warmup=60,
        weight_decay=0.02,
        betas=(0.9, 0.98),
        ema_decay=0.99,
        precision="bf16",
        seed=2,
        save_every=100,
    )
    return train(objective, batches, config, out / "encoders", description="encoders", **options)


def _vision_objective(out: Path) -> ContrastiveObjective:
    """The encoders as trained, the text's frozen: other models learn on its embeddings already."""
    text = models.build_text_encoder(len(WordTokenizer(models.TEXT_LENGTH)))
    objective = ContrastiveObjective(models.build_image_encoder(), text, read_weight=2.0)
    load_stage(objective, out, "encoders")
    text.requires_grad_(False)
    return objective


def train_vision(out: Path, **options: Any) -> Result:
    """The image encoder further, mostly on whole critters, whose shapes take longest to tell apart."""
    torch.manual_seed(9)
    base = _base_pictures(out)
    parts = len(base.sets[0]) + np.flatnonzero(base.sets[1].labels[:, -1] != 0)[::8]
    chosen = Pictures(base.sets, rows=np.concatenate([base.rows, parts]))
    batches = Captioned(chosen, captioner(out), WordTokenizer(models.TEXT_LENGTH))
    check = pictures(out, "world-check")
    whole = check.labels[:, -1] == 0
    pixels, objective = to_pixels(check.pixels[whole]), _vision_objective(out)

    def validate(step: int) -> dict[str, float]:
        readings = reader.read(objective.read_attributes, pixels)
        return {
            f"whole_{name}": value for name, value in reader.accuracy(readings, check.labels[whole]).items()
        }

    config = LoopConfig(
        steps=2400,
        batch_size=96,
        lr=1e-3,
        schedule="cosine",
        warmup=60,
        weight_decay=0.02,
        betas=(0.9, 0.98),
        ema_decay=0.995,
        precision="bf16",
        seed=9,
        save_every=200,
    )
    return train(
        objective, batches, config, out / "vision", description="vision", validate=validate, **options
    )


@torch.no_grad()
def reconstruction_db(vae: Any, pixels: Tensor) -> float:
    """Mean PSNR in dB over pictures (B, 3, H, W) in [-1, 1], through encode and decode."""
    values = []
    for chunk in pixels.split(20):
        decoded = vae.decode(vae.encode(chunk).latent_dist.mode()).sample.clamp(-1, 1)
        mse = ((decoded - chunk) / 2).pow(2).mean(dim=(1, 2, 3))
        values.append(-10 * torch.log10(mse))
    return float(torch.cat(values).mean())


def train_vae(out: Path, **options: Any) -> Result:
    """The VAE on lively crops."""
    torch.manual_seed(1)
    vae = models.build_vae()
    check = to_pixels(pictures(out, "world-check").pixels[:100])
    config = LoopConfig(
        steps=10000,
        batch_size=8,
        lr=1e-3,
        schedule="cosine",
        warmup=200,
        weight_decay=0.0,
        betas=(0.9, 0.99),
        ema_decay=0.998,
        precision="bf16",
        seed=1,
        save_every=250,
    )
    return train(
        VAEObjective(vae),
        Pictures([pictures(out, "world")], crop=64),
        config,
        out / "vae",
        description="vae",
        validate=lambda step: {"db": reconstruction_db(vae, check)},
        **options,
    )


def trained_reader(out: Path, name: str) -> nn.Module:
    model = models.build_reader(name)
    load_stage(ReaderObjective(model), out, f"reader-{name}")
    return model.requires_grad_(False)


def train_reader(out: Path, name: str, **options: Any) -> Result:
    """The attribute reader ``name``: "tuning" (convolutional) or "judge" (a transformer)."""
    seed = {"tuning": 3, "judge": 4}[name]
    torch.manual_seed(seed)
    model = models.build_reader(name)
    check = pictures(out, "reader-check")
    pixels = to_pixels(check.pixels[:])

    def validate(step: int) -> dict[str, float]:
        readings = reader.read(model, pixels)
        even, odd = slice(0, None, 2), slice(1, None, 2)
        clean = reader.accuracy(readings.rows(even), check.labels[even])
        damaged = reader.accuracy(readings.rows(odd), check.labels[odd])
        return {f"clean_{k}": v for k, v in clean.items()} | {f"damaged_{k}": v for k, v in damaged.items()}

    config = LoopConfig(
        steps=4500 if name == "tuning" else 3000,
        batch_size=64,
        lr=1e-3,
        schedule="cosine",
        warmup=150,
        weight_decay=0.02,
        ema_decay=0.998,
        precision="bf16",
        seed=seed,
        save_every=500,
    )
    return train(
        ReaderObjective(model),
        Pictures([pictures(out, "reader")]),
        config,
        out / f"reader-{name}",
        description=f"reader {name}",
        validate=validate,
        **options,
    )


def trained_vae(out: Path) -> Any:
    """The VAE with its latents normalised to SDXL's scale; its decoder is the finished one when there is one."""
    vae = models.build_vae()
    load_stage(VAEObjective(vae), out, "vae")
    if latest_checkpoint(out / "decoder"):
        load_stage(DecoderObjective(vae), out, "decoder")
    vae.requires_grad_(False)
    path = out / "vae" / "latents.safetensors"
    if not path.exists():
        with torch.no_grad():
            pixels = to_pixels(pictures(out, "world").pixels[:1000])
            latents = torch.cat([vae.encode(rows).latent_dist.mode() for rows in pixels.split(50)])
        save_tensors(path, {"mean": latents.mean(dim=(0, 2, 3)), "std": latents.std(dim=(0, 2, 3))}, {})
    measured, _ = load_tensors(path)
    models.normalise_latents(vae, measured["mean"], measured["std"], models.SDXL_LATENT_SCALE)
    return vae.eval()


def train_decoder(out: Path, **options: Any) -> Result:
    """The VAE's decoder alone on whole pictures, while the latents that others learn on stay as they are."""
    vae = models.build_vae()
    load_stage(VAEObjective(vae), out, "vae")
    check = to_pixels(pictures(out, "world-check").pixels[:100])
    config = LoopConfig(
        steps=2000,
        batch_size=6,
        lr=4e-4,
        schedule="cosine",
        warmup=50,
        weight_decay=0.0,
        betas=(0.9, 0.99),
        ema_decay=0.995,
        precision="bf16",
        seed=5,
        save_every=250,
    )
    return train(
        DecoderObjective(vae),
        Pictures([pictures(out, "world")]),
        config,
        out / "decoder",
        description="decoder",
        validate=lambda step: {"db": reconstruction_db(vae, check)},
        **options,
    )


def trained_encoders(out: Path) -> tuple[Any, Any]:
    """Image and text encoder, frozen."""
    objective = _vision_objective(out)
    load_stage(objective, out, "vision")
    return objective.image_encoder.requires_grad_(False), objective.text_encoder


def _base_pictures(out: Path) -> Pictures:
    """What the UNet and its adapter learn on: the world, and the concepts as whole critters."""
    sets = [pictures(out, "world"), pictures(out, "concepts")]
    whole = len(sets[0]) + np.flatnonzero(sets[1].labels[:, -1] == 0)
    return Pictures(sets, rows=np.concatenate([np.arange(len(sets[0])), whole]))


def _latents(out: Path, vae: Any) -> np.ndarray:
    scale = models.SDXL_LATENT_SCALE
    sets = [pictures(out, "world"), pictures(out, "concepts")]
    rows = _base_pictures(out).rows
    return cached(out / "cache", "latents", sets, lambda x: vae.encode(x).latent_dist.mode() * scale, rows)


def _features(out: Path, image_encoder: Any) -> np.ndarray:
    """Penultimate states of the base pictures, (N, 65, 128)."""
    sets = [pictures(out, "world"), pictures(out, "concepts")]
    rows = _base_pictures(out).rows
    return cached(out / "cache", "features", sets, lambda x: models.image_features(image_encoder, x), rows)


def alphas_cumprod() -> Tensor:
    return models.build_scheduler().alphas_cumprod


def train_unet(out: Path, **options: Any) -> Result:
    """The SDXL-family UNet on cached latents and fresh captions."""
    torch.manual_seed(6)
    text = _vision_objective(out).text_encoder
    batches = Conditioned(
        _base_pictures(out),
        captioner(out, neutral=0.12),
        WordTokenizer(models.TEXT_LENGTH),
        text,
        {"latents": _latents(out, trained_vae(out))},
    )
    config = LoopConfig(
        steps=3600,
        batch_size=64,
        lr=1.2e-3,
        schedule="cosine",
        warmup=150,
        weight_decay=0.01,
        ema_decay=0.998,
        seed=6,
        save_every=200,
    )
    objective = UNetObjective(models.build_unet(), alphas_cumprod())
    return train(objective, batches, config, out / "unet", description="unet", **options)


def trained_unet(out: Path) -> Any:
    unet = models.build_unet()
    load_stage(UNetObjective(unet, alphas_cumprod()), out, "unet")
    return unet.requires_grad_(False)


def _adapter_objective(out: Path, image: Any, text: Any) -> IPAdapterObjective:
    unet = trained_unet(out)
    adapter = new_ip_adapter(unet, models.build_resampler(), "the miniature's IP-Adapter")
    empty, pooled = models.encode_text(text, WordTokenizer(models.TEXT_LENGTH)([""]))
    return IPAdapterObjective(
        unet,
        adapter,
        alphas_cumprod=alphas_cumprod(),
        null_features=models.image_features(image, models.grey())[0],
        null_text=empty[0],
        null_pooled=pooled[0],
        dropout=Dropout(image=0.05, text=0.3, both=0.05),
    )


def train_adapter(out: Path, **options: Any) -> Result:
    """IP-Adapter Plus: projection and image keys and values, on the frozen UNet."""
    torch.manual_seed(7)
    image, text = trained_encoders(out)
    batches = Conditioned(
        _base_pictures(out),
        captioner(out, neutral=0.3),
        WordTokenizer(models.TEXT_LENGTH),
        text,
        {"latents": _latents(out, trained_vae(out)), "features": _features(out, image)},
    )
    config = LoopConfig(
        steps=2000,
        batch_size=48,
        lr=1e-3,
        schedule="cosine",
        warmup=100,
        weight_decay=0.01,
        ema_decay=0.995,
        seed=7,
        save_every=200,
    )
    return train(
        _adapter_objective(out, image, text),
        batches,
        config,
        out / "adapter",
        description="adapter",
        **options,
    )


def trained_adapter(out: Path) -> IPAdapter:
    image, text = trained_encoders(out)
    objective = _adapter_objective(out, image, text)
    load_stage(objective, out, "adapter")
    return objective.adapter.requires_grad_(False)


def train_prior(out: Path, **options: Any) -> Result:
    """The IP-Prior on the tokens of concepts and of their parts."""
    torch.manual_seed(8)
    image, _ = trained_encoders(out)
    adapter = trained_adapter(out)
    concepts = pictures(out, "concepts")
    tokens = cached(out / "cache", "tokens", [concepts], lambda x: adapter(models.image_features(image, x)))
    with torch.no_grad():
        white = adapter(models.image_features(image, torch.ones(1, 3, models.CANVAS, models.CANVAS)))[0]
    config = LoopConfig(
        steps=6000,
        batch_size=96,
        lr=1e-3,
        schedule="cosine",
        warmup=150,
        weight_decay=0.01,
        ema_decay=0.998,
        seed=8,
        save_every=250,
    )
    objective = IPPriorObjective(models.build_prior(), white=white)
    return train(
        objective,
        Concepts(concepts, tokens, white, SLOTS),
        config,
        out / "prior",
        description="prior",
        **options,
    )


def trained_prior(out: Path) -> IPPrior:
    prior = models.build_prior()
    load_stage(IPPriorObjective(prior), out, "prior")
    return prior.requires_grad_(False)


STAGES: dict[str, Callable[..., Result]] = {
    "encoders": train_encoders,
    "vision": train_vision,
    "vae": train_vae,
    "decoder": train_decoder,
    "reader-tuning": lambda out, **options: train_reader(out, "tuning", **options),
    "reader-judge": lambda out, **options: train_reader(out, "judge", **options),
    "unet": train_unet,
    "adapter": train_adapter,
    "prior": train_prior,
}


def main(
    stage: str | None, out: Path, minutes: float | None = None, processes: int = 1
) -> list[tuple[str, Result]]:
    """Train one stage, or all of them in order, and export what is finished; stops after ``minutes``.

    Raises PitError for an unknown stage.
    """
    if stage is not None and stage not in STAGES:
        raise PitError(f"unknown stage {stage!r}; the stages are {', '.join(STAGES)}.")
    results = []
    for name in STAGES if stage is None else (stage,):
        if processes > 1:
            from accelerate import debug_launcher

            debug_launcher(_run_stage, args=(name, out, minutes), num_processes=processes)
            result = Result(_finished_step(out, name), True, {}, 0.0)
        else:
            result = _run_stage(name, out, minutes)
        results.append((name, result))
        if not result.finished:
            break
    return results


def _run_stage(name: str, out: Path, minutes: float | None) -> Result:
    return STAGES[name](out, max_seconds=None if minutes is None else 60 * minutes)


def _finished_step(out: Path, name: str) -> int:
    newest = latest_checkpoint(out / name)
    return int(newest.name.removeprefix("step-")) if newest else 0
