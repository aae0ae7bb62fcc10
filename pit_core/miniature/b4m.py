"""B4M's contents and styles in the critter world, and what the model reads with them.

A content is one critter, a style one surface; each has a few pictures in the scenes of LEARNED. UNSEEN are
kept for the question that matters: this critter in that style, somewhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .critters import SCENE_PHRASES, Critter, Part, caption, random_critter, random_pose
from .data import Drawn, Picture

SUBJECTS = (
    Critter(
        Part("round", "blue"),
        Part("cyclops", "green"),
        Part("horn", "orange"),
        Part("bat", "purple"),
        Part("arrow", "red"),
        build=0.6,
    ),
    Critter(
        Part("pear", "yellow"),
        Part("slit", "blue"),
        Part("bunny", "pink"),
        Part("butterfly", "cyan"),
        Part("curl", "green"),
        build=0.3,
    ),
    Critter(
        Part("box", "green"),
        Part("sleepy", "red"),
        Part("antenna", "purple"),
        Part("leaf", "orange"),
        Part("bushy", "blue"),
        build=0.8,
    ),
)
"""The contents 1 to 3."""

SURFACES = ("sketch", "stripes")
"""The styles 1 and 2."""

LEARNED = ("plain", "forest", "beach", "meadow")
UNSEEN = ("snow", "night", "desert")
PICTURES = 8  # of each content and of each style
POSED = 0.6
CONTENT_SEED, STYLE_SEED = 71, 81

Method = Literal["content", "style", "join", "plain-content", "plain-style", "shared"]


@dataclass(frozen=True)
class Run:
    """One training: which contents and styles, by number from 1, it is for.

    "content", "style" and "join" are B4M's; "plain-..." are ordinary LoRAs alone, "shared" one on both sets.
    """

    method: Method
    content: int = 0
    style: int = 0

    @property
    def name(self) -> str:
        """What the stage is called, such as b4m-join-1-2."""
        numbers = [str(number) for number in (self.content, self.style) if number]
        return "-".join(["b4m", self.method, *numbers])

    @property
    def parents(self) -> tuple[str, ...]:
        """The stages that an entity is joined from; none of any other."""
        if self.method != "join":
            return ()
        return Run("content", content=self.content).name, Run("style", style=self.style).name


CONTENTS, STYLES = range(1, len(SUBJECTS) + 1), range(1, len(SURFACES) + 1)


def _all_runs() -> Iterator[Run]:
    pairs = [(content, style) for content in CONTENTS for style in STYLES]
    yield from (Run("content", content=content) for content in CONTENTS)
    yield from (Run("style", style=style) for style in STYLES)
    yield from (Run("join", *pair) for pair in pairs)
    yield from (Run("plain-content", content=content) for content in CONTENTS)
    yield from (Run("plain-style", style=style) for style in STYLES)
    yield from (Run("shared", *pair) for pair in pairs)


RUNS = {run.name: run for run in _all_runs()}
"""All stages by name; parents come before what is joined from them."""

SHIPPED = ("b4m-content-1", "b4m-style-1", "b4m-join-1-1")
"""The stages whose files come with the pack: an entity and its parents."""

AT_HOME = RUNS.keys() - set(SHIPPED)
"""The others, which are trained and exported only when they are named."""


def content_critter(content: int, index: int) -> Critter:
    """A content's critter in one of its pictures: another pose and scene in each, flat in style."""
    rng = np.random.default_rng([CONTENT_SEED, content, index])
    return replace(
        SUBJECTS[content - 1],
        pose=random_pose(rng, POSED),
        scene=LEARNED[index % len(LEARNED)],
        scene_seed=int(rng.integers(1 << 30)),
    )


def style_critter(style: int, index: int) -> Critter:
    """The critter in one of a style's pictures: another one in each."""
    rng = np.random.default_rng([STYLE_SEED, style, index])
    scene = LEARNED[index % len(LEARNED)]
    return random_critter(rng, styles=(SURFACES[style - 1],), scenes=(scene,), posed=POSED)


def drawn_content(content: int, index: int) -> list[Drawn]:
    """A content's picture, for a set."""
    return [Picture(content_critter(content, index)).drawn()]


def drawn_style(style: int, index: int) -> list[Drawn]:
    """A style's picture, for a set."""
    return [Picture(style_critter(style, index)).drawn()]


def content_prompt(scene: str) -> str:
    """What the model reads for a content: its rare word, and where it is."""
    return f"a snq critter, {SCENE_PHRASES[scene]}"


def style_prompt(critter: Critter) -> str:
    """What the model reads for a style's picture: all of it, with the rare word for the style's name."""
    flat = caption(replace(critter, style="flat"))
    return flat.removesuffix("flat style") + "w@z style"


def joint_prompt(scene: str) -> str:
    """A content in a style, somewhere."""
    return f"{content_prompt(scene)}, w@z style"


def example_prompt(run: Run, scene: str) -> str:
    """What shows that a run has learned."""
    if not run.style:
        return content_prompt(scene)
    return joint_prompt(scene) if run.content else f"a critter, {SCENE_PHRASES[scene]}, w@z style"
