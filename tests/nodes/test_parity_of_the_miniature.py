"""The shipped miniature, from a picture and a prompt to latents: ComfyUI's KSampler against diffusers.

Each side encodes prompt and picture by its own models; sigmas and noise are those that KSampler chose. The
adapter is the shipped one, or one of random weights as long as none is shipped.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benches
import numpy as np
import pytest
import real_host
import torch
from torch import Tensor

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(600)]

ADAPTER = "ip_adapter_plus.safetensors"
CASES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "tokens": {},
    "middle block only": {"schedule": "layer map", "layer_map": "4:1"},
    "plain once more": None,
}
"""Settings of "Apply IP tokens"; None for the model alone."""
RUN = {
    "shape": [2, 4, 16, 16],
    "seed": 7,
    "steps": 10,
    "cfg": 3.0,
    "sampler": "euler",
    "scheduler": "normal",
    "positive": "a red critter with blue wings, on the beach",
    "negative": "",
    "cases": CASES,
}
SCALE = 0.13025  # of SDXL's latents, which KSampler takes off in the end


@pytest.fixture(scope="module")
def found(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    """Case -> (ComfyUI's latents, diffusers')."""
    pytest.importorskip("diffusers")
    from pit_core.files import load_tensors, save_tensors
    from pit_core.miniature import models
    from pit_core.miniature.critters import Critter, Part, render

    if not (models.WEIGHTS / "unet" / "diffusion_pytorch_model.safetensors").is_file():
        pytest.skip("the miniature has not been trained here")
    folder = tmp_path_factory.mktemp("parity")
    critter = Critter(body=Part("box", "blue"), eyes=Part("round", "orange"), ears=Part("bunny", "cyan"))
    picture = render(critter, 128).convert("RGB")
    save_tensors(folder / "inputs.safetensors", {"picture": torch.from_numpy(np.array(picture))[None]})
    _place_adapter(folder / "adapter.safetensors")
    (folder / "run.json").write_text(json.dumps(RUN), "utf-8")
    script = Path(benches.__file__).with_name("host_parity_miniature.py")
    done = real_host.run(comfyui, str(script), str(folder), timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    results, _ = load_tensors(folder / "results.safetensors")
    expected = _with_diffusers(folder, picture, results["sigmas"], results["noise"])
    return {name: (results[name] * SCALE, value) for name, value in expected.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_latents_agree(found: dict[str, tuple[Tensor, Tensor]], case: str) -> None:
    error = _difference(*found[case])
    print(f"{case}: relative error {error:.2g}")  # noqa: T201
    assert error < 1e-3


def test_the_cases_differ(found: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Tokens that change nothing prove nothing."""
    _, plain = found["plain"]
    changes = {name: _difference(found[name][1], plain) for name in ("tokens", "middle block only")}
    print({name: f"{change:.2g}" for name, change in changes.items()})  # noqa: T201
    assert min(changes.values()) > 0.01


def test_the_base_is_the_same_bit_for_bit_afterwards(found: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert torch.equal(found["plain"][0], found["plain once more"][0])


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _place_adapter(path: Path) -> None:
    from pit_core.ip_adapter.adapter import IPAdapter, IPLayers
    from pit_core.ip_adapter.checkpoint import save_ip_adapter
    from pit_core.ip_adapter.layers import layers_of_config
    from pit_core.miniature import models

    if (models.WEIGHTS / ADAPTER).is_file():
        shutil.copy(models.WEIGHTS / ADAPTER, path)
        return
    layers = layers_of_config(json.loads((models.WEIGHTS / "unet/config.json").read_text("utf-8")))
    weights = IPLayers([layer.width for layer in layers], layers[0].context)
    save_ip_adapter(path, benches.fill(IPAdapter(models.build_resampler(), weights)))


# diffusers


@torch.no_grad()
def _with_diffusers(folder: Path, picture: Any, sigmas: Tensor, noise: Tensor) -> dict[str, Tensor]:
    from diffusers import UNet2DConditionModel

    from pit_core.ip_adapter.checkpoint import load_ip_adapter
    from pit_core.ip_adapter.encode import encode_tokens, load_image_encoder, null_tokens
    from pit_core.ip_adapter.processor import install_ip_adapter
    from pit_core.miniature import models

    adapter = load_ip_adapter(folder / "adapter.safetensors", dtype=torch.float32)
    encoder = load_image_encoder(models.WEIGHTS / "image_encoder.safetensors", dtype=torch.float32)
    tokens = encode_tokens(encoder, adapter, [picture])
    null = null_tokens(encoder, adapter, "grey")
    unet = UNet2DConditionModel.from_pretrained(models.WEIGHTS / "unet", torch_dtype=torch.float32)
    context = install_ip_adapter(unet)
    context.order = ("uncond", "cond")
    source = context.add(tokens, null, adapter=adapter)
    found = {}
    for name, settings in CASES.items():
        source.weight = _weights(unet, settings)
        found[name] = _sampled(_guided(unet), sigmas, noise)
    return found


def _weights(unet: Any, settings: dict[str, Any] | None) -> dict[int, float]:
    from pit_core.ip_adapter.layers import layers_of_unet
    from pit_core.ip_adapter.weights import layer_weights

    spread = {} if settings is None else layer_weights(layers_of_unet(unet), **settings)
    return {n: each.weight for n, each in spread.items()}


def _guided(unet: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """(scaled latents, time) -> epsilon, both halves in one batch, the unconditional one first."""
    from pit_core.miniature import models

    encode = models.prompt_encoder(models.load_text_encoder(models.WEIGHTS / "text_encoder.safetensors"))
    text, pooled = encode([RUN["negative"], RUN["positive"]])
    rows = RUN["shape"][0]
    text, pooled = text.repeat_interleave(rows, 0), pooled.repeat_interleave(rows, 0)
    sizes = torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2 * rows)
    options = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}

    def predict(x: Tensor, t: Tensor) -> Tensor:
        uncond, cond = unet(torch.cat([x, x]), t, text, **options).sample.chunk(2)
        return uncond + RUN["cfg"] * (cond - uncond)

    return predict


def _sampled(predict: Callable[[Tensor, Tensor], Tensor], sigmas: Tensor, noise: Tensor) -> Tensor:
    """diffusers' own Euler scheduler at KSampler's sigmas; ComfyUI takes the nearest whole time of each."""
    from pit_core.miniature import models

    scheduler = models.build_scheduler()
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    scheduler.timesteps = scheduler.timesteps.round()
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x
