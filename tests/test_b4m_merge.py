"""Splice, four strengths, the split of one entity, and the sum of what was never B4M."""

import pytest
import torch
from b4m_files import WIDTHS, b4m_file, quadrants_of

from pit_core.b4m.factors import Factors, factors_of, save_factors
from pit_core.b4m.merge import basis_difference, concatenate, merge, quadrant_lora, splice, split_entity
from pit_core.errors import PitError
from pit_core.files import load_tensors


def test_swap_exchanges_the_roles():
    content, style = factors_of(b4m_file(1)), factors_of(b4m_file(2))
    for name, layer in splice(content, style, swap=True).items():
        assert torch.equal(layer.up, content[name].up) and torch.equal(layer.down, style[name].down)
        ordinary = quadrant_lora(content, base=2, content=3, style=5)[name].delta()
        swapped = quadrant_lora(content, base=2, content=5, style=3, swap=True)[name].delta()
        assert not torch.equal(ordinary, quadrant_lora(content, base=2, content=5, style=3)[name].delta())
        assert torch.equal(quadrants_of(ordinary)[3], quadrants_of(swapped)[3])


@pytest.mark.parametrize(
    "strengths, gains",
    [
        ({"gains": (2.0, 3.0, 5.0, 7.0)}, (2, 3, 5, 7)),
        ({"base": 2.0, "content": 3.0, "style": 5.0}, (2, 6, 5, 15)),
        ({"base": 0.0, "content": 3.0, "style": 0.0}, (0, 0, 0, 0)),
    ],
)
def test_each_quadrant_has_its_own_strength(strengths, gains):
    factors = factors_of(b4m_file(1))
    for name, layer in quadrant_lora(factors, **strengths).items():
        found, before = quadrants_of(layer.delta()), quadrants_of(factors[name].delta())
        for gain, now, then in zip(gains, found, before, strict=True):
            assert torch.equal(now, gain * then)


def test_an_entity_splits_into_four_that_sum_up_to_it():
    factors = factors_of(b4m_file(1))
    parts = split_entity(factors)
    for name, layer in factors.items():
        for number, part in enumerate(parts):
            shown = quadrants_of(part[name].delta())
            assert torch.equal(shown[number], quadrants_of(layer.delta())[number])
            assert not any(shown[other].any() for other in range(4) if other != number)
            assert part[name].rank == 3
        assert torch.equal(sum(part[name].delta() for part in parts), layer.delta())
    swapped = split_entity(factors, swap=True)
    assert torch.equal(swapped.content[name].delta(), parts.style[name].delta())


def test_concatenation_is_the_exact_sum():
    one, other = factors_of(b4m_file(1)), factors_of(b4m_file(2, basis=7, rank=4))
    del other["lora_unet_mid_block_attn2_to_k"]
    total = concatenate([one, other], [1.0, -2.0])
    for name, layer in total.items():
        second = -2 * other[name].delta() if name in other else 0
        assert torch.equal(layer.delta(), one[name].delta() + second)


def test_merge_splices_one_basis_and_adds_up_others_with_a_note():
    content, style = b4m_file(1), b4m_file(2)
    merged = merge(content, style)
    assert (merged.method, merged.note) == ("splice", "")
    for other, reason in (
        (b4m_file(2, basis=7), "frozen halves differ"),
        (b4m_file(2, rank=5), "rank 5"),
    ):
        merged = merge(content, other)
        assert merged.method == "concatenation" and reason in merged.note
        for name, layer in merged.factors.items():
            assert torch.equal(
                layer.delta(), factors_of(content)[name].delta() + factors_of(other)[name].delta()
            )


def test_the_basis_is_compared_and_a_splice_across_bases_warns():
    content, style = b4m_file(1), b4m_file(2, basis=7)
    assert basis_difference(content, b4m_file(2))[0] == 0
    rounded = {key: (tensor * 1.001).half() for key, tensor in b4m_file(2).items()}
    assert 0 < basis_difference(content, rounded)[0] < 1e-2
    difference, layer = basis_difference(content, style)
    assert difference > 0.1 and layer.startswith("lora_unet_")
    with pytest.warns(UserWarning, match="frozen halves differ"):
        splice(content, style)


def test_saved_files_have_kohya_keys_with_alpha_as_rank(tmp_path):
    path = tmp_path / "merged.safetensors"
    save_factors(path, quadrant_lora(b4m_file(1)), dtype=torch.float16)
    tensors, _ = load_tensors(path)
    assert len(tensors) == 3 * len(WIDTHS)
    name = "lora_unet_up_blocks_0_attn1_to_out_0"
    assert tensors[f"{name}.lora_down.weight"].dtype == torch.float16
    assert tensors[f"{name}.alpha"] == 6 == tensors[f"{name}.lora_down.weight"].shape[0]


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
    content = factors_of(b4m_file(1))
    with pytest.raises(PitError, match="rank 3.*rank 5"):
        splice(content, b4m_file(2, rank=5))
    with pytest.raises(PitError, match="in one only"):
        splice(content, {k: v for k, v in b4m_file(2).items() if "mid_block" not in k})
    with pytest.raises(PitError, match="input_blocks"):
        concatenate([content, {"lora_unet_input_blocks_4_x": Factors(torch.ones(2, 4), torch.ones(4, 2))}])
    with pytest.raises(PitError, match="widths|width"):
        concatenate([content, dict.fromkeys(content, Factors(torch.ones(2, 4), torch.ones(4, 2)))])
