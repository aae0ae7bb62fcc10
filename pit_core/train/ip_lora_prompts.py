"""From a picture's caption to the prompt that an IP-LoRA is trained with."""

from __future__ import annotations

import re

from ..errors import PitError

SHEET = (
    "a character sheet displaying a creature, from several angles with 1 large front view in the middle, "
    "clean white background. In the background we can see half-completed, partially colored, sketches of "
    "different parts of the object"
)
"""The sentence of the published IP-LoRA for character sheets."""

CREATURE = "an imaginary fantasy creature"
IN_A = re.compile(r"\bin an?\b", re.IGNORECASE)
MODES = ("character_sheet", "creature_in_scene", "caption")
PLACE = "{caption}"


def check_prompt(prompt: str) -> None:
    """Raise PitError unless this is one of MODES or a text with {caption} in it."""
    if prompt not in MODES and PLACE not in prompt:
        raise PitError(
            f"Expected prompt to be {', '.join(MODES)}, or a text with {PLACE} in it, got '{prompt[:100]}'."
        )


def prompt_for(prompt: str, caption: str) -> str:
    """What a picture with this caption is trained with. `prompt` is one of MODES or a text with {caption}."""
    if prompt == "character_sheet":
        return SHEET
    if prompt == "creature_in_scene":
        return creature_in_scene(caption)
    return (PLACE if prompt == "caption" else prompt).replace(PLACE, " ".join(caption.split()))


def creature_in_scene(caption: str) -> str:
    """ "A photo, an owl in a forest in a book" -> "A photo an imaginary fantasy creature in forest".

    Kept are what stands before the first comma and what stands between the first and the second "in a", as
    the published IP-LoRA was trained: the article is lost. A caption without a comma is kept up to its first
    "in a", and one without "in a" gets no scene.
    """
    caption = " ".join(caption.split())
    before, *scenes = IN_A.split(caption)
    head = caption.partition(",")[0] if "," in caption else before
    scene = _bare(scenes[0]) if scenes else ""
    return " ".join(filter(None, (_bare(head), CREATURE, f"in {scene}" if scene else "")))


def _bare(text: str) -> str:
    return text.strip(" ,.;")
