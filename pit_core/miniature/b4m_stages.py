"""B4M's stages of the miniature: contents, styles, joined entities, and ordinary LoRAs to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..b4m.factors import Factors, layer_name, load_factors, save_factors
from ..b4m.merge import splice
from ..b4m.projection import SplitAdapter
from ..lora.kinds import KIND_KEY, PLAIN
from ..train.b4m import B4MObjective
from ..train.b4m_data import Rows
from ..train.ip_lora import OF_UNET, inject_lora, lora_factors
from ..train.loop import Data, Item, Objective, Result, latest_checkpoint
from . import models
from .b4m import (
    CONTENTS,
    RUNS,
    STYLES,
    Run,
    content_critter,
    content_prompt,
    example_prompt,
    style_critter,
    style_prompt,
)
from .batches import TIME_IDS
from .cache import cached
from .objectives import UNetObjective
from .recipes import RECIPES, SNR_LIMIT
from .sets import pictures
from .stage import train_stage
from .tokenizer import WordTokenizer
from .trained import (
    alphas_cumprod,
    encoding,
    load_stage,
    trained_encoders,
    trained_unet,
    trained_vae,
    weights_of,
)

RANK = 8
BASIS_SEED = 0
OTHER_LR = 0.1  # of the other side's factor, times the recipe's
DAMPING = 1e-2


class PlainObjective(UNetObjective):
    """An ordinary LoRA on the same layers, both factors learning."""

    def __init__(self, unet: Any, alphas_cumprod: Tensor, snr_limit: float | None = None) -> None:
        super().__init__(unet.requires_grad_(False), alphas_cumprod, snr_limit)
        inject_lora(unet, OF_UNET, RANK)

    def factors(self) -> dict[str, Factors]:
        """Copies of all layers' factors, by kohya name."""
        return {
            layer_name(module): Factors(down.detach().clone(), up.detach().clone())
            for module, (down, up) in lora_factors(self.unet)
        }


class FewPictures:
    """A small set's latents with their encoded prompts."""

    def __init__(self, latents: np.ndarray, prompts: Sequence[str], text_encoder: Any) -> None:
        self.latents = torch.from_numpy(np.array(latents)).float()
        with torch.no_grad():
            ids = WordTokenizer(models.TEXT_LENGTH)(prompts)
            self.text, self.pooled = models.encode_text(text_encoder, ids)

    def __len__(self) -> int:
        return len(self.latents)

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        rows = [index for _, index in items]
        return {
            "latents": self.latents[rows],
            "text": self.text[rows],
            "pooled": self.pooled[rows],
            "time_ids": torch.tensor([TIME_IDS] * len(rows), dtype=torch.float32),
        }


class OneAfterAnother:
    """Several sets as one."""

    def __init__(self, sets: Sequence[Data]) -> None:
        self.places = [(data, row) for data in sets for row in range(len(data))]

    def __len__(self) -> int:
        return len(self.places)

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        found = [self.places[index][0].fetch([(epoch, self.places[index][1])]) for epoch, index in items]
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}


def train_b4m(out: Path, stage: str, **options: Any) -> Result:
    """One content, style, joined entity, or LoRA to compare with."""
    torch.manual_seed(RECIPES[stage].seed)
    run = RUNS[stage]
    return train_stage(stage, b4m_objective(out, run), _batches(out, run), out, **options)


def b4m_objective(out: Path, run: Run) -> Objective:
    """What a run starts from: zero, or what its parents have learned. Raises PitError without the parents."""
    unet, alphas = trained_unet(out), alphas_cumprod()
    if run.method in ("content", "style"):
        adapter = SplitAdapter.new(unet, RANK, BASIS_SEED)
        role: Any = run.method
        return B4MObjective(
            unet, adapter, role=role, alphas_cumprod=alphas, other_lr_scale=OTHER_LR, snr_limit=SNR_LIMIT
        )
    if run.method == "join":
        content, style = (trained_b4m(out, parent) for parent in run.parents)
        adapter = SplitAdapter(splice(content, style), BASIS_SEED)
        return B4MObjective(
            unet, adapter, role="entity", alphas_cumprod=alphas, damping=DAMPING, snr_limit=SNR_LIMIT
        )
    return PlainObjective(unet, alphas, SNR_LIMIT)


def _batches(out: Path, run: Run) -> Data:
    vae, (_, text) = trained_vae(out), trained_encoders(out)
    contents = CONTENTS if run.method == "style" else [run.content] if run.content else []
    styles = STYLES if run.method == "content" else [run.style] if run.style else []
    of_contents = [_few(out, f"b4m-content-{n}", vae, text, _content_prompt(n)) for n in contents]
    of_styles = [_few(out, f"b4m-style-{n}", vae, text, _style_prompt(n)) for n in styles]
    if run.method == "style":
        return Rows(of_styles[0], of_contents)
    if run.method in ("content", "join"):
        return Rows(of_contents[0], of_styles)
    return OneAfterAnother([*of_contents, *of_styles])


def _few(out: Path, name: str, vae: Any, text: Any, prompt: Callable[[int], str]) -> FewPictures:
    drawn = pictures(out, name)
    latents = cached(out / "cache", f"{name}-latents", [drawn], encoding(vae), of=weights_of(out, "vae"))
    return FewPictures(latents, [prompt(int(group)) for group in drawn.groups], text)


def _content_prompt(content: int) -> Callable[[int], str]:
    return lambda index: content_prompt(content_critter(content, index).scene)


def _style_prompt(style: int) -> Callable[[int], str]:
    return lambda index: style_prompt(style_critter(style, index))


def trained_b4m(out: Path, stage: str) -> dict[str, Factors]:
    """A run's averaged factors; where it was not trained in ``out``, those of its shipped file, if any.

    Raises PitError when there is neither.
    """
    shipped = out / "shipped" / b4m_file(stage)
    if shipped.is_file() and latest_checkpoint(out / stage) is None:
        return {name: Factors(*(f.float() for f in pair)) for name, pair in load_factors(shipped)[0].items()}
    objective = b4m_objective(out, RUNS[stage])
    load_stage(objective, out, stage)
    assert isinstance(objective, B4MObjective | PlainObjective)
    return objective.adapter.factors() if isinstance(objective, B4MObjective) else objective.factors()


def b4m_file(stage: str) -> str:
    """The name of a stage's file."""
    return f"{stage.replace('-', '_')}.safetensors"


def save_b4m(out: Path, stage: str, path: Path) -> None:
    """Write a trained run in kohya's layout, fp16, with what it is for in the metadata."""
    run = RUNS[stage]
    objective = b4m_objective(out, run)
    step = load_stage(objective, out, stage)
    told = {"steps": step, "seed": RECIPES[stage].seed, "prompt": example_prompt(run, "plain")}
    if isinstance(objective, B4MObjective):
        objective.save(path, told, torch.float16)
    elif isinstance(objective, PlainObjective):
        save_factors(path, objective.factors(), {"format": "pt", KIND_KEY: PLAIN, **told}, torch.float16)


STAGES: dict[str, Callable[..., Result]] = {name: partial(train_b4m, stage=name) for name in RUNS}
