"""Weight schedules and layer maps, and what the weight scales."""

import pytest
import torch

from pit_core.errors import PitError
from pit_core.ip_adapter.attention import image_term
from pit_core.ip_adapter.layers import AttentionLayer, layers_of_config
from pit_core.ip_adapter.weights import (
    RAMPS,
    SCALINGS,
    SCHEDULES,
    LayerWeight,
    layer_weights,
    parse_layer_map,
    scaled_keys_values,
)

SDXL = layers_of_config(
    {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
    }
)
SD15 = layers_of_config({"cross_attention_dim": 768})


def by_transformer(schedule: str, **options: object) -> dict[int, LayerWeight]:
    found: dict[int, LayerWeight] = {}
    weights = layer_weights(SDXL, schedule, **options)
    for layer in SDXL:
        value = weights.get(layer.index, LayerWeight(0.0))
        assert found.setdefault(layer.transformer_index, value) == value
    return found


def numbers(schedule: str, **options: object) -> list[float]:
    return [round(each.weight, 6) for each in by_transformer(schedule, **options).values()]


def of(t: int, found: dict[int, LayerWeight]) -> LayerWeight:
    return found[t]


def test_even_weighs_all_layers_alike() -> None:
    assert len(SDXL) == 70
    assert set(numbers("even", weight=0.7)) == {0.7}


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("ease in", 1.0, 0.05 + 0.95 / 11),
        ("ease out", 0.05, 0.05 + 0.95 * 10 / 11),
        ("ease in-out", 0.05, 0.05 + 0.95 * (1 - 4.5 / 5.5)),
        ("reverse in-out", 1.0, 0.05 + 0.95 * 4.5 / 5.5),
    ],
)
def test_ramps_run_from_the_first_to_the_last_transformer(name: str, first: float, last: float) -> None:
    found = by_transformer(name)
    assert of(0, found).weight == pytest.approx(first)
    assert of(10, found).weight == pytest.approx(last)


def test_weak_and_strong_groups() -> None:
    found = by_transformer("weak input")
    assert [of(t, found).weight for t in (0, 3, 4, 5, 10)] == [0.2, 0.2, 1, 1, 1]
    found = by_transformer("weak output")
    assert [of(t, found).weight for t in (0, 3, 4, 5, 10)] == [1, 1, 1, 0.2, 0.2]
    found = by_transformer("strong middle", weight=2.0)
    assert [of(t, found).weight for t in (0, 3, 4, 5, 10)] == [0.4, 0.4, 2, 0.4, 0.4]
    assert of(4, by_transformer("weak middle")).weight == 0.2


def test_style_and_composition_layers() -> None:
    assert {t for t, w in by_transformer("style").items() if w.weight} == {6}
    assert {t for t, w in by_transformer("composition").items() if w.weight} == {3}
    assert {t for t, w in by_transformer("strong style").items() if not w.weight} == {3}
    both = by_transformer("style and composition", weight=0.5, composition_weight=0.25)
    assert {t: w.weight for t, w in both.items() if w.weight} == {3: 0.25, 6: 0.5}
    strong = by_transformer("strong style and composition", weight=0.5, composition_weight=0.25)
    assert {t: w.weight for t, w in strong.items()} == {t: 0.25 if t == 3 else 0.5 for t in range(11)}


def test_precise_variants_swap_the_halves() -> None:
    style = {t: w for t, w in by_transformer("precise style", weight=0.8).items() if w.weight}
    assert style == {3: LayerWeight(0.8, swapped=True), 6: LayerWeight(0.8)}
    composition = by_transformer("precise composition", weight=0.8)
    assert of(3, composition) == LayerWeight(0.8)
    assert of(6, composition) == LayerWeight(0.8, swapped=True)
    assert of(0, composition) == LayerWeight(pytest.approx(0.08), swapped=True)


def test_layer_maps_are_read_and_multiplied_by_the_weight() -> None:
    found = by_transformer("layer map", weight=0.5, layer_map=" 3:1, 6 : .5\n10:-2e0,")
    assert {t: w.weight for t, w in found.items() if w.weight} == {3: 0.5, 6: 0.25, 10: -1.0}


@pytest.mark.parametrize("text", ["", "3", "a:1", "3:x", "3:nan", "-1:1", "11:1", "3:1,3:2", "3:1 6:1"])
def test_broken_layer_maps_are_refused(text: str) -> None:
    with pytest.raises(PitError, match="layer map"):
        parse_layer_map(text, 11)


def test_the_middle_block_alone() -> None:
    weights = layer_weights(SDXL, "layer map", layer_map="4:1")
    assert sorted(weights) == list(range(60, 70))


def test_sd15_has_sixteen_transformers_and_refuses_sdxls_maps() -> None:
    assert len(layer_weights(SD15, "ease in")) == 16
    with pytest.raises(PitError, match="11 transformers, but this model has 16"):
        layer_weights(SD15, "style")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(PitError, match="weight to be a finite number"):
        layer_weights(SDXL, "even", value)


def test_weight_zero_leaves_no_layer() -> None:
    zero = {"weight": 0.0, "composition_weight": 0.0, "layer_map": "3:1"}
    assert all(layer_weights(SDXL, name, **zero) == {} for name in SCHEDULES)
    assert set(RAMPS) <= set(SCHEDULES)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(PitError, match="schedule out of"):
        layer_weights([AttentionLayer(0, "m", 8, 8, ("input", 1, 0), 0)], "steep")


# what the weight scales


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 6, 16), torch.randn(1, 4, 16), torch.randn(1, 4, 16)


@pytest.mark.parametrize("scaling", SCALINGS[:2])
def test_weight_one_is_plain_attention(scaling: str, qkv: tuple[torch.Tensor, ...]) -> None:
    q, k, v = qkv
    assert torch.equal(image_term(q, *_args(k, v, 1.0, scaling)), image_term(q, k, v, 2, 1.0))


def test_the_c_penalty_follows_the_width(qkv: tuple[torch.Tensor, ...]) -> None:
    _, k, v = qkv
    k2, v2, out = scaled_keys_values(k, v, 0.5, "K+V with C penalty")
    assert out == 1.0
    assert torch.allclose(k2, k * 0.5 * 16 / 1280) and torch.allclose(v2, v * 0.5 * 16 / 1280)
    k3, v3, _ = scaled_keys_values(k, v, 0.5, "K+mean(V) with C penalty")
    mean = v.mean(1, keepdim=True)
    assert torch.equal(k3, k2) and torch.allclose(v3, v - mean + mean * 0.5 * 16 / 1280)
    assert torch.allclose(v3 - v3.mean(1, keepdim=True), v - mean, atol=1e-6)


def test_v_only_is_linear_in_the_weight(qkv: tuple[torch.Tensor, ...]) -> None:
    q, k, v = qkv
    assert torch.allclose(image_term(q, *_args(k, v, 0.3, "V only")), 0.3 * image_term(q, k, v, 2))


def test_an_unknown_scaling_is_refused(qkv: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(PitError, match="embeds scaling"):
        scaled_keys_values(qkv[1], qkv[2], 1.0, "V")


def _args(k: torch.Tensor, v: torch.Tensor, weight: float, scaling: str) -> tuple:
    k, v, out = scaled_keys_values(k, v, weight, scaling)
    return k, v, 2, out
