"""Detection, segmentation and cutting out: real classes at toy size, saved to folders and loaded back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_finders
import torch
from PIL import Image, ImageDraw

from pit_core.cutout import (
    EveryMask,
    load_detector,
    load_foreground,
    load_segmenter,
    on_white,
    read_mask,
    subject_mask,
)
from pit_core.errors import PitError

LOOSE = EveryMask(points=3, iou=-100.0, stability=0.0, overlap=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model's folder by its name, made on first use."""
    root = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        if not (root / name).exists():
            getattr(tiny_finders, f"save_{name}")(root / name)
        return root / name

    return get


@pytest.fixture
def picture() -> Image.Image:
    image = Image.new("RGB", (48, 32), "white")
    ImageDraw.Draw(image).ellipse([8, 4, 30, 28], fill=(200, 60, 40))
    return image


# detection


@pytest.mark.parametrize("name", ["grounding_dino", "owlv2", "owlvit"])
def test_detectors_give_boxes_inside_the_picture_the_surest_first(
    folder: Callable[[str], Path], picture: Image.Image, name: str
) -> None:
    found = load_detector(folder(name)).find(picture, ["head", "two legs"], 0.0001, overlap=1.0)
    assert found and {each.phrase for each in found} <= {0, 1}
    for each in found:
        left, top, right, bottom = each.box
        assert 0 <= left < right <= 48 and 0 <= top < bottom <= 32
    scores = [each.score for each in found]
    assert scores == sorted(scores, reverse=True) and all(0 < score <= 1 for score in scores)
    again = load_detector(folder(name)).find(picture, ["head", "two legs"], 0.0001, overlap=1.0)
    assert again == found
    surest = load_detector(folder(name)).find(picture, ["head", "two legs"], scores[0])
    assert surest == found[:1]


def test_grounding_dinos_phrases_stand_where_their_words_are(folder: Callable[[str], Path]) -> None:
    detector: Any = load_detector(folder("grounding_dino"))
    ids, spans = detector._text(["head", "two legs"])
    words = detector.tokenizer.convert_ids_to_tokens(ids[0])
    assert words == ["[CLS]", "head", ".", "two", "legs", ".", "[SEP]"]
    assert spans == [(1, 2), (3, 5)]
    with pytest.raises(PitError, match="this detector reads 16; take fewer"):
        detector._text(["two legs"] * 8)


def test_boxes_of_one_phrase_that_overlap_are_one(
    folder: Callable[[str], Path], picture: Image.Image
) -> None:
    detector = load_detector(folder("owlv2"))
    every = detector.find(picture, ["head"], 0.0001, overlap=1.0)
    apart = detector.find(picture, ["head"], 0.0001, overlap=0.0)
    assert 0 < len(apart) < len(every)
    assert apart[0] == every[0]


# segmentation


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_segmenters_give_a_mask_of_the_pictures_size_for_each_box(
    folder: Callable[[str], Path], picture: Image.Image, name: str
) -> None:
    segmenter = load_segmenter(folder(name))
    masks = segmenter.masks(picture, [(8, 4, 30, 28), (0, 0, 10, 10)])
    assert [mask.shape for mask in masks] == [(32, 48)] * 2
    assert all(mask.dtype == bool for mask in masks)
    again = load_segmenter(folder(name)).masks(picture, [(8, 4, 30, 28)])
    assert np.array_equal(again[0], masks[0])
    assert segmenter.masks(picture, []) == []


def test_sam2_is_read_out_of_the_video_models_that_it_is_published_as(
    folder: Callable[[str], Path], picture: Image.Image, tmp_path: Path
) -> None:
    tiny_finders.save_sam2(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "sam2_video", "architectures": ["Sam2VideoModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    video, still = (
        load_segmenter(each).masks(picture, [(8, 4, 30, 28)]) for each in (tmp_path, folder("sam2"))
    )
    assert np.array_equal(video[0], still[0])


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_every_mask_of_a_picture(folder: Callable[[str], Path], picture: Image.Image, name: str) -> None:
    segmenter = load_segmenter(folder(name))
    masks = segmenter.everything(picture, LOOSE)
    assert 0 < len(masks) <= 3 * 9
    assert {mask.shape for mask in masks} == {(32, 48)}
    assert segmenter.everything(picture, EveryMask(points=2, iou=1000.0)) == []


def test_sam_sees_the_pictures_own_shape_and_sam2_a_square(
    folder: Callable[[str], Path], picture: Image.Image
) -> None:
    from pit_core.cutout import _View

    corner = torch.tensor([48.0, 32.0])
    sides = [_View(picture, load_segmenter(folder(name))).scaled(corner).tolist() for name in ("sam", "sam2")]
    assert sides[0] == pytest.approx([64, 43], abs=0.01)  # 32 * 64 / 48 = 42.7, in whole pixels
    assert sides[1] == [64, 64]


def test_a_subject_named_by_words_is_segmented(folder: Callable[[str], Path], picture: Image.Image) -> None:
    detector, segmenter = load_detector(folder("grounding_dino")), load_segmenter(folder("sam"))
    assert subject_mask(picture, "head", detector, segmenter, 0.0001).shape == (32, 48)
    with pytest.raises(PitError, match="Nothing in the picture was found as 'head'"):
        subject_mask(picture, "head", detector, segmenter, threshold=2.0)


def test_a_segmentation_model_tells_the_subject_from_the_background(
    folder: Callable[[str], Path], picture: Image.Image
) -> None:
    model = load_foreground(folder("segformer"))
    mask = model.mask(picture)
    assert mask.shape == (32, 48)
    model.background = 1
    assert np.array_equal(model.mask(picture), ~mask)  # of two classes one is the other's background


# mistakes


@pytest.mark.parametrize("load", [load_detector, load_segmenter, load_foreground])
def test_folders_that_are_no_such_model(load: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(PitError, match="There is no folder"):
        load(tmp_path / "absent")
    with pytest.raises(PitError, match="no model folder: it has no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PitError, match="is damaged"):
        load(tmp_path)
    code = {"model_type": "mine", "architectures": ["BiRefNet"], "auto_map": {"AutoModel": "mine.BiRefNet"}}
    (tmp_path / "config.json").write_text(json.dumps(code))
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(PitError, match="expected|code in its folder is not run"):
        load(tmp_path)


def test_missing_weights_are_not_made_up(folder: Callable[[str], Path], tmp_path: Path) -> None:
    tiny_finders.save_sam(tmp_path / "sam")
    tiny_finders.without_weight(tmp_path / "sam", "mask_decoder.iou_token.weight")
    with pytest.raises(PitError, match="lacks 1 weights of its SamModel, such as mask_decoder.iou_token"):
        load_segmenter(tmp_path / "sam")


# masks that are given


def test_what_is_white_or_opaque_is_the_mask(tmp_path: Path) -> None:
    grey = Image.new("L", (6, 4))
    grey.putpixel((2, 1), 255)
    grey.save(tmp_path / "grey.png")
    clear = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    clear.putpixel((2, 1), (9, 9, 9, 255))
    clear.save(tmp_path / "clear.png")
    for name in ("grey.png", "clear.png"):
        mask = read_mask(tmp_path / name)
        assert mask.shape == (4, 6) and mask[1, 2] and mask.sum() == 1
    Image.new("L", (6, 4)).save(tmp_path / "black.png")
    with pytest.raises(PitError, match="'black.png' is empty"):
        read_mask(tmp_path / "black.png")


def test_a_subject_on_white(picture: Image.Image) -> None:
    mask = np.zeros((32, 48), dtype=bool)
    mask[10:20, 12:26] = True
    whole, cropped = on_white(picture, mask), on_white(picture, mask, crop=True)
    assert whole.size == picture.size and cropped.size == (14, 10)
    assert whole.getpixel((0, 0)) == (255, 255, 255) == whole.getpixel((11, 10))
    assert whole.getpixel((20, 15)) == picture.getpixel((20, 15)) == cropped.getpixel((8, 5))
    with pytest.raises(PitError, match="The mask is 3 x 2 px, but its picture 48 x 32 px"):
        on_white(picture, np.ones((2, 3), dtype=bool))
    with pytest.raises(PitError, match="The mask is empty"):
        on_white(picture, np.zeros((32, 48), dtype=bool))
