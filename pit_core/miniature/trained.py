"""What the stages of the miniature's training left behind: their averaged weights, put back into models.

A folder may start from the shipped weights instead of from nothing: then a copy of them stands in for every
stage that was not trained there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import check_shapes, load_tensors, save_tensors, sha256_of
from ..ip_adapter.adapter import IPAdapter, new_ip_adapter
from ..ip_prior.model import IPPrior
from ..train.ip_adapter import Dropout, IPAdapterObjective
from ..train.ip_lora import IPLoRAObjective
from ..train.ip_prior import IPPriorObjective
from ..train.loop import Objective, latest_checkpoint, load_average
from . import models
from .batches import to_pixels
from .cache import cached
from .objectives import (
    ContrastiveObjective,
    DecoderObjective,
    ReaderObjective,
    UNetObjective,
    VAEObjective,
)
from .recipes import SNR_LIMIT
from .sets import base_pictures, everything, pictures
from .tokenizer import WordTokenizer

MEASURED = 1000  # pictures whose latents' mean and deviation the VAE is normalised by


def load_stage(objective: Objective, out: Path, stage: str) -> int:
    """Put a stage's averaged weights into its objective; returns the step that they were taken at.

    Raises PitError when the stage has not been trained, or was trained as another model.
    """
    step, tensors = load_average(out / stage)
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    check_shapes({name: p.shape for name, p in trained.items()}, tensors, f"the stage {stage} under {out}")
    with torch.no_grad():
        for name, value in tensors.items():
            trained[name].copy_(value)
    objective.eval()
    return step


def start_from_shipped(out: Path, weights: Path = models.WEIGHTS) -> None:
    """Copy the shipped weights into a training folder, where they stand in for untrained stages.

    A folder keeps the copy that it was begun with, also after newer weights were exported.
    """
    target = out / "shipped"
    if not target.exists():
        models.check_weights(weights)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".copying-", dir=out) as work:
            shutil.copytree(weights, Path(work) / "shipped")
            os.replace(Path(work) / "shipped", target)


_SHIPPED = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "vision": "image_encoder.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "adapter": "ip_adapter_plus.safetensors",
    "prior": "ip_prior.safetensors",
    "flux-vae": "flux_vae/diffusion_pytorch_model.safetensors",
    "flux-fill": "flux_fill/diffusion_pytorch_model.safetensors",
}


def shipped_file(out: Path, stage: str) -> Path | None:
    """The shipped file that stands in for a stage, or None where the stage was trained here."""
    path = out / "shipped" / _SHIPPED[stage]
    return path if path.is_file() and latest_checkpoint(out / stage) is None else None


def weights_of(out: Path, *stages: str) -> str:
    """A short name for the weights of these stages as they are now."""
    files = []
    for stage in stages:
        newest = latest_checkpoint(out / stage)
        files.append(newest / "ema.safetensors" if newest else shipped_file(out, stage))
    return "-".join(sha256_of(path)[:12] for path in files if path is not None)


def newest_of(out: Path, stages: Sequence[str]) -> str | None:
    """The last of these stages that was trained here, if any was."""
    there = [stage for stage in stages if latest_checkpoint(out / stage)]
    return there[-1] if there else None


# models


def first_vae(out: Path) -> Any:
    """The VAE before its decoder was finished; a shipped one has its latents normalised already."""
    shipped = shipped_file(out, "vae")
    if shipped:
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(shipped.parent, local_files_only=True)
    vae = models.build_vae()
    load_stage(VAEObjective(vae), out, "vae")
    return vae


def trained_vae(out: Path) -> Any:
    """The VAE, normalised to SDXL's latent scale; its decoder is the finished one when there is one."""
    vae = first_vae(out)
    if latest_checkpoint(out / "decoder"):
        load_stage(DecoderObjective(vae), out, "decoder")
    vae.requires_grad_(False)
    if not shipped_file(out, "vae"):
        measured = _latent_statistics(out, vae)
        models.normalise_latents(vae, measured["mean"], measured["std"], models.SDXL_LATENT_SCALE)
    return vae.eval()


def _latent_statistics(out: Path, vae: Any) -> dict[str, Tensor]:
    """Mean and deviation (C,) of the latents, measured once for each encoder and kept beside it."""
    path, encoder = out / "vae" / "latents.safetensors", weights_of(out, "vae")
    if path.exists():
        measured, metadata = load_tensors(path)
        if metadata.get("of", encoder) == encoder:
            return measured
    with torch.no_grad():
        pixels = to_pixels(pictures(out, "world").pixels[:MEASURED])
        latents = torch.cat([vae.encode(rows).latent_dist.mode() for rows in pixels.split(50)])
    measured = {"mean": latents.mean(dim=(0, 2, 3)), "std": latents.std(dim=(0, 2, 3))}
    save_tensors(path, measured, {"of": encoder})
    return measured


def vision_objective(out: Path) -> ContrastiveObjective:
    """The encoders as trained, the text's frozen: other models learn on its embeddings already."""
    text = models.build_text_encoder(len(WordTokenizer(models.TEXT_LENGTH)))
    objective = ContrastiveObjective(models.build_image_encoder(), text, read_weight=2.0)
    load_stage(objective, out, "encoders")
    text.requires_grad_(False)
    return objective


def trained_encoders(out: Path) -> tuple[Any, Any]:
    """Image and text encoder, frozen."""
    shipped = shipped_file(out, "vision")
    if shipped:
        from ..ip_adapter.encoder import load_image_encoder

        text = models.load_text_encoder(shipped.parent / "text_encoder.safetensors")
        return load_image_encoder(shipped, dtype=torch.float32).model.requires_grad_(False), text
    objective = vision_objective(out)
    load_stage(objective, out, "vision")
    return objective.image_encoder.requires_grad_(False), objective.text_encoder


UNET_STAGES = ("unet", "unet-further", "unet-finish")  # each starts from the average of the one before


def unet_before(out: Path, stage: str) -> Any:
    """The UNet that a stage starts from: new for the first, else of the newest stage before it."""
    earlier = UNET_STAGES[: UNET_STAGES.index(stage)]
    return _newest_unet(out, earlier) if earlier else models.build_unet()


def trained_unet(out: Path) -> Any:
    """The UNet of its newest stage, frozen."""
    return _newest_unet(out, UNET_STAGES).eval().requires_grad_(False)


def _newest_unet(out: Path, stages: Sequence[str]) -> Any:
    newest = newest_of(out, stages)
    shipped = shipped_file(out, "unet")
    if shipped and not newest:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_pretrained(shipped.parent, local_files_only=True)
    unet = models.build_unet()
    load_stage(UNetObjective(unet, alphas_cumprod()), out, newest or stages[0])
    return unet


ADAPTER_STAGES = ("adapter", "adapter-further", "adapter-finish")  # each starts from the one before


def adapter_objective(
    out: Path, image: Any, text: Any, stages: Sequence[str] = (), *, text_dropout: float = 0.4
) -> IPAdapterObjective:
    """The adapter as the newest of ``stages`` left it, or a new one without any, on the trained UNet.

    With it goes what a dropped picture and a dropped text turn into. Where the text is dropped, all that is
    drawn has to come from the picture.
    """
    unet = trained_unet(out)
    newest, shipped = newest_of(out, stages), shipped_file(out, "adapter")
    if stages and shipped and not newest:
        adapter = _load_adapter(shipped)
    else:
        adapter = new_ip_adapter(unet, models.build_resampler(), "the miniature's IP-Adapter")
    empty, pooled = models.encode_text(text, WordTokenizer(models.TEXT_LENGTH)([""]))
    objective = IPAdapterObjective(
        unet,
        adapter,
        alphas_cumprod=alphas_cumprod(),
        null_features=models.image_features(image, models.grey())[0],
        null_text=empty[0],
        null_pooled=pooled[0],
        dropout=Dropout(image=0.05, text=text_dropout, both=0.05),
        snr_limit=SNR_LIMIT,
    )
    if stages and (newest or not shipped):
        load_stage(objective, out, newest or stages[0])
    return objective


def trained_adapter(out: Path) -> IPAdapter:
    """The IP-Adapter of its newest stage, frozen."""
    shipped = shipped_file(out, "adapter")
    if shipped and not newest_of(out, ADAPTER_STAGES):
        return _load_adapter(shipped).requires_grad_(False)
    objective = adapter_objective(out, *trained_encoders(out), ADAPTER_STAGES)
    return objective.adapter.requires_grad_(False)


def _load_adapter(path: Path) -> IPAdapter:
    from ..ip_adapter.checkpoint import load_ip_adapter

    return load_ip_adapter(path, dtype=torch.float32)


PRIOR_STAGES = ("prior", "prior-further", "prior-finish")  # each starts from the one before


def prior_before(out: Path, stage: str) -> IPPrior:
    """The IP-Prior that a stage starts from: new for the first, else of the newest stage before it."""
    earlier = PRIOR_STAGES[: PRIOR_STAGES.index(stage)]
    return _newest_prior(out, earlier) if earlier else models.build_prior()


def trained_prior(out: Path) -> IPPrior:
    """The IP-Prior of its newest stage, frozen."""
    return _newest_prior(out, PRIOR_STAGES).requires_grad_(False)


def _newest_prior(out: Path, stages: Sequence[str]) -> IPPrior:
    newest, shipped = newest_of(out, stages), shipped_file(out, "prior")
    if shipped and not newest:
        from ..ip_prior.checkpoint import load_prior

        return load_prior(shipped, dtype=torch.float32)[0]
    prior = models.build_prior()
    load_stage(IPPriorObjective(prior), out, newest or stages[0])
    return prior


IP_LORA_STAGES = {"ip-lora-scene": "scene", "ip-lora-sheet": "sheet"}  # and the pairs that each learns on
IP_LORA_RANK = 6


def ip_lora_objective(out: Path) -> IPLoRAObjective:
    """A new IP-LoRA on the trained UNet and adapter; a dropped text turns into zeros, as it is sampled."""
    return IPLoRAObjective(
        trained_unet(out),
        trained_adapter(out),
        alphas_cumprod=alphas_cumprod(),
        rank=IP_LORA_RANK,
        snr_limit=SNR_LIMIT,
        dropout=Dropout(image=0.0, text=0.1, both=0.0),
        null_text=torch.zeros(models.TEXT_LENGTH, models.TEXT_WIDTH),
        null_pooled=torch.zeros(models.PROJECTION),
    )


def trained_ip_lora(out: Path, stage: str) -> IPLoRAObjective:
    """The IP-LoRA of a stage, in the models that it was trained in."""
    objective = ip_lora_objective(out)
    load_stage(objective, out, stage)
    return objective


def trained_reader(out: Path, name: str) -> nn.Module:
    """The attribute reader "tuning" or "judge", frozen."""
    model = models.build_reader(name)
    load_stage(ReaderObjective(model), out, f"reader-{name}")
    return model.requires_grad_(False)


def alphas_cumprod() -> Tensor:
    """The noise schedule's, (1000,)."""
    return models.build_scheduler().alphas_cumprod


# what they make of the picture sets


def base_latents(out: Path, vae: Any) -> np.ndarray:
    """Scaled latents (N, 4, 16, 16) of the base pictures."""

    return _of_base(out, "latents", encoding(vae), weights_of(out, "vae"))


def encoding(vae: Any) -> Callable[[Tensor], Tensor]:
    """What makes scaled latents (B, 4, 16, 16) of pixels (B, 3, 128, 128) in [-1, 1]."""

    def make(pixels: Tensor) -> Tensor:  # a few at a time: what stays in the CPU's cache is twice as fast
        latents = torch.cat([vae.encode(few).latent_dist.mode() for few in pixels.split(4)])
        return latents * models.SDXL_LATENT_SCALE

    return make


def base_features(out: Path, image_encoder: Any) -> np.ndarray:
    """Penultimate states (N, 65, VISION_WIDTH) of the base pictures."""

    def make(pixels: Tensor) -> Tensor:
        return models.image_features(image_encoder, pixels)

    return _of_base(out, "features", make, weights_of(out, "vision"))


def _of_base(out: Path, name: str, make: Callable[[Tensor], Tensor], of: str) -> np.ndarray:
    return cached(out / "cache", name, everything(out), make, base_pictures(out).rows, of=of)


def pair_latents(out: Path, kind: str, vae: Any) -> np.ndarray:
    """Scaled latents (N, 4, 16, 16) of the targets of a kind of pairs."""
    return _of_pairs(out, kind, 0, "latents", encoding(vae), weights_of(out, "vae"))


def pair_tokens(out: Path, kind: str, image_encoder: Any, adapter: IPAdapter) -> np.ndarray:
    """IP tokens (N, 16, TEXT_WIDTH) of the references of a kind of pairs."""

    def make(pixels: Tensor) -> Tensor:
        return adapter(models.image_features(image_encoder, pixels))

    of = weights_of(out, "vision", newest_of(out, ADAPTER_STAGES) or "adapter")
    return _of_pairs(out, kind, 1, "tokens", make, of)


def _of_pairs(
    out: Path, kind: str, place: int, name: str, make: Callable[[Tensor], Tensor], of: str
) -> np.ndarray:
    """Of the pictures at one place of every pair: the target's is 0, the reference's 1."""
    drawn = pictures(out, f"{kind}-pairs")
    rows = np.arange(place, len(drawn), 2)
    return cached(out / "cache", f"{kind}-{name}", [drawn], make, rows, of=of)[rows]


def concept_tokens(out: Path, image_encoder: Any, adapter: IPAdapter) -> np.ndarray:
    """IP tokens (N, 16, TEXT_WIDTH) of the concepts and of their parts."""

    def make(pixels: Tensor) -> Tensor:
        return adapter(models.image_features(image_encoder, pixels))

    of = weights_of(out, "vision", newest_of(out, ADAPTER_STAGES) or "adapter")
    return cached(out / "cache", "tokens", [pictures(out, "concepts")], make, of=of)
