"""Part data as training examples, and on a contact sheet."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from pit_core.errors import PitError
from pit_core.ip_adapter.pixels import preprocess
from pit_core.parts.augment import Augment
from pit_core.parts.dataset import PartData, fill_slots
from pit_core.parts.manifest import Whole
from pit_core.parts.sheet import part_sheet
from pit_core.train.loop import LoopConfig, _Batches

SETTINGS = Augment(crop_prob=0.5, rotate_prob=0.5, sketch_prob=0.2, empty_prob=0.2)
PLAIN = Augment(crop_prob=0, rotate_prob=0, sketch_prob=0, empty_prob=0, fill=(0.9, 0.9))


def _small(squares: list[Image.Image]) -> Tensor:
    return preprocess(squares, size=16)


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
    return PartData(wholes, folder, settings, _small, seed=seed, canvas=32)


def _colours(image: Image.Image, least: int = 1) -> set[tuple[int, int, int]]:
    """The colours of at least so many pixels, white left out."""
    found = image.getcolors(image.width * image.height)
    return {colour for count, colour in found if count >= least} - {(255, 255, 255)}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


def test_a_batch_holds_only_squares_that_show_something(folder: Path) -> None:
    data = _data(folder, PLAIN)
    items = [(0, index) for index in (5, 3, 4)]
    batch = data.fetch(items)
    examples = [data.example(*item) for item in items]
    assert torch.equal(batch["target"], _small([example.target for example in examples]))
    assert batch["slots"].shape == (3, 3)
    assert batch["slots"][0].tolist() == [-1, -1, -1]
    assert len(batch["parts"]) == int((batch["slots"] >= 0).sum()) > 1
    for row, example in zip(batch["slots"], examples, strict=True):
        for number, square in zip(row.tolist(), example.slots, strict=True):
            assert (number < 0) == (square is None)
            if square is not None:
                assert torch.equal(batch["parts"][number], _small([square])[0])
    assert data.fetch([(0, 0)])["parts"].shape == (0, 3, 16, 16)


def test_an_item_depends_on_seed_epoch_and_index_and_on_nothing_else(folder: Path) -> None:
    batch = _data(folder).fetch([(2, 4)])
    again = _data(folder)
    again.fetch([(0, 7), (1, 4)])
    assert _equal(again.fetch([(2, 4)]), batch)
    assert not _equal(again.fetch([(3, 4)]), batch)
    assert not _equal(_data(folder, seed=1).fetch([(2, 4)]), batch)
    beside = again.fetch([(0, 9), (2, 4)])
    assert torch.equal(beside["target"][1:], batch["target"])
    assert torch.equal(beside["parts"][beside["slots"][1][beside["slots"][1] >= 0]], batch["parts"])


def test_any_number_of_workers_and_processes_makes_the_same_batches(folder: Path) -> None:
    config = LoopConfig(steps=4, batch_size=4)

    def batches(workers: int, rank: int = 0, world: int = 1) -> list[dict[str, Tensor]]:
        source = _Batches(_data(folder), config, rank, world)
        return list(DataLoader(source, batch_size=None, sampler=range(4), num_workers=workers))

    alone = batches(0)
    assert all(_equal(a, b) for a, b in zip(alone, batches(2), strict=True))
    halves = [batches(0, rank, 2) for rank in range(2)]
    for whole, first, second in zip(alone, *halves, strict=True):
        for name in ("target", "parts"):
            assert torch.equal(whole[name], torch.cat([first[name], second[name]]))


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
    data = PartData([Whole("a.png", ("b.png",))], tmp_path, PLAIN, _small)
    with pytest.raises(PitError, match="There is no file"):
        data.fetch([(0, 0)])


def test_white_tokens_fill_the_slots_without_a_picture() -> None:
    tokens = torch.arange(12.0).reshape(2, 2, 3)
    white = torch.full((2, 3), -7.0)
    cond = fill_slots(tokens, torch.tensor([[1, -1], [-1, 0]]), white)
    assert torch.equal(cond, torch.stack([torch.cat([tokens[1], white]), torch.cat([white, tokens[0]])]))
    nothing = fill_slots(tokens[:0], torch.tensor([[-1, -1]]), white[None])
    assert torch.equal(nothing, white.repeat(2, 1)[None])


@pytest.mark.parametrize("augmented", [False, True])
def test_a_sheet_shows_targets_with_their_parts(folder: Path, augmented: bool) -> None:
    data = _data(folder, PLAIN)
    shown = _colours(part_sheet(data, 4, augmented=augmented), least=2000)  # areas, not their edges
    targets = {colour for colour in shown if colour[1:] == (0, 0) and colour[0] % 20 == 0}
    parts = {colour for colour in shown if colour[2] == 0 and colour[1] in range(20, 100, 20)}
    assert len(targets) == 4
    assert parts
    assert {red for red, *_ in parts} <= {red for red, *_ in targets}
    assert part_sheet(data, 4).tobytes() == part_sheet(data, 4).tobytes()
    assert part_sheet(data, 4, seed=1).tobytes() != part_sheet(data, 4).tobytes()


def test_a_sheet_of_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(PitError, match="at least one whole"):
        part_sheet(_data(folder), 0)
    assert part_sheet(_data(folder, PLAIN), 99).height > 10 * 192
