"""The miniature's models: their sizes, the conventions of their families, and the checks on loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pit_core.errors import PitError
from pit_core.files import save_tensors, sha256_of
from pit_core.ip_adapter.adapter import new_ip_adapter
from pit_core.ip_adapter.encode import ImageEncoder, null_pixels
from pit_core.miniature import models
from pit_core.miniature.batches import to_pixels
from pit_core.miniature.export import LIMIT
from pit_core.miniature.tokenizer import WordTokenizer

COMFYUI_GROUPS = 32  # ComfyUI's norms have 32 groups, whatever a model was trained with


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return models.build_unet().eval()


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    return models.build_vae().eval()


@pytest.fixture(scope="module")
def image_encoder() -> Any:
    torch.manual_seed(0)
    return models.build_image_encoder().eval()


def _text_encoder() -> Any:
    return models.build_text_encoder(len(WordTokenizer(models.TEXT_LENGTH)))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# sizes


def test_the_first_half_fits_the_budget(unet: Any, vae: Any, image_encoder: Any) -> None:
    """In fp16; the models of the other methods have to fit into the rest."""
    adapter = new_ip_adapter(unet, models.build_resampler())
    sizes = {
        "unet": _count(unet),
        "vae": _count(vae),
        "image encoder": _count(image_encoder),
        "text encoder": _count(_text_encoder()),
        "adapter": _count(adapter),
        "prior": _count(models.build_prior()),
        "reader": _count(models.build_reader("judge")),
    }
    total = 2 * sum(sizes.values())
    assert total < LIMIT, {name: f"{2 * size / 1e6:.2f} MB" for name, size in sizes.items()}


def test_latents_are_an_eighth_of_the_picture(vae: Any) -> None:
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 128, 128)).latent_dist.mode()
        assert latents.shape == (1, 4, 16, 16)
        assert vae.decode(latents).sample.shape == (1, 3, 128, 128)
    assert models.build_vae(16).config.latent_channels == 16


def test_the_image_encoder_makes_65_tokens_and_the_resampler_16(image_encoder: Any) -> None:
    with torch.no_grad():
        features = models.image_features(image_encoder, torch.zeros(2, 3, 128, 128))
        assert features.shape == (2, 65, models.VISION_WIDTH)
        assert models.build_resampler()(features).shape == (2, 16, models.TEXT_WIDTH)


def test_the_unet_has_sdxls_plan(unet: Any) -> None:
    """No attention at full resolution, attention on both lower levels, and text and time conditioning."""
    config = unet.config
    assert config.down_block_types == ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    assert config.layers_per_block == 2 and config.addition_embed_type == "text_time"
    added = {"text_embeds": torch.zeros(1, models.PROJECTION), "time_ids": torch.zeros(1, 6)}
    text = torch.zeros(1, models.TEXT_LENGTH, models.TEXT_WIDTH)
    with torch.no_grad():
        out = unet(torch.zeros(1, 4, 16, 16), 5, text, added_cond_kwargs=added).sample
    assert out.shape == (1, 4, 16, 16)


def test_every_norm_can_have_comfyuis_groups(unet: Any, vae: Any) -> None:
    for model in (unet, vae, models.build_vae(16)):
        norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
        assert norms and all(norm.num_channels % COMFYUI_GROUPS == 0 for norm in norms)


def test_attention_heads_are_16_wide(unet: Any) -> None:
    """What ComfyUI's UNet is told as num_head_channels."""
    heads = {
        (module.to_q.out_features // module.heads)
        for module in unet.modules()
        if hasattr(module, "to_q") and hasattr(module, "heads")
    }
    assert heads == {16}


# conventions


def test_normalised_latents_are_standard_and_decode_as_before() -> None:
    torch.manual_seed(3)
    vae = models.build_vae().eval().requires_grad_(False)
    vae.quant_conv.bias.copy_(torch.randn(8))  # an untrained VAE's latents have mean 0
    pixels = torch.rand(6, 3, 128, 128) * 2 - 1
    before = vae.encode(pixels).latent_dist
    decoded = vae.decode(before.mode()).sample
    mean, std = before.mode().mean(dim=(0, 2, 3)), before.mode().std(dim=(0, 2, 3))
    models.normalise_latents(vae, mean, std, models.SDXL_LATENT_SCALE)
    after = vae.encode(pixels).latent_dist
    scaled = after.mode() * models.SDXL_LATENT_SCALE
    assert scaled.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (scaled.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
    assert (vae.decode(after.mode()).sample - decoded).abs().max() < 1e-4
    spread = after.std / before.std * models.SDXL_LATENT_SCALE * std[:, None, None]
    assert (spread - 1).abs().max() < 1e-3, "the posterior's deviation is scaled as its mean"


def test_a_shift_is_folded_in_as_the_flux_family_wants_it() -> None:
    torch.manual_seed(4)
    vae = models.build_vae(16).eval().requires_grad_(False)
    pixels = torch.rand(4, 3, 128, 128) * 2 - 1
    latents = vae.encode(pixels).latent_dist.mode()
    decoded = vae.decode(latents).sample
    scale, shift = 0.3611, 0.1159
    models.normalise_latents(vae, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)), scale, shift)
    after = vae.encode(pixels).latent_dist.mode()
    standard = (after - shift) * scale
    assert standard.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (standard.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
    assert (vae.decode(after).sample - decoded).abs().max() < 1e-4


def test_features_in_training_are_those_in_use(image_encoder: Any) -> None:
    """The training's pixels and the encoder's own preprocessing lead to the same hidden_states[-2]."""
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    with torch.no_grad():
        trained = models.image_features(image_encoder, to_pixels(picture[None]))
        pixels = models.clip_pixels(to_pixels(picture[None]))
        hidden = image_encoder(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(trained, hidden[-2]) and len(hidden) == 6
    encoder = ImageEncoder(image_encoder)
    used, _ = encoder(encoder.preprocess([Image.fromarray(picture)]))
    assert (trained - used).abs().max() < 1e-4


def test_the_grey_null_is_zero_to_the_encoder() -> None:
    assert models.clip_pixels(models.grey()).abs().max() < 1e-5
    assert torch.allclose(
        models.clip_pixels(models.grey()), null_pixels("grey", size=models.CANVAS), atol=1e-5
    )


def test_text_is_read_as_sdxl_reads_its_second_encoder() -> None:
    torch.manual_seed(0)
    encoder = _text_encoder().eval()
    ids = WordTokenizer(models.TEXT_LENGTH)(["a red round critter"])
    with torch.no_grad():
        text, pooled = models.encode_text(encoder, ids)
        out = encoder(ids, output_hidden_states=True)
    assert torch.equal(text, out.hidden_states[-2]) and torch.equal(pooled, out.text_embeds)
    assert text.shape == (1, models.TEXT_LENGTH, models.TEXT_WIDTH) and pooled.shape == (1, models.PROJECTION)


# loading


def _with_manifest(folder: Path) -> Path:
    """A folder whose manifest lists all its files."""
    files = {
        path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def test_readers_and_text_encoder_come_back_from_fp16_files(tmp_path: Path) -> None:
    torch.manual_seed(1)
    for name in ("tuning", "judge"):
        model = models.build_reader(name)
        save_tensors(
            tmp_path / f"reader_{name}.safetensors", {k: v.half() for k, v in model.state_dict().items()}
        )
        loaded = models.load_reader(name, tmp_path)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        worst = max(
            float((a - b).detach().abs().max())
            for a, b in zip(model.parameters(), loaded.parameters(), strict=True)
        )
        assert worst < 1e-3
    text = _text_encoder()
    save_tensors(tmp_path / "text.safetensors", {k: v.half() for k, v in text.state_dict().items()})
    assert next(models.load_text_encoder(tmp_path / "text.safetensors").parameters()).dtype == torch.float32


def test_another_models_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    save_tensors(tmp_path / "reader_judge.safetensors", {"weight": torch.zeros(2)})
    with pytest.raises(PitError, match="'reader_judge.safetensors' does not have the expected tensors"):
        models.load_reader("judge", tmp_path)
    with pytest.raises(PitError, match="There is no file"):
        models.load_reader("tuning", tmp_path)


def test_missing_weights_are_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(PitError, match="weights are missing"):
        models.load_stack(tmp_path)
    (tmp_path / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(PitError, match="lacks its file 'vae/diffusion_pytorch_model.safetensors'"):
        models.load_stack(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', "{"])
def test_a_damaged_manifest_is_told_in_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(PitError, match="manifest.json' is damaged"):
        models.read_manifest(tmp_path)


def test_changed_and_lost_files_are_noticed(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_tensors(tmp_path / name, {"weight": torch.ones(3)})
    _with_manifest(tmp_path)
    assert set(models.check_weights(tmp_path)) == {"a.safetensors", "b.safetensors"}
    assert set(models.check_weights(tmp_path, ["a.safetensors"])) == {"a.safetensors"}
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(PitError, match="'a.safetensors' is damaged"):
        models.check_weights(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(PitError, match="lacks its file 'b.safetensors'"):
        models.check_weights(tmp_path)
