"""Pairs for IP-LoRAs: a critter on white as the reference, and what the prompt should make of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from ..train.ip_lora_prompts import prompt_for
from .critters import CANVAS, SCENE_PHRASES, SCENES, Critter, cut_out_part, random_critter, render
from .data import Drawn, labels_of

KINDS_OF_PAIRS = ("scene", "sheet")
POSED = 0.35  # as concepts are
LARGE, SMALL, PART = 76, 38, 24  # pixels of a sheet's views and parts


def pair_critter(kind: str, seed: int, index: int, *, held_out: bool = False) -> Critter:
    """The critter of a pair, in a scene where the kind is "scene"; flat in style, nearly upright."""
    rng = np.random.default_rng([seed, index])
    scenes = SCENES[1:] if kind == "scene" else SCENES[:1]
    return random_critter(rng, scenes=scenes, posed=POSED, held_out=held_out)


def drawn_pair(kind: str, critter: Critter) -> list[Drawn]:
    """(target, reference), 128 x 128 each, with their labels."""
    target = render(critter) if kind == "scene" else draw_sheet(critter)
    plain = replace(critter, scene="plain")
    return [(np.asarray(target), labels_of(critter)), (np.asarray(render(plain)), labels_of(plain))]


def pair_prompt(kind: str, critter: Critter) -> str:
    """What the model reads: the scene alone, or the published sentence for sheets."""
    if kind == "scene":
        return prompt_for("caption", f"a critter, {SCENE_PHRASES[critter.scene]}")
    return prompt_for("character_sheet", "")


def draw_sheet(critter: Critter) -> Image.Image:
    """A character sheet, 128 x 128 RGB: a large front view, one from the other side, a sketch, and parts."""
    sheet = Image.new("RGB", (CANVAS, CANVAS), "white")
    turned = replace(critter.pose, mirror=not critter.pose.mirror)
    views = (
        (replace(critter, pose=turned), SMALL, (0, 0)),
        (replace(critter, style="sketch"), SMALL, (CANVAS - SMALL, 0)),
        (critter, LARGE, ((CANVAS - LARGE) // 2, 24)),
    )
    for view, side, corner in views:
        picture = render(view, side, supersample=4)
        # Views overlap at their white corners: the darker of both pixels is the one that was drawn.
        below = sheet.crop((*corner, corner[0] + side, corner[1] + side))
        sheet.paste(Image.fromarray(np.minimum(np.asarray(below), np.asarray(picture))), corner)
    for place, kind in enumerate(critter.parts()):
        part = cut_out_part(critter, kind, 2 * CANVAS)
        part.thumbnail((PART, PART), Image.Resampling.LANCZOS)
        x = 4 + place * (PART + 1) + (PART - part.width) // 2
        sheet.paste(part, (x, CANVAS - PART - 2 + (PART - part.height) // 2), part)
    return sheet
