"""Damaged critters: the labels agree with the damage, and a seed gives the same damage again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pit_core.miniature import corrupt as corruption
from pit_core.miniature import critters
from pit_core.miniature.corrupt import corrupt
from pit_core.miniature.critters import BACK_TO_FRONT, KINDS, Critter, Part
from pit_core.miniature.data import ABSENT, DOUBLED, GARBLED, NO_COLOUR, labels_of

COUNT = 24
WHOLE = Critter(
    body=Part("round", "green"),
    eyes=Part("round", "blue"),
    ears=Part("cat", "orange"),
    wings=Part("bat", "purple"),
    tail=Part("curl", "red"),
)
Garble = Callable[[corruption.Layers, Critter, str, np.random.Generator], Image.Image]


def _critter(seed: int) -> Critter:
    return critters.random_critter(np.random.default_rng([seed, 1]), posed=0.5, held_out=None)


@pytest.fixture(scope="module")
def damaged() -> list[tuple[Critter, np.ndarray, np.ndarray]]:
    return [
        (critter, *corrupt(critter, np.random.default_rng(seed)))
        for seed in range(COUNT)
        for critter in [_critter(seed)]
    ]


def _changed(critter: Critter, labels: np.ndarray) -> list[str]:
    """The kinds whose label the damage changed."""
    whole = labels_of(critter)
    return [kind for slot, kind in enumerate(KINDS) if labels[slot] != whole[slot]]


def test_a_seed_gives_the_same_damage() -> None:
    critter = _critter(3)
    one, again, other = (corrupt(critter, np.random.default_rng(seed)) for seed in (8, 8, 9))
    assert (one[0] == again[0]).all() and (one[1] == again[1]).all()
    assert (one[0] != other[0]).any()


def test_parts_are_damaged_and_labelled(
    damaged: list[tuple[Critter, np.ndarray, np.ndarray]],
) -> None:
    for critter, picture, labels in damaged:
        changed = _changed(critter, labels)
        assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
        assert changed and set(changed) <= set(critter.parts())
        assert len([kind for kind in changed if labels[KINDS.index(kind)] != ABSENT]) <= 3
        for kind in changed:
            slot = KINDS.index(kind)
            assert labels[slot] in (ABSENT, DOUBLED, GARBLED)
            assert labels[len(KINDS) + slot] == NO_COLOUR
        assert (labels[2 * len(KINDS) :] == labels_of(critter)[2 * len(KINDS) :]).all()


def test_all_kinds_of_damage_occur_and_all_parts_are_hit(
    damaged: list[tuple[Critter, np.ndarray, np.ndarray]],
) -> None:
    hit = [
        (kind, int(labels[KINDS.index(kind)]))
        for critter, _, labels in damaged
        for kind in _changed(critter, labels)
    ]
    assert {kind for kind, _ in hit} == set(KINDS)
    assert {state for _, state in hit} == {ABSENT, DOUBLED, GARBLED}


def test_the_picture_shows_the_damage_and_nothing_else(
    damaged: list[tuple[Critter, np.ndarray, np.ndarray]],
) -> None:
    """A missing part alone gives exactly the critter without it; other damage is clearly visible."""
    for critter, picture, labels in damaged:
        changed = _changed(critter, labels)
        gone = [kind for kind in changed if labels[KINDS.index(kind)] == ABSENT]
        left = [kind for kind in BACK_TO_FRONT if kind not in gone]
        expected = np.asarray(critters.render(critter, kinds=left)).astype(int)
        difference = np.abs(picture.astype(int) - expected).mean()
        if gone == changed:
            assert difference == 0
        else:
            assert difference > 0.1, f"{changed} with labels {labels[:5]} is invisible"


def test_what_the_damage_of_others_covers_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body as large as the picture hides wings and tail, which are behind it, and not the eyes."""

    def grow(layers: corruption.Layers, critter: Critter, kind: str, rng: np.random.Generator) -> int:
        if kind == "body":
            layers[kind] = Image.new("RGBA", layers[kind].size, (0, 99, 0, 255))
        return GARBLED

    monkeypatch.setattr(corruption, "_damage", grow)
    seeds = (seed for seed in range(50) if "body" in _drawn_first(seed))
    _, labels = corrupt(WHOLE, np.random.default_rng(next(seeds)))
    states = dict(zip(KINDS, labels, strict=False))
    assert states["body"] == GARBLED and states["wings"] == states["tail"] == ABSENT
    assert states["eyes"] != ABSENT


def _drawn_first(seed: int) -> list[str]:
    """The kinds that `corrupt` picks for damage."""
    rng = np.random.default_rng(seed)
    present = list(WHOLE.parts())
    return [str(k) for k in rng.choice(present, size=int(rng.integers(1, 4)), replace=False)]


def _ink(layer: Image.Image) -> np.ndarray:
    return np.asarray(layer.getchannel("A")).astype(int)


def _layers() -> corruption.Layers:
    return {kind: critters.draw_layer(WHOLE, kind, 128, 2) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_doubled_part_is_there_and_once_more_elsewhere(kind: str) -> None:
    for seed in range(3):
        layers = _layers()
        twice = corruption._doubled(layers, WHOLE, kind, np.random.default_rng(seed))
        once, both = _ink(layers[kind]) > 128, _ink(twice) > 128
        assert both[once].all()
        before = corruption._visible(layers, kind).sum()
        assert corruption._visible({**layers, kind: twice}, kind).sum() > 1.3 * before


@pytest.mark.parametrize("garble", sorted(set(corruption._GARBLES), key=lambda f: f.__name__))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen_of_a_garbled_part_is_neither_whole_nor_gone(garble: Garble, kind: str) -> None:
    for seed in range(2):
        layers = _layers()
        made = garble(layers, WHOLE, kind, np.random.default_rng(seed))
        assert made.mode == "RGBA" and made.size == layers[kind].size
        before, after = (np.asarray(each.convert("RGBa")).astype(int) for each in (layers[kind], made))
        seen = corruption._visible(layers, kind)
        assert np.abs(before - after)[seen > 0.5].mean() > 20, "the part still looks whole"
        assert corruption._visible({**layers, kind: made}, kind).sum() > 0.3 * seen.sum(), "the part is gone"


def test_damage_leaves_the_scene_alone() -> None:
    critter = replace(WHOLE, scene="night", scene_seed=4)
    picture, labels = corrupt(critter, np.random.default_rng(2))
    corner = np.asarray(critters.draw_scene("night", 128, 4))[:8, :8]
    assert (picture[:8, :8] == corner).all()
    assert labels[2 * len(KINDS) + 1] == labels_of(critter)[2 * len(KINDS) + 1]
