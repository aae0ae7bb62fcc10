"""Contours, the Bezier fit, and sketches."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pit_core.errors import PitError
from pit_core.parts.sketch import as_sketch, contours, curve_points, fit_cubic, fit_strokes, sketch


def _disc(size: int = 128, radius: float = 40) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    centre = size / 2
    box = [centre - radius, centre - radius, centre + radius, centre + radius]
    ImageDraw.Draw(image).ellipse(box, fill=(40, 90, 200))
    return image


def _mask(image: Image.Image) -> np.ndarray:
    return np.asarray(image).min(-1) < 200


def test_a_discs_contour_is_a_circle() -> None:
    (loop,) = contours(_mask(_disc()))
    assert np.abs(np.linalg.norm(loop - 64, axis=1) - 40).max() < 2


def test_holes_and_separate_pieces_have_contours_of_their_own() -> None:
    mask = np.zeros((60, 90), bool)
    mask[10:50, 10:50] = True
    mask[20:40, 20:40] = False
    mask[15:30, 60:80] = True
    lengths = sorted(len(loop) for loop in contours(mask))
    assert lengths == [70, 80, 160]


def test_pieces_that_touch_at_a_corner_are_traced_to_the_end() -> None:
    mask = np.indices((12, 12)).sum(0) % 2 == 0
    assert sum(len(loop) for loop in contours(mask)) == 4 * mask.sum()


def test_the_whole_picture_and_nothing_have_contours_too() -> None:
    (loop,) = contours(np.ones((7, 9), bool))
    assert len(loop) == 32
    assert contours(np.zeros((7, 9), bool)) == []


def test_a_large_mask_is_traced_in_its_own_pixels() -> None:
    (loop,) = contours(_mask(_disc(1024, 300)))
    assert np.abs(np.linalg.norm(loop - 512, axis=1) - 300).max() < 5


def test_the_fit_finds_the_curve_that_points_were_drawn_from() -> None:
    curve = np.array([[0.0, 0.0], [3.0, 1.0], [6.0, -1.0], [9.0, 0.0]])  # nearly even speed
    fitted = fit_cubic(curve_points(curve, 200))
    assert np.abs(curve_points(fitted) - curve_points(curve)).max() < 0.02
    assert np.array_equal(fitted[[0, 3]], curve[[0, 3]])


def test_short_runs_become_lines() -> None:
    line = fit_cubic(np.array([[0.0, 0.0], [1.0, 3.0]]))
    assert np.allclose(line, np.linspace(0, 1, 4)[:, None] * [1, 3])


def test_strokes_are_shared_out_by_length_and_stay_on_the_contour() -> None:
    mask = np.zeros((200, 200), bool)
    mask[10:150, 10:150] = True
    mask[160:180, 160:180] = True
    loops = contours(mask)
    strokes = fit_strokes(loops, 12)
    small = [stroke for stroke in strokes if stroke[0].min() > 155]
    assert (len(strokes), len(small)) == (12, 3)
    for stroke in strokes:
        gaps = np.linalg.norm(curve_points(stroke)[:, None] - np.concatenate(loops)[None], axis=-1).min(1)
        assert gaps.max() < 12


@pytest.mark.parametrize("count", range(8, 16))
def test_a_closed_outline_gives_as_many_strokes_as_asked(count: int) -> None:
    strokes = fit_strokes(contours(_mask(_disc())), count)
    assert len(strokes) == count
    ends = np.array([stroke[3] for stroke in strokes])
    starts = np.array([stroke[0] for stroke in strokes])
    assert np.array_equal(ends, np.roll(starts, -1, axis=0))


def test_a_sketch_is_black_lines_on_white_at_the_outline() -> None:
    image = as_sketch(_disc(256, 80))
    pixels = np.asarray(image)
    assert (image.mode, image.size) == ("RGB", (256, 256))
    assert (pixels[..., 0] == pixels[..., 1]).all()
    rows, columns = np.nonzero(pixels[..., 0] < 128)
    assert np.abs(np.hypot(rows - 128, columns - 128) - 80).max() < 4
    # 2 px wide, all the way round
    assert 0.7 < len(rows) / (2 * np.pi * 80 * 2) < 1.4


def test_the_same_seed_draws_the_same_sketch_and_others_differ() -> None:
    drawn = [np.asarray(sketch(_disc(), seed=seed)) for seed in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert np.array_equal(as_sketch(_disc()), as_sketch(_disc()))


def test_strokes_are_left_out_by_chance_but_one_stays() -> None:
    def ink(**options: float) -> int:
        return int((np.asarray(sketch(_disc(), seed=0, curves=(10, 10), **options)) < 128).sum())

    assert ink(drop=0.0) > ink(drop=0.5) > ink(drop=1.0) > 0


def test_on_average_a_tenth_of_the_strokes_is_left_out() -> None:
    full = (np.asarray(sketch(_disc(), seed=0, curves=(12, 12), drop=0.0)) < 128).sum()
    drawn = [(np.asarray(sketch(_disc(), seed=s, curves=(12, 12))) < 128).sum() for s in range(60)]
    assert 0.85 < np.mean(drawn) / full < 0.95


def test_transparency_counts_as_white() -> None:
    part = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    part.paste((255, 0, 0, 255), (16, 16, 48, 48))
    pixels = np.asarray(as_sketch(part))[..., 0]
    assert (pixels[:12] == 255).all()
    assert (pixels[14:19] < 128).any()


def test_white_stays_white_and_cannot_be_asked_for_as_a_sketch() -> None:
    white = Image.new("RGB", (32, 32), "white")
    assert np.asarray(sketch(white, seed=0)).min() == 255
    with pytest.raises(PitError, match="this picture is white"):
        as_sketch(white)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (1, 300)])
def test_tiny_pictures_do_no_harm(size: tuple[int, int]) -> None:
    assert sketch(Image.new("RGB", size, "black"), seed=0).size == size


@pytest.mark.parametrize("values", [{"curves": (1, 5)}, {"curves": (9, 8)}, {"drop": 2.0}, {"width": 0.0}])
def test_values_out_of_range_are_refused(values: dict) -> None:
    with pytest.raises(PitError, match="Expected"):
        sketch(_disc(), **values)
