"""The miniature's second half: its VAE and fill model, their data, training, and a filled picture."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from pit_core.flow import velocity_target
from pit_core.miniature import flux_models, models
from pit_core.miniature.batches import Pictures
from pit_core.miniature.critters import SCENES, is_held_out
from pit_core.miniature.data import PictureSet, draw_set
from pit_core.miniature.diptychs import (
    Canvases,
    Diptych,
    DiptychBatches,
    full_prompt,
    plain_prompt,
    random_diptych,
)
from pit_core.miniature.flux_objectives import FillObjective, FluxVAEObjective
from pit_core.miniature.tokenizer import WordTokenizer
from pit_core.train.loop import Draws, LoopConfig, train

COUNT = 4


def _draw(index: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return random_diptych(5, index).drawn()


@pytest.fixture(scope="module")
def shown() -> list[Diptych]:
    return [random_diptych(5, index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def panels(tmp_path_factory: pytest.TempPathFactory) -> PictureSet:
    return draw_set(tmp_path_factory.mktemp("pictures"), "diptychs", _draw, COUNT, workers=1, quiet=True)


@pytest.fixture(scope="module")
def batches(shown: list[Diptych]) -> DiptychBatches:
    torch.manual_seed(0)
    tokenizer = WordTokenizer(models.TEXT_LENGTH)
    latents = torch.randn(COUNT, 32, 16, 32, generator=torch.Generator().manual_seed(1)).numpy()
    text_encoder = models.build_text_encoder(len(tokenizer)).eval().requires_grad_(False)
    return DiptychBatches(shown, latents, tokenizer, text_encoder)


# data


def test_the_same_critter_is_seen_in_a_part_of_the_diptychs_only() -> None:
    drawn = [random_diptych(7, index) for index in range(400)]
    assert 0.5 < np.mean([diptych.same for diptych in drawn]) < 0.7
    same = next(diptych for diptych in drawn if diptych.same)
    assert same.left.parts() == same.right.parts() and same.left.pose != same.right.pose
    assert 0.6 < np.mean([diptych.box == (128, 0, 256, 128) for diptych in drawn]) < 0.9
    assert {diptych.right.scene for diptych in drawn} == set(SCENES)
    assert not any(is_held_out(critter) for diptych in drawn for critter in (diptych.left, diptych.right))
    assert is_held_out(random_diptych(7, 0, held_out=True).left)


def test_masks_stay_on_the_canvas_and_within_one_panel() -> None:
    for index in range(300):
        diptych = random_diptych(8, index)
        left, top, right, bottom = diptych.box
        assert 0 <= left < right <= 256 and 0 <= top < bottom <= 128
        assert left // 128 == (right - 1) // 128
        assert (diptych.mask() > 0).sum() == (right - left) * (bottom - top)


def test_canvases_hold_both_panels_and_the_mask(panels: PictureSet, shown: list[Diptych]) -> None:
    canvases = Canvases(panels, shown)
    assert len(canvases) == COUNT
    assert np.array_equal(canvases.pixels[1][:, :128, :3], panels.pixels[2])
    assert np.array_equal(canvases.pixels[1][:, 128:, :3], panels.pixels[3])
    assert np.array_equal(canvases.pixels[:2][1, ..., 3], shown[1].mask())
    assert Pictures([canvases]).fetch([(0, 3)])["pixels"].shape == (1, 4, 128, 256)


@pytest.mark.parametrize("prompt", [full_prompt, plain_prompt])
def test_the_tokenizer_knows_the_prompts_to_their_end(prompt: object) -> None:
    tokenizer = WordTokenizer(models.TEXT_LENGTH)
    for scene in SCENES:
        text = full_prompt(scene) if prompt is full_prompt else plain_prompt(scene)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer([text])
        assert len(tokenizer.split(text)) <= models.TEXT_LENGTH - 2


def test_the_prompt_names_the_scene_that_is_filled_in(batches: DiptychBatches) -> None:
    for index, diptych in enumerate(batches.diptychs):
        filled = diptych.right if diptych.box[0] >= 128 else diptych.left
        said = {batches.prompt((epoch, index)) for epoch in range(60)}
        assert said <= {"", full_prompt(filled.scene), plain_prompt(filled.scene)} and len(said) > 1


# models


def test_packing_is_flux_fills() -> None:
    pipe = flux_models.fill_pipeline(flux_models.build_flux_vae(), flux_models.build_fill())
    pixels = torch.rand(2, 3, 32, 64) * 2 - 1
    mask = (torch.rand(2, 1, 32, 64) < 0.5).float()
    flux_models.normalise_flux_latents(pipe.vae, torch.rand(16) + 0.5)
    theirs, known = pipe.prepare_mask_latents(
        mask, pixels, 2, 16, 1, 32, 64, torch.float32, torch.device("cpu"), None
    )
    assert torch.equal(flux_models.pack_mask(mask[:, 0]), theirs)
    # The pipeline samples the posterior, ours is its mode: they agree, as it is a point.
    assert torch.allclose(flux_models.pack(flux_models.encode_flux(pipe.vae, pixels)), known, atol=1e-5)
    ids = pipe._prepare_latent_image_ids(1, 2, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(flux_models.image_ids(2, 4), ids)


def test_normalising_keeps_what_is_decoded() -> None:
    torch.manual_seed(0)
    vae, pixels = flux_models.build_flux_vae().eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist.mode()
        decoded = vae.decode(before).sample
        std = before.std(dim=(0, 2, 3))
        flux_models.normalise_flux_latents(vae, std)
        after = vae.encode(pixels).latent_dist.mode()
        assert torch.allclose(after * flux_models.FLUX_LATENT_SCALE, before / std[:, None, None], atol=1e-5)
        assert torch.allclose(vae.decode(after).sample, decoded, atol=1e-4)


def test_sizes() -> None:
    """In fp16 both have to fit beside the other weights."""
    assert sum(p.numel() for p in flux_models.build_flux_vae().parameters()) < 0.4e6
    assert sum(p.numel() for p in flux_models.build_fill().parameters()) < 1.3e6


# training


def test_the_vae_trains_all_its_parameters() -> None:
    torch.manual_seed(0)
    vae, pixels = flux_models.build_flux_vae(), torch.rand(4, 3, 16, 16)
    objective = FluxVAEObjective(vae)
    losses = objective({"pixels": pixels}, Draws(0, 0, slice(0, 4), 4))
    losses["loss"].backward()
    assert losses.keys() == {"loss", "mse", "kl", "off"}
    assert all(p.grad is not None for p in vae.parameters())


def test_a_new_fill_model_predicts_nothing_and_learns(batches: DiptychBatches, tmp_path: Path) -> None:
    torch.manual_seed(0)
    objective = FillObjective(flux_models.build_fill())
    batch, draws = batches.fetch([(0, row) for row in range(COUNT)]), Draws(0, 0, slice(0, COUNT), COUNT)
    noise, t = torch.randn(COUNT, 16, 16, 32), torch.full((COUNT,), 0.5)
    velocity, masked = objective.velocity(batch, noise, t, t)
    assert velocity.shape == flux_models.pack(velocity_target(batch["latents"], noise)).shape
    assert not velocity.any() and torch.equal(masked.mean(), batch["mask"].mean())
    before = float(objective(batch, draws)["loss"].detach())
    config = LoopConfig(steps=6, batch_size=COUNT, lr=3e-3, ema_decay=0.0)
    train(objective, batches, config, tmp_path, quiet=True)
    with torch.no_grad():
        assert float(objective(batch, draws)["loss"]) < before


def test_diffusers_fill_pipeline_takes_both_models(batches: DiptychBatches) -> None:
    pipe = flux_models.fill_pipeline(flux_models.build_flux_vae(), flux_models.build_fill())
    pipe.set_progress_bar_config(disable=True)
    batch = batches.fetch([(0, 0)])
    image = torch.rand(1, 3, 128, 256)
    made = pipe(
        image=image,
        mask_image=batch["mask"][:, None],
        prompt_embeds=batch["text"],
        pooled_prompt_embeds=batch["pooled"],
        height=128,
        width=256,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert made.shape == image.shape and torch.isfinite(made).all()
