"""What the miniature draws of critters' captions alone, without a picture to go by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from PIL import Image

from ..concepts import Stack
from .critters import Critter, caption


def from_captions(
    stack: Stack,
    critters: Sequence[Critter],
    seeds: Sequence[int],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Image.Image]:
    """What the UNet draws of the critters' full captions. progress: called with the pictures done."""
    nothing = stack.null("grey")
    images = []
    for critter, seed in zip(critters, seeds, strict=True):
        settings = replace(stack.defaults, prompt=caption(critter), weight=0.0)
        images += stack.renderer.render(nothing, nothing, settings, seeds=[seed])
        progress(len(images))
    return images
