"""From checkpoints to the weights that ship: fp16 files in the released layouts, and their manifest."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
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
from . import b4m, b4m_stages, flux_trained, models, trained
from .models import WEIGHTS
from .train import SLOTS

LIMIT = 24_000_000  # bytes: every user clones them


def export(
    out: Path, weights: Path = WEIGHTS, only: str | None = None, *, limit: int = LIMIT
) -> dict[str, Any]:
    """Write the files of every finished stage (or of one) and bring the manifest up to date; returns it.

    Raises PitError for a stage that has not been trained, and when the weights outgrow their limit; then
    nothing is changed.
    """
    return add_files(lambda folder: _written(out, folder, only), weights, limit)


def add_files(
    write: Callable[[Path], dict[str, Any]], weights: Path = WEIGHTS, limit: int = LIMIT
) -> dict[str, Any]:
    """Put files among the weights and into the manifest; returns the manifest.

    ``write`` makes them in the folder that it is given and returns their entries by name, each begun by
    `file_entry`. Raises PitError when the weights outgrow their limit; then nothing is changed.
    """
    weights.mkdir(parents=True, exist_ok=True)
    known = (weights / "manifest.json").is_file()
    manifest = models.read_manifest(weights) if known else {"files": {}}
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=weights) as folder:
        entries = write(Path(folder))
        manifest["files"] |= entries
        manifest["bytes"] = sum(entry["bytes"] for entry in manifest["files"].values())
        if manifest["bytes"] > limit:
            size, most = manifest["bytes"] / 1e6, limit / 1e6
            raise PitError(f"The weights take {size:.1f} MB, but at most {most:g} MB may ship.")
        for name in entries:
            (weights / name).parent.mkdir(exist_ok=True)
            os.replace(Path(folder) / name, weights / name)
    _write_manifest(weights, manifest)
    return manifest


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of every file."""
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def _written(out: Path, folder: Path, only: str | None) -> dict[str, Any]:
    """Write what is trained, or ``only`` one stage, into ``folder``; the manifest's entries."""
    if only is not None and only not in _WRITERS:
        raise PitError(f"There is no stage '{only}' to export; the stages are {', '.join(_WRITERS)}.")
    entries: dict[str, Any] = {}
    for name in [name for name in _WRITERS if name not in b4m.AT_HOME] if only is None else [only]:
        stages, write = _WRITERS[name]
        if any(latest_checkpoint(out / stage) for stage in stages):
            entries |= {file: _entry(folder, file, _history(out, file)) for file in write(out, folder)}
        elif only:
            raise PitError(f"The stage {stages[0]} has no checkpoint under '{out}'; train it first.")
    return entries


def _entry(folder: Path, name: str, history: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says of a file: the stages that it went through, and the last one's figures."""
    stages = [{key: stage[key] for key in ("stage", "seed", "steps")} for stage in history]
    return {**file_entry(folder / name), "stages": stages, "figures": history[-1]["figures"]}


def _history(out: Path, name: str) -> list[dict[str, Any]]:
    """The stages of a file's weights, in order; those that shipped weights went through as recorded there."""
    shipped = out / "shipped"
    recorded = models.read_manifest(shipped)["files"].get(name, {}) if shipped.is_dir() else {}
    earlier = {
        stage["stage"]: {**stage, "figures": recorded["figures"]} for stage in recorded.get("stages", ())
    }
    found = []
    for stage in _STAGES[name.split("/")[0]]:
        newest = latest_checkpoint(out / stage)
        if newest:
            state = json.loads((newest / "state.json").read_text("utf-8"))
            figures = {key: round(value, 4) for key, value in state["metrics"].items()}
            seed, steps = state["config"]["seed"], state["step"]
            found.append({"stage": stage, "seed": seed, "steps": steps, "figures": figures})
        elif stage in earlier:
            found.append(earlier[stage])
    return found


def note_figures(figures: dict[str, dict[str, float]], weights: Path = WEIGHTS) -> None:
    """Add figures to the manifest by file name, as those that the files were accepted at.

    Raises PitError for a file that the manifest does not list; then nothing is changed.
    """
    manifest = models.read_manifest(weights)
    for name, found in figures.items():
        if name not in manifest["files"]:
            raise PitError(f"The manifest of '{weights}' does not list '{name}'; export it first.")
        manifest["files"][name]["figures"] |= {key: round(value, 4) for key, value in found.items()}
    _write_manifest(weights, manifest)


def _write_manifest(weights: Path, manifest: dict[str, Any]) -> None:
    write_text_atomic(weights / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")


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


def _ip_lora(out: Path, folder: Path, stage: str) -> list[str]:
    name = f"{stage.replace('-', '_')}.safetensors"
    trained.trained_ip_lora(out, stage).save(folder / name, {"pairs": stage}, torch.float16)
    return [name]


def _flux_vae(out: Path, folder: Path) -> list[str]:
    return _diffusers(flux_trained.trained_flux_vae(out), folder, "flux_vae")


def _flux_fill(out: Path, folder: Path) -> list[str]:
    return _diffusers(flux_trained.trained_fill(out), folder, "flux_fill")


def _b4m(out: Path, folder: Path, stage: str) -> list[str]:
    b4m_stages.save_b4m(out, stage, folder / b4m_stages.b4m_file(stage))
    return [b4m_stages.b4m_file(stage)]


def _half(model: nn.Module, folder: Path, name: str) -> str:
    tensors = {key: value.half() for key, value in model.state_dict().items()}
    save_tensors(folder / f"{name}.safetensors", tensors, {"format": "pt"})
    return f"{name}.safetensors"


# What is exported -> the stages of which at least one must have been trained here; and its writer.
_WRITERS: dict[str, tuple[tuple[str, ...], Callable[[Path, Path], list[str]]]] = {
    "vae": (("vae", "decoder"), _vae),
    "encoders": (("vision",), _encoders),
    "unet": (trained.UNET_STAGES, _unet),
    "adapter": (trained.ADAPTER_STAGES, _adapter),
    "prior": (trained.PRIOR_STAGES, _prior),
    **{stage: ((stage,), partial(_ip_lora, stage=stage)) for stage in trained.IP_LORA_STAGES},
    # The reader that served while tuning stays at home: figures come from the other one.
    "reader-judge": (("reader-judge",), _judge),
    "flux-vae": (("flux-vae",), _flux_vae),
    "flux-fill": (flux_trained.FILL_STAGES, _flux_fill),
    **{stage: ((stage,), partial(_b4m, stage=stage)) for stage in b4m.RUNS},
}

# The stages that a file's weights go through, by its folder or name.
_STAGES: dict[str, tuple[str, ...]] = {
    "vae": ("vae", "decoder"),
    "image_encoder.safetensors": ("encoders", "vision"),
    "text_encoder.safetensors": ("encoders",),
    "unet": trained.UNET_STAGES,
    "ip_adapter_plus.safetensors": trained.ADAPTER_STAGES,
    "ip_prior.safetensors": trained.PRIOR_STAGES,
    **{f"{stage.replace('-', '_')}.safetensors": (stage,) for stage in trained.IP_LORA_STAGES},
    "reader_judge.safetensors": ("reader-judge",),
    "flux_vae": ("flux-vae",),
    "flux_fill": flux_trained.FILL_STAGES,
    **{b4m_stages.b4m_file(stage): (*run.parents, stage) for stage, run in b4m.RUNS.items()},
}
