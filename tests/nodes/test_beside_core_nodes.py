"""Tokens beside what core brings: guiders, windows, masked conditions, LoRAs, ControlNets, inpainting.

It runs in ComfyUI itself; that the numbers are diffusers' too, test_parity_with_diffusers.py shows.
"""

from typing import Any

import pytest
import torch
from benches import CONTEXT, UNET, RealBench, fill, randn
from torch import Tensor

NOISE = randn((1, 4, 8, 16), 7)


@pytest.fixture(scope="module")
def given(bench: Any) -> dict[str, Any]:
    if not isinstance(bench, RealBench):
        pytest.skip("runs in ComfyUI itself")
    return {"model": bench.model(), "ip_adapter": bench.adapter()}


def applied(real: RealBench, given: dict[str, Any], seed: int = 1, **settings: Any) -> Any:
    return real.first("PiTApplyTokens", **{**given, "tokens": real.tokens(seed), **settings})


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


# guiders


def guided(guider: Any, noise: Tensor = NOISE) -> Tensor:
    import comfy.samplers

    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 2)
    euler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)


@pytest.mark.parametrize("nested", [False, True])
def test_the_negative_condition_is_so_in_any_place(
    real: RealBench, given: dict[str, Any], nested: bool
) -> None:
    """Core's dual guider runs the negative condition first; with both others equal it is plain guidance."""
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    positive, negative = real.conds()
    patched = applied(real, given)
    guider = Guider_DualCFG(patched)
    guider.set_conds(positive, positive, negative)
    guider.set_cfg(1.7, 3.0, nested=nested)
    assert close(guided(guider), real.sample(patched, noise=NOISE, cfg=3.0))


def test_an_empty_negative_prompt_is_unconditional(real: RealBench, given: dict[str, Any]) -> None:
    """Core's perpendicular guider, whose negative prompt is off, guides away from its empty prompt."""
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    positive, negative = real.conds()
    patched = applied(real, given)
    guider = Guider_PerpNeg(patched)
    guider.set_conds(positive, positive, negative)
    guider.set_cfg(3.0, 0.0)
    assert close(guided(guider), real.sample(patched, noise=NOISE, cfg=3.0))


def test_self_attention_guidance_looks_at_the_unconditional_half(
    real: RealBench, given: dict[str, Any]
) -> None:
    """At guidance 0 only the unconditional half counts, so the positive tokens must not be seen at all."""
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    def sampled(seed: int, **extras: Any) -> Tensor:
        tokens = real.tokens(seed, **extras)
        patched = SelfAttentionGuidance.execute(applied(real, given, tokens=tokens), 0.7, 2.0)[0]
        return real.sample(patched, noise=randn((1, 4, 16, 16), 7), cfg=0.0)

    one = sampled(1)
    assert torch.equal(one, sampled(2))
    assert not close(one, sampled(1, null=randn((1, 4, CONTEXT), 50)))


# windows


def in_windows(model: Any, dimension: int, length: int, overlap: int, **options: Any) -> Any:
    """Core's context windows: the model sees a part of the latents at a time."""
    import inspect

    from comfy_extras.nodes_context_windows import ContextWindowsManualNode as Node

    known = inspect.signature(Node.execute).parameters
    options = {key: value for key, value in options.items() if key in known}
    return Node.execute(
        model, length, overlap, "standard_static", 1, False, "pyramid", dimension, False, **options
    )[0]


def test_windows_over_a_batch_give_each_picture_its_own_tokens(
    real: RealBench, given: dict[str, Any]
) -> None:
    """Pictures are independent, so it does not matter with which others the model sees them."""
    noise = randn((5, 4, 8, 8), 7)
    masks = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(4))
    patched = applied(real, given, tokens=real.tokens(1, rows=5), mask=masks)
    whole = real.sample(patched, noise=noise)
    assert close(real.sample(in_windows(patched, 0, 2, 1), noise=noise), whole)


@pytest.mark.parametrize(("dimension", "size"), [(2, (16, 8)), (3, (8, 16))])
def test_a_mask_lies_where_it_should_in_windows(
    real: RealBench, given: dict[str, Any], dimension: int, size: tuple[int, int]
) -> None:
    """Two windows that do not touch, and a mask over the first."""
    options = {"noise": randn((1, 4, *size), 7), "steps": 1, "cfg": 1.0}
    mask = torch.zeros(1, *size).narrow(dimension - 1, 0, 8).fill_(1)
    mask = torch.cat([mask, torch.zeros_like(mask)], dim=dimension - 1)
    plain, free, masked = (
        real.sample(in_windows(each, dimension, 8, 0, causal_window_fix=False), **options)
        for each in (given["model"], applied(real, given), applied(real, given, mask=mask))
    )
    first, second = ([t.narrow(dimension, at, 8) for t in (plain, free, masked)] for at in (0, 8))
    assert close(first[2], first[1]) and not close(first[2], first[0])
    assert close(second[2], second[0]) and not close(second[2], second[1])


# tiles, as other packs cut them in a wrapper of the model


def in_tiles(model: Any, order: str) -> Any:
    """Left and right half: one by one, or both in one batch, in turn or those of each row side by side."""

    def wrapper(apply_model: Any, given: dict[str, Any]) -> Tensor:
        x, others = given["input"], {"t": given["timestep"], **given["c"]}
        halves = x.chunk(2, dim=-1)
        if order == "one by one":
            return torch.cat([apply_model(half, **others) for half in halves], dim=-1)

        def twice(value: Any) -> Any:
            if not torch.is_tensor(value) or len(value) != len(x):
                return value
            return torch.cat([value] * 2) if order == "in turn" else value.repeat_interleave(2, dim=0)

        many = torch.cat(halves) if order == "in turn" else torch.stack(halves, 1).flatten(0, 1)
        out = apply_model(many, **{name: twice(value) for name, value in others.items()})
        pair = out.chunk(2) if order == "in turn" else out.unflatten(0, (-1, 2)).unbind(1)
        return torch.cat([*pair], dim=-1)

    patched = model.clone()
    patched.set_model_unet_function_wrapper(wrapper)
    return patched


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ["in turn", "side by side"])
def test_batched_tiles_get_what_single_ones_get(
    real: RealBench, given: dict[str, Any], order: str, masked: bool
) -> None:
    """Both halves of guidance and each picture their own tokens, wherever the batch has them."""
    noise, mask = randn((3, 4, 8, 16), 7), torch.rand(3, 8, 16, generator=torch.Generator().manual_seed(6))
    patched = applied(real, given, tokens=real.tokens(1, rows=3), mask=mask if masked else None)
    single, batched = (real.sample(in_tiles(patched, how), noise=noise) for how in ("one by one", order))
    assert close(batched, single)
    assert not close(single, real.sample(in_tiles(given["model"], "one by one"), noise=noise))


def test_a_mask_that_tiles_squeeze_is_told_once_a_run(
    real: RealBench, given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    mask = torch.zeros(8, 16)
    mask[:, :8] = 1
    masked = applied(real, given, mask=mask)
    for model in (masked, in_tiles(applied(real, given), "one by one")):
        real.sample(model, noise=NOISE)
    assert "tile" not in caplog.text
    for runs in (1, 2):
        real.sample(in_tiles(masked, "one by one"), noise=NOISE)
        assert caplog.text.count("laid on each tile of 64 x 64 pixels") == runs


# sampling


def test_a_span_of_the_run_is_that_of_the_sampling_that_is_used(
    real: RealBench, given: dict[str, Any]
) -> None:
    """Whether core's node for another sampling stands before or after ours."""
    from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM

    def other(model: Any) -> Any:
        return ModelSamplingContinuousEDM().patch(model, "eps", 120.0, 0.002)[0]

    span = {"start_at": 0.1}  # of ours the second of eight steps, of the model's own none so early
    last = real.sample(other(applied(real, given, **span)), steps=8)
    first = real.sample(applied(real, {**given, "model": other(given["model"])}, **span), steps=8)
    always = real.sample(other(applied(real, given)), steps=8)
    assert torch.equal(first, last) and not close(first, always)


# conditions


def test_masked_conditions(real: RealBench, given: dict[str, Any]) -> None:
    """Left and right prompts by masks, with and without areas at the masks' bounds; tokens on the left."""
    (left, rest), (right, _) = real.conds([[(1, None), (3, None)], [(2, None)]])[0]
    negative = real.conds()[1]
    halves = torch.zeros(2, 1, 8, 16)
    halves[0, :, :, :8], halves[1, :, :, 8:] = 1, 1
    patched = applied(real, given, mask=halves[0])
    for bounds in (False, True):
        options = {"set_area_to_bounds": bounds, "mask_strength": 1.0}
        positive = [
            [context, {**rest, **options, "mask": mask}]
            for context, mask in zip((left, right), halves, strict=True)
        ]
        runs = {"noise": NOISE, "cfg": 1.0, "steps": 1, "conds": [positive, negative]}
        plain, free, masked = (
            real.sample(each, **runs) for each in (given["model"], applied(real, given), patched)
        )
        assert not close(masked, plain) and not close(masked, free)
        if bounds:
            assert close(masked[..., :8], free[..., :8]) and close(masked[..., 8:], plain[..., 8:])


def test_conditions_that_take_turns(real: RealBench, given: dict[str, Any]) -> None:
    """The same prompt for the first and the second half of the run is the prompt."""
    patched = applied(real, given)
    (context, rest), negative = real.conds()[0][0], real.conds()[1]
    spans = [{"start_percent": 0.0, "end_percent": 0.5}, {"start_percent": 0.5, "end_percent": 1.0}]
    positive = [[context, {**rest, **span}] for span in spans]
    found = real.sample(patched, steps=4, conds=[positive, negative])
    assert close(found, real.sample(patched, steps=4))


# other patches


def lora(seed: int = 3) -> dict[str, Tensor]:
    """Of rank 2, on the queries of the middle block and the keys of an output block."""
    names = {
        "mid_block_attentions_0_transformer_blocks_0_attn2_to_q": (64, 64),
        "up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (32, CONTEXT),
    }
    return {
        f"lora_unet_{name}.lora_{part}.weight": randn((out, 2) if part == "up" else (2, into), seed + i)
        for i, (name, (out, into)) in enumerate(names.items())
        for part in ("up", "down")
    }


def test_loras_before_or_after_the_tokens(real: RealBench, given: dict[str, Any]) -> None:
    import core_models

    model = given["model"]
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    plain, tokens = real.sample(model), real.sample(applied(real, given))
    first = applied(real, {**given, "model": core_models.with_lora(model, lora())})
    last = core_models.with_lora(applied(real, given), lora())
    found = real.sample(first)
    assert torch.equal(real.sample(last), found)
    assert not close(found, tokens) and not close(found, real.sample(core_models.with_lora(model, lora())))
    assert torch.equal(real.sample(model), plain) and torch.equal(real.sample(applied(real, given)), tokens)
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())


def test_loras_of_one_condition(real: RealBench, given: dict[str, Any]) -> None:
    """Core's hooks: a LoRA on both conditions is one on the model; on the positive alone it is neither."""
    import comfy.hooks
    import core_models

    patched = applied(real, given)
    hooks = comfy.hooks.create_hook_lora(lora(), 1.0, 0.0)
    (hooked, rest), (plain, _) = real.conds(hooks=hooks), real.conds()
    base, whole = real.sample(patched), real.sample(core_models.with_lora(patched, lora()))
    assert close(real.sample(patched, conds=[hooked, rest]), whole)
    half = real.sample(patched, conds=[hooked, real.conds()[1]])
    assert not close(half, whole) and not close(half, base)
    alone = real.sample(patched, conds=[hooked, rest], cfg=1.0)
    assert close(real.sample(patched, conds=[hooked, real.conds()[1]], cfg=1.0), alone)
    assert torch.equal(real.sample(patched, conds=[plain, real.conds()[1]]), base)


def test_a_controlnet_does_not_see_the_tokens(real: RealBench, given: dict[str, Any]) -> None:
    import core_models

    control = core_models.controlnet(real.host, UNET)
    fill(control.control_model, "control")
    seen: list[Tensor] = []
    control.control_model.register_forward_hook(
        lambda _module, _inputs, out: seen.append(torch.cat([t.flatten() for t in out["middle"]]).clone())
    )
    hint = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(5))
    conds = core_models.controlled(real.conds(), control, hint, 0.5)
    options = {"noise": NOISE, "steps": 1, "conds": conds}
    plain, none, tokens = (
        real.sample(each, **options)
        for each in (given["model"], applied(real, given, weight=0.0), applied(real, given))
    )
    assert torch.equal(plain, none)
    assert not close(tokens, plain) and not close(tokens, real.sample(applied(real, given), noise=NOISE))
    assert len(seen) >= 3 and all(torch.equal(each, seen[0]) for each in seen)


# image to image, inpainting


def test_image_to_image(real: RealBench, given: dict[str, Any]) -> None:
    options = {"noise": NOISE, "latent": randn((1, 4, 8, 16), 8), "denoise": 0.5, "steps": 4}
    plain = real.sample(given["model"], **options)
    assert torch.equal(real.sample(applied(real, given, weight=0.0), **options), plain)
    assert not close(real.sample(applied(real, given), **options), plain)
    over = applied(real, given, end_at=0.3)  # of the whole run, whose second half this is
    assert torch.equal(real.sample(over, **options), plain)


def test_inpainting_with_any_model(real: RealBench, given: dict[str, Any]) -> None:
    latent, mask = randn((1, 4, 8, 16), 8), torch.zeros(1, 1, 8, 16)
    mask[..., 8:] = 1
    options = {"noise": NOISE, "latent": latent, "noise_mask": mask}
    plain, none, tokens = (
        real.sample(each, **options)
        for each in (given["model"], applied(real, given, weight=0.0), applied(real, given))
    )
    assert torch.equal(plain, none)
    assert close(tokens[..., :8], latent[..., :8]) and not close(tokens[..., 8:], plain[..., 8:])


def test_inpainting_models(real: RealBench, given: dict[str, Any]) -> None:
    """Nine channels, as core's node for them conditions them."""
    latent, mask = randn((1, 4, 8, 16), 8), torch.zeros(1, 1, 8, 16)
    mask[..., 8:] = 1
    conds = real.conds(concat_latent_image=latent, concat_mask=mask)
    options = {"noise": NOISE, "latent": latent, "noise_mask": mask, "conds": conds}
    inputs = {**given, "model": real.model(in_channels=9)}
    plain, none, nowhere, tokens = (
        real.sample(each, **options)
        for each in (
            inputs["model"],
            applied(real, inputs, weight=0.0),
            applied(real, inputs, mask=torch.zeros(8, 16)),
            applied(real, inputs),
        )
    )
    assert torch.equal(plain, none) and close(nowhere, plain)
    assert not close(tokens[..., 8:], plain[..., 8:])


# SD1.5


@pytest.mark.parametrize("kind", ["plus", "base"])
def test_sd15_from_pictures_to_latents(real: RealBench, kind: str) -> None:
    """Sixteen layers, width 768: 16 tokens of a Plus adapter, 4 of a base one."""
    import core_models
    from benches import PROJECTION, SD15, VISION

    parts = {k: real.part(f"pit_core.ip_adapter.{k}") for k in ("adapter", "resampler", "checkpoint")}
    model = core_models.sd15(real.host, SD15)[0]
    fill(model.model)
    layers = real.host.layers_of_model(model)
    if kind == "plus":
        projector = parts["resampler"].Resampler(64, 1, 64, 1, 16, VISION, 768)
    else:
        projector = parts["resampler"].ImageProjection(PROJECTION, 768, 4)
    weights = parts["adapter"].IPLayers([layer.width for layer in layers], 768)
    made = fill(parts["adapter"].IPAdapter(projector, weights))
    parts["checkpoint"].save_ip_adapter(real.folder / "models/ipadapter/sd15.safetensors", made)
    adapter, report = real.run("PiTLoadIPAdapter", file="sd15.safetensors").args
    assert len(layers) == 16 and "SD1.5 (16 layers, text width 768)" in report
    image = torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(1))
    inputs = {"ip_adapter": adapter, "clip_vision": real.clip_vision()}
    tokens = real.first("PiTEncodeImage", **inputs, image=image)
    assert tuple(tokens.tokens.shape) == (1, 16 if kind == "plus" else 4, 768)
    conds = [[[randn((1, 6, 768), seed), {}]] for seed in (1, 2)]
    inputs = {"model": model, "ip_adapter": adapter, "tokens": tokens}
    plain = real.sample(model, conds=conds)
    for schedule, weight in (("even", 0.0), ("even", 1.0), ("ease in", 1.0), ("weak middle", 1.0)):
        patched = real.first("PiTApplyTokens", **inputs, schedule=schedule, weight=weight)
        assert torch.equal(real.sample(patched, conds=conds), plain) == (weight == 0)
    mask = real.first("PiTApplyTokens", **inputs, mask=torch.zeros(8, 8))
    assert close(real.sample(mask, conds=conds), plain)
    with pytest.raises(real.error, match="SD1.5"):
        real.run("PiTApplyTokens", **{**inputs, "model": real.model()})
    with pytest.raises(real.error, match="known for SDXL"):
        real.run("PiTApplyTokens", **inputs, schedule="style")
