"""The concepts table: fair and repeatable cases, and a run from end to end on an untrained stack."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pit_core.concepts import PriorSettings, Stack
from pit_core.errors import PitError
from pit_core.evaluate import concepts
from pit_core.evaluate.common import margin
from pit_core.evaluate.concepts import Row, concept_cases, table
from pit_core.miniature.critters import KINDS, is_held_out

ROWS = [
    Row("IP-Prior", 0.9123, 0.02, 0.96, 0.013, 0.95, 0.94),
    Row("ceiling: the true concept's tokens", 0.99, 0.01, 1.0, 0.0, 1.0, 0.99),
]


# cases


def test_cases_are_held_out_critters_with_one_to_three_of_their_parts() -> None:
    cases = concept_cases(60, 0)
    for case in cases:
        assert is_held_out(case.critter)
        assert set(case.given) <= set(case.critter.parts()) and len(set(case.given)) == len(case.given)
        assert len(case.parts) == len(case.given)
        assert all(part.mode == "RGBA" and part.getchannel("A").getbbox() for part in case.parts)
    numbers = np.bincount([len(case.given) for case in cases], minlength=4)
    assert numbers[0] == 0 and numbers[1:].min() >= 10
    assert {kind for case in cases for kind in case.given} == set(KINDS)


def test_cases_depend_on_seed_and_place_alone() -> None:
    few, many, other = concept_cases(3, 4), concept_cases(5, 4), concept_cases(3, 5)
    for one, again in zip(few, many, strict=False):
        assert (one.critter, one.given) == (again.critter, again.given)
        assert [part.tobytes() for part in one.parts] == [part.tobytes() for part in again.parts]
    assert all(one.critter != another.critter for one, another in zip(few, other, strict=True))


@pytest.mark.parametrize("count", [0, -1, 10_001, 2.5, True])
def test_a_count_out_of_range_is_told_in_a_sentence(count: int) -> None:
    with pytest.raises(PitError, match="the count as a whole number from 1 to 10000"):
        concept_cases(count, 0)


@pytest.mark.parametrize("seed", [-1, 2**33, 0.5])
def test_a_seed_out_of_range_is_told_in_a_sentence(seed: int) -> None:
    with pytest.raises(PitError, match="the seed as a whole number from 0"):
        concept_cases(1, seed)


# the table


def test_the_table_aligns_its_columns() -> None:
    head, first, last = table(ROWS).splitlines()
    assert head.split() == ["method", "parts", "kept", "valid", "creature", "shape", "colour"]
    assert "0.912 +- 0.020" in first and "0.960 +- 0.013" in first
    assert first.endswith("0.950    0.940") and last.startswith("ceiling")
    assert len(head) == len(first) == len(last)


def test_margins_are_those_of_a_share() -> None:
    assert margin(np.array([True] * 50)) == 0.0
    half = margin(np.array([True, False] * 50))
    assert half == pytest.approx(1.96 * 0.05)


# a run


@pytest.fixture(scope="module")
def run(
    stack: Stack, judge: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Row]]:
    out = tmp_path_factory.mktemp("evaluation") / "new"
    return out, concepts.run(stack, judge, count=3, seed=2, out=out, prior=PriorSettings(steps=2))


def test_a_run_compares_the_prior_with_baselines_and_ceiling(run: tuple[Path, list[Row]]) -> None:
    _, rows = run
    assert [row.method for row in rows] == [
        "IP-Prior",
        "average of the parts' tokens",
        "parts' tokens side by side",
        "ceiling: the true concept's tokens",
    ]
    for row in rows:
        for share in (row.kept, row.valid, row.shape_kept, row.colour_kept):
            assert 0 <= share <= 1
        assert row.kept <= min(row.shape_kept, row.colour_kept)


def test_a_run_leaves_a_table_a_record_and_pictures(run: tuple[Path, list[Row]]) -> None:
    out, rows = run
    assert {path.name for path in out.iterdir()} == {"concepts.json", "concepts.txt", "concepts.png"}
    record = json.loads((out / "concepts.json").read_text())
    given = sum(len(case.given) for case in concept_cases(3, 2))
    assert (record["count"], record["seed"], record["given_parts"]) == (3, 2, given)
    assert [Row(**row) for row in record["rows"]] == rows
    heading, *lines = (out / "concepts.txt").read_text().splitlines()
    assert heading == f"3 held-out critters, 1 to 3 given parts ({given} in all), seed 2"
    assert "\n".join(lines) == table(rows)
    with Image.open(out / "concepts.png") as sheet:
        assert sheet.width > 4 * 128 and sheet.height > 3 * 128


def test_a_run_repeats_itself_and_reports_its_progress(
    run: tuple[Path, list[Row]], stack: Stack, judge: torch.nn.Module
) -> None:
    said: list[str] = []
    again = concepts.run(stack, judge, count=3, seed=2, prior=PriorSettings(steps=2), progress=said.append)
    assert again == run[1]
    assert said[0] == "sampling the prior"
    assert [re.sub(":.*", "", text) for text in said[1:]] == ["drawing 3 pictures"] * 4


def test_the_ceiling_and_the_baselines_are_what_they_are_called(stack: Stack) -> None:
    cases = concept_cases(4, 1)
    methods = dict(concepts._methods(stack, cases, [1, 2, 3, 4], PriorSettings(steps=1)))
    average, side_by_side = methods["average of the parts' tokens"], methods["parts' tokens side by side"]
    for case, mean, joined in zip(cases, average, side_by_side, strict=True):
        tokens = joined.unflatten(0, (len(case.given), -1))
        assert torch.allclose(tokens.mean(0), mean, atol=1e-6)
    truth = methods["ceiling: the true concept's tokens"]
    assert all(tokens.shape == truth[0].shape for tokens in methods["IP-Prior"])


def test_weights_are_accepted_by_what_their_pictures_show(stack: Stack, judge: torch.nn.Module) -> None:
    figures = concepts.accepted(stack, judge, count=2, seed=2)
    assert set(figures) == {
        "ip_prior.safetensors",
        "ip_adapter_plus.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
    }
    for found in figures.values():
        assert 0 <= found["parts_kept"] <= 1 and 0 <= found["valid"] <= 1
        assert (found["accepted_on"], found["accepted_seed"]) == (2, 2)
