"""The diptych table with untrained models of the miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pit_core.diptych.pipeline import DiptychModel, DiptychSettings
from pit_core.errors import PitError
from pit_core.evaluate import diptych
from pit_core.evaluate.diptych import STRENGTHS, Row, table
from pit_core.miniature import flux_models, models
from pit_core.miniature.critters import SCENES, is_held_out
from pit_core.miniature.tokenizer import WordTokenizer


@pytest.fixture(scope="module")
def untrained() -> DiptychModel:
    torch.manual_seed(0)
    pipe = flux_models.fill_pipeline(flux_models.build_flux_vae(), flux_models.build_fill())
    pipe.set_progress_bar_config(disable=True)
    text = models.build_text_encoder(len(WordTokenizer(models.TEXT_LENGTH))).eval()
    return DiptychModel(pipe, models.prompt_encoder(text))


def test_a_run_goes_over_the_strength_cut_out_and_not(untrained: DiptychModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = models.build_reader("judge").eval()
    settings = DiptychSettings(steps=1)
    rows = diptych.run(untrained, judge, count=2, seed=1, settings=settings, out=tmp_path)
    assert [(row.cut_out, row.strength) for row in rows] == [
        (cut_out, strength) for cut_out in (True, False) for strength in STRENGTHS
    ]
    assert all(0 <= row.kept <= 1 and 0 <= row.followed <= 1 for row in rows)
    record = json.loads((tmp_path / "diptych.json").read_text("utf-8"))
    assert [Row(**row) for row in record["rows"]] == rows
    text = (tmp_path / "diptych.txt").read_text("utf-8").splitlines()
    assert "\n".join(text[1:]) == table(rows) and len({len(line) for line in text[1:]}) == 1
    with Image.open(tmp_path / "diptych.png") as grid:
        assert grid.width > 8 * 128


def test_cases_are_held_out_and_ask_for_another_scene() -> None:
    for index in range(20):
        case = diptych._case(3, index)
        assert is_held_out(case.critter) and case == diptych._case(3, index)
        assert case.scene in SCENES[1:] and case.scene != case.critter.scene


def test_a_count_out_of_range_is_told_in_a_sentence(untrained: DiptychModel) -> None:
    with pytest.raises(PitError, match="the count as a whole number"):
        diptych.run(untrained, models.build_reader("judge"), count=0)
