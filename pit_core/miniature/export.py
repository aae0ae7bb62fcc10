"""From checkpoints to the weights that ship: fp16 files in the released layouts, and their manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import PitError
from ..files import save_tensors, sha256_of, write_text_atomic
from ..ip_adapter.checkpoint import save_ip_adapter
from ..ip_adapter.encode import save_image_encoder
from ..ip_prior.checkpoint import save_prior
from ..ip_prior.info import PriorInfo
from ..train.loop import latest_checkpoint
from . import models, trained
from .models import WEIGHTS
from .train import SLOTS

LIMIT = 24 * 2**20


def export(out: Path, weights: Path = WEIGHTS, only: str | None = None) -> dict[str, Any]:
    """Write the files of every finished stage (or of one) and bring the manifest up to date; returns it.

    Raises PitError for a stage that has not been trained, and when the weights outgrow their limit.
    """
    weights.mkdir(parents=True, exist_ok=True)
    path = weights / "manifest.json"
    manifest = models.read_manifest(weights) if path.is_file() else {"files": {}}
    for stage, write in _WRITERS.items():
        if only not in (None, stage):
            continue
        newest = latest_checkpoint(out / _STAGE_OF.get(stage, stage))
        if newest is None:
            if only:
                raise PitError(f"the stage {stage} has no checkpoint under {out}; train it first.")
            continue
        state = json.loads((newest / "state.json").read_text("utf-8"))
        for name in write(out, weights):
            manifest["files"][name] = {
                "sha256": sha256_of(weights / name),
                "bytes": (weights / name).stat().st_size,
                "stage": stage,
                "seed": state["config"]["seed"],
                "steps": state["step"],
                "figures": {key: round(value, 4) for key, value in state["metrics"].items()},
            }
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    if total > LIMIT:
        raise PitError(f"the weights take {total / 2**20:.1f} MB, but at most {LIMIT // 2**20} MB may ship.")
    manifest["bytes"] = total
    write_text_atomic(path, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest


def _vae(out: Path, weights: Path) -> list[str]:
    trained.trained_vae(out).half().save_pretrained(weights / "vae")
    return ["vae/diffusion_pytorch_model.safetensors", "vae/config.json"]


def _unet(out: Path, weights: Path) -> list[str]:
    trained.trained_unet(out).half().save_pretrained(weights / "unet")
    return ["unet/diffusion_pytorch_model.safetensors", "unet/config.json"]


def _encoders(out: Path, weights: Path) -> list[str]:
    image, text = trained.trained_encoders(out)
    save_image_encoder(weights / "image_encoder.safetensors", image, dtype=torch.float16)
    tensors = {name: value.half() for name, value in text.state_dict().items() if value.is_floating_point()}
    save_tensors(weights / "text_encoder.safetensors", tensors, {"format": "pt"})
    return ["image_encoder.safetensors", "text_encoder.safetensors"]


def _adapter(out: Path, weights: Path) -> list[str]:
    save_ip_adapter(
        weights / "ip_adapter_plus.safetensors", trained.trained_adapter(out), dtype=torch.float16
    )
    return ["ip_adapter_plus.safetensors"]


def _prior(out: Path, weights: Path) -> list[str]:
    prior = trained.trained_prior(out).half()
    save_prior(weights / "ip_prior.safetensors", prior, PriorInfo(prior.config, max_crops=SLOTS))
    return ["ip_prior.safetensors"]


def _reader(name: str) -> Callable[[Path, Path], list[str]]:
    def write(out: Path, weights: Path) -> list[str]:
        model = trained.trained_reader(out, name)
        tensors = {key: value.half() for key, value in model.state_dict().items()}
        save_tensors(weights / f"reader_{name}.safetensors", tensors, {"format": "pt"})
        return [f"reader_{name}.safetensors"]

    return write


_WRITERS: dict[str, Callable[[Path, Path], list[str]]] = {
    "vae": _vae,
    "encoders": _encoders,
    "unet": _unet,
    "adapter": _adapter,
    "prior": _prior,
    "reader-tuning": _reader("tuning"),
    "reader-judge": _reader("judge"),
}
# The VAE's figure is that of its finished decoder.
_STAGE_OF = {"vae": "decoder"}
