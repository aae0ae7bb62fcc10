"""A diptych's canvas: sizes, panels, tokens; a crop of a picture and its way back."""

import math

import pytest
import torch

from pit_core.diptych.attention import panel_attention
from pit_core.diptych.crop import Crop
from pit_core.diptych.layout import DiptychLayout
from pit_core.errors import PitError

SMALL = DiptychLayout(width=48, height=16, reference_width=32, margin=8)  # tokens: 2 rows, 3 + 4 columns


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_the_published_sizes():
    layout = DiptychLayout()
    assert (layout.canvas, layout.grid, layout.columns) == ((784, 1568), (49, 98), 49)


def test_a_narrower_reference():
    assert (SMALL.canvas, SMALL.grid, SMALL.columns, SMALL.seam) == ((32, 112), (2, 7), 3, 48)


def test_compose_leaves_the_right_panel_to_be_made():
    reference = noise(2, 16, 32, 3)
    canvas, mask = SMALL.compose(reference)
    assert torch.equal(canvas[:, 8:24, 8:40], reference)
    assert canvas[:, :8, :48].eq(1).all() and canvas[:, :, 40:48].eq(1).all()
    assert canvas[:, :, 48:].eq(0).all()
    assert mask[:, :, :48].eq(0).all() and mask[:, :, 48:].eq(1).all()


def test_compose_with_a_picture_to_edit():
    target, edit = noise(2, 16, 48, 3), torch.zeros(1, 16, 48)
    edit[:, 3:7, 5:9] = 1
    canvas, mask = SMALL.compose(noise(1, 16, 32, 3, seed=1), target, edit)
    assert torch.equal(SMALL.crop(canvas), target)
    assert torch.equal(canvas[:, 8:24, 48], target[:, :, 0])  # the margin repeats the edge
    assert mask.sum() == 2 * 16 and mask[:, 11:15, 61:65].eq(1).all()
    assert SMALL.compose(noise(1, 16, 32, 3), target)[1][:, :, 48:].eq(1).all()


def test_the_strength_map_is_what_each_token_shows_of_the_subject():
    mask = torch.zeros(1, 16, 32)
    mask[:, :8, 8:24] = 1  # with the margin, all of the token in the first row's middle
    mask[:, 8:12, 8:24] = 1  # and a quarter of the one below
    strength = SMALL.strength_map(mask, 1.4)
    torch.testing.assert_close(strength, torch.tensor([[1, 1.4, 1, 1, 1.1, 1]]))
    assert SMALL.strength_map(torch.ones(1, 16, 32), 1.5).eq(1.5).all()
    q, k, v = noise(3, 1, 1, 14, 4)
    out = panel_attention(q, k, v, text_tokens=0, grid=SMALL.grid, columns=SMALL.columns, strength=strength)
    assert out.shape == q.shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 770}, "width plus two margins is a multiple of 16, but got 770; use 768 or 784"),
        ({"height": 767}, "height plus two margins .* but got 767; use 752 or 768"),
        ({"reference_width": 300}, "reference width .* use 288 or 304"),
        ({"width": 768, "margin": 4}, "margin of 4, .* use 760 or 776"),
        ({"width": 5}, "but got 5; use 16"),
        ({"width": 0}, "use a whole number of pixels"),
        ({"height": 512.0}, "but got 512.0; use a whole number"),
        ({"margin": -8}, "0 or more pixels, but got -8"),
    ],
)
def test_odd_sizes_are_named_with_what_would_fit(given, message):
    with pytest.raises(PitError, match=message):
        DiptychLayout(**given)


def test_panels_that_do_not_fit_are_named():
    reference, target = noise(1, 16, 32, 3), noise(1, 16, 48, 3)
    for arguments, message in (
        (
            (noise(1, 16, 48, 3),),
            r"reference panel has the shape \(batch, 16, 32, channels\), but got \(1, 16, 48",
        ),
        ((noise(16, 32, 3),), "reference panel has the shape"),
        ((reference, noise(1, 16, 32, 3)), "target panel has the shape"),
        ((reference, noise(1, 16, 48, 4)), "3 and 4 channels"),
        ((reference, target, noise(1, 16, 32)), r"mask of what to edit .*\(batch, 16, 48\)"),
        ((reference, None, noise(1, 16, 48)), "got no target"),
        ((noise(2, 16, 32, 3), noise(3, 16, 48, 3)), "2, 3 rows"),
    ):
        with pytest.raises(PitError, match=message):
            SMALL.compose(*arguments)
    with pytest.raises(PitError, match=r"\(batch, 32, 112, channels\), but got \(1, 32, 96, 3\)"):
        SMALL.crop(noise(1, 32, 96, 3))
    with pytest.raises(PitError, match="mask of the subject"):
        SMALL.strength_map(noise(1, 16, 48), 1.3)


# crop


@pytest.mark.parametrize("box", [(3, 5, 8, 6), (-2, -3, 20, 31), (7, 11, 9, 13)])
def test_points_come_back(box):
    crop = Crop((13, 17), box, (48, 32))
    assert crop.to_panel(box[0], box[1]) == (0, 0)
    assert crop.to_panel(box[0] + box[2], box[1] + box[3]) == (48, 32)
    assert crop.to_source(*crop.to_panel(4.25, 9.5)) == pytest.approx((4.25, 9.5), abs=1e-12)


@pytest.mark.parametrize("place", [(3, 5), (-2, -3), (7, 11)])
def test_an_unchanged_panel_of_the_same_scale_gives_the_picture_back_exactly(place):
    picture = noise(2, 13, 17, 3)
    crop = Crop((13, 17), (*place, 8, 10), (8, 10))
    panel = crop.apply(picture)
    assert torch.equal(crop.restore(panel, picture), picture)
    assert torch.equal(
        crop.apply(crop.restore(1 - panel, picture)), torch.where(panel == 1, panel, 1 - panel)
    )


def test_outside_mask_and_box_nothing_changes():
    picture, mask = noise(1, 40, 30, 3), torch.zeros(1, 40, 30)
    mask[:, 10:20, 5:25] = 1
    mask[:, 12, 12] = 0.5
    crop = Crop.around(mask[0], (64, 48))
    changed = torch.zeros(2, 64, 48, 3)
    out = crop.restore(changed, picture, mask)
    assert torch.equal(out[:, mask[0] == 0], picture[:, mask[0] == 0].expand(2, -1, -1))
    assert out[:, mask[0] == 1].eq(0).all()
    torch.testing.assert_close(out[:, 12, 12], picture[:, 12, 12].expand(2, -1) / 2)


def test_around_a_mask_has_the_panels_proportions_and_stays_inside():
    mask = torch.zeros(100, 200)
    mask[90:98, 190:198] = 1
    top, left, height, width = Crop.around(mask, (32, 64), context=2).box
    assert (height, width) == (16, 32) and (top, left) == (84, 168)


def test_a_whole_picture_lies_on_white():
    picture = torch.zeros(1, 10, 20, 3)
    crop = Crop.whole((10, 20), (20, 20))
    assert crop.box == (-5, 0, 20, 20)
    panel = crop.apply(picture)
    assert panel[:, :5].eq(1).all() and panel[:, 5:15].eq(0).all() and panel[:, 15:].eq(1).all()
    assert crop.apply(torch.ones(1, 10, 20), fill=0).sum() == 200


def test_bad_crops_are_named():
    mask = torch.zeros(10, 10)
    for make, message in (
        (lambda: Crop.around(mask, (8, 8)), "marks nothing"),
        (lambda: Crop.around(mask[None], (8, 8)), "shape .height, width."),
        (lambda: Crop.around(mask + 1, (8, 8), math.nan), "context is a number of 1 or more"),
        (lambda: Crop((10, 10), (0, 0, 0, 5), (8, 8)), "at least 1 pixel"),
        (lambda: Crop((10, 10), (10, 0, 5, 5), (8, 8)), "outside the picture"),
        (lambda: Crop.whole((10, 10), (8, 0)), "at least 1 pixel"),
        (
            lambda: Crop.whole((10, 10), (8, 8)).apply(noise(1, 9, 10, 3)),
            r"\(batch, 10, 10, ...\), but got \(1, 9",
        ),
        (
            lambda: Crop.whole((10, 10), (8, 8)).restore(noise(1, 9, 8, 3), noise(1, 10, 10, 3)),
            "The panel of",
        ),
    ):
        with pytest.raises(PitError, match=message):
            make()
