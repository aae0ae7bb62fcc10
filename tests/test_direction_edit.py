"""Editing tokens: the published sum, several directions, masks, and directions in CLIP features."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pit_core.directions.direction import Direction
from pit_core.directions.edit import STEPS, Source, edit, orthogonalised, picture_features, sweep, swept
from pit_core.directions.text import parse_mask, parse_move, parse_steps, step_labels
from pit_core.errors import PitError
from pit_core.ip_adapter.adapter import IPAdapter, IPLayers
from pit_core.ip_adapter.encode import tokens_from_features
from pit_core.ip_adapter.resampler import ImageProjection, Resampler
from pit_core.ip_adapter.tokens import IPTokens

UNIT, WIDTH = 4, 8


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int = 2, count: int = UNIT) -> IPTokens:
    return IPTokens(randn(rows, count, WIDTH), UNIT, null=randn(1, UNIT, WIDTH, seed=9), adapter="made")


def direction(seed: int = 1) -> Direction:
    return Direction(randn(UNIT, WIDTH, seed=seed))


# one direction


def test_an_edit_is_tokens_plus_step_times_direction() -> None:
    for step in STEPS:
        found = edit(tokens(), [(direction(), step)])
        assert torch.equal(found.tokens, tokens().tokens + step * direction().vector)
    assert found.null is not None and torch.equal(found.null, tokens().null)
    assert found.adapter == "made"


def test_step_zero_and_there_and_back_change_nothing() -> None:
    assert torch.equal(edit(tokens(), [(direction(), 0.0)]).tokens, tokens().tokens)
    there = edit(tokens(), [(direction(), 0.7)])
    back = edit(there, [(direction(), -0.7)])
    assert torch.allclose(back.tokens, tokens().tokens, atol=1e-6)


def test_pictures_side_by_side_move_alike() -> None:
    found = edit(tokens(count=2 * UNIT), [(direction(), 1.0)]).tokens - tokens(count=2 * UNIT).tokens
    assert torch.allclose(found[:, :UNIT], found[:, UNIT:], atol=1e-6)
    assert torch.allclose(found[0, :UNIT], direction().vector, atol=1e-6)


def test_a_mask_moves_what_it_names_and_as_far() -> None:
    mask = parse_mask("0, 2-3: 0.5", UNIT)
    change = edit(tokens(), [(direction(), 2.0)], mask=mask).tokens - tokens().tokens
    expected = 2 * direction().vector * torch.tensor([1, 0, 0.5, 0.5])[:, None]
    assert torch.allclose(change, expected.expand(2, -1, -1), atol=1e-6)
    assert torch.equal(change[:, 1], torch.zeros(2, WIDTH))


def test_a_sweep_has_the_steps_of_the_first_row_first() -> None:
    found = sweep(tokens(2), direction(), [-1.0, 0.0, 2.0])
    expected = [tokens().tokens[row] + step * direction().vector for row in (0, 1) for step in (-1, 0, 2)]
    assert torch.equal(found.tokens, torch.stack(expected))


# several


def test_directions_add_up_in_any_order() -> None:
    moves = [(direction(1), 1.0), (direction(2), -0.5), (direction(3), 2.0)]
    expected = tokens().tokens + sum(step * each.vector for each, step in moves)
    for order in (moves, moves[::-1]):
        assert torch.allclose(edit(tokens(), order).tokens, expected, atol=1e-5)
        bent = [edit(tokens(), each, orthogonal=True).tokens for each in (moves, moves[::-1])]
        assert torch.allclose(*bent, atol=1e-5)


def test_orthogonalised_directions_keep_their_lengths_and_are_the_nearest() -> None:
    shared = randn(UNIT, WIDTH, seed=7)
    vectors = [shared + randn(UNIT, WIDTH, seed=seed) for seed in (1, 2, 3)]
    found = orthogonalised(vectors)
    gram = torch.stack([each.flatten() for each in found]) @ torch.stack([each.flatten() for each in found]).T
    assert torch.allclose(gram, torch.diag(gram.diag()), atol=1e-4)
    for before, after in zip(vectors, found, strict=True):
        assert math.isclose(before.norm(), after.norm(), rel_tol=1e-5)
        assert torch.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.75
    again = orthogonalised(found)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, again, strict=True))


def test_what_the_mask_leaves_is_orthogonal() -> None:
    mask = parse_mask("1-2", UNIT)
    changes = [
        edit(tokens(1), [(direction(1), a), (direction(2), b)], mask=mask, orthogonal=True).tokens
        - tokens(1).tokens
        for a, b in ((1.0, 0.0), (0.0, 1.0))
    ]
    assert abs(float((changes[0] * changes[1]).sum())) < 1e-4


def test_nearly_the_same_directions_cannot_be_set_apart() -> None:
    near = Direction(direction().vector + 1e-3)
    with pytest.raises(PitError, match="leave one out"):
        edit(tokens(), [(direction(), 1.0), (near, 1.0)], orthogonal=True)
    edit(tokens(), [(direction(), 1.0), (near, 1.0)])


# in CLIP features


def adapter(kind: str) -> IPAdapter:
    torch.manual_seed(0)
    if kind == "base":
        projection = ImageProjection(embedding_dim=6, output_dim=WIDTH, num_tokens=UNIT)
        return IPAdapter(projection, IPLayers([4], WIDTH))
    sizes = {"dim": 8, "depth": 1, "dim_head": 4, "heads": 2, "num_queries": UNIT, "ff_mult": 2}
    return IPAdapter(Resampler(**sizes, embedding_dim=6, output_dim=WIDTH), IPLayers([4], WIDTH))


def source(kind: str, rows: int = 2) -> tuple[IPTokens, Source]:
    ours = adapter(kind)
    features = randn(rows, 5, 6, seed=3) if kind == "plus" else randn(rows, 6, seed=3)
    made = Source(features, lambda each: tokens_from_features(ours, each))
    return IPTokens(tokens_from_features(ours, features), UNIT), made


@pytest.mark.parametrize(("kind", "shape"), [("plus", (5, 6)), ("plus", (6,)), ("base", (6,))])
def test_features_are_edited_then_projected(kind: str, shape: tuple[int, ...]) -> None:
    made, where = source(kind)
    clip = Direction(randn(*shape, seed=4), "clip")
    expected = tokens_from_features(adapter(kind), where.features + 0.5 * clip.vector)
    found = edit(made, [(clip, 0.5)], source=where)
    assert torch.allclose(found.tokens, expected, atol=1e-5)
    both = edit(made, [(clip, 0.5), (direction(), 1.0)], source=where, orthogonal=True)
    assert torch.allclose(both.tokens, expected + direction().vector, atol=1e-5)
    masked = edit(made, [(clip, 0.5)], source=where, mask=parse_mask("0", UNIT))
    assert torch.equal(masked.tokens[:, 1:], made.tokens[:, 1:])
    assert torch.allclose(masked.tokens[:, :1], expected[:, :1], atol=1e-5)


def test_an_adapter_reads_states_or_embeddings() -> None:
    seen = []

    def encoder(pixels: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(pixels))
        return torch.zeros(len(pixels), 5, 6), torch.ones(len(pixels), 6)

    pixels = torch.zeros(5, 3, 4, 4)
    assert picture_features(encoder, adapter("plus"), pixels, 2).shape == (5, 5, 6)
    assert seen == [2, 2, 1]
    assert torch.equal(picture_features(encoder, adapter("base"), pixels), torch.ones(5, 6))


@pytest.mark.parametrize(
    ("moves", "options", "words"),
    [
        ([(Direction(torch.ones(UNIT, 9)), 1.0)], {}, "a picture has 4 of width 8"),
        ([(Direction(torch.ones(16, WIDTH)), 1.0)], {}, "moves 16 tokens"),
        ([(direction(), math.nan)], {}, "finite step"),
        ([(direction(), math.inf)], {}, "finite step"),
        ([(direction(), 1.0)], {"mask": torch.zeros(UNIT)}, "leaves no token"),
        ([(direction(), 1.0)], {"mask": torch.ones(9)}, "for 9 tokens"),
        ([(Direction(torch.ones(5, 6), "clip"), 1.0)], {}, "give the picture"),
        ([(Direction(torch.ones(9, 6), "clip"), 1.0)], {"source": source("plus")[1]}, "features of shape"),
        ([(Direction(torch.ones(5, 6), "clip"), 1.0)], {"source": source("plus", 3)[1]}, "one picture per"),
    ],
)
def test_edits_that_make_no_sense(moves: Any, options: dict, words: str) -> None:
    with pytest.raises(PitError, match=words):
        edit(tokens(), moves, **options)


def test_a_sweep_without_steps() -> None:
    with pytest.raises(PitError, match="no steps"):
        swept(tokens(), [(direction(), 1.0)], [])


# what people write


def test_masks() -> None:
    assert parse_mask(" ", 4) is None
    assert parse_mask("0-3", 4).tolist() == [1, 1, 1, 1]
    assert parse_mask("3; 0 - 1 : .25\n", 4).tolist() == [0.25, 0.25, 0, 1]
    for text in ("4", "2-1", "a", "0:", "-1", "0-3-4", "0:1:2"):
        with pytest.raises(PitError):
            parse_mask(text, 4)


def test_steps() -> None:
    assert parse_steps("-1, -.5 0;0.5\n1e0") == [-1, -0.5, 0, 0.5, 1]
    assert step_labels([-1, 0, 0.25]) == ["step -1", "step 0", "step +0.25"]
    for text in ("", ",", "one", "nan", "1 inf", "1 " * 65):
        with pytest.raises(PitError):
            parse_steps(text)


def test_a_file_and_a_step(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(text: str) -> tuple[str, float]:
        path, step = parse_move(text)
        return str(path), step

    assert read("a/b.pt") == ("a/b.pt", 1.0)
    assert read("b.pt:-0.8") == ("b.pt", -0.8)
    assert read("C:\\x.pt") == ("C:\\x.pt", 1.0)
    assert read("C:/x.pt:2") == ("C:/x.pt", 2.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:1").touch()
    assert read("odd:1") == ("odd:1", 1.0)
    for text in ("a.pt:much", "a.pt:nan", ":1", "a.pt:"):
        with pytest.raises(PitError, match="FILE:0.8"):
            parse_move(text)
