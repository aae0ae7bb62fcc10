"""The miniature Flux in the host's classes gives what diffusers' FluxFillPipeline gives."""

from pathlib import Path
from typing import Any

import benches
import pytest
import real_host
import torch
from torch import Tensor

PROMPT = "A diptych with two side-by-side images of same critter. On the left, a photo of a critter."
NAMES = ["text", "pooled", "encoded", "decoded", "predicted", "sampled"]
SEED, STEPS = 5, 4


def test_without_its_weights_it_says_so(bench: benches.Bench, tmp_path: Path) -> None:
    with pytest.raises(bench.error, match="miniature Flux's weights are missing"):
        bench.part("nodes.miniature").load_miniature_flux(tmp_path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The folder with weights and inputs, and what diffusers makes of them."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("miniature-flux")
    return folder, _with_diffusers(folder)


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_numbers_agree(comfyui: Path, expected: tuple[Path, dict[str, Tensor]]) -> None:
    folder, numbers = expected
    script = Path(benches.__file__).with_name("host_miniature_flux.py")
    done = real_host.run(comfyui, str(script), str(folder), timeout=1000)
    assert done.returncode == 0, done.stderr[-4000:]
    from pit_core.files import load_tensors

    found, _ = load_tensors(folder / "results.safetensors")
    errors = {name: _error(found[name], numbers[name]) for name in NAMES}
    print(errors)  # noqa: T201
    assert max(errors.values()) < 1e-3


def _error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def _with_diffusers(folder: Path) -> dict[str, Tensor]:
    from pit_core.files import save_tensors
    from pit_core.miniature import flux_models, models
    from pit_core.miniature.tokenizer import WordTokenizer

    weights, prompt = folder / "weights", PROMPT
    vae = benches.fill(flux_models.build_flux_vae())
    flux_models.normalise_flux_latents(vae, torch.ones(16))
    fill = benches.fill(flux_models.build_fill())
    text = benches.fill(models.build_text_encoder(len(WordTokenizer(models.TEXT_LENGTH))))
    vae.save_pretrained(weights / "flux_vae")
    fill.save_pretrained(weights / "flux_fill")
    save_tensors(weights / "text_encoder.safetensors", text.state_dict(), {})

    generator = torch.Generator().manual_seed(3)
    canvas, mask = torch.rand(1, 128, 256, 3, generator=generator), torch.zeros(1, 128, 256)
    mask[..., 128:] = 1
    noise = torch.randn(1, 16, 16, 32, generator=torch.manual_seed(SEED))  # as the host draws it
    latents = benches.randn((1, 16, 16, 32), 2)
    given = {"canvas": canvas, "mask": mask, "noise": noise, "latents": latents, "times": torch.tensor([0.6])}
    save_tensors(folder / "inputs.safetensors", given, {"prompt": prompt})
    context, pooled = models.prompt_encoder(text)([prompt])

    pipe: Any = flux_models.fill_pipeline(vae, fill)
    pipe.set_progress_bar_config(disable=True)
    pixels = canvas.movedim(-1, 1) * 2 - 1
    known = flux_models.pack(flux_models.encode_flux(vae, pixels * (1 - mask[:, None])))
    velocity = fill(
        hidden_states=torch.cat([flux_models.pack(noise), known, flux_models.pack_mask(mask)], -1),
        timestep=given["times"],
        guidance=torch.tensor([30.0]),
        pooled_projections=pooled,
        encoder_hidden_states=context,
        img_ids=flux_models.image_ids(8, 16),
        txt_ids=torch.zeros(context.shape[1], 3),
    ).sample
    sampled = pipe(
        image=canvas.movedim(-1, 1),
        mask_image=mask[:, None],
        prompt_embeds=context,
        pooled_prompt_embeds=pooled,
        height=128,
        width=256,
        guidance_scale=30.0,
        num_inference_steps=STEPS,
        latents=flux_models.pack(noise),
        output_type="latent",
    ).images
    unpacked = [
        pipe._unpack_latents(tokens, 128, 256, pipe.vae_scale_factor) for tokens in (velocity, sampled)
    ]
    return {
        "text": context,
        "pooled": pooled,
        "encoded": vae.encode(pixels).latent_dist.mean,
        "decoded": (vae.decode(latents).sample.movedim(1, -1) / 2 + 0.5).clamp(0, 1),
        "predicted": unpacked[0],
        "sampled": unpacked[1] / flux_models.FLUX_LATENT_SCALE + flux_models.FLUX_LATENT_SHIFT,
    }
