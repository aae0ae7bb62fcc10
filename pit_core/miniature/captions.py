"""Critters in words, by a small grammar."""

from __future__ import annotations

import numpy as np

from .world import Critter, Part

BUILD_WORDS = ("thin", "slim", "medium", "stout", "wide")
SCENE_PHRASES = {
    "plain": "on a white background",
    "forest": "in a forest",
    "beach": "in a beach",
    "snow": "in a snowfield",
    "night": "in a night",
    "desert": "in a desert",
    "meadow": "in a meadow",
}


def caption(critter: Critter, rng: np.random.Generator | None = None) -> str:
    """The critter in words; with ``rng`` some phrases are left out and the order of the parts changes."""
    parts = [(kind, part) for kind, part in critter.parts().items() if kind != "body"]
    keep = 1.0 if rng is None or rng.random() < 0.5 else float(rng.random())

    def kept(at_least: float = 0.0) -> bool:
        return rng is None or rng.random() < max(keep, at_least)

    words = ["a"]
    if kept():
        words.append(build_word(critter.build))
    if kept():
        words += [critter.body.colour, critter.body.shape]
    words.append("critter")
    if rng is not None:
        parts = [parts[i] for i in rng.permutation(len(parts))]
    phrases = [part_phrase(kind, part) for kind, part in parts if kept()]
    text = " ".join(words) + (" with " + " and ".join(phrases) if phrases else "")
    if kept(0.7):
        text += f", {SCENE_PHRASES[critter.scene]}"
    if kept(0.7):
        text += f", {critter.style} style"
    return text


def part_caption(critter: Critter, kind: str) -> str:
    """The caption of a part picture. Raises ValueError for a part that the critter lacks."""
    part = critter.part(kind)
    if part is None:
        raise ValueError(f"this critter has no {kind}")
    return f"only {part_phrase(kind, part)}, {SCENE_PHRASES['plain']}, {critter.style} style"


def part_phrase(kind: str, part: Part) -> str:
    return f"{part.colour} {part.shape} {kind}"


def build_word(build: float) -> str:
    return BUILD_WORDS[min(int(build * len(BUILD_WORDS)), len(BUILD_WORDS) - 1)]
