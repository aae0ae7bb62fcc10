"""`pit diptych` with folders of tiny Flux models, and the miniature's Flux out of its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_flux
import torch
from PIL import Image
from torch import nn

from pit_core.errors import PitError
from pit_core.files import save_tensors, sha256_of
from pit_core.miniature import flux_models, flux_stack, models
from pit_core.miniature.tokenizer import WordTokenizer

Run = Callable[..., tuple[int, str, str]]

SIZES = {
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": tiny_flux.TEXT,
    "pooled_projection_dim": tiny_flux.POOLED,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}
SAID = ["--subject", "a cat", "--prompt", "a cat at sea", "--size", 32, "--steps", 1]


def _flux(folder: Path, inputs: int) -> Path:
    from diffusers import FluxTransformer2DModel

    tiny_flux.save(folder)
    torch.manual_seed(0)
    flux_models.build_flux_vae().save_pretrained(folder / "vae")
    transformer = FluxTransformer2DModel(**SIZES, in_channels=inputs, out_channels=64, num_single_layers=1)
    transformer.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def fill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _flux(tmp_path_factory.mktemp("fill"), 384)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _flux(tmp_path_factory.mktemp("dev"), 64)


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import FluxControlNetModel

    folder = tmp_path_factory.mktemp("controlnet")
    model: Any = FluxControlNetModel(**SIZES, in_channels=64, num_single_layers=0)
    model.controlnet_x_embedder = nn.Linear(68, 16)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cat.png")
    Image.fromarray(noise[::-1].copy()).save(folder / "room.png")
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[10:30, 10:40] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:20]).save(folder / "small.png")
    return folder


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_fill_writes_picture_canvas_sheet_and_record(
    run: Run, fill: Path, pictures: Path, tmp_path: Path
) -> None:
    given = ["--image", pictures / "cat.png", "--mask", pictures / "mask.png", "--flux", fill]
    code, said, errors = run("diptych", *given, *SAID, "--out", tmp_path)
    assert code == 0, errors
    assert "001-picture.png" in said
    names = ["001-canvas.png", "001-contact-sheet.png", "001-picture.png", "001-record.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    canvas = _pixels(tmp_path / names[0])
    assert canvas.shape == (48, 96, 3)
    assert np.array_equal(_pixels(tmp_path / names[2]), canvas[8:40, 56:88])
    record = json.loads((tmp_path / names[3]).read_text("utf-8"))
    assert record["settings"]["strength"] == 1.3 and record["model"]["files"].keys() == {"flux"}
    assert record["jobs"][0]["text"].startswith("A diptych") and "mask" in record["jobs"][0]


def test_an_edit_keeps_every_pixel_outside_its_mask(
    run: Run, dev: Path, controlnet: Path, pictures: Path, tmp_path: Path
) -> None:
    given = ["--image", pictures / "cat.png", "--target", pictures / "room.png", "--mode", "edit"]
    models_ = ["--edit-mask", pictures / "mask.png", "--flux", dev, "--controlnet", controlnet]
    code, _, errors = run("diptych", *given, *models_, *SAID, "--out", tmp_path)
    assert code == 0, errors
    made, room = _pixels(tmp_path / "001-picture.png"), _pixels(pictures / "room.png")
    inside = np.asarray(Image.open(pictures / "mask.png")) > 0
    assert np.array_equal(made[~inside], room[~inside]) and not np.array_equal(made[inside], room[inside])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--mode", "style", "--mask", "mask.png"], "leave out --mask"),
        (["--mask", "small.png"], "make masks of the picture's size"),
        (["--mode", "edit", "--target", "room.png"], "--edit-mask"),
        (["--controlnet", "."], "name its diffusers folder with --flux"),
        (["--size", "40"], "multiple of 16"),
        (["--strength", "-1"], "strength is a number of 0 or more"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    run: Run, pictures: Path, tmp_path: Path, options: list[str], sentence: str
) -> None:
    paths = [pictures / word if word.endswith(".png") else word for word in options]
    arguments = ["--image", pictures / "cat.png", *SAID, *paths, "--out", tmp_path / "out"]
    code, _, errors = run("diptych", *arguments)
    assert code == 2 and sentence in errors, errors
    assert not (tmp_path / "out").exists()


def test_flux_without_fill_or_controlnet_is_refused(
    run: Run, dev: Path, pictures: Path, tmp_path: Path
) -> None:
    code, _, errors = run("diptych", "--image", pictures / "cat.png", *SAID, "--flux", dev, "--out", tmp_path)
    assert code == 2 and "take Flux Fill" in errors and not list(tmp_path.iterdir())


def test_the_miniatures_flux_is_its_files(tmp_path: Path) -> None:
    with pytest.raises(PitError, match="missing"):
        flux_stack.load_flux(tmp_path)
    text = models.build_text_encoder(len(WordTokenizer(models.TEXT_LENGTH)))
    flux_models.build_flux_vae().save_pretrained(tmp_path / "flux_vae")
    flux_models.build_fill().save_pretrained(tmp_path / "flux_fill")
    save_tensors(tmp_path / "text_encoder.safetensors", text.state_dict(), {})
    files = {name: {"sha256": sha256_of(tmp_path / name)} for name in flux_stack.FILES}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}), "utf-8")
    model, hashes = flux_stack.load_flux(tmp_path)
    assert set(hashes) == set(flux_stack.FILES)
    assert model.encode(["a critter"])[0].shape == (1, models.TEXT_LENGTH, models.TEXT_WIDTH)
    assert model.pipe.transformer.config.in_channels == 384
