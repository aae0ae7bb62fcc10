"""Finding directions: the published difference of means, and what held-out pictures say of it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pit_core.directions.direction import Direction, Evidence, describe, doubtful_below, fit_notes, notes
from pit_core.directions.find import find_direction
from pit_core.errors import PitError

TOKENS, WIDTH = 4, 24


def piles(
    count: int = 30, *, gap: float = 3.0, seed: int = 0, others: int | None = None
) -> tuple[Tensor, Tensor]:
    """Two piles that differ by `gap` at one place, among nuisances that vary far more at another few."""
    chance = torch.Generator().manual_seed(seed)
    made = []
    for number, size in enumerate((count, others or count)):
        rows = torch.randn(size, TOKENS, WIDTH, generator=chance)
        rows[:, 0, :6] *= 8
        rows[:, 1, 0] += gap * number
        made.append(rows)
    return made[0], made[1]


def truth() -> Tensor:
    direction = torch.zeros(TOKENS, WIDTH)
    direction[1, 0] = 1
    return direction


def cosine(found: Direction) -> float:
    return float((found.vector * truth()).sum() / found.norm)


# what is found


def test_the_mean_is_the_published_difference() -> None:
    first, second = piles(12, others=20)
    found = find_direction(first, second, method="mean")
    assert torch.allclose(found.vector, second.mean(0) - first.mean(0), atol=1e-6)
    assert found.evidence is not None and found.evidence.counts == (12, 20)
    assert math.isclose(found.evidence.gap, found.norm, rel_tol=1e-5)


def test_step_one_covers_the_gap_of_the_means_by_either_method() -> None:
    """Seen along the direction itself: so 1 means the same, whatever the direction was found by."""
    first, second = piles()
    gap = second.mean(0) - first.mean(0)
    for method in ("mean", "ridge"):
        vector = find_direction(first, second, method=method).vector
        along = vector / vector.norm()
        assert math.isclose(float((vector * along).sum()), float((gap * along).sum()), rel_tol=1e-4)


def test_of_small_piles_the_ridge_comes_nearer_to_the_truth_and_is_chosen() -> None:
    gains = []
    for seed in range(4):
        first, second = piles(30, gap=5, seed=seed)
        found = {method: find_direction(first, second, method=method) for method in ("mean", "ridge", "auto")}
        gains.append(cosine(found["ridge"]) - cosine(found["mean"]))
        assert torch.equal(found["auto"].vector, found["ridge"].vector)
    assert sum(gains) / len(gains) > 0.08


def test_of_large_piles_without_nuisances_the_mean_is_kept() -> None:
    chance = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 150, TOKENS, WIDTH, generator=chance)
    found = find_direction(first, second + 3 * torch.randn(TOKENS, WIDTH, generator=chance))
    assert found.evidence is not None
    assert found.evidence.method == "mean" and found.evidence.ridge == math.inf


def test_the_answer_does_not_change_from_run_to_run_nor_with_a_shift() -> None:
    first, second = piles()
    found = find_direction(first, second)
    again = find_direction(first.clone(), second.clone())
    assert torch.equal(found.vector, again.vector) and found.evidence == again.evidence
    moved = find_direction(first + 5, second + 5)
    assert torch.allclose(moved.vector, found.vector, atol=1e-3)
    there, back = (find_direction(*pair, method="mean") for pair in ((first, second), (second, first)))
    assert torch.allclose(back.vector, -there.vector)


@pytest.mark.parametrize("shape", [(9,), (7, 9)])
def test_clip_features_of_either_kind(shape: tuple[int, ...]) -> None:
    first, second = torch.randn(2, 8, *shape, generator=torch.Generator().manual_seed(0))
    found = find_direction(first, second + 1, space="clip", names=("a", "b"), adapter="x", encoder="y")
    assert (found.space, found.names, found.adapter, found.encoder) == ("clip", ("a", "b"), "x", "y")
    assert found.vector.shape == shape


# what held-out pictures say


def test_held_out_pictures_tell_a_real_difference_from_none() -> None:
    def found(gap: float) -> list[Any]:
        return [find_direction(*piles(40, gap=gap, seed=seed)).evidence for seed in range(10)]

    real, none = found(9), found(0)
    assert min(each.accuracy for each in real) > 0.9 and min(each.confirmed for each in real) > 0.4
    assert all(each.spread > 0 for each in real)
    assert abs(np.mean([each.accuracy for each in none]) - 0.5) < 0.1
    assert np.mean([each.confirmed for each in none]) < 0.4


def test_chance_is_not_taken_for_a_direction() -> None:
    """Of piles without a difference, nearly all get the warning; of such with one, none does."""
    said = [bool(notes(find_direction(*piles(10, gap=0, seed=seed)))) for seed in range(20)]
    assert sum(said) >= 17
    assert not any(notes(find_direction(*piles(10, gap=30, seed=seed))) for seed in range(5))


def test_few_pictures_are_a_warning() -> None:
    found = find_direction(*piles(7, gap=30))
    assert "below 8 a side" in notes(found)[0]
    tiny = find_direction(*piles(2, gap=30))
    assert tiny.evidence is not None and tiny.evidence.accuracy is None and tiny.evidence.method == "mean"
    assert "too few pictures to hold some out" in notes(tiny)[1]
    assert "mean" in describe(find_direction(*piles(1)))


def test_a_pile_of_one_picture_over_and_over() -> None:
    """No variance within, so ridge and mean are one."""
    first, second = (rows[:1].expand(8, -1, -1) for rows in piles())
    for method in ("mean", "ridge", "auto"):
        found = find_direction(first, second, method=method)
        assert torch.allclose(found.vector, second[0] - first[0], atol=1e-3)


def test_doubt_begins_where_chance_ends() -> None:
    assert doubtful_below((8, 8)) == pytest.approx(0.705)
    assert doubtful_below((1000, 1000)) == 0.6


# what is said of it


def test_the_description_names_what_matters() -> None:
    found = find_direction(*piles(10), names=("thin", "wide"), adapter="0123456789")
    lines = describe(found).splitlines()
    assert lines[0] == "thin to wide: 4 IP tokens of width 24"
    assert lines[1].startswith("found from 10 and 10 pictures by ")
    assert "of the pictures told apart" in lines[2]
    assert lines[3].startswith("step 1: length ") and lines[3].endswith("spreads of a pile")
    assert lines[4] == "made with adapter 01234567"


def test_another_adapter_is_a_note() -> None:
    found = Direction(truth(), adapter="a" * 64)
    assert fit_notes(found, "a" * 64) == fit_notes(found, "") == []
    assert "was found with adapter aaaaaaaa" in fit_notes(found, "b" * 64)[0]


def test_names_from_strangers_are_made_short_and_printable() -> None:
    found = Direction(truth(), names=("a\n\x1b[31mb", "x" * 500))
    assert found.names == ("a [31mb", "x" * 60)


@pytest.mark.parametrize(
    ("first", "second", "options", "words"),
    [
        (torch.zeros(0, 4, 8), torch.ones(2, 4, 8), {}, "there are 0 and 2"),
        (torch.zeros(2, 4, 8), torch.ones(2, 4, 9), {}, "same adapter"),
        (torch.zeros(2, 4, 8), torch.full((2, 4, 8), math.nan), {}, "holds NaN|hold NaN|NaN"),
        (torch.ones(5, 4, 8), torch.ones(9, 4, 8), {}, "the same mean"),
        (torch.zeros(2, 4, 8), torch.ones(9, 4, 8), {"method": "ridge"}, "at least 3 pictures"),
        (torch.zeros(2, 4, 8), torch.ones(9, 4, 8), {"method": "best"}, "auto, mean, ridge"),
        (torch.zeros(2, 4, 8), torch.ones(9, 4, 8), {"space": "pixels"}, "tokens or clip"),
    ],
)
def test_piles_that_lead_nowhere(first: Tensor, second: Tensor, options: dict, words: str) -> None:
    with pytest.raises(PitError, match=words):
        find_direction(first, second, **options)


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        (torch.ones(8), "has the shape"),
        (torch.ones(1, 4, 8), "has the shape"),
        (torch.ones(0, 8), "has the shape"),
        (torch.zeros(4, 8), "zero everywhere"),
        (torch.full((4, 8), math.inf), "infinite"),
    ],
)
def test_vectors_that_are_no_direction(vector: Tensor, words: str) -> None:
    with pytest.raises(PitError, match=words):
        Direction(vector)


@pytest.mark.parametrize(
    "change", [{"method": "luck"}, {"counts": (0, 3)}, {"gap": math.nan}, {"accuracy": math.inf}]
)
def test_evidence_that_makes_no_sense(change: dict) -> None:
    sound = {"counts": (3, 3), "method": "mean", "ridge": math.inf, "gap": 1.0, "length": 1.0}
    with pytest.raises(PitError, match="makes no sense"):
        Evidence(**{**sound, **change})
