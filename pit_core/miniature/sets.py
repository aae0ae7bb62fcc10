"""The miniature's picture sets by name: what is in them, how many, and their captions.

The check sets hold combinations of shapes that the sets "world" and "concepts" do not contain, on which all
models but the readers learn. The readers learn on all combinations: one that knew some less well would count
its own mistakes against what it reads.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from . import b4m, data
from .batches import Captioner, Pictures
from .corrupt import corrupt
from .critters import SCENES, STYLES, random_critter
from .data import Drawn, Maker, Picture, PictureSet
from .diptychs import Diptych, random_diptych
from .pairs import drawn_pair, pair_critter, pair_prompt
from .scale import scaled_count

# Seeds.
WORLD, WORLD_CHECK, CONCEPTS, READER, READER_CHECK, SCENE_PAIRS, SHEET_PAIRS = 11, 12, 21, 31, 32, 41, 42
DIPTYCHS, DIPTYCHS_CHECK = 51, 52


def pictures(out: Path, name: str) -> PictureSet:
    """A picture set by name, drawn on first use."""
    make, count = _SETS[name]
    return data.draw_set(out / "pictures", name, make, scaled_count(out, count))


def captioner(out: Path, neutral: float = 0.0) -> Captioner:
    """Captions for the sets "world" and "concepts"; ``neutral``: how often they say nothing."""
    folder = out / "pictures"
    return Captioner({folder / "world": _world, folder / "concepts": _concepts}, neutral)


def everything(out: Path) -> list[PictureSet]:
    """What the base models learn on: the world, then the concepts and their parts."""
    return [pictures(out, "world"), pictures(out, "concepts")]


def base_pictures(out: Path) -> Pictures:
    """What the UNet and its adapter learn on: half of the whole pictures, as encoding them takes long."""
    whole = _whole_pictures(out)
    return Pictures(whole.sets, rows=whole.rows[::2])


def adapter_pictures(out: Path) -> Pictures:
    """The base pictures, the mirrored critters' three times: only a sixth are, and their tails get lost."""
    base = base_pictures(out)
    return Pictures(base.sets, rows=np.concatenate([base.rows, np.repeat(_mirrored(out, base), 2)]))


def concept_pictures(out: Path) -> Pictures:
    """What the adapter learns on at last: its concepts twice, the mirrored ones four times more, and half of
    its other pictures. Concepts are what the prior will ask it for.
    """
    base = base_pictures(out)
    rows = base.rows >= len(base.sets[0])
    concepts = Pictures(base.sets, rows=base.rows[rows])
    repeated = [concepts.rows, concepts.rows, np.repeat(_mirrored(out, concepts), 4)]
    return Pictures(base.sets, rows=np.concatenate([base.rows[~rows][::2], *repeated]))


def _mirrored(out: Path, shown: Pictures) -> np.ndarray:
    """The rows of the mirrored critters."""
    captions = captioner(out)
    places = (captions.picture(*shown.place(index)) for index in range(len(shown)))
    return shown.rows[[picture.critter.pose.mirror for picture in places]]


def vision_pictures(out: Path) -> Pictures:
    """What the image encoder learns on at last: all whole pictures and an eighth of the concepts' parts."""
    whole = _whole_pictures(out)
    world, concepts = whole.sets
    parts = len(world) + np.flatnonzero(concepts.labels[:, -1] != 0)[::8]
    return Pictures(whole.sets, rows=np.concatenate([whole.rows, parts]))


def _whole_pictures(out: Path) -> Pictures:
    """The world, and the concepts as whole critters."""
    world, concepts = everything(out)
    whole = len(world) + np.flatnonzero(concepts.labels[:, -1] == 0)
    return Pictures([world, concepts], rows=np.concatenate([np.arange(len(world)), whole]))


def _world(index: int) -> list[Picture]:
    return [data.world_picture(WORLD, index)]


def _concepts(index: int) -> list[Picture]:
    return data.concept_pictures(CONCEPTS, index)


def _draw_world(index: int) -> list[Drawn]:
    return [picture.drawn() for picture in _world(index)]


def _draw_world_check(index: int) -> list[Drawn]:
    return [data.world_picture(WORLD_CHECK, index, held_out=True).drawn()]


def _draw_concepts(index: int) -> list[Drawn]:
    return [picture.drawn() for picture in _concepts(index)]


def _draw_reader(index: int) -> list[Drawn]:
    return [reader_picture(np.random.default_rng([READER, index]), None)]


def _draw_reader_check(index: int) -> list[Drawn]:
    """Held-out combinations: clean pictures at even places, damaged ones at odd places."""
    return [reader_picture(np.random.default_rng([READER_CHECK, index]), True, damaged=index % 2 == 1)]


def _draw_scene_pair(index: int) -> list[Drawn]:
    return drawn_pair("scene", pair_critter("scene", SCENE_PAIRS, index))


def _draw_sheet_pair(index: int) -> list[Drawn]:
    return drawn_pair("sheet", pair_critter("sheet", SHEET_PAIRS, index))


def pair_prompts(out: Path, kind: str) -> list[str]:
    """What the model reads for each pair of a kind, in the set's order."""
    seed = {"scene": SCENE_PAIRS, "sheet": SHEET_PAIRS}[kind]
    groups = pictures(out, f"{kind}-pairs").groups[::2]
    return [pair_prompt(kind, pair_critter(kind, seed, int(group))) for group in groups]


def diptychs(out: Path, name: str) -> list[Diptych]:
    """What the set "diptychs", or "diptychs-check", shows, in its order."""
    make = {"diptychs": _diptych, "diptychs-check": _diptych_check}[name]
    return [make(int(group)) for group in pictures(out, name).groups[::2]]


def _diptych(index: int) -> Diptych:
    return random_diptych(DIPTYCHS, index)


def _diptych_check(index: int) -> Diptych:
    return random_diptych(DIPTYCHS_CHECK, index, held_out=True)


def _draw_diptych(index: int) -> list[Drawn]:
    return _diptych(index).drawn()


def _draw_diptych_check(index: int) -> list[Drawn]:
    return _diptych_check(index).drawn()


def reader_picture(rng: np.random.Generator, held_out: bool | None, damaged: bool | None = None) -> Drawn:
    """A critter, clean or damaged; ``damaged`` None leaves it to chance."""
    styles = STYLES if rng.random() < 0.25 else ("flat",)
    scenes = SCENES if rng.random() < 0.3 else ("plain",)
    posed = float(rng.random())
    critter = random_critter(rng, styles=styles, scenes=scenes, posed=posed, held_out=held_out)
    if damaged is None:
        damaged = bool(rng.random() < 0.5)
    return corrupt(critter, rng) if damaged else Picture(critter).drawn()


_B4M: dict[str, tuple[Maker, int]] = {
    **{f"b4m-content-{n}": (partial(b4m.drawn_content, n), b4m.PICTURES) for n in b4m.CONTENTS},
    **{f"b4m-style-{n}": (partial(b4m.drawn_style, n), b4m.PICTURES) for n in b4m.STYLES},
}

_SETS: dict[str, tuple[Maker, int]] = {
    "world": (_draw_world, 30000),
    "world-check": (_draw_world_check, 500),
    "concepts": (_draw_concepts, 20000),
    "reader": (_draw_reader, 60000),
    "reader-check": (_draw_reader_check, 2000),
    "scene-pairs": (_draw_scene_pair, 4000),
    "sheet-pairs": (_draw_sheet_pair, 4000),
    "diptychs": (_draw_diptych, 12000),
    "diptychs-check": (_draw_diptych_check, 200),
    **_B4M,
}
