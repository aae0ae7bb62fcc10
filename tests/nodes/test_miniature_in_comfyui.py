"""The miniature's models in the host's classes give what they give in diffusers and transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import benches
import pytest
import real_host
import torch
from torch import Tensor

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = "a red critter with blue wings, on the beach"
NAMES = ["text", "pooled", "states", "embedding", "own_states", "decoded", "encoded", "predicted"]


def test_without_its_weights_it_says_so(bench: benches.Bench, tmp_path: Path) -> None:
    with pytest.raises(bench.error, match="weights are missing"):
        bench.part("nodes.miniature").load_miniature(tmp_path)


@pytest.fixture(scope="module")
def results(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (found in the host, expected)."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("miniature")
    expected = _with_diffusers(folder)
    script = Path(benches.__file__).with_name("host_miniature.py")
    done = real_host.run(comfyui, str(script), str(folder), timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    from pit_core.files import load_tensors

    found, _ = load_tensors(folder / "results.safetensors")
    assert found["weighted"].shape == found["text"].shape and torch.isfinite(found["weighted"]).all()
    return {name: (found[name], expected[name]) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_agree(results: dict[str, tuple[Tensor, Tensor]], name: str) -> None:
    found, expected = results[name]
    assert found.shape == expected.shape
    error = float((found - expected).abs().max() / expected.abs().max())
    print(f"{name}: relative error {error:.2g}")  # noqa: T201
    assert error < 1e-3


@torch.no_grad()
def _with_diffusers(folder: Path) -> dict[str, Tensor]:
    from diffusers import AutoencoderKL

    from pit_core.files import save_tensors
    from pit_core.ip_adapter.encode import load_image_encoder
    from pit_core.miniature import models

    weights = folder / "weights"
    if not (models.WEIGHTS / "vae").is_dir():
        pytest.skip("the miniature has not been trained here")
    shutil.copytree(models.WEIGHTS, weights)
    unet = benches.fill(models.build_unet())
    unet.save_pretrained(weights / "unet")  # another's weights do for a test of the layout
    picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(3))
    encoder = load_image_encoder(weights / "image_encoder.safetensors", dtype=torch.float32)
    added = benches.randn((1, unet.config.projection_class_embeddings_input_dim - 6 * 256), 4)
    given = {
        "picture": picture,
        "pixels": encoder.preprocess(picture),
        "latents": benches.randn((1, 4, 16, 16), 1),
        "context": benches.randn((1, 7, unet.config.cross_attention_dim), 2),
        "times": torch.tensor([500.0]),
    }
    embedded = unet.add_time_proj(torch.tensor([128.0, 128, 0, 0, 128, 128])).flatten()[None]
    given["added"] = torch.cat([added, embedded], dim=1)
    save_tensors(folder / "inputs.safetensors", given, {"prompt": PROMPT})
    vae = AutoencoderKL.from_pretrained(weights / "vae").float()
    text = models.prompt_encoder(models.load_text_encoder(weights / "text_encoder.safetensors"))([PROMPT])
    states, embedding = encoder(given["pixels"])
    condition: dict[str, Any] = {
        "text_embeds": added,
        "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]),
    }
    return {
        "text": text[0],
        "pooled": text[1],
        "states": states,
        "embedding": embedding,
        "own_states": states,
        "decoded": (vae.decode(given["latents"]).sample.movedim(1, -1) / 2 + 0.5).clamp(0, 1),
        "encoded": vae.encode(picture.movedim(-1, 1) * 2 - 1).latent_dist.mean,
        "predicted": unet(
            given["latents"], given["times"], given["context"], added_cond_kwargs=condition
        ).sample,
    }


def test_the_shipped_manifest_is_json() -> None:
    path = real_host.ROOT / "pit_core/miniature/weights/manifest.json"
    if not path.is_file():
        pytest.skip("the miniature has not been trained here")
    assert json.loads(path.read_text("utf-8"))["files"]
