"""The critter world: deterministic, everything visible and distinct, and captions that say what is there."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pit_core.miniature import critters
from pit_core.miniature.critters import (
    BUILD_WORDS,
    COLOUR_NAMES,
    COLOURS,
    KINDS,
    MANDATORY,
    SCENE_PHRASES,
    SCENES,
    SHAPES,
    STYLES,
    Critter,
    Part,
    Pose,
)
from pit_core.miniature.tokenizer import WordTokenizer

GOLDEN = Path(__file__).parent / "goldens" / "critters.png"
PLAIN = Critter(
    body=Part("round", "green"),
    eyes=Part("round", "blue"),
    ears=Part("cat", "orange"),
    wings=Part("bat", "purple"),
    tail=Part("curl", "red"),
)


def _critter(seed: int, **options: Any) -> Critter:
    return critters.random_critter(np.random.default_rng(seed), **options)


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# the shipped weights have learnt these pictures


def _golden_tiles() -> list[Image.Image]:
    """Every style twice, every scene, a part of every kind, some parts of a critter: 24 of 64 x 64."""
    tiles = []
    for index, style in enumerate((*STYLES, *STYLES)):
        critter = _critter(100 + index, styles=(style,), scenes=SCENES, held_out=None)
        tiles.append(critters.render(critter, 64))
    for index, scene in enumerate(SCENES[1:]):
        tiles.append(critters.draw_scene(scene, 64, index))
    for kind in KINDS:
        tiles.append(critters.render_part(PLAIN, kind, 64))
    for kinds in (("body", "eyes"), ("wings",), ("tail", "ears")):
        tiles.append(critters.render(PLAIN, 64, kinds=kinds))
    return tiles


def test_the_world_looks_as_the_weights_have_learnt_it() -> None:
    """Against pictures on file; another Pillow may round differently, but nothing may move."""
    golden = Image.open(GOLDEN).convert("RGB")
    for index, tile in enumerate(_golden_tiles()):
        x, y = index % 6 * 64, index // 6 * 64
        error = np.abs(_array(tile) - _array(golden.crop((x, y, x + 64, y + 64))))
        assert error.mean() < 0.5, f"tile {index} differs by {error.mean():.2f} grey levels"
        assert (error > 40).mean() < 0.002, f"something moved in tile {index}"


def test_a_seed_names_one_critter_and_one_picture() -> None:
    first, again = (_critter(5, styles=STYLES, scenes=SCENES) for _ in range(2))
    assert first == again
    assert first != _critter(6, styles=STYLES, scenes=SCENES)
    assert critters.render(first, 64).tobytes() == critters.render(again, 64).tobytes()


def test_random_critters_use_everything_there_is() -> None:
    many = [_critter(seed, styles=STYLES, scenes=SCENES, held_out=None) for seed in range(300)]
    for kind in KINDS:
        shapes = {part.shape for critter in many if (part := critter.part(kind))}
        colours = {part.colour for critter in many if (part := critter.part(kind))}
        assert shapes == set(SHAPES[kind]) and colours == set(COLOUR_NAMES)
        assert any(critter.part(kind) is None for critter in many) == (kind not in MANDATORY)
    assert {critter.style for critter in many} == set(STYLES)
    assert {critter.scene for critter in many} == set(SCENES)


def test_an_unposed_critter_stands_upright_in_the_middle() -> None:
    assert _critter(3, posed=0.0).pose == Pose()
    assert _critter(3, posed=1.0).pose != Pose()


# the rule of what is held out


def test_a_seventh_of_the_shape_combinations_is_held_out() -> None:
    share = np.mean([critters.is_held_out(_critter(seed, held_out=None)) for seed in range(400)])
    assert 1 / 7 - 0.05 < share < 1 / 7 + 0.05


def test_training_and_held_out_critters_never_share_a_combination() -> None:
    def shapes(critter: Critter) -> tuple[str, ...]:
        return tuple(part.shape if (part := critter.part(kind)) else "none" for kind in KINDS)

    training = {shapes(_critter(seed, held_out=False)) for seed in range(200)}
    held_out = {shapes(_critter(seed, held_out=True)) for seed in range(50)}
    assert not training & held_out


def test_being_held_out_depends_on_shapes_alone() -> None:
    critter = _critter(1, held_out=True)
    other = replace(critter, build=0.9, pose=Pose(3, 3), style="paper", scene="night", scene_seed=9)
    for kind, part in critter.parts().items():
        other = other.having(kind, Part(part.shape, "red"))
    assert critters.is_held_out(other)


# pictures


@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_and_colour_is_visible_and_distinct(kind: str) -> None:
    pictures = {}
    for shape in SHAPES[kind]:
        for colour in COLOUR_NAMES:
            critter = PLAIN.having(kind, Part(shape, colour))
            pictures[shape, colour] = _array(critters.render_part(critter, kind, 32))
    for (shape, colour), picture in pictures.items():
        ink = (picture < 245).any(-1)
        assert ink.mean() > 0.04, f"{colour} {shape} {kind} is nearly invisible"
        inside = picture[ink]
        distance = {name: np.abs(inside - rgb).sum(-1).min() for name, rgb in COLOURS.items()}
        assert min(distance, key=distance.__getitem__) == colour
    for (a, one), (b, other) in combinations(pictures.items(), 2):
        assert np.abs(one - other).mean() > 1.5, f"{a} and {b} of {kind} look alike"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [0.0, 1.0])
def test_every_part_is_seen_on_the_whole_critter(kind: str, build: float) -> None:
    """No part is hidden behind the others or off the canvas, whatever its shape and the build."""
    for shape in SHAPES[kind]:
        critter = replace(PLAIN.having(kind, Part(shape, "yellow")), build=build)
        with_it = _array(critters.render(critter, 64))
        without = _array(critters.render(critter, 64, kinds=[k for k in KINDS if k != kind]))
        assert (np.abs(with_it - without).sum(-1) > 60).mean() > 0.01, f"{shape} {kind}"


def test_critters_stay_on_the_canvas_in_every_pose() -> None:
    """Of the widest with the widest wings a wing tip may leave at the side; nothing else ever does."""
    for seed in range(30):
        critter = replace(_critter(seed), wings=Part("bat", "blue"), ears=Part("bunny", "blue"), build=1.0)
        ink = (_array(critters.render(critter, 64)) < 250).any(-1)
        assert not ink[[0, -1]].any()
        assert ink[:, [0, -1]].mean() < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_part_pictures_are_tight_and_centred_on_white(kind: str) -> None:
    for seed, fill in ((1, 0.92), (2, 0.8), (3, 0.95)):
        critter = replace(_critter(seed), **{k: PLAIN.part(k) for k in ("ears", "wings", "tail")})
        picture = _array(critters.render_part(critter, kind, 128, fill=fill))
        ink = (picture < 250).any(-1)
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        top, bottom, left, right = rows[0], 127 - rows[-1], columns[0], 127 - columns[-1]
        assert abs(top - bottom) <= 3 and abs(left - right) <= 3
        longest = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
        assert abs(longest / 128 - fill) < 0.04
        assert picture[[0, -1]].min() > 250 and picture[:, [0, -1]].min() > 250


def test_a_cut_out_is_cropped_to_its_ink_and_transparent_around() -> None:
    for kind in KINDS:
        cut = critters.cut_out_part(PLAIN, kind, 128)
        assert cut.mode == "RGBA" and cut.getchannel("A").getbbox() == (0, 0, *cut.size)
        assert np.asarray(cut.getchannel("A")).min() == 0


@pytest.mark.parametrize("shape", SHAPES["wings"])
@pytest.mark.parametrize("mirror", [False, True])
def test_of_two_wings_a_cut_out_shows_one(shape: str, mirror: bool) -> None:
    critter = replace(PLAIN, wings=Part(shape, "red"), pose=Pose(mirror=mirror))
    layer = critters.draw_layer(critter, "wings", 128, 1)
    cut = critters.cut_out_part(critter, "wings", 128, supersample=1)
    ink = np.asarray(layer.getchannel("A")) > 0
    assert cut.width < 0.55 * np.flatnonzero(ink.any(0)).size + 2
    assert abs((np.asarray(cut.getchannel("A")) > 0).sum() / ink.sum() - 0.5) < 0.05


def test_a_part_that_is_not_there_leaves_no_trace() -> None:
    bare = replace(PLAIN, wings=None)
    assert critters.draw_layer(bare, "wings", 32).getextrema()[3] == (0, 0)
    without = critters.render(PLAIN, 64, kinds=[kind for kind in KINDS if kind != "wings"])
    assert critters.render(bare, 64).tobytes() == without.tobytes()


def test_builds_go_from_thin_to_wide() -> None:
    def width(build: float) -> int:
        alpha = np.asarray(critters.draw_layer(replace(PLAIN, build=build), "body", 128, 1).getchannel("A"))
        return int((alpha > 0).any(0).sum())

    widths = [width(build) for build in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert widths == sorted(set(widths)) and widths[-1] > 1.5 * widths[0]


def test_poses_move_mirror_scale_and_turn() -> None:
    plain = _array(critters.render(PLAIN, 64))
    moved = _array(critters.render(replace(PLAIN, pose=Pose(dx=6)), 64))
    assert np.abs(np.roll(plain, 3, axis=1) - moved)[:, 8:-8].mean() < 0.5
    for pose in (Pose(mirror=True), Pose(scale=0.8), Pose(rotation=12)):
        assert np.abs(_array(critters.render(replace(PLAIN, pose=pose), 64)) - plain).mean() > 2


def test_styles_look_different() -> None:
    pictures = [_array(critters.render(replace(PLAIN, style=style), 64)) for style in STYLES]
    for one, other in combinations(pictures, 2):
        assert np.abs(one - other).mean() > 0.5


def test_stripes_are_stripes_and_pixels_are_blocks() -> None:
    flat = _array(critters.draw_layer(PLAIN, "body", 128))
    striped = _array(critters.draw_layer(replace(PLAIN, style="stripes"), "body", 128))
    darker = (striped[..., :3] < flat[..., :3]).any(-1)[flat[..., 3] > 0]
    assert 0.3 < darker.mean() < 0.6
    edges = np.abs(np.diff(_array(critters.render(replace(PLAIN, style="pixel"), 64)), axis=1)).sum((0, 2))
    at_blocks = edges[3::4].sum() / edges.sum()  # a block is 4 pixels wide at every size
    assert at_blocks > 0.5


def test_scenes_look_different_and_their_seed_moves_things() -> None:
    pictures = {scene: _array(critters.draw_scene(scene, 64, 1)) for scene in SCENES}
    for one, other in combinations(SCENES, 2):
        assert np.abs(pictures[one] - pictures[other]).mean() > 8, f"{one} and {other} look alike"
    for scene in SCENES[1:]:
        assert (_array(critters.draw_scene(scene, 64, 2)) != pictures[scene]).any()
    assert (pictures["plain"] == 255).all()


def test_sizes_show_the_same_picture() -> None:
    critter = _critter(4, styles=("flat",), scenes=("beach",))
    small = critters.render(critter, 128).resize((64, 64), Image.Resampling.BOX)
    assert np.abs(_array(small) - _array(critters.render(critter, 64))).mean() < 3


# captions


def test_a_full_caption_says_everything() -> None:
    critter = replace(PLAIN, style="paper", scene="forest", build=0.05)
    assert critters.caption(critter) == (
        "a thin green round critter with blue round eyes and orange cat ears and purple bat wings "
        "and red curl tail, in a forest, paper style"
    )


def test_varied_captions_leave_out_but_never_invent() -> None:
    rng = np.random.default_rng(0)
    texts = set()
    for seed in range(100):
        critter = _critter(seed, styles=STYLES, scenes=SCENES)
        text = critters.caption(critter, rng)
        texts.add(text)
        parts, *rest = text.split(", ")
        named = re.findall(r"(\w+) (\w+) (eyes|ears|wings|tail)", parts)
        assert all(critter.part(kind) == Part(shape, colour) for colour, shape, kind in named)
        body = parts.split(" critter")[0].removeprefix("a").split()
        assert set(body) <= {critters.build_word(critter.build), critter.body.colour, critter.body.shape}
        assert set(rest) <= {SCENE_PHRASES[critter.scene], f"{critter.style} style"}
    assert len(texts) > 90


def test_the_same_random_numbers_give_the_same_caption() -> None:
    one, again = (critters.caption(PLAIN, np.random.default_rng(3)) for _ in range(2))
    assert one == again


def test_a_part_caption_names_the_part_alone() -> None:
    assert critters.part_caption(PLAIN, "wings") == (
        "only purple bat wings, on a white background, flat style"
    )
    with pytest.raises(ValueError, match="no wings"):
        critters.part_caption(replace(PLAIN, wings=None), "wings")


def test_captions_use_known_words_alone() -> None:
    tokenizer = WordTokenizer(40)
    for seed in range(100):
        critter = _critter(seed, styles=STYLES, scenes=SCENES, held_out=None)
        texts = [critters.caption(critter), *(critters.part_caption(critter, k) for k in critter.parts())]
        for text in texts:
            assert not tokenizer.unknown(text)
            assert len(tokenizer.split(text)) <= 38, "the caption would be cut"


def test_build_words_cover_all_builds() -> None:
    assert [critters.build_word(b) for b in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)] == [*BUILD_WORDS, "wide"]
