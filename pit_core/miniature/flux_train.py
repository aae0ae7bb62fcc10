"""The stages of the miniature's second half: the 16-channel VAE, then the fill model on its latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..train.loop import Draws, Result
from . import flux_models, models
from .batches import Pictures
from .diptychs import DiptychBatches
from .flux_objectives import FillObjective, FluxVAEObjective
from .flux_trained import FILL_STAGES, diptych_latents, fill_before, trained_flux_vae
from .recipes import RECIPES
from .sets import diptychs, pictures
from .stage import db_check, train_stage
from .tokenizer import WordTokenizer
from .trained import trained_encoders


def train_flux_vae(out: Path, **options: Any) -> Result:
    """The 16-channel VAE on lively crops."""
    torch.manual_seed(RECIPES["flux-vae"].seed)
    vae = flux_models.build_flux_vae()
    batches = Pictures([pictures(out, "world")], crop=64)
    check = db_check(out, vae)
    return train_stage("flux-vae", FluxVAEObjective(vae), batches, out, validate=check, **options)


def train_fill(out: Path, stage: str, **options: Any) -> Result:
    """The fill model on cached latents of diptychs."""
    torch.manual_seed(RECIPES[stage].seed)
    vae, (_, text) = trained_flux_vae(out), trained_encoders(out)
    objective = FillObjective(fill_before(out, stage))
    batches = _batches(out, "diptychs", vae, text)
    check = _fill_check(objective, _batches(out, "diptychs-check", vae, text))
    return train_stage(stage, objective, batches, out, validate=check, **options)


def _batches(out: Path, name: str, vae: Any, text_encoder: Any) -> DiptychBatches:
    shown, latents = diptychs(out, name), diptych_latents(out, name, vae)
    return DiptychBatches(shown, latents, WordTokenizer(models.TEXT_LENGTH), text_encoder)


def _fill_check(objective: FillObjective, check: DiptychBatches) -> Callable[[int], dict[str, float]]:
    """The loss where the mask is, of unseen diptychs that show one critter and of those that show two.

    The difference says how much the model takes from the panel that it sees.
    """

    def validate(step: int) -> dict[str, float]:
        found = {}
        for name, same in (("same", True), ("other", False)):
            rows = [row for row, diptych in enumerate(check.diptychs) if diptych.same == same]
            if rows:  # a trial's check set has a few diptychs only
                batch = check.fetch([(0, row) for row in rows])
                found[name] = float(objective(batch, Draws(0, 0, slice(0, len(rows)), len(rows)))["filled"])
        return found

    return validate


STAGES: dict[str, Callable[..., Result]] = {
    "flux-vae": train_flux_vae,
    **{stage: partial(train_fill, stage=stage) for stage in FILL_STAGES},
}
