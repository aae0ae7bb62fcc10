"""Three dials on one entity or on two files, and what they are multiplied by in each block."""

import math

import pytest
import torch
from lora_files import lora_file
from torch import Tensor

from pit_core.b4m.blocks import PRESETS, Share, block_name, parse_blocks, share_of
from pit_core.b4m.dials import Dials, Source, load_source
from pit_core.b4m.factors import Factors, lora_of_factors
from pit_core.b4m.merge import concatenate, quadrant_lora, splice
from pit_core.errors import PitError
from pit_core.files import save_tensors
from pit_core.lora.formats import lora_from_tensors, to_kohya
from pit_core.lora.kinds import kind_of

SHAPES = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (6, 9),
    "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (7, 5),
    "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": (8, 8),
}
NAMES = [f"lora_unet_{module.replace('.', '_')}" for module in SHAPES]
DOWN, MID, CONTENT, STYLE = NAMES


def whole_numbers(seed: int, *shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def entity(seed: int, basis: int = 0) -> dict[str, Factors]:
    """A stage-one file in whole numbers: A and C of `basis`, in separate channels, so that A C = 0."""
    made = {}
    for name, (m, n) in zip(NAMES, SHAPES.values(), strict=True):
        up, down = whole_numbers(seed, m, 4), whole_numbers(seed + 50, 4, n)
        up[: m // 2], down[:, : n // 2] = 0, 0
        up[: m // 2, :2] = whole_numbers(basis + 100, m // 2, 2)
        down[2:, : n // 2] = whole_numbers(basis + 150, 2, n // 2)
        made[name] = Factors(down, up)
    return made


def source(content: dict[str, Factors], style: dict[str, Factors] | None = None) -> Source:
    return Source(lora_of_factors(content), None if style is None else lora_of_factors(style))


def same(a: dict[str, Factors], b: dict[str, Factors]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].delta(), b[name].delta()) for name in a)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dials", [(1, 1, 1), (2, 3, 5), (-1, 0.5, 2), (2, 1, 0), (0, 0, 1)])
def test_the_dials_are_the_four_gain_form_at_half_the_rank(dials: tuple[float, ...], swap: bool) -> None:
    content, style, base = dials
    found = source(entity(1)).dialled(Dials(content, style, base, swap)).factors
    assert same(found, quadrant_lora(entity(1), base, content, style, swap=swap))
    assert all(layer.rank == 4 for layer in found.values())


def test_two_files_are_spliced_and_keep_every_bit_at_strength_one() -> None:
    content, style = entity(1), entity(2)
    for swap in (False, True):
        done = source(content, style).dialled(Dials(swap=swap))
        assert (done.method, done.notes) == ("splice", ())
        for name, (down, up) in splice(content, style, swap).items():
            assert torch.equal(done.factors[name].down, down) and torch.equal(done.factors[name].up, up)


def test_nothing_is_left_of_dials_at_zero() -> None:
    done = source(entity(1), entity(2)).dialled(Dials(0, 0, 0))
    assert done.factors == {} and set(done.whole) == set(NAMES)


@pytest.mark.parametrize("swap, idle, others", [(False, "content", "style"), (True, "style", "content")])
def test_a_dial_that_does_nothing_is_noted(swap: bool, idle: str, others: str) -> None:
    done = source(entity(1)).dialled(Dials(**{idle: 2.0, others: 0.0, "base": 0.0, "swap": swap}))
    assert done.factors == {}
    assert done.notes == (f"With base and {others} 0 the {idle} has nothing to act through.",)
    assert source(entity(1)).dialled(Dials(1, 0, 0.1, swap)).notes == ()


def test_files_of_another_basis_are_added_up_and_it_is_said() -> None:
    content, style = entity(1), entity(2, basis=7)
    done = source(content, style).dialled(Dials(2.0, -0.5, 3.0))
    assert done.method == "sum"
    assert same(done.factors, concatenate([content, style], [2.0, -0.5]))
    assert "B4M does not apply, so the two LoRAs were added up" in done.notes[0]
    assert "no base" in done.notes[1]
    forced = source(content, style).dialled(Dials(mode="splice"))
    assert forced.method == "splice" and "frozen halves differ" in forced.notes[0]
    asked = source(content, entity(2)).dialled(Dials(mode="sum"))
    assert asked.method == "sum" and asked.notes == ()
    assert source(content, style).dialled(Dials(0.0, 0.0)).factors == {}


def test_ordinary_loras_are_added_up_and_their_halves_are_doubted() -> None:
    plain = lora_from_tensors(lora_file(SHAPES, rank=3), name="plain")
    assert Source(lora_of_factors(entity(1)), plain).dialled(Dials()).method == "sum"
    with pytest.raises(PitError, match="rank 4.*rank 3"):
        Source(lora_of_factors(entity(1)), plain).dialled(Dials(mode="splice"))
    (note,) = Source(plain).dialled(Dials()).notes
    assert note.startswith("'plain' was not trained as B4M")
    assert "warning: 'plain' was not" in Source(plain).report()


def test_block_weights_count_beside_the_dials() -> None:
    found = source(entity(1)).dialled(Dials(content=2.0, blocks=parse_blocks("B-LoRA"))).factors
    assert set(found) == {CONTENT, STYLE}
    whole = entity(1)
    assert same({CONTENT: found[CONTENT]}, quadrant_lora({CONTENT: whole[CONTENT]}, content=2.0, style=0.0))
    assert same({STYLE: found[STYLE]}, quadrant_lora({STYLE: whole[STYLE]}, content=0.0))
    with pytest.raises(
        PitError, match="no block 'up_blocks.7'.*it has down_blocks.1.attentions.0, mid_block"
    ):
        source(entity(1)).dialled(Dials(blocks=parse_blocks("up_blocks.7: 0")))


def test_b_lora_on_two_ordinary_loras_takes_one_block_of_each() -> None:
    content, style = entity(1), entity(2, basis=7)
    found = source(content, style).dialled(Dials(blocks=parse_blocks("B-LoRA"), mode="sum")).factors
    assert same(found, {CONTENT: content[CONTENT], STYLE: style[STYLE]})


def test_blocks_are_read_out_of_a_text() -> None:
    blocks = parse_blocks("up_blocks: 0.5\nup_blocks.0.attentions.1.: 1 -2; *: 0 0 1")
    assert share_of(CONTENT, blocks) == Share(0.5, 0.5, 0.5)
    assert share_of(STYLE, blocks) == Share(1, -2, 1)
    assert share_of(DOWN, blocks) == share_of(MID, blocks) == Share(0, 0, 1)
    assert share_of(MID, parse_blocks("")) == Share(1, 1, 1)
    assert all(parse_blocks(name) == parse_blocks(text) for name, text in PRESETS.items())


@pytest.mark.parametrize(
    "text", ["up_blocks", "up_blocks: much", "up blocks: 1", "a: 1 2 3 4", "a:", "a: nan", "a: 1; a: 2"]
)
def test_block_weights_that_cannot_be_read_are_quoted(text: str) -> None:
    with pytest.raises(PitError, match="Expected block weights such as"):
        parse_blocks(text)


def test_original_names_of_blocks_mean_the_same() -> None:
    pairs = {"input_blocks_4_1": "down_blocks.1.attentions.0", "middle_block_1": "mid_block",
             "output_blocks_4_1": "up_blocks.1.attentions.1"}  # fmt: skip
    for theirs, ours in pairs.items():
        assert block_name(f"lora_unet_{theirs}_transformer_blocks_0_attn1_to_q") == ours


def test_what_is_saved_loads_as_the_same_lora(tmp_path) -> None:
    dials = Dials(0.5, 2.0)
    for name, seed in (("content", 1), ("style", 2)):
        save_tensors(tmp_path / f"{name}.safetensors", to_kohya(lora_of_factors(entity(seed))), {})
    loaded = load_source(tmp_path / "content.safetensors", tmp_path / "style.safetensors")
    done = loaded.dialled(dials)
    saved = loaded.saved(done, dials)
    assert kind_of(saved) == "B4M" and saved.metadata["content"] == "0.5"
    assert saved.metadata["content_file"] == "content.safetensors" and saved.metadata["method"] == "splice"
    assert same(Source(saved).dialled(Dials()).factors, done.factors)
    assert "made for each other" in loaded.report().splitlines()[-1]
    assert "not made for each other" in source(entity(1), entity(2, basis=7)).report()


@pytest.mark.parametrize("wrong", [{"content": math.nan}, {"base": "much"}, {"style": True}, {"mode": "mix"}])
def test_dials_out_of_range_are_named(wrong: dict) -> None:
    with pytest.raises(PitError, match=f"Expected.*{next(iter(wrong))}"):
        Dials(**wrong)
