"""Panel attention against the published numbers and against the dense form, computed in float64."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pit_core.diptych.attention import panel_attention
from pit_core.errors import PitError

GOLDEN = Path(__file__).parent / "goldens" / "diptych_attention.safetensors"
GRIDS = [(1, 2, 1), (3, 5, 2), (5, 7, 3), (2, 9, 1), (4, 6, 5)]  # height, width, columns


def inputs(tokens, batch=2, heads=3, width=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, tokens, width, generator=generator).to(dtype).unbind()


def dense(q, k, v, text, grid, columns, gains, mask=None, normalized=False):
    """The definition, in float64: probabilities of right queries for left keys times the gains (B, left)."""
    q, k, v, gains = q.double(), k.double(), v.double(), gains.double()
    batch, _, tokens, width = q.shape
    scores = q @ k.mT / math.sqrt(width)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    probabilities = scores.softmax(-1)
    column = torch.arange(tokens) - text
    image = (column >= 0) & (column < grid[0] * grid[1])
    left = image & (column % grid[1] < columns)
    right = image & ~left
    factor = torch.ones(batch, tokens, tokens, dtype=torch.float64)
    for b in range(batch):
        row = torch.ones(tokens, dtype=torch.float64)
        row[left] = gains[b]
        factor[b, right] = row
    probabilities = probabilities * factor[:, None]
    if normalized:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities @ v


def close(got, expected, tolerance=2e-5):
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=0)


def test_published_numbers():
    golden = load_file(GOLDEN)
    out = panel_attention(golden["q"], golden["k"], golden["v"], text_tokens=7, grid=(5, 8), strength=1.3)
    torch.testing.assert_close(out, golden["output"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("mode", ["reference", "normalized"])
@pytest.mark.parametrize("trailing", [0, 4])
@pytest.mark.parametrize(("height", "width", "columns"), GRIDS)
def test_equals_the_dense_form_on_any_grid(height, width, columns, trailing, mode):
    q, k, v = inputs(3 + height * width + trailing)
    out = panel_attention(
        q,
        k,
        v,
        text_tokens=3,
        grid=(height, width),
        columns=columns,
        strength=1.7,
        mode=mode,
        trailing_tokens=trailing,
    )
    gains = torch.full((2, height * columns), 1.7)
    close(out, dense(q, k, v, 3, (height, width), columns, gains, normalized=mode == "normalized"))


def test_an_odd_grid_gives_the_middle_column_to_the_right_panel():
    q, k, v = inputs(15)
    out = panel_attention(q, k, v, text_tokens=0, grid=(3, 5), strength=2.0)
    close(out, dense(q, k, v, 0, (3, 5), 2, torch.full((2, 6), 2.0)))


def test_normalized_is_a_logarithm_added_to_the_scores():
    """And the reference is that, times 1 + (strength - 1) * what the query gave to the left panel."""
    q, k, v = inputs(2 + 12)
    how = {"text_tokens": 2, "grid": (2, 6), "strength": 1.3}
    bias = torch.zeros(14, 14, dtype=torch.float64)
    right, left = torch.tensor([5, 6, 7, 11, 12, 13]), torch.tensor([2, 3, 4, 8, 9, 10])
    bias[right[:, None], left] = math.log(1.3)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=bias)
    normalized = panel_attention(q, k, v, mode="normalized", **how)
    close(normalized, expected)
    weight = (q.double() @ k.double().mT / math.sqrt(8)).softmax(-1)[:, :, right][..., left].sum(-1, True)
    reference = panel_attention(q, k, v, **how)[:, :, right]
    close(reference, expected[:, :, right] * (1 + 0.3 * weight))


@pytest.mark.parametrize("strength", [0.0, 0.4, 3.0])
@pytest.mark.parametrize("mode", ["reference", "normalized"])
def test_any_strength_from_zero_on(strength, mode):
    q, k, v = inputs(3 + 15)
    out = panel_attention(q, k, v, text_tokens=3, grid=(3, 5), strength=strength, mode=mode)
    close(out, dense(q, k, v, 3, (3, 5), 2, torch.full((2, 6), strength), normalized=mode == "normalized"))


def test_strength_one_is_the_plain_attention_bit_for_bit():
    q, k, v = inputs(3 + 15)
    plain = F.scaled_dot_product_attention(q, k, v)
    for rows, strength in ((None, 1.0), (None, 1), ([False, False], 1.3)):
        out = panel_attention(q, k, v, text_tokens=3, grid=(3, 5), strength=strength, rows=rows)
        assert torch.equal(out, plain)


@pytest.mark.parametrize("mode", ["reference", "normalized"])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 6), (2, 15), (20,), (2, 20)])
def test_strength_for_each_key(shape, mode):
    """Over the left panel's tokens, the image's or all: the left panel's are read."""
    q, k, v = inputs(20)
    strength = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(5))
    out = panel_attention(
        q, k, v, text_tokens=3, grid=(3, 5), strength=strength, mode=mode, trailing_tokens=2
    )
    first = {6: 0, 15: 0, 20: 3}[shape[-1]]
    step = {6: 2, 15: 5, 20: 5}[shape[-1]]
    left = [first + step * row + column for row in range(3) for column in range(2)]
    gains = strength.expand(2, -1)[:, left]
    close(out, dense(q, k, v, 3, (3, 5), 2, gains, normalized=mode == "normalized"))


@pytest.mark.parametrize("rows", [[True, False, True], torch.tensor([True, False, True])])
def test_only_the_named_rows_are_enhanced(rows):
    q, k, v = inputs(3 + 15, batch=3)
    strength = torch.tensor([[1.3], [1.4], [1.5]])
    out = panel_attention(q, k, v, text_tokens=3, grid=(3, 5), strength=strength, rows=rows)
    gains = torch.tensor([[1.3], [1.0], [1.5]]).expand(3, 6)
    close(out, dense(q, k, v, 3, (3, 5), 2, gains))


@pytest.mark.parametrize("mode", ["reference", "normalized"])
def test_only_the_named_targets_look_harder(mode):
    q, k, v = inputs(3 + 15 + 2)
    how = {"text_tokens": 3, "grid": (3, 5), "trailing_tokens": 2}
    targets = torch.tensor([True, False, False] * 3)
    out = panel_attention(q, k, v, strength=1.7, mode=mode, targets=targets, **how)
    gains = torch.full((2, 6), 1.7)
    expected = dense(q, k, v, 3, (3, 5), 2, torch.ones(2, 6))
    harder = 3 + torch.tensor([2, 7, 12])
    expected[:, :, harder] = dense(q, k, v, 3, (3, 5), 2, gains, None, mode == "normalized")[:, :, harder]
    close(out, expected)
    none = panel_attention(q, k, v, strength=1.7, mode=mode, targets=~(targets | True), **how)
    assert torch.equal(none, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("mode", ["reference", "normalized"])
@pytest.mark.parametrize("kind", ["added", "bool"])
@pytest.mark.parametrize("shape", [(18, 18), (1, 18), (2, 1, 18, 18), (2, 3, 18, 18), (1, 1, 1, 18)])
def test_masks(shape, kind, mode):
    q, k, v = inputs(18)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    mask = mask if kind == "added" else mask > -0.5
    out = panel_attention(q, k, v, text_tokens=3, grid=(3, 5), strength=1.6, mask=mask, mode=mode)
    close(out, dense(q, k, v, 3, (3, 5), 2, torch.full((2, 6), 1.6), mask, mode == "normalized"))


@pytest.mark.parametrize("mode", ["reference", "normalized"])
def test_heads_side_by_side_give_the_same(mode):
    q, k, v = inputs(18)
    how = {"text_tokens": 3, "grid": (3, 5), "strength": torch.linspace(0.5, 2, 6), "mode": mode}
    how["mask"] = torch.randn(2, 1, 18, 18, generator=torch.Generator().manual_seed(4))
    expected = panel_attention(q, k, v, **how)
    flat = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    out = panel_attention(*flat, heads=3, **how)
    assert out.shape == (2, 18, 24)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2), atol=1e-6, rtol=0)


def test_another_attention_may_change_the_layout():
    """As ComfyUI's do: heads apart on the way in, side by side on the way out."""
    q, k, v = inputs(18)
    seen = []

    def attend(q, k, v, mask):
        seen.append(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    out = panel_attention(q, k, v, text_tokens=3, grid=(3, 5), strength=1.3, attend=attend)
    expected = panel_attention(q, k, v, text_tokens=3, grid=(3, 5), strength=1.3)
    assert torch.equal(out, expected.transpose(1, 2).flatten(2))
    assert seen == [9, 9]  # every query once: the work of plain attention


@pytest.mark.parametrize("mode", ["reference", "normalized"])
def test_half_precision_keeps_its_type_and_its_inputs(mode):
    q, k, v = inputs(18, dtype=torch.bfloat16)
    before = v.clone()
    out = panel_attention(q, k, v, text_tokens=3, grid=(3, 5), strength=1.3, mode=mode)
    assert out.dtype == torch.bfloat16 and torch.equal(v, before)
    close(out, dense(q, k, v, 3, (3, 5), 2, torch.full((2, 6), 1.3), None, mode == "normalized"), 0.03)


def test_gradients_are_those_of_the_dense_form():
    q, k, v = (t.double().requires_grad_() for t in inputs(18))
    strength = torch.full((2, 6), 1.3)
    ours = panel_attention(q, k, v, text_tokens=3, grid=(3, 5), strength=1.3, mode="normalized")
    expected = dense(q, k, v, 3, (3, 5), 2, strength, normalized=True)
    for got, wanted in zip(
        *(torch.autograd.grad(o.sin().sum(), (q, k, v)) for o in (ours, expected)), strict=True
    ):
        close(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (3, 6)}, "18 tokens, which are not 3 of text and a grid of 3 x 6"),
        ({"grid": (3, 4)}, "not 3 of text and a grid of 3 x 4"),
        ({"grid": (-3, -5)}, "not 3 of text and a grid of -3 x -5"),
        ({"text_tokens": -12, "grid": (5, 6)}, "not -12 of text"),
        ({"trailing_tokens": 1}, "not 3 of text, 1 trailing and a grid"),
        ({"grid": (15, 1)}, "0 tokens wide"),
        ({"columns": 0}, "left panel is 0 tokens wide"),
        ({"columns": 5}, "at least 1 of 5"),
        ({"strength": math.nan}, "0 or more .* but got nan"),
        ({"strength": -0.1}, "0 or more .* but got -0.1"),
        ({"strength": math.inf}, "but got inf"),
        (
            {"strength": torch.tensor([1.0, 1, 1, math.nan, 1, 1])},
            "got negative, NaN or infinite numbers",
        ),
        ({"strength": torch.ones(2, 7)}, r"shape \(2, 6\), or a row for all, but got \(2, 7\)"),
        ({"strength": torch.ones(3, 6)}, r"but got \(3, 6\)"),
        ({"strength": torch.ones(2, 1, 6)}, r"but got \(2, 1, 6\)"),
        ({"targets": torch.ones(8, dtype=torch.bool)}, "right panel's 9 tokens, but got torch.bool of shape"),
        ({"targets": torch.ones(9)}, "got torch.float32"),
        ({"rows": [True]}, "batch has 2 rows, but rows says for 1"),
        ({"mode": "renormalised"}, "one of reference, normalized, but got 'renormalised'"),
        ({"mask": torch.zeros(17, 18)}, r"but got \(17, 18\)"),
        ({"mask": torch.zeros(18, 17)}, r"but got \(18, 17\)"),
        ({"mask": torch.zeros(18)}, r"but got \(18,\)"),
        ({"mask": torch.zeros(4, 1, 18, 18)}, r"shape \(2 or 1, 3 or 1, 18 or 1, 18\), but got \(4, 1"),
        ({"mask": torch.zeros(2, 18, 18)}, r"but got \(2, 18, 18\)"),
        ({"k": torch.zeros(2, 3, 17, 8)}, "q, k and v of one shape"),
        ({"q": torch.zeros(18, 8)}, r"got \(18, 8\)"),
    ],
)
def test_bad_input_is_named_in_one_sentence(change, message):
    q, k, v = inputs(18)
    given = {"q": q, "k": k, "v": v, "text_tokens": 3, "grid": (3, 5), "strength": 1.3, **change}
    with pytest.raises(PitError, match=message):
        panel_attention(**given)


@pytest.mark.parametrize("heads", [None, 0, 5])
def test_heads_side_by_side_need_their_number(heads):
    q, k, v = torch.zeros(3, 2, 18, 24)
    with pytest.raises(PitError, match=f"width of 24 has to be split into heads, but got heads={heads}"):
        panel_attention(q, k, v, text_tokens=3, grid=(3, 5), strength=1.3, heads=heads)
