"""Pictures on white paper: by masks or by a segmentation model, and what `pit sample` makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_finders
import tiny_stack
import torch
from PIL import Image

from pit_core.backgrounds import load_cut_out, on_paper
from pit_core.errors import PitError
from pit_core.runs import JobFiles

Run = Callable[..., tuple[int, str, str]]
SIZE = (48, 32)


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "segformer"
    tiny_finders.save_segformer(folder)
    return folder


@pytest.fixture(scope="module")
def hero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture without any white, and masks of its left and of its right beside it."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 200, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "hero.png")
    for name, box in (("left", (4, 4, 20, 28)), ("right", (30, 2, 44, 12))):
        mask = Image.new("L", SIZE)
        mask.paste(255, box)
        mask.save(folder / f"{name}.png")
    Image.new("L", (3, 2), 255).save(folder / "small.png")
    return folder / "hero.png"


def opened(path: Path) -> dict[Path, Image.Image]:
    return {path: Image.open(path).convert("RGB")}


# pictures


def test_two_masks_cut_two_parts_out_of_one_picture(hero: Path) -> None:
    masks = tuple(hero.with_name(f"{name}.png") for name in ("left", "right"))
    pictures = opened(hero)
    files = JobFiles((hero, hero), (1,), masks=masks)
    left, right = on_paper(files, pictures)
    assert (left.size, right.size) == ((16, 24), (14, 10))
    assert left.tobytes() == pictures[hero].crop((4, 4, 20, 28)).tobytes()


def test_references_and_starts_keep_their_size(hero: Path) -> None:
    mask = hero.with_name("left.png")
    for files in (JobFiles((), (1,), (hero,), masks=(mask,)), JobFiles((), (1,), (), hero, masks=(mask,))):
        (shown,) = on_paper(files, opened(hero))
        pixels = np.asarray(shown)
        assert shown.size == SIZE and (pixels[:, 20:] == 255).all() and (pixels[4:28, 4:20] < 200).all()


def test_without_masks_and_model_pictures_are_as_they_were(hero: Path) -> None:
    pictures = opened(hero)
    assert on_paper(JobFiles((hero,), (1,)), pictures) == [pictures[hero]]


def test_a_model_finds_the_subject_or_says_that_there_is_none(hero: Path, segformer: Path) -> None:
    cut_out = load_cut_out(segformer)
    files, pictures = JobFiles((), (1,), (hero,)), opened(hero)
    bias = cut_out.model.model.decode_head.classifier.bias
    with torch.no_grad():
        bias.copy_(torch.tensor([0.0, 1e4]))  # the background's class is 0
        assert on_paper(files, pictures, cut_out)[0].tobytes() == pictures[hero].tobytes()
        bias.copy_(torch.tensor([1e4, 0.0]))
    with pytest.raises(PitError, match="'hero.png': The segmentation model found no subject"):
        on_paper(files, pictures, cut_out)


def test_a_mask_of_another_size_names_its_picture(hero: Path) -> None:
    files = JobFiles((hero,), (1,), masks=(hero.with_name("small.png"),))
    with pytest.raises(PitError, match="'hero.png': The mask is 3 x 2 px, but its picture 48 x 32 px"):
        on_paper(files, opened(hero))


# pit sample


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    files = tiny_stack.save(tmp_path_factory.mktemp("stack"))
    named = [("--" + name.replace("_", "-"), path) for name, path in files.named().items()]
    return [*(word for pair in named for word in pair), "--steps", 1, "--prior-steps", 1, "--count", 1]


def tokens(folder: Path, number: int) -> torch.Tensor:
    from pit_core.ip_adapter.tokens import load_ip_tokens

    return load_ip_tokens(folder / f"00{number}-tokens.safetensors").tokens


def test_masks_are_recorded_and_repeated(run: Run, options: list, hero: Path, tmp_path: Path) -> None:
    base = ["sample", "--parts", hero, hero, "--out", tmp_path]
    masks = [hero.with_name("left.png"), hero.with_name("right.png")]
    code, _, err = run(*base, "--mask", *masks, *options)
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "001-record.json").read_text("utf-8"))
    assert [Path(entry["path"]).name for entry in record["jobs"][0]["masks"]] == ["left.png", "right.png"]
    assert run("sample", "--repeat", tmp_path / "001-record.json", "--out", tmp_path)[0] == 0
    assert torch.equal(tokens(tmp_path, 1), tokens(tmp_path, 2))
    assert run(*base, *options)[0] == 0
    assert tiny_stack.same(tokens(tmp_path, 1), tokens(tmp_path, 3)) > 1e-3


def test_a_segmentation_folder_is_recorded_and_repeated(
    run: Run, options: list, hero: Path, segformer: Path, tmp_path: Path
) -> None:
    code, _, err = run("sample", "--parts", hero, "--cut-out", segformer, "--out", tmp_path / "out", *options)
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "out/001-record.json").read_text("utf-8"))
    assert Path(record["settings"]["cut_out"]["path"]).name == "segformer"
    assert run("sample", "--repeat", tmp_path / "out/001-record.json", "--out", tmp_path / "out")[0] == 0
    assert torch.equal(tokens(tmp_path / "out", 1), tokens(tmp_path / "out", 2))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--mask", "left.png"], "Expected a mask for each of the 2 pictures"),
        (["--mask", "left.png", "small.png"], "'hero.png': The mask is 3 x 2 px"),
        (["--mask", "left.png", "gone.png"], "gone.png"),
        (["--mask", "left.png", "left.png", "--cut-out", "model"], "give one of them"),
        (["--cut-out", "model"], "There is no folder"),
        (["--mask", "left.png", "left.png", "--random", "2"], "random sets do not have"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    run: Run, options: list, hero: Path, tmp_path: Path, given: list[str], said: str
) -> None:
    given = [str(hero.parent / word) if word.endswith(".png") or word == "model" else word for word in given]
    code, _, err = run("sample", "--parts", hero, hero, *given, "--out", tmp_path / "out", *options)
    assert code == 2 and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
