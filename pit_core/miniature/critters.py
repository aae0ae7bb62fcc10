"""The critter world: procedural creatures, deterministic from a seed. This is the door to its modules.

``world`` says what there is, ``shapes`` and ``scenes`` how it looks, ``drawing`` makes pictures, ``captions``
words. Geometry is given in units of a 128 x 128 canvas, y down, and drawn at any size.
"""

from .captions import BUILD_WORDS, SCENE_PHRASES, build_word, caption, part_caption, part_phrase
from .drawing import BACK_TO_FRONT, compose, cut_out_part, draw_layer, render, render_part
from .scenes import draw_scene
from .world import (
    CANVAS,
    COLOUR_NAMES,
    COLOURS,
    KINDS,
    MANDATORY,
    SCENES,
    SHAPES,
    STYLES,
    Critter,
    Part,
    Pose,
    is_held_out,
    random_critter,
    random_pose,
)

__all__ = [
    "BACK_TO_FRONT",
    "BUILD_WORDS",
    "CANVAS",
    "COLOURS",
    "COLOUR_NAMES",
    "KINDS",
    "MANDATORY",
    "SCENES",
    "SCENE_PHRASES",
    "SHAPES",
    "STYLES",
    "Critter",
    "Part",
    "Pose",
    "build_word",
    "caption",
    "compose",
    "cut_out_part",
    "draw_layer",
    "draw_scene",
    "is_held_out",
    "part_caption",
    "part_phrase",
    "random_critter",
    "random_pose",
    "render",
    "render_part",
]
