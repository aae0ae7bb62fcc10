"""Reading attributes: what counts in the loss, and what a reading says of a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pit_core.errors import PitError
from pit_core.miniature import models, reader
from pit_core.miniature.critters import COLOUR_NAMES, KINDS, SHAPES, Critter, Part
from pit_core.miniature.data import ABSENT, DOUBLED, GARBLED, LABELS, NO_COLOUR, labels_of
from pit_core.miniature.reader import OUTPUTS, Readings

CRITTER = Critter(
    body=Part("pear", "green"),
    eyes=Part("slit", "red"),
    wings=Part("leaf", "blue"),
    build=0.25,
    style="paper",
    scene="snow",
)


def _readings(*critters: Critter) -> Readings:
    """What a perfect reader says."""
    labels = np.stack([labels_of(critter) for critter in critters])
    n = len(KINDS)
    return Readings(
        labels[:, :n].copy(),
        labels[:, n : 2 * n].copy(),
        labels[:, 2 * n],
        labels[:, 2 * n + 1],
        labels[:, 2 * n + 2] / 1000,
    )


def _perfect_outputs(labels: np.ndarray, sure: float = 30.0) -> torch.Tensor:
    """Outputs that a perfect and sure reader gives for label rows (B, LABELS)."""
    out = torch.zeros(len(labels), OUTPUTS)
    parts = reader.split(out)  # views
    n = len(KINDS)
    for row, label in enumerate(labels):
        for slot in range(n):
            parts["state"][row, slot, label[slot]] = sure
            if label[n + slot] != NO_COLOUR:
                parts["colour"][row, slot, label[n + slot]] = sure
        parts["style"][row, label[2 * n]] = sure
        parts["scene"][row, label[2 * n + 1]] = sure
        parts["build"][row] = label[2 * n + 2] / 1000
    return out


def test_outputs_are_split_without_rest() -> None:
    parts = reader.split(torch.arange(float(2 * OUTPUTS)).view(2, OUTPUTS))
    assert {name: tuple(value.shape[1:]) for name, value in parts.items()} == {
        "state": (5, 7),
        "colour": (5, 8),
        "style": (5,),
        "scene": (7,),
        "build": (),
    }
    assert sum(value[0].numel() for value in parts.values()) == OUTPUTS


def test_the_loss_of_a_perfect_reading_is_zero() -> None:
    labels = np.stack([labels_of(CRITTER), labels_of(CRITTER, "wings")])
    assert reader.loss(_perfect_outputs(labels), torch.from_numpy(labels)) < 1e-5


def test_colours_of_absent_parts_do_not_count() -> None:
    labels = labels_of(CRITTER)[None]
    outputs = _perfect_outputs(labels)
    ears = KINDS.index("ears")
    reader.split(outputs)["colour"][0, ears, 3] = 30.0
    assert reader.loss(outputs, torch.from_numpy(labels)) < 1e-5
    wings = KINDS.index("wings")
    reader.split(outputs)["colour"][0, wings] = torch.zeros(8)
    assert reader.loss(outputs, torch.from_numpy(labels)) > 0.5


@pytest.mark.parametrize("name", ["state", "style", "scene", "build"])
def test_every_attribute_counts_in_the_loss(name: str) -> None:
    labels = labels_of(CRITTER)[None]
    outputs = _perfect_outputs(labels)
    part = reader.split(outputs)[name]
    part[0] = torch.zeros_like(part[0]) if name != "build" else part[0] + 0.5
    assert reader.loss(outputs, torch.from_numpy(labels)) > 0.1


def test_a_whole_critter_is_valid_with_or_without_what_it_may_lack() -> None:
    bare = Critter(body=Part("box", "red"), eyes=Part("round", "red"))
    assert _readings(CRITTER, bare).valid().tolist() == [True, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", [ABSENT, DOUBLED, GARBLED])
def test_a_missing_doubled_or_garbled_part_is_not_valid(kind: str, state: int) -> None:
    readings = _readings(CRITTER, CRITTER)
    readings.state[1, KINDS.index(kind)] = state
    expected = state == ABSENT and kind not in ("body", "eyes")
    assert readings.valid().tolist() == [True, expected]


def test_given_parts_are_matched_by_shape_and_colour() -> None:
    other = CRITTER.having("wings", Part("leaf", "pink")).having("eyes", Part("round", "red"))
    readings = _readings(CRITTER, other)
    given = [("wings",), ("eyes", "wings", "body")]
    shape, colour = readings.matches([CRITTER, CRITTER], given)
    assert shape.tolist() == [True, False, True, True]
    assert colour.tolist() == [True, True, False, True]
    assert readings.kept([CRITTER, CRITTER], given).tolist() == [True, False, False, True]


def test_a_part_that_was_not_drawn_is_not_kept() -> None:
    bare = Critter(body=CRITTER.body, eyes=CRITTER.eyes)
    readings = _readings(bare)
    readings.colour[0, KINDS.index("wings")] = COLOUR_NAMES.index("blue")  # a guess
    assert not readings.kept([CRITTER], [("wings",)])[0]


def test_rows_pick_pictures() -> None:
    many = _readings(*[CRITTER.having("body", Part(shape, "red")) for shape in SHAPES["body"]])
    odd = many.rows(slice(1, None, 2))
    assert len(odd) == 2 and odd.state[:, 0].tolist() == [1, 3]
    assert odd.build.tolist() == [0.25, 0.25]


def test_accuracy_counts_colours_of_seen_parts_alone() -> None:
    readings = _readings(CRITTER, CRITTER)
    labels = np.stack([labels_of(CRITTER)] * 2)
    assert reader.accuracy(readings, labels) == {
        "state": 1.0,
        "colour": 1.0,
        "style": 1.0,
        "scene": 1.0,
        "build_error": 0.0,
    }
    readings.colour[:, KINDS.index("ears")] = 5  # absent: whatever is said of its colour is no mistake
    assert reader.accuracy(readings, labels)["colour"] == 1.0
    readings.colour[0, KINDS.index("body")] = 0
    readings.state[0, 0], readings.scene[0], readings.build[1] = GARBLED, 0, 0.35
    wrong = reader.accuracy(readings, labels)
    assert wrong["colour"] == pytest.approx(5 / 6) and wrong["state"] == pytest.approx(9 / 10)
    assert wrong["scene"] == 0.5 and wrong["build_error"] == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["tuning", "judge"])
def test_readers_read_in_chunks_as_at_once(name: str) -> None:
    torch.manual_seed(0)
    model = models.build_reader(name).eval()
    pixels = torch.rand(5, 3, 128, 128) * 2 - 1
    whole, parts = reader.read(model, pixels), reader.read(model, pixels, chunk=2)
    assert (whole.state == parts.state).all() and (whole.colour == parts.colour).all()
    assert np.abs(whole.build - parts.build).max() < 1e-5
    assert whole.state.shape == (5, 5) and whole.style.shape == (5,)


def test_readers_differ_in_architecture() -> None:
    tuning, judge = (models.build_reader(name) for name in ("tuning", "judge"))
    assert type(tuning) is not type(judge)
    with pytest.raises(PitError, match="no reader 'jury'.*tuning, judge"):
        models.build_reader("jury")


def test_labels_fit_the_readers_outputs() -> None:
    assert 2 * len(KINDS) + 4 == LABELS
    assert [len(shapes) for shapes in SHAPES.values()] == [ABSENT] * 5 and GARBLED == reader.STATES - 1
