"""Diptychs drawn with diffusers' Flux classes at tiny size, random weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pit_core.diptych.hook import Look, looking
from pit_core.diptych.layout import DiptychLayout
from pit_core.diptych.pipeline import (
    DiptychModel,
    DiptychSettings,
    control_input,
    draw_diptych,
    pack,
    unpack,
)
from pit_core.errors import PitError
from pit_core.miniature import flux_models, models
from pit_core.miniature.tokenizer import WordTokenizer

LAYOUT = DiptychLayout(32, 32, margin=0)
PROMPT, SEED = "a critter on the beach", 3
SETTINGS = DiptychSettings(steps=2)
SIZES = {
    "in_channels": 64,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": models.TEXT_WIDTH,
    "pooled_projection_dim": models.PROJECTION,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}


def randomised(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def encode() -> Any:
    tower = randomised(models.build_text_encoder(len(WordTokenizer(models.TEXT_LENGTH))))
    return models.prompt_encoder(tower)


@pytest.fixture(scope="module")
def vae() -> Any:
    vae = randomised(flux_models.build_flux_vae())
    flux_models.normalise_flux_latents(vae, torch.ones(16))
    return vae


@pytest.fixture(scope="module")
def fill(encode: Any, vae: Any) -> DiptychModel:
    pipe = flux_models.fill_pipeline(vae, randomised(flux_models.build_fill()))
    pipe.set_progress_bar_config(disable=True)
    return DiptychModel(pipe, encode)


@pytest.fixture(scope="module")
def controlled(encode: Any, vae: Any) -> DiptychModel:
    from diffusers import FluxControlNetModel, FluxPipeline, FluxTransformer2DModel

    control = FluxControlNetModel(**SIZES, num_single_layers=0)
    control.controlnet_x_embedder = nn.Linear(68, 16)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    transformer = randomised(FluxTransformer2DModel(**SIZES, num_single_layers=2))
    scheduler = flux_models.build_flux_scheduler()
    pipe = FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **nothing)
    pipe.set_progress_bar_config(disable=True)
    return DiptychModel(pipe, encode, randomised(control))


def board(rows: int = 1) -> tuple[Tensor, Tensor]:
    return LAYOUT.compose(torch.rand(rows, 32, 32, 3, generator=torch.Generator().manual_seed(1)))


def drawn(model: DiptychModel, **changes: Any) -> Tensor:
    canvas, mask = board()
    return draw_diptych(model, LAYOUT, canvas, mask, [PROMPT], [SEED], replace(SETTINGS, **changes))


# attention


@pytest.mark.parametrize("rows", [None, (True, False)])
def test_the_hook_is_attention_with_a_bias(fill: DiptychModel, rows: tuple[bool, ...] | None) -> None:
    """mode "normalized" equals ln(strength) on the scores, which diffusers' own processor can add."""
    transformer, height, width, text = fill.pipe.transformer, 2, 4, 5
    generator = torch.Generator().manual_seed(2)
    given = {
        "hidden_states": torch.randn(2, 8, transformer.config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(2, text, models.TEXT_WIDTH, generator=generator),
        "pooled_projections": torch.randn(2, models.PROJECTION, generator=generator),
        "timestep": torch.tensor([0.7, 0.7]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": flux_models.image_ids(height, width),
        "txt_ids": torch.zeros(text, 3),
    }
    left = torch.cat([torch.zeros(text), (torch.arange(8) % width < 2).float()]).bool()
    right = torch.cat([torch.zeros(text), (torch.arange(8) % width >= 2).float()]).bool()
    bias = math.log(1.5) * (right[:, None] & left).float().expand(2, 1, -1, -1).clone()
    if rows is not None:
        bias[1] = 0
    with torch.no_grad():
        expected = transformer(**given, joint_attention_kwargs={"attention_mask": bias}).sample
        plain = transformer(**given).sample
        look = Look((height, width), 2, 1.5, "normalized", cond_only=rows is not None)
        with looking(transformer, look):
            look.at_step(0, 1, rows)
            found = transformer(**given).sample
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(plain, expected, atol=1e-3)


def test_the_processors_come_back_after_a_failure(fill: DiptychModel) -> None:
    before = dict(fill.pipe.transformer.attn_processors)
    with pytest.raises(RuntimeError), looking(fill.pipe.transformer, Look((2, 4), 2)):
        raise RuntimeError
    assert fill.pipe.transformer.attn_processors == before


# Fill


def test_fill_at_strength_one_is_the_stock_pipeline_bit_for_bit(fill: DiptychModel) -> None:
    canvas, mask = board()
    context, pooled = fill.encode([PROMPT])
    stock = fill.pipe(
        image=canvas.movedim(-1, 1),
        mask_image=mask[:, None],
        prompt_embeds=context,
        pooled_prompt_embeds=pooled,
        height=32,
        width=64,
        num_inference_steps=2,
        guidance_scale=30.0,
        generator=[torch.Generator().manual_seed(SEED)],
        output_type="pt",
    ).images.movedim(1, -1)
    assert torch.equal(drawn(fill, strength=1.0), stock)
    assert torch.equal(drawn(fill, start=0.9), stock)  # the second of two steps is at one half
    assert not torch.allclose(drawn(fill), stock, atol=1e-4)


def test_start_and_end_choose_steps(fill: DiptychModel) -> None:
    whole, first, second = drawn(fill), drawn(fill, end=0.4), drawn(fill, start=0.4)
    assert not torch.equal(first, second)
    assert not torch.equal(whole, first) and not torch.equal(whole, second)


def test_a_rows_picture_is_its_own_seeds(fill: DiptychModel) -> None:
    canvas, mask = (t.expand(2, *t.shape[1:]) for t in board())
    both = draw_diptych(fill, LAYOUT, canvas, mask, [PROMPT] * 2, [SEED, 9], SETTINGS)
    assert torch.allclose(both[:1], drawn(fill), atol=1e-4) and not torch.allclose(
        both[0], both[1], atol=1e-3
    )


# ControlNet


def test_without_control_and_guidance_it_is_the_stock_flux_pipeline(controlled: DiptychModel) -> None:
    context, pooled = controlled.encode([PROMPT])
    noise = torch.randn(1, 16, 4, 8, generator=torch.Generator().manual_seed(SEED))
    stock = controlled.pipe(
        prompt_embeds=context,
        pooled_prompt_embeds=pooled,
        height=32,
        width=64,
        num_inference_steps=2,
        guidance_scale=3.5,
        latents=pack(noise),
        output_type="pt",
    ).images.movedim(1, -1)
    plain = drawn(controlled, strength=1.0, true_cfg=1.0, control=0.0)
    assert torch.allclose(plain, stock, atol=1e-5)
    assert not torch.allclose(drawn(controlled, strength=1.0, true_cfg=1.0), stock, atol=1e-3)


def test_true_guidance_is_against_an_empty_prompt(controlled: DiptychModel) -> None:
    canvas, mask = board()
    options = replace(SETTINGS, strength=1.0)
    empty = draw_diptych(controlled, LAYOUT, canvas, mask, [""], [SEED], options)
    alone = draw_diptych(controlled, LAYOUT, canvas, mask, [""], [SEED], replace(options, true_cfg=1.0))
    assert torch.allclose(empty, alone, atol=1e-4)
    assert not torch.allclose(drawn(controlled), drawn(controlled, true_cfg=1.0), atol=1e-3)
    assert not torch.equal(drawn(controlled), drawn(controlled, cond_only=True))


def test_the_control_input_hides_what_is_masked(controlled: DiptychModel) -> None:
    canvas, mask = board()
    found = control_input(controlled.pipe, canvas, mask)
    assert found.shape == (1, 8, 68)
    other = torch.where(mask[..., None] > 0, torch.rand_like(canvas), canvas)
    assert torch.equal(found, control_input(controlled.pipe, other, mask))
    kept = unpack(found, 4, 8)[:, 16]
    assert torch.equal(kept[..., :4], torch.ones(1, 4, 4)) and not kept[..., 4:].any()


def test_packing_is_flux_and_unpacking_undoes_it() -> None:
    latents = torch.randn(2, 17, 4, 8)
    assert torch.equal(pack(latents), flux_models.pack(latents))
    assert torch.equal(unpack(pack(latents), 4, 8), latents)


# mistakes


def test_models_that_do_not_fit_are_refused(fill: DiptychModel, controlled: DiptychModel) -> None:
    with pytest.raises(PitError, match="64 features a token, not 384; take Flux Fill"):
        drawn(replace(controlled, controlnet=None))
    with pytest.raises(PitError, match="384 features a token, not 64"):
        drawn(replace(fill, controlnet=controlled.controlnet))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps from 1"),
        ({"strength": -1.0}, "strength is a number of 0 or more"),
        ({"start": 0.6, "end": 0.5}, "start first"),
        ({"mode": "logits"}, "mode is one of"),
        ({"true_cfg": math.nan}, "true_cfg from 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(PitError, match=said):
        DiptychSettings(**settings)


def test_rows_that_do_not_match_are_refused(fill: DiptychModel) -> None:
    canvas, mask = board()
    with pytest.raises(PitError, match="1 diptychs of this layout"):
        draw_diptych(fill, LAYOUT, canvas[:, :16], mask, [PROMPT], [SEED])
