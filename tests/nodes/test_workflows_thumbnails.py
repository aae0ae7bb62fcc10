"""The workflows' thumbnails: one beside each, and how they are put together."""

from pathlib import Path

import pytest
from PIL import Image
from workflow_graphs import all_workflows
from workflow_server import FOLDER
from workflow_thumbnails import (
    BEFORE_FLUX,
    BY_MINIATURE,
    GIVEN_TO_FLUX,
    RESULT,
    SIDE,
    caption_of,
    compose,
    source_of,
)

GRAPHS = {workflow.name: workflow for workflow in all_workflows()}
BYTES = 100_000

WEIGHTS = Path(__file__).resolve().parents[2] / "pit_core" / "miniature" / "weights"
pytestmark = pytest.mark.skipif(
    not (WEIGHTS / "ip_prior.safetensors").is_file(),
    reason="the miniature has not been trained here: ip_prior.safetensors is missing",
)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_workflow_has_a_small_square_thumbnail(name: str) -> None:
    path = FOLDER / f"{name}.jpg"
    assert path.stat().st_size < BYTES
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and picture.size == (SIDE, SIDE)
        extrema = picture.convert("L").getextrema()
    assert extrema[1] - extrema[0] > 100


def test_no_thumbnail_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.jpg")} <= set(GRAPHS)


def test_it_says_whose_pictures_it_shows() -> None:
    captions = {name: (source_of(graph), caption_of(graph)) for name, graph in GRAPHS.items()}
    assert captions["04_regions_miniature"] == ("04_regions_miniature", "")
    assert captions["04_regions_sdxl"] == ("04_regions_miniature", BY_MINIATURE)
    assert captions["06_refined_by_flux_sdxl"] == ("01_first_concept_miniature", BEFORE_FLUX)
    assert captions["11_diptych_subject_flux"] == (None, GIVEN_TO_FLUX)
    assert all(not GRAPHS[source].full for source, _ in captions.values() if source)


def test_what_went_in_is_left_of_what_came_out() -> None:
    red, green, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue"))
    sheet = compose([red, green], [blue] * 8 + [red])
    assert sheet.size == (SIDE, SIDE)
    assert sheet.getpixel((64, 192)) == (255, 0, 0) and sheet.getpixel((64, 320)) == (0, 128, 0)
    top = (SIDE - RESULT) // 2
    assert sheet.getpixel((SIDE - RESULT + 5, top + 5)) == (0, 0, 255)
    assert sheet.getpixel((SIDE - 5, SIDE - top - 5)) == (255, 0, 0)
    captioned = compose([red], [blue], "words")
    assert captioned.crop((0, SIDE - top, SIDE, SIDE)).convert("L").getextrema()[0] < 200
