"""Parts on the white square, and the reference grid."""

import numpy as np
import pytest
from PIL import Image

from pit_core.errors import PitError
from pit_core.parts.canvas import on_white_square, reference_grid


def _extent(square: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, width, height of what is not white."""
    rows, columns = np.nonzero((np.asarray(square) < 250).any(-1))
    return int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


@pytest.mark.parametrize("size", [128, 224, 1024])
@pytest.mark.parametrize("shape", [(50, 50), (300, 90), (20, 400)])
def test_the_long_side_fills_its_share_of_the_square(size: int, shape: tuple[int, int]) -> None:
    square = on_white_square(Image.new("RGB", shape, "black"), size)
    left, top, width, height = _extent(square)
    assert square.size == (size, size)
    assert abs(max(width, height) - 0.92 * size) <= 1
    assert abs(width / height - shape[0] / shape[1]) < 0.1
    assert abs(left - (size - width) / 2) <= 1
    assert abs(top - (size - height) / 2) <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 4096), (4096, 1), (3, 5)])
def test_extreme_shapes_fit(shape: tuple[int, int]) -> None:
    assert on_white_square(Image.new("RGB", shape, "black"), 64).size == (64, 64)


def test_transparent_borders_are_cropped_and_the_rest_lies_on_white() -> None:
    part = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
    part.paste((255, 0, 0, 128), (80, 40, 120, 60))
    square = on_white_square(part, 100)
    assert abs(_extent(square)[2] - 92) <= 1
    assert square.getpixel((50, 50)) == pytest.approx((255, 127, 127), abs=2)
    assert square.getpixel((2, 2)) == (255, 255, 255)


def test_invisible_colours_do_not_bleed_into_the_edge() -> None:
    part = Image.new("RGBA", (40, 40), (0, 255, 0, 0))  # transparent green
    part.paste((255, 0, 0, 255), (10, 10, 30, 30))
    pixels = np.asarray(on_white_square(part, 256), int)
    assert (pixels[..., 1] <= pixels[..., 0]).all()


def test_other_modes_are_taken() -> None:
    for mode in ("L", "LA", "P", "1", "CMYK"):
        assert on_white_square(Image.new("RGB", (10, 10)).convert(mode), 32).mode == "RGB"


def test_a_random_place_is_inside_and_repeats_with_its_seed() -> None:
    part = Image.new("RGB", (50, 20), "black")
    places = {_extent(on_white_square(part, 100, 0.5, "random", seed))[:2] for seed in range(20)}
    assert len(places) > 10
    again = [_extent(on_white_square(part, 100, 0.5, "random", 3)) for _ in range(2)]
    assert again[0] == again[1]
    assert again[0][2:] == (50, 20)


@pytest.mark.parametrize(
    "values", [{"size": 0}, {"fill": 0.0}, {"fill": 1.5}, {"fill": float("nan")}, {"position": "left"}]
)
def test_values_out_of_range_are_refused(values: dict) -> None:
    with pytest.raises(PitError, match="Expected"):
        on_white_square(Image.new("RGB", (4, 4)), **values)


def test_a_wholly_transparent_part_is_refused() -> None:
    with pytest.raises(PitError, match="wholly transparent"):
        on_white_square(Image.new("RGBA", (4, 4)))


def _flat(colour: str) -> Image.Image:
    return Image.new("RGB", (30, 50), colour)


@pytest.mark.parametrize("size", [64, 65])
def test_four_references_make_the_grid_in_reading_order(size: int) -> None:
    grid = reference_grid([_flat(c) for c in ("red", "lime", "blue", "black")], size)
    corners = [(0, 0), (size - 1, 0), (0, size - 1), (size - 1, size - 1)]
    assert [grid.getpixel(xy) for xy in corners] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]
    assert grid.size == (size, size)


def test_fewer_references_go_round_one_is_stretched_none_is_white() -> None:
    colours = {(255, 0, 0): "a", (0, 255, 0): "b", (0, 0, 255): "c", (255, 255, 255): "-"}

    def cells(*names: str) -> str:
        grid = reference_grid([_flat(name) for name in names], 40)
        return "".join(colours[grid.getpixel(xy)] for xy in [(5, 5), (35, 5), (5, 35), (35, 35)])

    assert cells("red", "lime") == "abba"
    assert cells("red", "lime", "blue") == "abca"
    assert cells("red") == "aaaa"
    assert cells() == "----"
    with pytest.raises(PitError, match="up to 4"):
        cells(*["red"] * 5)
