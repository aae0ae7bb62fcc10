"""The diptych's canvas, its prompt, and its panels taken apart and put back."""

from typing import Any

import pytest
import torch
from benches import Bench
from torch import Tensor

SIDES = {"width": 32, "height": 32, "margin": 8}
GREY = 0.25


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def box(size: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
    mask = torch.zeros(1, *size)
    mask[:, top : top + height, left : left + width] = 1
    return mask


def prepared(bench: Bench, **inputs: Any) -> Any:
    inputs = {"image": torch.full((1, 32, 32, 3), GREY), **SIDES, **inputs}
    return bench.run("PiTDiptychPrepare", **inputs).args


# the canvas


def test_the_subject_is_on_the_left_and_the_right_is_to_be_made(bench: Bench) -> None:
    picture = rand(1, 32, 32, 3)
    canvas, mask, layout, width, height, seen = prepared(bench, image=picture)
    assert canvas.shape == (1, 48, 96, 3) and mask.shape == (1, 48, 96) and (width, height) == (96, 48)
    assert torch.equal(canvas[:, 8:40, 8:40], picture)
    assert canvas[:, :8, :48].eq(1).all() and mask[..., :48].eq(0).all() and mask[..., 48:].eq(1).all()
    assert seen.shape == (1, 32, 32) and seen.eq(1).all()
    assert str(layout) == "diptych of 96 x 48 pixels"


def test_the_left_panel_may_be_narrower(bench: Bench) -> None:
    canvas, mask, _, width, _, seen = prepared(bench, reference_width=16)
    assert canvas.shape[2] == width == 80 and seen.shape == (1, 32, 16)
    assert mask[..., :32].eq(0).all() and mask[..., 32:].eq(1).all()
    assert canvas[:, 8:16, 8:24].gt(0.9).all()  # a square picture in a tall panel: white above and below
    torch.testing.assert_close(canvas[:, 18:30, 8:24], torch.full((1, 12, 16, 3), GREY))


def test_a_mask_cuts_the_subject_out_but_not_for_a_style(bench: Bench) -> None:
    mask = box((32, 32), 8, 8, 16, 16)
    canvas, *_, seen = prepared(bench, mask=mask)
    panel = canvas[:, 8:40, 8:40]
    assert panel[:, 8:24, 8:24].eq(GREY).all() and panel[(mask == 0)].eq(1).all()
    assert torch.equal(seen, mask)
    style, *_ = prepared(bench, mask=mask, mode="style")
    assert style[:, 8:40, 8:40].eq(GREY).all()


def test_the_subject_may_fill_the_panel(bench: Bench) -> None:
    mask = box((32, 32), 4, 8, 16, 8)
    canvas, *_, seen = prepared(bench, mask=mask, fill_panel=True)
    assert seen[0].amax(1).gt(0.9).all()  # from top to bottom
    assert seen[0, :, :4].lt(0.1).all() and canvas[:, 8:40, 8:10].gt(0.9).all()


def test_transparency_is_white_and_masks_are_fitted(bench: Bench) -> None:
    picture = torch.cat([torch.full((1, 32, 32, 3), GREY), torch.zeros(1, 32, 32, 1)], -1)
    assert prepared(bench, image=picture)[0][:, :, :48].eq(1).all()
    canvas, *_ = prepared(bench, mask=torch.ones(8, 8))
    assert canvas[:, 8:40, 8:40].eq(GREY).all()


def test_a_batch_of_subjects_makes_a_batch_of_diptychs(bench: Bench) -> None:
    canvas, mask, *_ = prepared(bench, image=rand(3, 32, 32, 3), mask=torch.ones(1, 32, 32))
    assert canvas.shape[0] == mask.shape[0] == 3


# edits


def edit(bench: Bench, **inputs: Any) -> Any:
    """A region of 16 x 16 in a picture of 64 x 64; with its surroundings it has the panel's size."""
    given = {"target": rand(1, 64, 64, 3, seed=2), "edit_mask": box((64, 64), 20, 24, 16, 16)}
    return prepared(bench, mode="edit", edit_context=2.0, **{**given, **inputs})


def test_an_edit_shows_the_region_and_masks_it(bench: Bench) -> None:
    canvas, mask, *_ = edit(bench)
    target = rand(1, 64, 64, 3, seed=2)
    assert torch.equal(canvas[:, 8:40, 56:88], target[:, 12:44, 16:48])
    assert torch.equal(mask[:, 8:40, 56:88], box((32, 32), 8, 8, 16, 16))
    assert mask.sum() == 16 * 16


@pytest.mark.parametrize("feather", [0, 6])
def test_an_edit_leaves_every_pixel_outside_its_mask(bench: Bench, feather: int) -> None:
    target, mask = rand(1, 64, 64, 3, seed=2), box((64, 64), 20, 24, 16, 16)
    layout = edit(bench)[2]
    made = rand(2, 48, 96, 3, seed=3)
    right, left, edited = bench.run("PiTDiptychCrop", image=made, layout=layout, feather=feather).args
    assert torch.equal(right, made[:, 8:40, 56:88]) and torch.equal(left, made[:, 8:40, 8:40])
    assert edited.shape == (2, 64, 64, 3)
    for each, panel in zip(edited, right, strict=True):
        assert torch.equal(each[mask[0] == 0], target[0][mask[0] == 0])
        inside = each[20 + feather : 36 - feather, 24 + feather : 40 - feather]
        assert torch.equal(inside, panel[8 + feather : 24 - feather, 8 + feather : 24 - feather])


def test_a_large_picture_keeps_its_size_and_its_pixels(bench: Bench) -> None:
    target, mask = rand(1, 150, 100, 3, seed=2), box((150, 100), 90, 10, 50, 61)
    canvas, _, layout, *_ = edit(bench, target=target, edit_mask=mask)
    edited = bench.run("PiTDiptychCrop", image=canvas.flip(0), layout=layout, feather=8)[2]
    assert edited.shape == target.shape and torch.equal(edited[mask == 0], target[mask == 0])
    assert not torch.equal(edited, target)


def test_an_edit_fades_in_from_its_edge(bench: Bench) -> None:
    faded = bench.part("nodes.diptych")._faded(box((20, 40), 0, 10, 20, 20), 8)[0]
    assert faded[:, :10].eq(0).all() and faded[:, 30:].eq(0).all() and faded[:, 18:22].eq(1).all()
    row = faded[10, 9:20]
    assert (row.diff() >= 0).all() and 0 < row[1] < 0.2
    assert torch.equal(faded[0], faded[10])  # the picture's own edge is none of the mask's


def test_without_an_edit_the_right_panel_is_the_picture(bench: Bench) -> None:
    canvas, _, layout, *_ = prepared(bench)
    right, _, edited = bench.run("PiTDiptychCrop", image=canvas, layout=layout).args
    assert torch.equal(right, edited)


# the prompt


def test_the_published_prompt(bench: Bench) -> None:
    said = bench.first("PiTDiptychPrompt", subject="cat", target="a cat on the moon")
    assert said == (
        "A diptych with two side-by-side images of same cat. On the left, a photo of a cat. "
        "On the right, replicate this cat exactly but as a cat on the moon"
    )
    own = bench.first(
        "PiTDiptychPrompt", task="custom", subject="owl", target="a stamp", template="{a_subject}: {target}"
    )
    assert own == "an owl: a stamp"
    assert "same style" in bench.first("PiTDiptychPrompt", task="style", subject="a mosaic", target="a ship")


# mistakes


def test_mistakes_are_one_sentence(bench: Bench) -> None:
    layout = prepared(bench)[2]
    for run, words in [
        (lambda: prepared(bench, width=33), "width plus two margins is a multiple of 16, but got 33"),
        (lambda: prepared(bench, image=torch.rand(4, 4)), "image has the shape"),
        (lambda: prepared(bench, mask=torch.zeros(32, 32), fill_panel=True), "mask: The mask marks nothing"),
        (lambda: prepared(bench, mask=torch.zeros(2, 32, 32)), "mask has 2 rows, but there are 1 pictures"),
        (lambda: prepared(bench, mode="edit"), "target is missing; an edit needs the picture"),
        (lambda: edit(bench, edit_mask=None), "edit_mask is missing"),
        (lambda: edit(bench, edit_mask=torch.zeros(64, 64)), "edit_mask: The mask marks nothing"),
        (lambda: prepared(bench, mode="swap"), "mode is one of subject, style, edit, but got 'swap'"),
        (lambda: bench.run("PiTDiptychCrop", image=rand(1, 48, 64, 3), layout=layout), "The diptych has the"),
        (lambda: bench.run("PiTDiptychCrop", image=rand(1, 48, 96, 3), layout=1), "layout is int; connect"),
        (lambda: bench.run("PiTDiptychPrompt", subject=" "), "The subject is empty"),
    ]:
        with pytest.raises(bench.error, match=words) as error:
            run()
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
