"""Splice, four strengths, the split of one entity, and the sum of what was never B4M."""

import pytest
import torch

from pit_core.b4m.factors import Factors, factors_of, load_factors, save_factors
from pit_core.b4m.merge import basis_difference, concatenate, merge, quadrant_lora, splice, split_entity
from pit_core.errors import PitError
from pit_core.files import load_tensors, save_tensors

RANK = 3
WIDTHS = {
    "down_blocks.1.attn1.to_q": (8, 8),
    "mid_block.attn2.to_k": (6, 9),
    "up_blocks.0.attn1.to_out.0": (7, 5),
}


def state_dict(seed, basis=0, prefix="unet.unet.", rank=RANK):
    """A file's tensors, in whole numbers so that products are exact; the frozen halves belong to `basis`."""
    tensors = {}
    for module, (m, n) in WIDTHS.items():
        up, down = whole_numbers(seed, m, rank), whole_numbers(seed + 50, rank, n)
        up[: m // 2] = whole_numbers(basis + 100, m, rank)[: m // 2]
        down[:, : n // 2] = whole_numbers(basis + 150, rank, n)[:, : n // 2]
        tensors[f"{prefix}{module}.lora.up.weight"] = up
        tensors[f"{prefix}{module}.lora.down.weight"] = down
    return tensors


def whole_numbers(seed, *shape):
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def quadrants_of(delta):
    m, n = delta.shape
    return (
        delta[: m // 2, : n // 2],
        delta[: m // 2, n // 2 :],
        delta[m // 2 :, : n // 2],
        delta[m // 2 :, n // 2 :],
    )


def test_spliced_quadrants_are_the_parents_blocks():
    content, style = state_dict(1), state_dict(2)
    spliced, c, s = splice(content, style), factors_of(content), factors_of(style)
    assert spliced.keys() == c.keys()
    for name, layer in spliced.items():
        ul, ur, dl, dr = quadrants_of(layer.delta())
        of_content, of_style = quadrants_of(c[name].delta()), quadrants_of(s[name].delta())
        assert torch.equal(ul, of_content[0]) and torch.equal(ul, of_style[0])
        assert torch.equal(ur, of_content[1])
        assert torch.equal(dl, of_style[2])
        assert torch.equal(dr, s[name].halves().b @ c[name].halves().d)


def test_weights_survive_saving_loading_and_splicing_bit_for_bit(tmp_path):
    content, style = ({k: t / 3 for k, t in state_dict(seed).items()} for seed in (1, 2))
    save_tensors(tmp_path / "content.safetensors", content)
    save_factors(tmp_path / "style.safetensors", factors_of(style), {"basis_seed": 0})
    (c, _), (s, metadata) = (load_factors(tmp_path / f"{n}.safetensors") for n in ("content", "style"))
    assert metadata == {"basis_seed": "0"}
    for module in WIDTHS:
        name = "lora_unet_" + module.replace(".", "_")
        assert torch.equal(splice(c, s)[name].down, content[f"unet.unet.{module}.lora.down.weight"])
        assert torch.equal(splice(c, s)[name].up, style[f"unet.unet.{module}.lora.up.weight"])


def test_swap_exchanges_the_roles():
    content, style = factors_of(state_dict(1)), factors_of(state_dict(2))
    for name, layer in splice(content, style, swap=True).items():
        assert torch.equal(layer.up, content[name].up) and torch.equal(layer.down, style[name].down)
        ordinary = quadrant_lora(content, base=2, content=3, style=5)[name].delta()
        swapped = quadrant_lora(content, base=2, content=5, style=3, swap=True)[name].delta()
        assert not torch.equal(ordinary, quadrant_lora(content, base=2, content=5, style=3)[name].delta())
        assert torch.equal(quadrants_of(ordinary)[3], quadrants_of(swapped)[3])


def test_all_strengths_one_give_the_lora_itself_at_twice_the_rank():
    factors = factors_of(state_dict(1))
    for name, layer in quadrant_lora(factors).items():
        assert layer.rank == 2 * RANK
        assert torch.equal(layer.delta(), factors[name].delta())


@pytest.mark.parametrize(
    "strengths, gains",
    [
        ({"gains": (2.0, 3.0, 5.0, 7.0)}, (2, 3, 5, 7)),
        ({"base": 2.0, "content": 3.0, "style": 5.0}, (2, 6, 5, 15)),
        ({"base": 0.0, "content": 3.0, "style": 0.0}, (0, 0, 0, 0)),
    ],
)
def test_each_quadrant_has_its_own_strength(strengths, gains):
    factors = factors_of(state_dict(1))
    for name, layer in quadrant_lora(factors, **strengths).items():
        found, before = quadrants_of(layer.delta()), quadrants_of(factors[name].delta())
        for gain, now, then in zip(gains, found, before, strict=True):
            assert torch.equal(now, gain * then)


def test_strengths_zero_leave_the_model_unchanged():
    for layer in quadrant_lora({k: t / 3 for k, t in state_dict(1).items()}, gains=(0, 0, 0, 0)).values():
        weight = torch.randn(layer.delta().shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(weight + layer.delta(), weight)


def test_an_entity_splits_into_four_that_sum_up_to_it():
    factors = factors_of(state_dict(1))
    parts = split_entity(factors)
    for name, layer in factors.items():
        for number, part in enumerate(parts):
            shown = quadrants_of(part[name].delta())
            assert torch.equal(shown[number], quadrants_of(layer.delta())[number])
            assert not any(shown[other].any() for other in range(4) if other != number)
            assert part[name].rank == RANK
        assert torch.equal(sum(part[name].delta() for part in parts), layer.delta())
    swapped = split_entity(factors, swap=True)
    assert torch.equal(swapped.content[name].delta(), parts.style[name].delta())


def test_concatenation_is_the_exact_sum():
    one, other = factors_of(state_dict(1)), factors_of(state_dict(2, basis=7, rank=RANK + 1))
    del other["lora_unet_mid_block_attn2_to_k"]
    total = concatenate([one, other], [1.0, -2.0])
    for name, layer in total.items():
        second = -2 * other[name].delta() if name in other else 0
        assert torch.equal(layer.delta(), one[name].delta() + second)


def test_merge_splices_one_basis_and_adds_up_others_with_a_note():
    content, style = state_dict(1), state_dict(2)
    merged = merge(content, style)
    assert (merged.method, merged.note) == ("splice", "")
    for other, reason in (
        (state_dict(2, basis=7), "frozen halves differ"),
        (state_dict(2, rank=5), "rank 5"),
    ):
        merged = merge(content, other)
        assert merged.method == "concatenation" and reason in merged.note
        for name, layer in merged.factors.items():
            assert torch.equal(
                layer.delta(), factors_of(content)[name].delta() + factors_of(other)[name].delta()
            )


def test_the_basis_is_compared_and_a_splice_across_bases_warns():
    content, style = state_dict(1), state_dict(2, basis=7)
    assert basis_difference(content, state_dict(2))[0] == 0
    rounded = {key: (tensor * 1.001).half() for key, tensor in state_dict(2).items()}
    assert 0 < basis_difference(content, rounded)[0] < 1e-2
    difference, layer = basis_difference(content, style)
    assert difference > 0.1 and layer.startswith("lora_unet_")
    with pytest.warns(UserWarning, match="frozen halves differ"):
        splice(content, style)


@pytest.mark.parametrize("prefix", ["", "unet.", "unet.unet."])
def test_all_prefixes_mean_the_same_layers(prefix):
    assert factors_of(state_dict(1, prefix=prefix)).keys() == factors_of(state_dict(1)).keys()


def test_saved_files_have_kohya_keys_with_alpha_as_rank(tmp_path):
    path = tmp_path / "merged.safetensors"
    save_factors(path, quadrant_lora(state_dict(1)), dtype=torch.float16)
    tensors, _ = load_tensors(path)
    assert len(tensors) == 3 * len(WIDTHS)
    name = "lora_unet_up_blocks_0_attn1_to_out_0"
    assert tensors[f"{name}.lora_down.weight"].dtype == torch.float16
    assert tensors[f"{name}.alpha"] == 2 * RANK == tensors[f"{name}.lora_down.weight"].shape[0]


def test_alpha_scales_and_foreign_keys_are_named():
    tensors = {
        "lora_unet_x.lora_down.weight": torch.ones(2, 4),
        "lora_unet_x.lora_up.weight": torch.ones(4, 2),
        "lora_unet_x.alpha": torch.tensor(1.0),
    }
    assert torch.equal(factors_of(tensors)["lora_unet_x"].delta(), torch.ones(4, 4))
    with pytest.raises(PitError, match="dora_scale"):
        factors_of({**tensors, "lora_unet_x.dora_scale": torch.ones(4)})
    del tensors["lora_unet_x.lora_up.weight"]
    with pytest.raises(PitError, match="needs down and up"):
        factors_of(tensors)


def test_what_cannot_be_merged_is_named():
    content = factors_of(state_dict(1))
    with pytest.raises(PitError, match="rank 3.*rank 5"):
        splice(content, state_dict(2, rank=5))
    with pytest.raises(PitError, match="in one only"):
        splice(content, {k: v for k, v in state_dict(2).items() if "mid_block" not in k})
    with pytest.raises(PitError, match="input_blocks"):
        concatenate([content, {"lora_unet_input_blocks_4_x": Factors(torch.ones(2, 4), torch.ones(4, 2))}])
    with pytest.raises(PitError, match="widths|width"):
        concatenate([content, dict.fromkeys(content, Factors(torch.ones(2, 4), torch.ones(4, 2)))])
