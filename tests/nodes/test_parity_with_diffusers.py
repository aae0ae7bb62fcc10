"""One UNet, one noise, one list of sigmas: ComfyUI with our nodes against diffusers with our processor."""

import json
from pathlib import Path
from typing import Any

import benches
import pytest
import real_host
import torch
from torch import Tensor

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(600)]

TIMES = [999, 800, 600, 400, 200, 50]
SCALE = 0.13025  # of SDXL's latents, which the host takes off in the end
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain at guidance 1": {"cfg": 1.0},
    "tokens": {"weight": 1.0},
    "tokens at guidance 1": {"weight": 0.8, "cfg": 1.0},
    "middle block only": {"schedule": "layer map", "layer_map": "4:1"},
    "style": {"schedule": "style"},
    "masked": {"weight": 1.0, "masked": True},
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Case -> the largest difference over the largest number."""
    real_host.find()
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("parity")
    expected = _with_diffusers(folder)
    script = Path(benches.__file__).with_name("host_parity.py")
    done = real_host.run(str(script), str(folder), timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    from pit_core.files import load_tensors

    found, _ = load_tensors(folder / "results.safetensors")
    errors = {
        name: float((found[name] * SCALE - value).abs().max() / value.abs().max())
        for name, value in expected.items()
    }
    tokens, middle = (
        float((expected[name] - expected["plain"]).abs().max() / expected["plain"].abs().max())
        for name in ("tokens", "middle block only")
    )
    print(f"relative errors {errors}; what tokens change: {tokens:.3g}, {middle:.3g}")  # noqa: T201
    assert min(tokens, middle) > 0.01, "tokens that change nothing prove nothing"
    return errors


@pytest.mark.parametrize("case", CASES)
def test_the_pictures_agree(errors: dict[str, float], case: str) -> None:
    assert errors[case] < 1e-3


@torch.no_grad()
def _with_diffusers(folder: Path) -> dict[str, Tensor]:
    from diffusers import UNet2DConditionModel

    from pit_core.files import save_tensors
    from pit_core.ip_adapter.adapter import IPAdapter, IPLayers
    from pit_core.ip_adapter.checkpoint import save_ip_adapter
    from pit_core.ip_adapter.layers import layers_of_unet
    from pit_core.ip_adapter.processor import install_ip_adapter
    from pit_core.ip_adapter.resampler import Resampler
    from pit_core.ip_adapter.weights import layer_weights

    extra = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "use_linear_projection": True,
        "sample_size": 16,
    }
    unet = benches.fill(UNet2DConditionModel(**benches.UNET, **extra))
    layers = layers_of_unet(unet)
    projector = Resampler(64, 1, 64, 1, benches.TOKENS, benches.VISION, benches.CONTEXT)
    weights = IPLayers([layer.width for layer in layers], benches.CONTEXT)
    adapter = benches.fill(IPAdapter(projector, weights))
    for parameter in adapter.layers.parameters():
        parameter.mul_(3)  # so that the tokens are seen in so small a model
    given = _inputs()
    (folder / "unet.json").write_text(json.dumps(benches.UNET), "utf-8")
    (folder / "cases.json").write_text(json.dumps(CASES), "utf-8")
    save_tensors(folder / "unet.safetensors", unet.state_dict())
    save_ip_adapter(folder / "adapter.safetensors", adapter)
    save_tensors(folder / "inputs.safetensors", given)

    context = install_ip_adapter(unet, adapter)
    expected = {}
    for name, settings in CASES.items():
        context.clear()
        if settings.keys() - {"cfg"}:
            spread = layer_weights(
                layers,
                settings.get("schedule", "even"),
                settings.get("weight", 1.0),
                layer_map=settings.get("layer_map", ""),
            )
            mask = given["mask"] if settings.get("masked") else None
            context.add(
                given["tokens"], given["null"], weight={n: w.weight for n, w in spread.items()}, mask=mask
            )
        context.order = ("uncond", "cond")
        expected[name] = _sampled(unet, given, settings.get("cfg", 4.0))
    return expected


def _inputs() -> dict[str, Tensor]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    sigmas = ((1 - alphas) / alphas).sqrt()
    shapes = {
        "tokens": (2, benches.TOKENS, benches.CONTEXT),
        "null": (1, benches.TOKENS, benches.CONTEXT),
        "cond": (1, 6, benches.CONTEXT),
        "uncond": (1, 6, benches.CONTEXT),
        "cond_pooled": (1, benches.POOLED),
        "uncond_pooled": (1, benches.POOLED),
        "noise": (2, 4, 16, 16),
    }
    made = {name: benches.randn(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    mask = torch.linspace(0, 1, 24).expand(1, 20, 24)
    return {**made, "mask": mask, "sigmas": torch.cat([sigmas[TIMES], torch.zeros(1)]).float()}


def _sampled(unet: Any, given: dict[str, Tensor], cfg: float) -> Tensor:
    """Euler's method on epsilon predictions, both halves in one batch, the unconditional one first."""
    sigmas, rows = given["sigmas"].double(), given["noise"].shape[0]
    x = given["noise"].double() * (1 + sigmas[0] ** 2).sqrt()
    text, pooled = (
        torch.cat([given[f"{half}{suffix}"].repeat_interleave(rows, 0) for half in ("uncond", "cond")])
        for suffix in ("", "_pooled")
    )
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2 * rows)}
    for i, t in enumerate(TIMES):
        scaled = (x / (1 + sigmas[i] ** 2).sqrt()).float()
        out = unet(torch.cat([scaled, scaled]), t, text, added_cond_kwargs=added).sample.double()
        uncond, cond = out.chunk(2)
        x = x + (sigmas[i + 1] - sigmas[i]) * (uncond + cfg * (cond - uncond))
    return x.float()
