"""One UNet, one noise, one list of sigmas: ComfyUI with our nodes against diffusers with our processor.

The processor itself is held to published numbers elsewhere; LoRAs are merged here by hand, the ControlNet is
diffusers' own.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benches
import pytest
import real_host
import torch
from torch import Tensor

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(900)]

TIMES = [999, 600, 300, 50]
SCALES = {"sdxl": 0.13025, "sd15": 0.18215}  # of the latents, which the host takes off in the end
TWO = [{"adapter": "a", "masked": True}, {"adapter": "b", "weight": 2.0, "start_at": 0.3}]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain at guidance 1": {"cfg": 1.0},
    "tokens": {"apply": [{}]},
    "tokens at guidance 1": {"apply": [{"weight": 0.8}], "cfg": 1.0},
    "middle block only": {"apply": [{"schedule": "layer map", "layer_map": "4:1"}]},
    "style": {"apply": [{"schedule": "style"}]},
    "masked": {"apply": [{"masked": True}]},
    "some steps": {"apply": [{"start_at": 0.3, "end_at": 0.9}]},
    "two adapters": {"apply": TWO},
    "two adapters the other way round": {"apply": TWO[::-1]},
    "image to image": {"apply": [{}], "first": 1},
    "inpainting": {"apply": [{}], "first": 1, "inpaint": True},
    "a fine-tuned base": {"on": "tuned", "apply": [{}]},
    "a LoRA": {"lora": True, "apply": [{}]},
    "a ControlNet": {"control": True, "apply": [{}]},
    "all of it": {
        "on": "tuned",
        "lora": True,
        "control": True,
        "apply": TWO,
        "first": 1,
        "inpaint": True,
    },
    "SD1.5 plain": {"on": "sd15"},
    "SD1.5 with a Plus adapter": {"on": "sd15", "apply": [{"adapter": "plus", "masked": True}]},
    "SD1.5 with a base adapter": {"on": "sd15", "apply": [{"adapter": "base"}]},
    "plain once more": {},
}
"""on: the base model, else SDXL's. apply: settings of "Apply IP tokens". first: the step to begin with."""


@pytest.fixture(scope="module")
def found(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    """Case -> (ComfyUI's latents, diffusers')."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("parity")
    expected = _with_diffusers(folder)
    script = Path(benches.__file__).with_name("host_parity.py")
    done = real_host.run(comfyui, str(script), str(folder), timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    from pit_core.files import load_tensors

    results, _ = load_tensors(folder / "results.safetensors")
    scales = {name: SCALES["sd15" if case.get("on") == "sd15" else "sdxl"] for name, case in CASES.items()}
    return {name: (results[name] * scales[name], value) for name, value in expected.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_pictures_agree(found: dict[str, tuple[Tensor, Tensor]], case: str) -> None:
    error = _difference(*found[case])
    print(f"{case}: relative error {error:.2g}")  # noqa: T201
    assert error < 1e-3


def test_the_cases_differ(found: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Tokens that change nothing prove nothing."""
    expected = {name: value for name, (_, value) in found.items()}
    groups = [
        ["plain", "tokens", "middle block only", "style", "some steps", "masked", "two adapters"],
        ["tokens", "masked", "some steps", "a LoRA", "a ControlNet", "a fine-tuned base", "image to image"],
        ["image to image", "inpainting", "all of it"],
        ["masked", "two adapters"],
        ["SD1.5 plain", "SD1.5 with a Plus adapter", "SD1.5 with a base adapter"],
    ]
    for first, *others in groups:
        changes = {name: _difference(expected[name], expected[first]) for name in others}
        print(f"against {first}:", {name: f"{change:.2g}" for name, change in changes.items()})  # noqa: T201
        assert min(changes.values()) > 0.02


def test_the_base_is_the_same_bit_for_bit_afterwards(found: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert torch.equal(found["plain"][0], found["plain once more"][0])


def test_the_order_of_two_adapters_leaves_every_bit(found: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert torch.equal(found["two adapters"][0], found["two adapters the other way round"][0])


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# diffusers


@torch.no_grad()
def _with_diffusers(folder: Path) -> dict[str, Tensor]:
    from pit_core.files import save_tensors
    from pit_core.ip_adapter.checkpoint import save_ip_adapter

    given, bases = _inputs(), _bases()
    adapters = {
        "a": _adapter(bases["sdxl"], "a", benches.TOKENS),
        "b": _adapter(bases["sdxl"], "b", benches.TOKENS),
        "plus": _adapter(bases["sd15"], "plus", 16),
        "base": _adapter(bases["sd15"], "base", 4, plus=False),
    }
    control, lora = _control(bases["sdxl"]), _lora(bases["sdxl"])
    (folder / "cases.json").write_text(json.dumps(CASES), "utf-8")
    save_tensors(folder / "inputs.safetensors", given)
    for name, model in {**bases, "control": control}.items():
        save_tensors(folder / f"{name}.safetensors", model.state_dict())
    save_tensors(folder / "lora.safetensors", lora)
    for name, adapter in adapters.items():
        save_ip_adapter(folder / f"{name}.safetensors", adapter)
    expected = {}
    for name, case in CASES.items():
        unet = copy.deepcopy(bases[case.get("on", "sdxl")])
        if case.get("lora"):
            _merge(unet, lora)
        expected[name] = _sampled(unet, given, case, adapters, control if case.get("control") else None)
    return expected


def _bases() -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    sdxl = {**benches.UNET, **added, "use_linear_projection": True, "sample_size": 16}
    return {
        "sdxl": benches.fill(UNet2DConditionModel(**sdxl)),
        "tuned": benches.fill(UNet2DConditionModel(**sdxl), salt="tuned"),
        "sd15": benches.fill(UNet2DConditionModel(**benches.SD15, sample_size=16)),
    }


def _adapter(unet: Any, name: str, tokens: int, plus: bool = True) -> Any:
    from pit_core.ip_adapter.adapter import IPAdapter, IPLayers
    from pit_core.ip_adapter.layers import layers_of_unet
    from pit_core.ip_adapter.resampler import ImageProjection, Resampler

    layers = layers_of_unet(unet)
    width = layers[0].context
    projector = (
        Resampler(64, 1, 64, 1, tokens, benches.VISION, width)
        if plus
        else ImageProjection(benches.PROJECTION, width, tokens)
    )
    adapter = benches.fill(IPAdapter(projector, IPLayers([layer.width for layer in layers], width)), name)
    for parameter in adapter.layers.parameters():
        parameter.mul_(3)  # so that the tokens are seen in so small a model
    return adapter


def _control(unet: Any) -> Any:
    from diffusers import ControlNetModel

    return benches.fill(ControlNetModel.from_unet(unet), "control")


def _lora(unet: Any) -> dict[str, Tensor]:
    """Of rank 2, in kohya's format, on queries and outputs of every text cross-attention."""
    found = {}
    for seed, (name, weight) in enumerate(unet.named_parameters()):
        if ".attn2.to_q." in name or ".attn2.to_out.0.weight" in name:
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            rows, columns = weight.shape
            found[f"{key}.lora_up.weight"] = benches.randn((rows, 2), 1000 + seed)
            found[f"{key}.lora_down.weight"] = benches.randn((2, columns), 2000 + seed) / columns
            found[f"{key}.alpha"] = torch.tensor(1.0)
    return found


def _merge(unet: Any, lora: dict[str, Tensor]) -> None:
    for name, weight in unet.named_parameters():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.alpha" in lora:
            up, down = lora[f"{key}.lora_up.weight"], lora[f"{key}.lora_down.weight"]
            weight += lora[f"{key}.alpha"] / 2 * (up @ down)


def _inputs() -> dict[str, Tensor]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    sigmas = ((1 - alphas) / alphas).sqrt()
    shapes = {
        **{f"{name}_tokens": (2, benches.TOKENS, benches.CONTEXT) for name in ("a", "b")},
        **{f"{name}_null": (1, benches.TOKENS, benches.CONTEXT) for name in ("a", "b")},
        **{f"plus_{part}": (1 + (part == "tokens"), 16, 768) for part in ("tokens", "null")},
        **{f"base_{part}": (1 + (part == "tokens"), 4, 768) for part in ("tokens", "null")},
        **{f"sdxl_{half}": (1, 6, benches.CONTEXT) for half in ("cond", "uncond")},
        **{f"sd15_{half}": (1, 6, 768) for half in ("cond", "uncond")},
        **{f"{half}_pooled": (1, benches.POOLED) for half in ("cond", "uncond")},
        "noise": (2, 4, 16, 16),
        "latent": (2, 4, 16, 16),
    }
    made = {name: benches.randn(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    made["mask"] = torch.linspace(0, 1, 24).expand(1, 20, 24)
    made["noise_mask"] = torch.zeros(1, 1, 16, 16)
    made["noise_mask"][..., 5:] = 1
    made["hint"] = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(9))
    return {**made, "sigmas": torch.cat([sigmas[TIMES], torch.zeros(1)]).float()}


def _sampled(
    unet: Any, given: dict[str, Tensor], case: dict[str, Any], adapters: dict[str, Any], control: Any
) -> Tensor:
    """Euler's method on epsilon predictions; at the first step of all the noise is all there is."""
    family = "sd15" if case.get("on") == "sd15" else "sdxl"
    predict, at = _guided(unet, given, case, adapters, control), case.get("first", 0)
    sigmas, noise = given["sigmas"].double(), given["noise"].double()
    latent = given["latent"].double() * SCALES[family]
    open_ = given["noise_mask"].double() if case.get("inpaint") else torch.ones(1, dtype=torch.float64)
    x = noise * sigmas[at] + latent if at else noise * (1 + sigmas[0] ** 2).sqrt()
    for i in range(at, len(TIMES)):
        seen = x * open_ + (latent + noise * sigmas[i]) * (1 - open_)
        clean = seen - sigmas[i] * predict(seen / (1 + sigmas[i] ** 2).sqrt(), TIMES[i])
        clean = clean * open_ + latent * (1 - open_)
        x = x + (sigmas[i + 1] - sigmas[i]) * (x - clean) / sigmas[i]
    return x.float()


def _guided(
    unet: Any, given: dict[str, Tensor], case: dict[str, Any], adapters: dict[str, Any], control: Any
) -> Callable[[Tensor, int], Tensor]:
    """(scaled latents, time) -> epsilon, both halves in one batch, the unconditional one first."""
    family, rows = "sd15" if case.get("on") == "sd15" else "sdxl", given["noise"].shape[0]
    halves = ("uncond", "cond")
    text = torch.cat([given[f"{family}_{half}"].expand(rows, -1, -1) for half in halves])
    pooled = torch.cat([given[f"{half}_pooled"].expand(rows, -1) for half in halves])
    times = torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2 * rows)
    extra = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}} if family == "sdxl" else {}
    choose = _applied(unet, given, case, adapters)

    def predict(x: Tensor, t: int) -> Tensor:
        choose(t)
        both, options = torch.cat([x, x]).float(), dict(extra)
        if control is not None:
            hint = given["hint"].expand(2 * rows, -1, -1, -1)
            down, middle = control(both, t, text, hint, 0.5, return_dict=False, **extra)
            options |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        uncond, cond = unet(both, t, text, **options).sample.double().chunk(2)
        return uncond + case.get("cfg", 4.0) * (cond - uncond)

    return predict


def _applied(
    unet: Any, given: dict[str, Tensor], case: dict[str, Any], adapters: dict[str, Any]
) -> Callable[[int], None]:
    """Tokens on the UNet; the function that comes back is called with the time, for those of some steps."""
    from pit_core.ip_adapter.layers import layers_of_unet
    from pit_core.ip_adapter.processor import install_ip_adapter
    from pit_core.ip_adapter.weights import layer_weights

    spans = []
    context = install_ip_adapter(unet)
    context.order = ("uncond", "cond")
    for each in case.get("apply", []):
        name = each.get("adapter", "a")
        spread = layer_weights(
            layers_of_unet(unet),
            each.get("schedule", "even"),
            each.get("weight", 1.0),
            layer_map=each.get("layer_map", ""),
        )
        weights = {n: w.weight for n, w in spread.items()}
        mask = given["mask"] if each.get("masked") else None
        source = context.add(
            given[f"{name}_tokens"], given[f"{name}_null"], mask=mask, adapter=adapters[name]
        )
        spans.append(
            (source, weights, 999 * (1 - each.get("start_at", 0)), 999 * (1 - each.get("end_at", 1)))
        )

    def choose(t: int) -> None:
        for source, weights, first, last in spans:
            source.weight = weights if last <= t <= first else {}

    return choose
