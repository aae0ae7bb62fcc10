"""From checkpoints to the weights that ship: fp16 files in the released layouts, and their manifest."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

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

LIMIT = 24 * 2**20  # bytes: every user clones them


def export(
    out: Path, weights: Path = WEIGHTS, only: str | None = None, *, limit: int = LIMIT
) -> dict[str, Any]:
    """Write the files of every finished stage (or of one) and bring the manifest up to date; returns it.

    Raises PitError for a stage that has not been trained, and when the weights outgrow their limit; then
    nothing is changed.
    """
    weights.mkdir(parents=True, exist_ok=True)
    known = (weights / "manifest.json").is_file()
    manifest = models.read_manifest(weights) if known else {"files": {}}
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=weights) as folder:
        entries = _written(out, Path(folder), only)
        manifest["files"] |= entries
        manifest["bytes"] = sum(entry["bytes"] for entry in manifest["files"].values())
        if manifest["bytes"] > limit:
            size, most = manifest["bytes"] / 2**20, limit / 2**20
            raise PitError(f"The weights take {size:.1f} MB, but at most {most:g} MB may ship.")
        for name in entries:
            (weights / name).parent.mkdir(exist_ok=True)
            os.replace(Path(folder) / name, weights / name)
    write_text_atomic(weights / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest


def _written(out: Path, folder: Path, only: str | None) -> dict[str, Any]:
    """Write what is trained, or ``only`` one stage, into ``folder``; the manifest's entries."""
    if only is not None and only not in _WRITERS:
        raise PitError(f"There is no stage '{only}' to export; the stages are {', '.join(_WRITERS)}.")
    entries: dict[str, Any] = {}
    for stage in _WRITERS if only is None else (only,):
        sources, write = _WRITERS[stage]
        newest = next((found for source in sources if (found := latest_checkpoint(out / source))), None)
        if newest is None and only:
            raise PitError(f"The stage {sources[-1]} has no checkpoint under '{out}'; train it first.")
        if newest is not None:
            state = json.loads((newest / "state.json").read_text("utf-8"))
            trained_as = newest.parent.parent.name  # its last stage
            entries |= {name: _entry(folder / name, trained_as, state) for name in write(out, folder)}
    return entries


def _entry(path: Path, stage: str, state: dict[str, Any]) -> dict[str, Any]:
    return {
        "sha256": sha256_of(path),
        "bytes": path.stat().st_size,
        "stage": stage,
        "seed": state["config"]["seed"],
        "steps": state["step"],
        "figures": {key: round(value, 4) for key, value in state["metrics"].items()},
    }


# a writer each: training folder, target folder -> the names of the files that it wrote


def _vae(out: Path, folder: Path) -> list[str]:
    return _diffusers(trained.trained_vae(out), folder, "vae")


def _unet(out: Path, folder: Path) -> list[str]:
    return _diffusers(trained.trained_unet(out), folder, "unet")


def _diffusers(model: Any, folder: Path, name: str) -> list[str]:
    model.half().save_pretrained(folder / name)
    return [f"{name}/diffusion_pytorch_model.safetensors", f"{name}/config.json"]


def _encoders(out: Path, folder: Path) -> list[str]:
    image, text = trained.trained_encoders(out)
    save_image_encoder(folder / "image_encoder.safetensors", image, dtype=torch.float16)
    return ["image_encoder.safetensors", _half(text, folder, "text_encoder")]


def _adapter(out: Path, folder: Path) -> list[str]:
    save_ip_adapter(folder / "ip_adapter_plus.safetensors", trained.trained_adapter(out), dtype=torch.float16)
    return ["ip_adapter_plus.safetensors"]


def _prior(out: Path, folder: Path) -> list[str]:
    prior = trained.trained_prior(out).half()
    save_prior(folder / "ip_prior.safetensors", prior, PriorInfo(prior.config, max_crops=SLOTS))
    return ["ip_prior.safetensors"]


def _judge(out: Path, folder: Path) -> list[str]:
    return [_half(trained.trained_reader(out, "judge"), folder, "reader_judge")]


def _half(model: nn.Module, folder: Path, name: str) -> str:
    tensors = {key: value.half() for key, value in model.state_dict().items()}
    save_tensors(folder / f"{name}.safetensors", tensors, {"format": "pt"})
    return f"{name}.safetensors"


# What is exported -> the stages whose figures count, the first that was trained; and its writer.
_WRITERS: dict[str, tuple[tuple[str, ...], Callable[[Path, Path], list[str]]]] = {
    "vae": (("decoder", "vae"), _vae),
    "encoders": (("vision",), _encoders),
    "unet": (trained.UNET_STAGES[::-1], _unet),
    "adapter": (("adapter",), _adapter),
    "prior": (("prior",), _prior),
    # The reader that served while tuning stays at home: figures come from the other one.
    "reader-judge": (("reader-judge",), _judge),
}
