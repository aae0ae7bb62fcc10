"""Part data as training examples, and on a contact sheet."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pit_core.errors import PitError
from pit_core.parts.augment import Augment
from pit_core.parts.dataset import PartData
from pit_core.parts.manifest import Whole
from pit_core.parts.sheet import choose_rows, part_sheet

SETTINGS = Augment(crop_prob=0.5, rotate_prob=0.5, sketch_prob=0.2, empty_prob=0.2)
PLAIN = Augment(crop_prob=0, rotate_prob=0, sketch_prob=0, empty_prob=0, fill=(0.9, 0.9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten targets whose red says which they are; part i of each has the green 20 * i."""
    folder = tmp_path_factory.mktemp("parts")
    for whole in range(10):
        Image.new("RGB", (20, 20), (whole * 20, 0, 0)).save(folder / f"{whole}.png")
        for part in range(whole % 5):
            Image.new("RGB", (16, 8), (whole * 20, part * 20 + 20, 0)).save(folder / f"{whole}_{part}.png")
    return folder


def _data(folder: Path, settings: Augment = SETTINGS, seed: int = 0, sets: int = 1) -> PartData:
    wholes = [
        Whole(f"{i}.png", tuple(f"{i}_{part}.png" for part in range(i % 5)), set=f"set {i % sets}")
        for i in range(10)
    ]
    return PartData(wholes, folder, settings, seed=seed, canvas=32)


def _colours(image: Image.Image, least: int = 1) -> set[tuple[int, int, int]]:
    """The colours of at least so many pixels, white left out."""
    found = image.getcolors(image.width * image.height)
    return {colour for count, colour in found if count >= least} - {(255, 255, 255)}


def test_an_example_is_a_target_and_its_own_parts_padded_with_white(folder: Path) -> None:
    data = _data(folder, PLAIN)
    for index in range(10):
        example = data.example(0, index)
        assert _colours(example.target) == {(index * 20, 0, 0)}
        shown = [square for square in example.slots if square is not None]
        assert len(example.slots) == 3
        assert example.slots[len(shown) :] == (None,) * (3 - len(shown))
        assert bool(shown) == bool(index % 5)
        assert {(red, blue) for square in shown for red, _, blue in _colours(square)} <= {(index * 20, 0)}


def _bytes(data: PartData, epoch: int, index: int) -> list[bytes]:
    example = data.example(epoch, index)
    return [square.tobytes() if square is not None else b"" for square in (example.target, *example.slots)]


def test_an_item_depends_on_seed_epoch_and_index_and_on_nothing_else(folder: Path) -> None:
    data = _data(folder)
    first = _bytes(data, 2, 4)
    again = _data(folder)
    again.example(0, 7)
    assert _bytes(again, 2, 4) == first
    assert _bytes(again, 3, 4) != first
    assert _bytes(_data(folder, seed=1), 2, 4) != first


def test_the_reference_slot_shows_four_siblings_of_a_set_of_nine(folder: Path) -> None:
    settings = replace(PLAIN, use_ref=True)
    example = _data(folder, settings).example(0, 3)
    assert len(example.slots) == 4
    assert example.slots[0] is not None
    shown = _colours(example.slots[0])
    assert len(shown) == 4
    assert shown <= {(i * 20, 0, 0) for i in range(10) if i != 3}
    assert _data(folder, settings, sets=2).example(0, 3).slots[0] is None


def test_a_file_that_breaks_during_training_stops_it(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    data = PartData([Whole("a.png", ("b.png",))], tmp_path, PLAIN)
    with pytest.raises(PitError, match="There is no file"):
        data.example(0, 0)


@pytest.mark.parametrize("augmented", [False, True])
def test_a_sheet_shows_targets_with_their_parts(folder: Path, augmented: bool) -> None:
    data = _data(folder, PLAIN)
    chosen = choose_rows(len(data), 4)
    shown = _colours(part_sheet(data, chosen, augmented=augmented), least=2000)  # areas, not their edges
    targets = {colour for colour in shown if colour[1:] == (0, 0) and colour[0] % 20 == 0}
    parts = {colour for colour in shown if colour[2] == 0 and colour[1] in range(20, 100, 20)}
    assert len(targets) == 4
    assert parts
    assert {red for red, *_ in parts} <= {red for red, *_ in targets}
    assert part_sheet(data, chosen).tobytes() == part_sheet(data, chosen).tobytes()
    assert choose_rows(len(data), 4) == chosen != choose_rows(len(data), 4, seed=1)


def test_a_sheet_of_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(PitError, match="at least one whole"):
        choose_rows(10, 0)
    assert choose_rows(10, 99) == list(range(10))
    assert part_sheet(_data(folder, PLAIN), choose_rows(10, 99)).height > 10 * 192
