"""Subjects cut out: by any mask, and by tiny models of the families that users have."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from benches import Bench
from torch import Tensor


@pytest.fixture(autouse=True)
def folders(bench: Bench) -> Iterator[None]:
    yield
    shutil.rmtree(bench.folder / "models/cut_out", ignore_errors=True)


@pytest.fixture
def picture() -> Tensor:
    image = torch.ones(2, 32, 48, 3)
    image[:, 4:28, 8:30] = torch.tensor([0.8, 0.2, 0.2])
    return image


def saved(bench: Bench, name: str) -> str:
    pytest.importorskip("transformers")
    import tiny_finders

    getattr(tiny_finders, f"save_{name}")(bench.folder / "models/cut_out" / name)
    return name


def test_any_mask_will_do(bench: Bench, picture: Tensor) -> None:
    mask = torch.zeros(1, 16, 24)
    mask[:, :, :12] = 1
    image, seen = bench.run("PiTCutOut", image=picture * 0.5, mask=mask).args
    assert image.shape == picture.shape and seen.shape == (2, 32, 48)
    assert torch.equal(image[:, :, :22], picture[:, :, :22] * 0.5) and image[:, :, 26:].eq(1).all()


def test_a_segmentation_model_by_itself(bench: Bench, picture: Tensor) -> None:
    image, mask = bench.run("PiTCutOut", image=picture, segmenter=saved(bench, "segformer")).args
    assert mask.shape == (2, 32, 48) and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert image[mask == 0].eq(1).all() and torch.equal(image[mask == 1], picture[mask == 1])


def test_words_are_found_and_segmented(bench: Bench, picture: Tensor) -> None:
    models = {"detector": saved(bench, "grounding_dino"), "segmenter": saved(bench, "sam")}
    assert bench.host.folders_in("cut_out") == ["grounding_dino", "sam"]
    given = {"image": picture, "subject": "head", **models}
    mask = bench.run("PiTCutOut", **given, threshold=0.0001)[1]
    assert mask.shape == (2, 32, 48) and torch.equal(mask[0], mask[1])
    with pytest.raises(bench.error, match="Nothing in the picture was found as 'head'"):
        bench.run("PiTCutOut", **given, threshold=1.0)
    with pytest.raises(bench.error, match="subject is empty"):
        bench.run("PiTCutOut", **{**given, "subject": " "})
    with pytest.raises(bench.error, match="detector: 'sam' holds a sam, but GroundingDINO"):
        bench.run("PiTCutOut", **{**given, "detector": "sam"})


def test_mistakes_are_one_sentence(bench: Bench, picture: Tensor) -> None:
    for inputs, words in [
        ({}, "segmenter is none and there is no mask"),
        ({"segmenter": "gone"}, "segmenter: There is no model folder 'gone' in"),
        ({"segmenter": "../ipadapter"}, "There is no model folder '../ipadapter'"),
        ({"mask": torch.ones(3, 32, 48)}, "mask has 3 rows, but there are 2 pictures"),
        ({"image": "a picture"}, "image is no image but str"),
    ]:
        with pytest.raises(bench.error, match=words) as error:
            bench.run("PiTCutOut", **{"image": picture, **inputs})
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
