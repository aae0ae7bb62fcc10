"""The directions table: what counts as following, what as kept, and a run on an untrained stack."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pit_core.concepts import Stack
from pit_core.errors import PitError
from pit_core.evaluate import directions
from pit_core.evaluate.directions import Row, followed, others_kept, table
from pit_core.miniature import reader
from pit_core.miniature.attributes import ATTRIBUTES
from pit_core.miniature.critters import SCENES, STYLES, is_held_out

# attributes


def test_piles_differ_in_their_attribute_and_are_of_training_combinations() -> None:
    for attribute in ATTRIBUTES.values():
        first, second = attribute.pile(0, 20, 1), attribute.pile(1, 20, 1)
        assert max(map(attribute.true, first)) <= 0.2 and min(map(attribute.true, second)) >= 0.8
        assert not any(map(is_held_out, (*first, *second)))
        for field in {"build", "style", "scene"} - {attribute.field}:
            assert {type(getattr(critter, field)) for critter in first} == {type(getattr(second[0], field))}
        assert len({critter.body for critter in first}) > 5
        assert attribute.pile(0, 3, 1) == first[:3]


def test_a_reader_sees_an_attribute_where_its_outputs_say_so() -> None:
    shares = {"build": np.array([0.3]), "style": np.zeros((1, 5)), "scene": np.zeros((1, 7))}
    shares["style"][0, STYLES.index("sketch")] = 0.7
    shares["scene"][0, SCENES.index("night")] = 0.9
    assert [float(ATTRIBUTES[name].seen(shares)[0]) for name in ("build", "style", "scene")] == [
        0.3,
        0.7,
        0.9,
    ]


# what counts


def test_following_is_rising_by_three_errors_without_falling_by_one() -> None:
    seen = np.array(
        [
            [0.2, 0.3, 0.4, 0.5, 0.6],
            [0.2, 0.15, 0.4, 0.5, 0.6],  # falls within the error
            [0.2, 0.05, 0.4, 0.5, 0.6],  # falls by more
            [0.2, 0.2, 0.3, 0.4, 0.45],  # does not rise by three
        ]
    )
    assert followed(seen, 0.1).tolist() == [True, True, False, False]


def test_others_are_compared_with_step_0_and_the_attribute_itself_is_not() -> None:
    steps = len(directions.STEPS)
    state, colour = np.zeros((steps, 5), int), np.zeros((steps, 5), int)
    style, scene = np.zeros(steps, int), np.zeros(steps, int)
    half = directions.STEPS.index(0.5)
    state[:, 4] = 4  # no tail, so that its colour means nothing
    colour[half, 4], state[half, 1], scene[half], style[half] = 3, 2, 1, 1
    found = others_kept(reader.Readings(state, colour, style, scene, style.astype(float)), 1, "style")
    assert len(found) == 5 + 1 + 4 and found.sum() == len(found) - 2  # the eyes' shape and the scene


# a run


def test_a_run_compares_both_spaces_and_leaves_a_table_and_grids(
    stack: Stack, judge: torch.nn.Module, tmp_path: Path
) -> None:
    options = {"attributes": ("build",), "count": 2, "seed": 1, "pile": 3}
    rows = directions.run(stack, judge, **options, out=tmp_path / "new")
    assert [(row.attribute, row.space) for row in rows] == [
        ("thin to wide", "tokens"),
        ("thin to wide", "clip"),
    ]
    for row in rows:
        assert 0 <= row.follows <= 1 and 0 <= row.kept <= 1 and row.error > 0 and len(row.seen) == 5
    record = json.loads((tmp_path / "new" / "directions.json").read_text())
    assert [Row(**{**row, "seen": tuple(row["seen"])}) for row in record["rows"]] == rows
    text = (tmp_path / "new" / "directions.txt").read_text().splitlines()
    assert text[0] == "2 held-out critters, directions of 3 and 3 pictures, seed 1"
    assert "\n".join(text[1:]) == table(rows) and len({len(line) for line in text[1:]}) == 1
    for space in ("tokens", "clip"):
        with Image.open(tmp_path / "new" / f"directions-build-{space}.png") as grid:
            assert grid.width > 5 * 128 and grid.height > 2 * 128
    assert directions.run(stack, judge, **options) == rows


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"attributes": ("mood",)}, "no attribute 'mood'; there are build, style, scene"),
        ({"count": 0}, "the count as a whole number"),
        ({"pile": 2}, "the pile as a whole number from 3"),
    ],
)
def test_wrong_settings_are_told_in_a_sentence(
    stack: Stack, judge: torch.nn.Module, wrong: dict, said: str
) -> None:
    with pytest.raises(PitError, match=said):
        directions.run(stack, judge, **wrong)
