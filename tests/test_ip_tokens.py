"""IP tokens: what they carry, how they combine, their files and their picture."""

import json
from pathlib import Path

import pytest
import torch

from pit_core.errors import PitError
from pit_core.files import save_tensors
from pit_core.ip_adapter.token_picture import CELL, token_picture
from pit_core.ip_adapter.tokens import (
    OPERATIONS,
    IPTokens,
    combine,
    load_ip_tokens,
    save_ip_tokens,
    slerp,
    unconditional,
)


def tokens(seed: int = 0, rows: int = 1, count: int = 4, width: int = 8, **extras: object) -> IPTokens:
    generator = torch.Generator().manual_seed(seed)
    return IPTokens(torch.randn(rows, count, width, generator=generator), 4, **extras)


def row(value: float) -> torch.Tensor:
    return torch.full((1, 4, 8), value)


# what they are


def test_they_are_kept_as_float32_on_the_cpu() -> None:
    half = IPTokens(torch.ones(1, 4, 8, dtype=torch.float16), 4, null=row(0).half())
    assert half.tokens.dtype == half.null.dtype == torch.float32
    assert (half.rows, half.width, str(half)) == (1, 8, "1 row of 4 tokens, width 8")


@pytest.mark.parametrize("shape", [(4, 8), (0, 4, 8), (1, 0, 8), (1, 5, 8), (1, 4, 8, 1)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PitError, match="IP tokens have the shape"):
        IPTokens(torch.zeros(shape), 4)


def test_nan_and_a_null_of_another_length_are_refused() -> None:
    with pytest.raises(PitError, match="NaN"):
        IPTokens(torch.full((1, 4, 8), torch.nan), 4)
    with pytest.raises(PitError, match="null of IP tokens"):
        IPTokens(row(1), 4, null=torch.zeros(1, 8, 8))


def test_the_hash_follows_the_content() -> None:
    assert tokens(1).content_hash() == tokens(1).content_hash() != tokens(2).content_hash()
    assert tokens(1).content_hash() != tokens(1, null=row(0)).content_hash()


def test_combining_names_the_inputs_that_do_not_go_together() -> None:
    wide, long, many = tokens(width=9), tokens(count=8), tokens(rows=3)
    for other, words in (
        (wide, "b come in 4s of width 9, a in 4s of width 8"),
        (long, "b are 8 to a row, a 4"),
    ):
        with pytest.raises(PitError, match=words):
            combine([tokens(), other], "add", names=["a", "b"])
    with pytest.raises(PitError, match="^b have 2 rows, others 3"):
        combine([many, tokens(rows=2)], "add", names=["a", "b"])
    with pytest.raises(PitError, match="^Tokens 2 have 2 rows, others 3"):
        combine([many, tokens(rows=2)], "add")
    assert combine([many], "average", names=["a"]).rows == 1


# the unconditional half


def test_the_null_is_repeated_to_the_length_of_concatenated_tokens() -> None:
    both = combine([tokens(1, null=row(3)), tokens(2)], "concat")
    assert torch.equal(unconditional(both, None), row(3).repeat(1, 2, 1))
    assert torch.equal(unconditional(both, tokens(5)), tokens(5).tokens.repeat(1, 2, 1))
    assert unconditional(both, tokens(5), same=True) is both.tokens


def test_missing_and_misfitting_negatives_are_refused() -> None:
    with pytest.raises(PitError, match="carry no null"):
        unconditional(tokens(1), None)
    with pytest.raises(PitError, match="negative tokens have 8 tokens"):
        unconditional(tokens(1), tokens(2, count=8))
    with pytest.raises(PitError, match="of width 6"):
        unconditional(tokens(1), tokens(2, width=6))


# combining


def test_elementwise_operations() -> None:
    three = [IPTokens(row(v), 4) for v in (1.0, 2.0, 6.0)]
    for operation, value in {"average": 3, "add": 9, "subtract": -3, "max": 6, "min": 1}.items():
        assert torch.equal(combine(three, operation).tokens, row(value)), operation


def test_norm_average_keeps_the_mean_length() -> None:
    found = combine([tokens(1), tokens(2)], "norm-average").tokens
    lengths = (tokens(1).tokens.norm(dim=-1) + tokens(2).tokens.norm(dim=-1)) / 2
    assert torch.allclose(found.norm(dim=-1), lengths, rtol=1e-5)
    assert (combine([tokens(1), tokens(2)], "average").tokens.norm(dim=-1) < lengths).all()


def test_order_is_irrelevant_where_it_should_be() -> None:
    for operation in ("average", "norm-average", "add", "max", "min"):
        a, b = (combine(pair, operation) for pair in ([tokens(1), tokens(2)], [tokens(2), tokens(1)]))
        assert torch.allclose(a.tokens, b.tokens, atol=1e-6), operation


def test_a_single_input_has_its_rows_combined() -> None:
    rows = tokens(1, rows=3)
    assert torch.allclose(combine([rows], "average").tokens[0], rows.tokens.mean(0))
    assert combine([rows], "concat").tokens.shape == (1, 12, 8)


def test_one_row_serves_all_and_the_first_inputs_nulls_stay() -> None:
    found = combine([tokens(1, null=row(7), adapter="a"), tokens(2, rows=3)], "add")
    assert found.rows == 3 and found.adapter == "a" and torch.equal(found.null, row(7))


def test_slerp_walks_the_arc() -> None:
    a, b = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 4.0]]])
    assert torch.equal(slerp(a, b, 0), a)
    assert torch.allclose(slerp(a, b, 1), b, atol=1e-6)
    assert torch.allclose(slerp(a, b, 0.5), torch.full((1, 1, 2), 3 / 2**0.5))
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a)
    assert torch.isfinite(slerp(a, -a, 0.5)).all() and torch.isfinite(slerp(a, 0 * a, 0.5)).all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_tokens_that_do_not_go_together_are_refused(operation: str) -> None:
    with pytest.raises(PitError, match="different adapters"):
        combine([tokens(1), tokens(2, width=6)], operation)
    with pytest.raises(PitError, match="give 1 or 3"):
        combine([tokens(1, rows=2), tokens(2, rows=3)], operation)
    if operation != "concat":
        with pytest.raises(PitError, match="only concat"):
            combine([tokens(1), tokens(2, count=8)], operation)


def test_wrong_operations_amounts_and_counts_are_refused() -> None:
    with pytest.raises(PitError, match="operation out of"):
        combine([tokens()], "multiply")
    with pytest.raises(PitError, match="no tokens to combine"):
        combine([], "add")
    with pytest.raises(PitError, match="got 3 tokens"):
        combine([tokens(i) for i in range(3)], "slerp")
    with pytest.raises(PitError, match="connect two"):
        combine([tokens()], "subtract")
    with pytest.raises(PitError, match="from 0"):
        combine([tokens(1), tokens(2)], "slerp", float("nan"))


# files


def test_a_file_brings_back_every_bit(tmp_path: Path) -> None:
    before = tokens(1, rows=2, count=8, null=row(1), white=row(2), reference=row(3), adapter="abc")
    save_ip_tokens(tmp_path / "a.safetensors", before, {"made_by": "a test"})
    after = load_ip_tokens(tmp_path / "a.safetensors")
    assert after.content_hash() == before.content_hash()
    assert (after.unit, after.adapter) == (4, "abc")


def test_files_of_the_command_line_are_read(tmp_path: Path) -> None:
    """They hold the tokens alone."""
    metadata = {"kind": "ip_tokens", "version": "1", "seeds": json.dumps([1, 2])}
    save_tensors(tmp_path / "a.safetensors", {"tokens": torch.ones(2, 4, 8)}, metadata)
    assert load_ip_tokens(tmp_path / "a.safetensors").unit == 4


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"direction": torch.ones(4, 8)}, {}, "another kind of file"),
        ({"tokens": torch.ones(1, 4, 8)}, {"kind": "direction"}, "of kind 'direction'"),
        ({"tokens": torch.ones(1, 4, 8)}, {"kind": "ip_tokens", "version": "9"}, "newer"),
        ({"tokens": torch.ones(4, 8)}, {"kind": "ip_tokens"}, "damaged"),
        ({"tokens": torch.ones(1, 4, 8).long()}, {"kind": "ip_tokens"}, "not floats"),
        ({"tokens": torch.ones(1, 4, 8) * torch.inf}, {"kind": "ip_tokens"}, "NaN or infinite"),
        ({"tokens": torch.ones(1, 4, 8), "null": torch.ones(3)}, {"kind": "ip_tokens"}, "null"),
    ],
)
def test_files_of_another_kind_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], words: str
) -> None:
    save_tensors(tmp_path / "a.safetensors", tensors, metadata)
    with pytest.raises(PitError, match=words):
        load_ip_tokens(tmp_path / "a.safetensors")


# the picture


def test_the_picture_grows_with_the_rows_and_stops_at_eight() -> None:
    one, two = token_picture(tokens(1)), token_picture(tokens(1, rows=2, null=row(1)))
    many, more = token_picture(tokens(1, rows=9)), token_picture(tokens(1, rows=90))
    assert one.width == two.width and one.height < two.height < many.height == more.height
    assert one.mode == "RGB"


def test_equal_tokens_are_drawn_as_similar() -> None:
    picture = token_picture(IPTokens(row(1.0), 4))
    warm = picture.getpixel((picture.width - CELL // 2, picture.height - CELL // 2))
    assert warm[0] > 150 and warm[2] < 100


def test_tokens_of_zeros_can_be_drawn() -> None:
    token_picture(IPTokens(row(0.0), 4, null=row(0.0)))
