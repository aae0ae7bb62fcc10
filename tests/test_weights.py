"""The shipped weights: what the manifest promises, and that every model does what it was accepted for.

The thresholds lie below the accepted figures: they notice a broken file, they are no measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pit_core.concepts import Job, PriorSettings, Stack, make_many
from pit_core.evaluate.concepts import concept_cases
from pit_core.files import load_tensors, sha256_of
from pit_core.ip_adapter.checkpoint import load_ip_adapter
from pit_core.ip_adapter.encode import load_image_encoder
from pit_core.ip_prior.checkpoint import load_prior
from pit_core.miniature import models, reader
from pit_core.miniature.batches import to_pixels
from pit_core.miniature.data import world_picture
from pit_core.miniature.export import LIMIT
from pit_core.miniature.models import STACK_FILES, WEIGHTS
from pit_core.miniature.recipes import RECIPES
from pit_core.miniature.sets import reader_picture
from pit_core.miniature.stage import reconstruction_db

SEED = 99  # of pictures that no training and no tuning has seen


def _shipped() -> dict[str, dict[str, Any]]:
    """The manifest's entries; skips while nothing is shipped."""
    if not (WEIGHTS / "manifest.json").exists():
        pytest.skip("the miniature's weights are not shipped yet")
    return models.read_manifest()["files"]


def _needs(*names: str) -> None:
    missing = [name for name in names if name not in _shipped()]
    if missing:
        pytest.skip(f"not shipped yet: {', '.join(missing)}")


# the manifest


def test_every_file_is_listed_and_every_listed_file_is_there() -> None:
    files = {path.relative_to(WEIGHTS).as_posix() for path in WEIGHTS.rglob("*") if path.is_file()}
    assert files == {*_shipped(), "manifest.json"}


def test_hashes_and_sizes_are_as_listed() -> None:
    for name, entry in _shipped().items():
        assert sha256_of(WEIGHTS / name) == entry["sha256"], name
        assert (WEIGHTS / name).stat().st_size == entry["bytes"], name


def test_the_weights_stay_within_their_limit() -> None:
    _shipped()
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= LIMIT + 2**16
    assert models.read_manifest()["bytes"] <= LIMIT


def test_every_file_says_how_it_was_made() -> None:
    for name, entry in _shipped().items():
        assert entry["stages"] and entry["figures"], name
        for stage in entry["stages"]:
            assert stage["stage"] in RECIPES and isinstance(stage["seed"], int) and stage["steps"] > 0, name


def test_all_weights_are_finite_and_fp16() -> None:
    for name in _shipped():
        if name.endswith(".safetensors"):
            tensors, _ = load_tensors(WEIGHTS / name)
            assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}, name
            assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()), name


# loading


def _diffusers(kind: str) -> Any:
    import diffusers

    name = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}[kind]
    model = getattr(diffusers, name).from_pretrained(WEIGHTS / kind, local_files_only=True)
    return model.float().eval().requires_grad_(False)


LOADERS: dict[str, Callable[[Path], Any]] = {
    "vae/diffusion_pytorch_model.safetensors": lambda path: _diffusers("vae"),
    "unet/diffusion_pytorch_model.safetensors": lambda path: _diffusers("unet"),
    "image_encoder.safetensors": load_image_encoder,
    "text_encoder.safetensors": models.load_text_encoder,
    "ip_adapter_plus.safetensors": load_ip_adapter,
    "ip_prior.safetensors": load_prior,
    "reader_judge.safetensors": lambda path: models.load_reader("judge"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_loaders_of_full_size_files_read_it(name: str) -> None:
    _needs(name)
    assert LOADERS[name](WEIGHTS / name) is not None


# what they do


def test_the_vae_gives_held_out_pictures_back() -> None:
    _needs("vae/diffusion_pytorch_model.safetensors")
    pictures = [world_picture(SEED, index, held_out=True).draw() for index in range(40)]
    decibels = reconstruction_db(_diffusers("vae"), to_pixels(np.stack(pictures)))
    assert decibels >= 32, f"{decibels:.2f} dB"


def test_the_vaes_latents_are_standard() -> None:
    _needs("vae/diffusion_pytorch_model.safetensors")
    pictures = to_pixels(np.stack([world_picture(SEED, index).draw() for index in range(40)]))
    with torch.no_grad():
        latents = _diffusers("vae").encode(pictures).latent_dist.mode() * models.SDXL_LATENT_SCALE
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.2
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.2


@pytest.mark.parametrize(("damaged", "least"), [(False, 0.99), (True, 0.97)])
def test_the_judge_reads_clean_and_damaged_pictures(damaged: bool, least: float) -> None:
    _needs("reader_judge.safetensors")
    drawn = [reader_picture(np.random.default_rng([SEED, i]), True, damaged=damaged) for i in range(150)]
    pixels, labels = (np.stack(each) for each in zip(*drawn, strict=True))
    figures = reader.accuracy(reader.read(models.load_reader("judge"), to_pixels(pixels)), labels)
    assert figures["state"] >= least and figures["colour"] >= least, figures


def test_texts_and_pictures_find_each_other() -> None:
    """Of 16 captions, most pictures are nearest to their own."""
    _needs("image_encoder.safetensors", "text_encoder.safetensors")
    from pit_core.miniature.tokenizer import WordTokenizer

    shown = [world_picture(SEED, index) for index in range(16)]
    encoder = load_image_encoder(WEIGHTS / "image_encoder.safetensors", dtype=torch.float32)
    _, image = encoder(models.clip_pixels(to_pixels(np.stack([picture.draw() for picture in shown]))))
    ids = WordTokenizer(models.TEXT_LENGTH)([picture.caption() for picture in shown])
    with torch.no_grad():
        _, text = models.encode_text(models.load_text_encoder(WEIGHTS / "text_encoder.safetensors"), ids)
    likeness = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T
    assert (likeness.argmax(1) == torch.arange(16)).float().mean() >= 0.8


@pytest.fixture(scope="module")
def stack() -> Stack:
    _needs(*STACK_FILES, "reader_judge.safetensors")
    return models.load_stack()


def test_concepts_keep_the_parts_that_were_given(stack: Stack) -> None:
    cases = concept_cases(16, SEED)
    jobs = [Job(case.parts, [index]) for index, case in enumerate(cases)]
    images = [made[0].image for made in make_many(stack, jobs, PriorSettings(), stack.defaults)]
    pixels = to_pixels(np.stack([np.asarray(image) for image in images]))
    readings = reader.read(models.load_reader("judge"), pixels)
    kept = readings.kept([case.critter for case in cases], [case.given for case in cases])
    assert kept.mean() >= 0.8, f"{kept.mean():.2f} of {len(kept)} parts kept"
    assert readings.valid().mean() >= 0.8, f"{readings.valid().mean():.2f} valid"
