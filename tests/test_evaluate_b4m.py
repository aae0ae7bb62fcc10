"""The table of content and style on an untrained stack, and the figures in it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from b4m_files import fill
from lora_files import lora_file, unet_shapes
from PIL import Image

from pit_core.b4m.factors import save_factors
from pit_core.b4m.projection import SplitAdapter
from pit_core.concepts import Stack
from pit_core.errors import PitError
from pit_core.evaluate import b4m
from pit_core.evaluate.b4m import METHODS, PairRow, Row, Scores, mean_harmonic, paired_interval, table
from pit_core.files import save_tensors
from pit_core.miniature.b4m import SUBJECTS, SURFACES, UNSEEN
from pit_core.miniature.critters import STYLES, Critter, render
from pit_core.miniature.data import labels_of


@pytest.fixture(scope="module")
def folder(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of content 1 and style 2, as they are exported, with random numbers in them."""
    folder, unet = tmp_path_factory.mktemp("b4m"), stack.renderer.unet
    for number, name in enumerate(("content_1", "style_2", "join_1_2")):
        adapter = SplitAdapter.new(unet, rank=4)
        fill(adapter, number)
        factors = {layer: (down / 8, up / 8) for layer, (down, up) in adapter.factors().items()}
        save_factors(folder / f"b4m_{name}.safetensors", factors, adapter.metadata())
    for name in ("plain_content_1", "plain_style_2", "shared_1_2"):
        save_tensors(folder / f"b4m_{name}.safetensors", lora_file(unet_shapes(unet)))
    return folder


def test_a_run_compares_all_methods_on_the_same_noise(
    stack: Stack, judge: torch.nn.Module, folder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    options = {"pairs": [(1, 2)], "count": 4, "seed": 1}
    rows = b4m.run(stack, judge, folder, **options, out=tmp_path, progress=said.append)
    assert [row.method for row in rows] == list(METHODS)
    assert all(
        0 <= row.content <= 1 and 0 <= row.style <= 1 and row.low <= row.gain <= row.high for row in rows
    )
    assert rows[1].gain == rows[1].low == rows[1].high == 0
    assert said[0] == "drawing 4 pictures: content 1, style 2, splice"
    record = json.loads((tmp_path / "b4m.json").read_text())
    assert [Row(**row) for row in record["rows"]] == rows and record["count"] == 4
    assert [PairRow(**row).pair for row in record["pairs"]] == ["1-2"] * len(METHODS)
    text = (tmp_path / "b4m.txt").read_text().splitlines()
    assert "\n".join(text[1:]) == table(rows)
    with (tmp_path / "b4m.csv").open(newline="") as file:
        readings = list(csv.DictReader(file))
    assert len(readings) == 4 * len(METHODS)
    mean = np.mean([float(row["content_kept"]) for row in readings if row["method"] == "splice"])
    assert float(mean) == pytest.approx(rows[0].content)
    with Image.open(tmp_path / "b4m.png") as grid:
        assert grid.width > 5 * 128
    assert b4m.run(stack, judge, folder, **options) == rows


def test_every_method_draws_under_its_own_files(stack: Stack, folder: Path) -> None:
    sources = b4m._sources(folder, 1, 2)
    drawn = {
        method: [picture.tobytes() for picture in b4m._drawn(stack, source, METHODS[method], [1, 2, 3])]
        for method, source in sources.items()
    }
    assert len({tuple(pictures) for pictures in drawn.values()}) == len(METHODS)


def test_content_and_style_are_read_off_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a reader that knows what was drawn: all parts and the style, then another critter, another style."""
    right = replace(SUBJECTS[0], style=SURFACES[1])
    others: list[Critter] = [right, SUBJECTS[0], replace(SUBJECTS[1], style=SURFACES[1])]
    labels = np.stack([labels_of(critter) for critter in others])
    readings = b4m.reader.Readings(
        labels[:, :5], labels[:, 5:10], labels[:, 10], labels[:, 11], labels[:, 12] / 1000
    )
    monkeypatch.setattr(b4m.reader, "read", lambda _judge, _pixels: readings)
    scores = b4m._read(torch.nn.Identity(), [render(critter) for critter in others], 1, 2)
    assert scores.content.tolist() == [1, 1, 0] and scores.style.tolist() == [1, 0, 1]
    assert STYLES.index(SURFACES[1]) == labels[0, 10]


def test_the_harmonic_mean_wants_both() -> None:
    both = Scores(np.array([1.0, 0.5]), np.array([1.0, 0.0]))
    assert both.harmonic() == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert Scores(np.ones(3), np.zeros(3)).harmonic() == 0
    assert mean_harmonic([both, Scores(np.ones(2), np.ones(2))]) == pytest.approx((0.6 + 1) / 2)


def test_the_interval_is_paired() -> None:
    """A small gain in every picture is certain, however much the pictures differ among themselves."""
    rng = np.random.default_rng(3)
    content, style = rng.uniform(0.2, 0.8, 100), (rng.random(100) < 0.7).astype(float)
    worse, better = Scores(content, style), Scores(content + 0.05, style)
    low, high = paired_interval([better], [worse])
    gain = mean_harmonic([better]) - mean_harmonic([worse])
    assert 0 < low < gain < high < 2 * gain
    low, high = paired_interval([worse], [Scores(content[::-1], style[::-1])])
    assert low < 0 < high


def test_what_is_missing_is_named(stack: Stack, judge: torch.nn.Module, folder: Path) -> None:
    for options, words in [
        (
            {"pairs": [(1, 1)]},
            "lacks b4m_style_1.safetensors; make it with 'pit miniature train b4m-style-1'",
        ),
        ({"pairs": [(4, 1)]}, "out of 1-1, 1-2, 2-1, 2-2, 3-1, 3-2, got"),
        ({"pairs": []}, "Expected pairs"),
        ({"pairs": [(1, 2)], "count": len(UNSEEN) - 1}, "the count as a whole number"),
    ]:
        with pytest.raises(PitError, match=words):
            b4m.run(stack, judge, folder, **options)
    assert b4m.parse_pair("3-2") == (3, 2)
    for text in ("3", "3-", "a-b", "1-2-3"):
        with pytest.raises(PitError, match="such as 1-2, got"):
            b4m.parse_pair(text)
