"""What training does to parts: each change with its probability, all from given random numbers."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pit_core.errors import PitError
from pit_core.parts.augment import Augment, choose_parts, choose_siblings, is_white, item_chance, part_square
from pit_core.parts.canvas import on_white_square

PLAIN = Augment(crop_prob=0, rotate_prob=0, fill=(0.9, 0.9), sketch_prob=0)


def _extent(square: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, width, height of what is not white."""
    rows, columns = np.nonzero((np.asarray(square) < 200).any(-1))
    return int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


def _ramp() -> Image.Image:
    """Every column and every row has its own colour, none of them near white."""
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(100), np.arange(100)[:, None]
    return Image.fromarray(pixels)


def test_an_example_shows_one_to_all_parts_up_to_the_cap_and_one_in_ten_shows_none() -> None:
    counts = [len(choose_parts(5, Augment(), item_chance(0, 0, i))) for i in range(4000)]
    shares = np.bincount(counts, minlength=4) / len(counts)
    assert len(shares) == 4
    # 1 to 5 are equally likely; what is above 3 becomes 3
    assert shares == pytest.approx([0.1, 0.18, 0.18, 0.54], abs=0.025)


def test_parts_come_in_any_order_and_none_twice() -> None:
    settings = Augment(empty_prob=0, max_crops=7)
    chosen = [choose_parts(3, settings, item_chance(1, 0, i)) for i in range(300)]
    assert all(len(set(parts)) == len(parts) for parts in chosen)
    assert len({tuple(parts) for parts in chosen if len(parts) == 3}) == 6
    assert choose_parts(0, settings, item_chance(0, 0, 0)) == []


def test_siblings_are_four_others_of_a_set_that_is_large_enough() -> None:
    members = [3, 5, 8, 9, 12, 20, 21, 22, 30]
    for i in range(100):
        chosen = choose_siblings(9, members, Augment(use_ref=True), item_chance(0, 0, i))
        assert len(set(chosen)) == 4
        assert set(chosen) < set(members) - {9}
    assert choose_siblings(9, members[:8], Augment(use_ref=True), item_chance(0, 0, 0)) == []
    assert choose_siblings(9, members, Augment(), item_chance(0, 0, 0)) == []
    rare = Augment(use_ref=True, reference_prob=0.25)
    given = [bool(choose_siblings(9, members, rare, item_chance(0, 0, i))) for i in range(2000)]
    assert np.mean(given) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("own", [3, 12, 30])
def test_every_sibling_but_the_whole_itself_is_as_likely(own: int) -> None:
    members = [3, 5, 8, 9, 12, 20, 21, 22, 30]
    drawn = [choose_siblings(own, members, Augment(use_ref=True), item_chance(1, 0, i)) for i in range(800)]
    counts = Counter(member for row in drawn for member in row)
    assert set(counts) == set(members) - {own}
    assert all(count == pytest.approx(400, abs=80) for count in counts.values())


def test_siblings_of_a_very_large_set_cost_no_pass_over_it() -> None:
    members = range(10**12)  # one pass would never end
    chosen = choose_siblings(10**11, members, Augment(use_ref=True), item_chance(0, 0, 0))
    assert len(set(chosen) - {10**11}) == 4


def test_without_changes_a_part_is_only_placed() -> None:
    part = Image.new("RGB", (60, 30), "black")
    places = set()
    for i in range(20):
        left, top, width, height = _extent(part_square(part, PLAIN, item_chance(0, 0, i), 100))
        assert (width, height) == (90, 45)
        places.add((left, top))
    assert len(places) > 10


def test_the_share_of_the_canvas_lies_between_its_bounds() -> None:
    settings = replace(PLAIN, fill=(0.8, 0.95))
    part = Image.new("RGB", (60, 30), "black")
    widths = [_extent(part_square(part, settings, item_chance(0, 0, i), 200))[2] for i in range(100)]
    assert 160 <= min(widths) < 165
    assert 185 < max(widths) <= 190


def test_a_fifth_is_cropped_to_a_window_of_80_to_100_percent() -> None:
    settings = replace(PLAIN, crop_prob=0.2, fill=(1.0, 1.0))
    whole = np.asarray(_ramp())
    cropped = []
    for i in range(500):
        pixels = np.asarray(part_square(_ramp(), settings, item_chance(0, 0, i), 100)).astype(int)
        spans = np.ptp(pixels[..., 0]) + 1, np.ptp(pixels[..., 1]) + 1
        assert abs(spans[0] - spans[1]) <= 2
        assert min(spans) >= 79
        cropped.append(not np.array_equal(pixels, whole))
    assert np.mean(cropped) == pytest.approx(0.2, abs=0.05)


def test_a_fifth_is_turned_by_up_to_30_degrees_and_nothing_is_cut_off() -> None:
    settings = replace(PLAIN, rotate_prob=0.2)
    bar = Image.new("RGB", (100, 10), "black")
    tilts = []
    for i in range(300):
        _, _, width, height = _extent(part_square(bar, settings, item_chance(0, 0, i), 100))
        assert width > 85
        tilts.append(np.degrees(np.arctan2(height - 9, width)))
    turned = [tilt for tilt in tilts if tilt > 0.8]
    assert len(turned) / len(tilts) == pytest.approx(0.2, abs=0.06)
    assert 25 < max(turned) <= 32


def test_half_are_drawn_as_sketches_of_what_was_placed() -> None:
    part = Image.new("RGB", (50, 50), "red")
    drawn = 0
    for i in range(80):
        square = np.asarray(part_square(part, replace(PLAIN, sketch_prob=0.5), item_chance(0, 0, i), 32))
        grey = (square[..., 0] == square[..., 1]).all()
        drawn += grey
        assert grey == (square[16, 16] == 255).all()
    assert drawn / 80 == pytest.approx(0.5, abs=0.1)


def test_no_change_makes_a_part_white() -> None:
    pale = Image.new("RGB", (50, 50), (250, 250, 250))
    settings = replace(PLAIN, sketch_prob=1)
    assert not is_white(part_square(pale, settings, item_chance(0, 0, 0), 64))
    dark = Image.new("RGB", (50, 50), "black")
    for i in range(30):
        assert not is_white(part_square(dark, Augment(sketch_prob=1), item_chance(0, 0, i), 32))


def test_transparency_is_cropped_and_laid_on_white() -> None:
    part = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    part.paste((255, 0, 0, 255), (80, 90, 120, 110))
    plain = _extent(part_square(part, PLAIN, item_chance(0, 0, 0), 100))
    assert plain[2:] == (90, 45)
    turned = np.asarray(part_square(part, replace(PLAIN, rotate_prob=1), item_chance(0, 0, 0), 100), int)
    # red to white, never through black
    assert turned[..., 0].min() > 245


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_tiny_parts_do_no_harm(size: tuple[int, int]) -> None:
    part = Image.new("RGB", size, "black")
    always = Augment(crop_prob=1, rotate_prob=1, sketch_prob=1)
    assert part_square(part, always, item_chance(0, 0, 0), 64).size == (64, 64)


def test_the_same_numbers_give_the_same_square_and_others_another() -> None:
    def square(*key: int) -> bytes:
        return part_square(_ramp(), Augment(sketch_prob=0), item_chance(*key), 64).tobytes()

    assert square(1, 2, 3) == square(1, 2, 3)
    others = {square(*key) for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)]}
    assert len(others) == 5
    assert item_chance(1 << 32, 0, 0).random() != item_chance(0, 1, 0).random()
    assert item_chance(2**64 - 1, 0, 0).random() < 1


def test_white_is_what_shows_nothing() -> None:
    assert is_white(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    assert is_white(on_white_square(Image.new("L", (4, 4), 255), 8))
    assert not is_white(Image.new("RGB", (4, 4), (255, 255, 254)))


@pytest.mark.parametrize(
    "values",
    [
        {"empty_prob": -0.1},
        {"crop_prob": 1.5},
        {"sketch_prob": float("nan")},
        {"crop_share": (0.9, 0.8)},
        {"crop_share": (0.0, 1.0)},
        {"fill": (0.5, 1.1)},
        {"degrees": float("inf")},
        {"max_crops": 0},
        {"reference_targets": 4},
    ],
)
def test_values_out_of_range_are_refused(values: dict) -> None:
    with pytest.raises(PitError, match=f"Expected {next(iter(values))}"):
        Augment(**values)


def test_slots_count_the_reference() -> None:
    assert (Augment().slots, Augment(max_crops=7, use_ref=True).slots) == (3, 8)
