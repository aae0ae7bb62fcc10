"""Tokens on a model: what they change, and what they must leave alone."""

import copy
from typing import Any

import pytest
import torch
from benches import CONTEXT, TOKENS, Bench, randn
from torch import Tensor


@pytest.fixture(scope="module")
def model(bench: Bench) -> Any:
    return bench.model()


@pytest.fixture(scope="module")
def adapter(bench: Bench) -> Any:
    return bench.adapter()


@pytest.fixture(scope="module")
def plain(bench: Bench, model: Any) -> Tensor:
    return bench.sample(model)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def kept(bench: Bench, model: Any) -> int:
    return sum(len(each._kept) for each in bench.host.applications_of(model))


def test_tokens_change_the_picture(bench: Bench, model: Any, adapter: Any, plain: Tensor) -> None:
    one, two = (
        bench.sample(bench.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=bench.tokens(i)))
        for i in (1, 2)
    )
    assert torch.isfinite(one).all()
    assert not close(one, plain) and not close(one, two)


def test_the_model_itself_stays_as_it_is(bench: Bench, model: Any, adapter: Any, plain: Tensor) -> None:
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    patched = bench.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=bench.tokens(1))
    bench.sample(patched)
    assert torch.equal(bench.sample(model), plain)
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())


def test_weight_zero_is_the_base_bit_for_bit(bench: Bench, model: Any, adapter: Any, plain: Tensor) -> None:
    inputs = {"model": model, "ip_adapter": adapter, "tokens": bench.tokens(1)}
    assert torch.equal(bench.sample(bench.first("PiTApplyTokens", **inputs, weight=0.0)), plain)


def test_weight_zero_is_off_in_every_schedule(bench: Bench, model: Any, adapter: Any) -> None:
    """Also where composition_weight would leave a layer."""
    inputs = {"model": model, "ip_adapter": adapter, "tokens": bench.tokens(1), "layer_map": "3:1"}
    for schedule in bench.part("pit_core.ip_adapter.weights").SCHEDULES:
        assert bench.first("PiTApplyTokens", **inputs, weight=0.0, schedule=schedule) is model


def test_outside_its_steps_it_is_the_base_bit_for_bit(
    bench: Bench, model: Any, adapter: Any, plain: Tensor
) -> None:
    inputs = {"model": model, "ip_adapter": adapter, "tokens": bench.tokens(1)}
    whole = bench.sample(bench.first("PiTApplyTokens", **inputs))
    assert torch.equal(bench.sample(bench.first("PiTApplyTokens", **inputs, start_at=0.0, end_at=0.0)), plain)
    half = bench.sample(bench.first("PiTApplyTokens", **inputs, start_at=0.3))
    assert not torch.equal(half, plain) and not torch.equal(half, whole)


def test_applications_stack_in_any_order(bench: Bench, model: Any, adapter: Any, plain: Tensor) -> None:
    def stack(*seeds: int) -> Tensor:
        patched = model
        for seed in seeds:
            patched = bench.first(
                "PiTApplyTokens", model=patched, ip_adapter=adapter, tokens=bench.tokens(seed), weight=0.6
            )
        return bench.sample(patched)

    assert torch.equal(stack(1, 2, 3), stack(3, 1, 2))
    assert not close(stack(1, 2, 3), stack(1, 2))


def test_two_adapters_stack_in_either_order(bench: Bench, model: Any, adapter: Any) -> None:
    """Each with a mask, a span of steps and a weight of its own; one that weighs nothing changes no bit."""
    other = bench.adapter(name="second.safetensors", salt="second")
    left, right = torch.zeros(2, 1, 8, 8)
    left[..., :4], right[..., 3:] = 1, 1
    settings = [
        {"ip_adapter": adapter, "tokens": bench.tokens(1), "mask": left, "end_at": 0.9},
        {"ip_adapter": other, "tokens": bench.tokens(2), "mask": right, "weight": 0.7},
        {"ip_adapter": other, "tokens": bench.tokens(3), "weight": 0.0},
    ]

    def stack(*order: int) -> Tensor:
        patched = model
        for i in order:
            patched = bench.first("PiTApplyTokens", model=patched, **settings[i])
        return bench.sample(patched)

    both = stack(0, 1)
    assert torch.equal(both, stack(1, 0)) and torch.equal(both, stack(2, 1, 0))
    assert not close(both, stack(0)) and not close(both, stack(1))


def test_half_the_weight_twice_is_the_whole(bench: Bench, model: Any, adapter: Any) -> None:
    inputs = {"ip_adapter": adapter, "tokens": bench.tokens(1)}
    whole = bench.first("PiTApplyTokens", model=model, **inputs)
    half = bench.first("PiTApplyTokens", model=model, weight=0.5, **inputs)
    assert close(
        bench.sample(bench.first("PiTApplyTokens", model=half, weight=0.5, **inputs)), bench.sample(whole)
    )


def test_the_middle_block_alone_counts(bench: Bench, model: Any, adapter: Any, plain: Tensor) -> None:
    inputs = {"model": model, "ip_adapter": adapter, "tokens": bench.tokens(1)}
    patched = bench.first("PiTApplyTokens", **inputs, schedule="layer map", layer_map="4:1")
    keys = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    assert {key[:2] for key in keys} == {("middle", 0)}
    assert not torch.equal(bench.sample(patched), plain)


def test_every_schedule_and_scaling_runs(bench: Bench, model: Any, adapter: Any, plain: Tensor) -> None:
    weights = bench.part("pit_core.ip_adapter.weights")
    inputs = {"model": model, "ip_adapter": adapter, "tokens": bench.tokens(1), "layer_map": "0:1"}
    seen = []
    for schedule in weights.SCHEDULES:
        patched = bench.first("PiTApplyTokens", **inputs, schedule=schedule, composition_weight=0.4)
        seen.append(bench.sample(patched, steps=1))
    for scaling in weights.SCALINGS[1:]:
        patched = bench.first("PiTApplyTokens", **inputs, weight=0.7, embeds_scaling=scaling)
        seen.append(bench.sample(patched, steps=1))
    assert all(torch.isfinite(each).all() for each in seen)
    assert len({each.numpy().tobytes() for each in seen}) == len(seen)


def test_precise_style_gives_layer_three_to_the_unconditional_half(
    bench: Bench, model: Any, adapter: Any
) -> None:
    """At guidance 1 only the conditional half runs, so layer 3 adds nothing and plain style is the same."""
    inputs = {"model": model, "ip_adapter": adapter, "tokens": bench.tokens(1)}
    precise, style = (
        bench.first("PiTApplyTokens", **inputs, schedule=name) for name in ("precise style", "style")
    )
    assert close(bench.sample(precise, cfg=1.0), bench.sample(style, cfg=1.0))
    assert not close(bench.sample(precise), bench.sample(style))


def test_both_halves_have_their_own_tokens(bench: Bench, model: Any, adapter: Any) -> None:
    inputs = {"model": model, "ip_adapter": adapter, "tokens": bench.tokens(1)}
    null = bench.sample(bench.first("PiTApplyTokens", **inputs))
    same = bench.sample(bench.first("PiTApplyTokens", **inputs, uncond="same as positive"))
    other = bench.sample(bench.first("PiTApplyTokens", **inputs, negative_tokens=bench.tokens(5)))
    own = bench.sample(bench.first("PiTApplyTokens", **inputs, negative_tokens=bench.tokens(1)))
    assert not close(null, same) and not close(null, other)
    assert torch.equal(own, same)


def test_each_picture_of_a_batch_gets_its_own_row(bench: Bench, model: Any, adapter: Any) -> None:
    noise = randn((2, 4, 8, 8), 7)
    rows = bench.tokens(1, rows=2)
    both = bench.sample(
        bench.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=rows), noise=noise
    )
    for i in range(2):
        single = bench.first(
            "PiTApplyTokens", model=model, ip_adapter=adapter, tokens=rows.with_tokens(rows.tokens[i : i + 1])
        )
        assert close(both[i : i + 1], bench.sample(single, noise=noise[i : i + 1]))


def test_rows_that_do_not_fit_the_batch_are_one_sentence(bench: Bench, model: Any, adapter: Any) -> None:
    patched = bench.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=bench.tokens(1, rows=3))
    with pytest.raises(bench.error, match="tokens have 3 rows, but the batch has 2 pictures"):
        bench.sample(patched, noise=randn((2, 4, 8, 8), 7))
    assert kept(bench, patched) == 0


@pytest.mark.parametrize("size", [(8, 8), (7, 13), (16, 4), (1, 1), (1, 9)])
def test_any_latent_size_with_a_mask(bench: Bench, model: Any, adapter: Any, size: tuple[int, int]) -> None:
    noise = randn((1, 4, *size), 7)
    inputs = {"model": model, "ip_adapter": adapter, "tokens": bench.tokens(1)}
    plain, free = (
        bench.sample(each, noise=noise) for each in (model, bench.first("PiTApplyTokens", **inputs))
    )
    none = bench.first("PiTApplyTokens", **inputs, mask=torch.zeros(1, 50, 30))
    full = bench.first("PiTApplyTokens", **inputs, mask=torch.ones(64, 64))
    half = bench.first("PiTApplyTokens", **inputs, mask=torch.linspace(0, 1, 64).expand(1, 1, 64, 64))
    assert close(bench.sample(none, noise=noise), plain)
    assert close(bench.sample(full, noise=noise), free)
    assert not close(bench.sample(half, noise=noise), free)


def test_one_mask_per_picture(bench: Bench, model: Any, adapter: Any) -> None:
    noise = randn((2, 4, 8, 8), 7)
    masks = torch.stack([torch.zeros(16, 16), torch.ones(16, 16)])
    inputs = {"model": model, "ip_adapter": adapter, "tokens": bench.tokens(1)}
    found = bench.sample(bench.first("PiTApplyTokens", **inputs, mask=masks), noise=noise)
    assert close(found[:1], bench.sample(model, noise=noise)[:1])
    assert close(found[1:], bench.sample(bench.first("PiTApplyTokens", **inputs), noise=noise)[1:])


def test_regions_are_stacked_applications(bench: Bench, model: Any, adapter: Any) -> None:
    rows, masks = bench.tokens(1, rows=2), torch.zeros(2, 16, 16)
    masks[0, :, :8], masks[1, :, 8:] = 1, 1
    inputs = {"ip_adapter": adapter}
    regions = bench.first("PiTApplyTokens", model=model, tokens=rows, rows="regions", mask=masks, **inputs)
    stacked = model
    for i in range(2):
        tokens = rows.with_tokens(rows.tokens[i : i + 1])
        stacked = bench.first("PiTApplyTokens", model=stacked, tokens=tokens, mask=masks[i], **inputs)
    noise = randn((3, 4, 8, 8), 7)
    assert torch.equal(bench.sample(regions, noise=noise), bench.sample(stacked, noise=noise))


def test_a_mask_lies_where_it_should_in_conditions_with_an_area(
    bench: Bench, model: Any, adapter: Any
) -> None:
    """Two conditions, left and right: a mask on the left half leaves the right one as it was."""
    groups = [[(1, (8, 8, 0, 0)), (3, (8, 8, 0, 8))], [(2, None)]]
    options = {"noise": randn((1, 4, 8, 16), 7), "cfg": 1.0, "steps": 1, "groups": groups}
    mask = torch.zeros(1, 8, 16)
    mask[..., :8] = 1
    inputs = {"model": model, "ip_adapter": adapter, "tokens": bench.tokens(1)}
    plain, free, left = (
        bench.sample(each, **options)
        for each in (
            model,
            bench.first("PiTApplyTokens", **inputs),
            bench.first("PiTApplyTokens", **inputs, mask=mask),
        )
    )
    assert close(left[..., 8:], plain[..., 8:]) and not close(free[..., 8:], plain[..., 8:])
    assert close(left[..., :8], free[..., :8])


def test_several_conditions_at_once(bench: Bench, model: Any, adapter: Any) -> None:
    """Two equal positive conditions average to one."""
    patched = bench.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=bench.tokens(1))
    twice = bench.sample(patched, groups=[[(1, None), (1, None)], [(2, None)]])
    assert close(twice, bench.sample(patched))


def test_concatenated_tokens_and_their_repeated_null(bench: Bench, model: Any, adapter: Any) -> None:
    """Attention to the same tokens twice is attention to them once."""
    once = bench.tokens(1)
    twice = bench.first("PiTCombineTokens", tokens={"tokens0": once, "tokens1": once}, operation="concat")
    single, double = (
        bench.sample(bench.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=each))
        for each in (once, twice)
    )
    assert close(double, single)


def test_nothing_stays_on_the_device_after_a_run(bench: Bench, model: Any, adapter: Any) -> None:
    patched = bench.first(
        "PiTApplyTokens", model=model, ip_adapter=adapter, tokens=bench.tokens(1), mask=torch.ones(8, 8)
    )
    bench.sample(patched)
    assert kept(bench, patched) == 0


def test_copies_of_a_model_share_the_keys_and_values(bench: Bench, model: Any, adapter: Any) -> None:
    patched = bench.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=bench.tokens(1))
    copied, cloned = copy.deepcopy(patched.model_options), patched.clone()
    first = next(iter(bench.host.applications_of(patched)))
    assert next(iter(bench.host.applications_of(cloned))) is first
    patches = copied["transformer_options"]["patches_replace"]["attn2"].values()
    assert all(patch.applications[0] is first for patch in patches)


def test_anothers_replacement_is_kept_below_ours(bench: Bench, model: Any, adapter: Any) -> None:
    other = model.clone()
    calls = []

    def halved(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        calls.append(options["block"])
        return 0.5 * bench.host._attention(q, k, v, options)

    other.set_model_attn2_replace(halved, "middle", 0, 0)
    inputs = {"ip_adapter": adapter, "tokens": bench.tokens(1)}
    both = bench.first("PiTApplyTokens", model=other, **inputs)
    assert not close(bench.sample(both), bench.sample(bench.first("PiTApplyTokens", model=model, **inputs)))
    assert calls


def test_keys_and_values_are_computed_once_for_the_same_tokens(bench: Bench, model: Any) -> None:
    adapter = bench.adapter(name="other.safetensors", salt="other")
    calls = []
    projected = adapter.adapter.layers.keys_values
    adapter.adapter.layers.keys_values = lambda n, *rest: calls.append(n) or projected(n, *rest)
    for weight in (1.0, 0.5):
        bench.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=bench.tokens(1), weight=weight)
    layers = len(adapter.adapter.layers)
    assert len(calls) == 2 * layers  # the tokens and their null
    before = len(calls)
    patched = bench.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=bench.tokens(2))
    during = len(calls)
    bench.sample(patched)
    assert during == before + layers and len(calls) == during


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_follows_the_queries(bench: Bench, model: Any, adapter: Any, dtype: torch.dtype) -> None:
    patched = bench.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=bench.tokens(1))
    patches = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    patch = patches["input", 4, 0]
    width = patch.applications[0].cond[0][0].shape[-1]
    q, k, v = (randn((2, 16, width), seed).to(dtype) for seed in (1, 2, 3))
    options = {
        "n_heads": 2,
        "cond_or_uncond": [1, 0],
        "attn_precision": None,
        "activations_shape": [2, width, 4, 4],
    }
    assert patch(q, k, v, options).dtype == dtype
    bench.host._release(patched)


def test_numbers_too_large_for_the_model_are_one_sentence(bench: Bench, model: Any, adapter: Any) -> None:
    """And no black picture: in half precision they would be infinite."""
    tokens = bench.tokens(1).with_tokens(1e6 * bench.tokens(1).tokens)
    patched = bench.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=tokens)
    patch = patched.model_options["transformer_options"]["patches_replace"]["attn2"]["input", 4, 0]
    width = patch.applications[0].cond[0][0].shape[-1]
    options = {"n_heads": 2, "cond_or_uncond": [1, 0], "activations_shape": [2, width, 4, 4]}
    for dtype in (torch.bfloat16, torch.float32):
        q = randn((2, 16, width), 1).to(dtype)
        assert torch.isfinite(patch(q, q, q, options)).all()
    q = randn((2, 16, width), 1).half()
    with pytest.raises(bench.error, match="^tokens give layer 0 numbers that are too large .* float16"):
        patch(q, q, q, options)
    bench.host._release(patched)


def test_half_precision_models_keep_half_precision_keys(bench: Bench) -> None:
    stored = bench.host._stored(torch.ones(1, 4, 8), torch.bfloat16)
    assert stored.dtype == torch.float16
    assert bench.host._stored(torch.full((1, 4, 8), 1e6), torch.float16).dtype == torch.float32
    assert bench.host._stored(torch.ones(1, 4, 8), torch.float32).dtype == torch.float32


def test_unconditional_tokens_of_the_right_half_only(bench: Bench, model: Any, adapter: Any) -> None:
    """A null of zeros' keys is no matter at guidance 1, where the unconditional half never runs."""
    one = bench.tokens(1)
    two = bench.tokens(1, null=torch.zeros(1, TOKENS, CONTEXT))
    a, b = (
        bench.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=each) for each in (one, two)
    )
    assert torch.equal(bench.sample(a, cfg=1.0), bench.sample(b, cfg=1.0))
    assert not torch.equal(bench.sample(a), bench.sample(b))
