"""Diptych Attention in the model: against the dense definition, when it does not apply, and beside others."""

from typing import Any

import pytest
import torch
from benches import Bench, RealBench, randn
from diptych_bench import (
    COLUMNS,
    GRID,
    SIZES,
    TEXT,
    Dense,
    controlled,
    flux,
    noise,
    overridden,
    strip_overrides,
)
from torch import Tensor

LEFT = GRID[0] * COLUMNS
STRENGTH = 5.0  # so much that every part of it shows
EVERY = torch.full((LEFT,), STRENGTH)


@pytest.fixture(scope="module")
def model(bench: Bench) -> Any:
    return flux(bench)


@pytest.fixture(scope="module")
def plain(bench: Bench, model: Any) -> Tensor:
    return bench.sample(model, noise=noise())


@pytest.fixture
def layout(bench: Bench) -> Any:
    return made_layout(bench)


def made_layout(bench: Bench, **changes: int) -> Any:
    picture = torch.rand(1, 20, 20, 3, generator=torch.Generator().manual_seed(3))
    return bench.run("PiTDiptychPrepare", image=picture, **{**SIZES, **changes})[2]


def attended(bench: Bench, model: Any, **inputs: Any) -> Any:
    inputs = {"strength": STRENGTH, **inputs}
    return bench.first("PiTDiptychAttention", model=model, **inputs)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-4 * float(b.abs().max()))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "Diptych Attention" in r.getMessage()]


# what it does

CASES = {
    "everywhere": ({}, {}),
    "normalized": ({"mode": "normalized"}, {"normalized": True}),
    "cond only": ({"cond_only": True}, {"cond_only": True}),
    "first step": ({"end_at": 0.3}, {"steps": [0]}),
    "second step": ({"start_at": 0.3}, {"steps": [1]}),
    "blocks": (
        {"double_blocks": "1", "single_blocks": "0-0"},
        {"blocks": [("double", 1), ("single", 0)]},
    ),
    "no single": ({"single_blocks": "none"}, {"blocks": [("double", 0), ("double", 1)]}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_dense_definition(bench: Bench, model: Any, layout: Any, plain: Tensor, case: str) -> None:
    inputs, definition = CASES[case]
    found = bench.sample(attended(bench, model, layout=layout, **inputs), noise=noise())
    expected = bench.sample(overridden(model, Dense(EVERY, **definition)), noise=noise())
    assert close(found, expected) and not close(found, plain)
    assert torch.equal(bench.sample(model, noise=noise()), plain)


def test_masks_say_what_is_looked_at_and_from_where(bench: Bench, model: Any, layout: Any) -> None:
    reference = torch.zeros(1, 32, 16)
    reference[:, :8] = 1  # the panel's first row of tokens, its margin included
    target = torch.zeros(1, 32, 48)
    target[:, :, 24:] = 1  # the right half of four columns
    found = bench.sample(
        attended(bench, model, layout=layout, reference_mask=reference, target_mask=target), noise=noise()
    )
    gains = torch.ones(GRID[0], COLUMNS)
    gains[0] = STRENGTH
    targets = torch.tensor([False, False, True, True] * GRID[0])
    expected = Dense(gains.flatten(), targets=targets)
    assert close(found, bench.sample(overridden(model, expected), noise=noise()))


def test_each_picture_of_a_batch_has_its_own_reference_mask(bench: Bench, model: Any, layout: Any) -> None:
    masks = torch.zeros(2, 32, 16)
    masks[1] = 1
    found = bench.sample(attended(bench, model, layout=layout, reference_mask=masks), noise=noise(2))
    gains = torch.stack([torch.ones(LEFT), EVERY])
    assert close(found, bench.sample(overridden(model, Dense(gains)), noise=noise(2)))
    with pytest.raises(bench.error, match="reference_mask have 2 rows, but the batch has 3 pictures"):
        bench.sample(attended(bench, model, layout=layout, reference_mask=masks), noise=noise(3))


def test_strength_one_changes_no_bit(bench: Bench, model: Any, layout: Any, plain: Tensor) -> None:
    for more in ({}, {"reference_mask": torch.ones(1, 32, 16)}, {"mode": "normalized"}):
        patched = attended(bench, model, layout=layout, strength=1.0, **more)
        assert torch.equal(bench.sample(patched, noise=noise()), plain)


def test_of_two_uses_the_last_one_that_is_active_counts(bench: Bench, model: Any, layout: Any) -> None:
    both = attended(bench, model, layout=layout, strength=1.2)
    both = attended(bench, both, layout=layout, end_at=0.3)
    alone = bench.sample(attended(bench, model, layout=layout, strength=1.2), noise=noise())
    found = bench.sample(both, noise=noise())

    class Both(Dense):
        def _factors(self, tokens: int, options: dict[str, Any]) -> Tensor:
            first = self.seen.index(float(options["sigmas"].max())) == 0
            self.gains = EVERY if first else torch.full((LEFT,), 1.2)
            return super()._factors(tokens, options)

    assert close(found, bench.sample(overridden(model, Both(EVERY)), noise=noise()))
    assert not close(found, alone)


# when it does not apply


def test_another_size_passes_through_with_one_warning(
    bench: Bench, model: Any, plain: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    patched = attended(bench, model, layout=made_layout(bench, width=64))
    assert torch.equal(bench.sample(patched, noise=noise()), plain)
    (warning,) = said(caplog)
    assert "shown 96 x 48 pixels, but the diptych has 112 x 48" in warning
    bench.sample(patched, noise=noise())
    assert len(said(caplog)) == 2  # once a run


def test_a_model_that_never_asks_is_told_of_once(
    bench: Bench, model: Any, layout: Any, plain: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    patched = attended(bench, model, layout=layout)
    bench.sample(patched, noise=noise())
    assert said(caplog) == []
    patched.add_wrapper_with_key("diffusion_model", "deaf", strip_overrides)
    assert torch.equal(bench.sample(patched, noise=noise()), plain)
    (warning,) = said(caplog)
    assert "never asked for another attention" in warning


def test_a_model_that_never_runs_its_wrappers_is_told_of_once(
    real: RealBench, model: Any, layout: Any, caplog: pytest.LogCaptureFixture
) -> None:
    patched = attended(real, model, layout=layout)
    patched.set_model_unet_function_wrapper(lambda apply, args: torch.zeros_like(args["input"]))
    real.sample(patched, noise=noise())
    (warning,) = said(caplog)
    assert "never asked for another attention" in warning


def test_mistakes_are_one_sentence(bench: Bench, model: Any, layout: Any) -> None:
    for inputs, words in [
        ({"model": bench.model()}, "model is a UNet"),
        ({"model": "a model"}, "model is str, no diffusion model"),
        ({"layout": "a layout"}, "layout is str; connect 'Diptych Prepare'"),
        ({"strength": -1.0}, "strength is a number of 0 or more .* but got -1.0"),
        ({"strength": float("nan")}, "but got nan"),
        ({"double_blocks": "0-2"}, "double_blocks names block 2, but the model's are 0 to 1"),
        ({"single_blocks": "some"}, "single_blocks is 'all', 'none' or ranges .* but got 'some'"),
        ({"target_mask": torch.ones(2, 32, 48)}, "target_mask has 2 rows"),
        ({"reference_mask": torch.full((32, 16), torch.nan)}, "reference_mask holds NaN"),
    ]:
        with pytest.raises(bench.error, match=words) as error:
            attended(bench, **{"model": model, "layout": layout, **inputs})
        assert "\n" not in str(error.value) and str(error.value).endswith(".")


# beside others


@pytest.mark.parametrize("first", [True, False])
def test_other_overrides_keep_working(bench: Bench, model: Any, layout: Any, first: bool) -> None:
    """One that was there gives the attention that ours is made of, whichever node comes first."""

    class Halved(Dense):
        def __call__(self, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **named: Any) -> Tensor:
            return super().__call__(func, q, k, 0.5 * v, heads, **named)

    def halving(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **named: Any) -> Tensor:
        assert "transformer_options" in named
        return func(q, k, 0.5 * v, heads, **named)

    if first:
        found = attended(bench, overridden(model, halving), layout=layout)
    else:
        found = overridden(attended(bench, model, layout=layout), halving)
    expected = bench.sample(overridden(model, Halved(EVERY)), noise=noise())
    assert close(bench.sample(found, noise=noise()), expected)


def test_text_that_a_patch_adds_is_counted(real: RealBench, model: Any, layout: Any) -> None:
    """As USO's style tokens are."""

    def longer(args: dict[str, Any]) -> dict[str, Any]:
        text, ids = args["txt"], args["txt_ids"]
        return {**args, "txt": torch.cat([text[:, :2], text], 1), "txt_ids": torch.cat([ids[:, :2], ids], 1)}

    with_more = model.clone()
    with_more.set_model_patch(longer, "post_input")
    found = real.sample(attended(real, with_more, layout=layout), noise=noise())
    expected = Dense(EVERY, text=TEXT + 2)
    assert close(found, real.sample(overridden(with_more, expected), noise=noise()))


def test_reference_latents_stay_as_they_are(real: RealBench, model: Any, layout: Any) -> None:
    conds = real.conds(reference_latents=[randn((1, 16, 4, 8), 5)])
    found = real.sample(attended(real, model, layout=layout), noise=noise(), conds=conds)
    dense = Dense(EVERY)
    assert close(found, real.sample(overridden(model, dense), noise=noise(), conds=conds))
    assert dense.tokens == {TEXT + 18 + 8}


def test_loras_go_along_in_any_order(real: RealBench, model: Any, layout: Any) -> None:
    key = "diffusion_model.single_blocks.0.linear1.weight"
    change = {key: ("diff", (0.1 * randn(tuple(model.model.get_parameter(key).shape), 4),))}

    def changed(onto: Any) -> Any:
        clone = onto.clone()
        assert clone.add_patches(change) == [key]
        return clone

    one = real.sample(attended(real, changed(model), layout=layout), noise=noise())
    other = real.sample(changed(attended(real, model, layout=layout)), noise=noise())
    expected = real.sample(overridden(changed(model), Dense(EVERY)), noise=noise())
    assert torch.equal(one, other) and close(one, expected)
    assert not close(one, real.sample(attended(real, model, layout=layout), noise=noise()))


def test_a_controlnets_own_blocks_stay_as_they_are(real: RealBench, model: Any, layout: Any) -> None:
    """What it adds comes through; in its blocks nothing is enhanced, in the model's all is."""
    conds = controlled(real.conds())
    found = real.sample(attended(real, model, layout=layout), noise=noise(), conds=conds)
    expected = real.sample(overridden(model, Dense(EVERY)), noise=noise(), conds=conds)
    assert close(found, expected)
    assert not close(found, real.sample(attended(real, model, layout=layout), noise=noise()))
