"""Part pictures on the white square that encoder and prior were trained with.

Light on purpose, Pillow alone: ComfyUI's nodes use it too. "Piece it Together" (arXiv 2503.10365).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal

from PIL import Image

from ..errors import PitError

WHITE = (255, 255, 255)
FILL = 0.92
SIZE = 1024

Position = Literal["centre", "random"]


def on_white_square(
    image: Image.Image,
    size: int = SIZE,
    fill: float = FILL,
    position: Position = "centre",
    seed: int | None = None,
) -> Image.Image:
    """The picture on a white square of `size` pixels, RGB, its long side `fill` of the square's.

    Fully transparent borders are cropped first, the rest of the transparency is laid on white. `position`
    "random" places it anywhere inside the square, the same place for the same seed.

    Raises PitError for a picture that is wholly transparent and for values out of range.
    """
    _check(size, fill, position)
    image = crop_transparent(image)
    long_side = max(1, round(size * fill))
    scale = long_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size), WHITE)
    x, y = _place(size - width, size - height, position, seed)
    square.paste(flatten(_resized(image, (width, height))), (x, y))
    return square


def reference_grid(images: Sequence[Image.Image], size: int = SIZE) -> Image.Image:
    """Up to four reference pictures as one square of `size` pixels, RGB.

    Four make the 2x2 grid of the training, in reading order. One is stretched to the whole square, none is
    white. Two and three go round again, so that no cell stays empty: a b / b a, and a b / c a.
    Transparency is laid on white. Raises PitError for more than four pictures.
    """
    if len(images) > 4:
        raise PitError(f"A reference holds up to 4 pictures (the 2x2 grid), but got {len(images)}.")
    square = Image.new("RGB", (size, size), WHITE)
    if len(images) == 1:
        return flatten(_resized(images[0], (size, size)))
    half = size // 2
    order = {0: (), 2: (0, 1, 1, 0), 3: (0, 1, 2, 0), 4: (0, 1, 2, 3)}[len(images)]
    for cell, index in enumerate(order):
        x, y = cell % 2 * half, cell // 2 * half
        # The second column and row take what an odd size leaves over.
        box = (size - half if x else half, size - half if y else half)
        square.paste(flatten(_resized(images[index], box)), (x, y))
    return square


def crop_transparent(image: Image.Image) -> Image.Image:
    """The picture without its fully transparent borders. Raises PitError where nothing is left."""
    if not has_alpha(image):
        return image
    image = image.convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        raise PitError("This picture is wholly transparent; give one that shows something.")
    return image.crop(box)


def flatten(image: Image.Image) -> Image.Image:
    """RGB, with transparency laid on white."""
    if not has_alpha(image):
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image).convert("RGB")


def has_alpha(image: Image.Image) -> bool:
    """Whether the picture can be transparent somewhere."""
    return image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    # Pillow premultiplies RGBA while it scales, so invisible colours do not bleed into the edge.
    plain = image.convert("RGBA" if has_alpha(image) else "RGB")
    return plain if plain.size == size else plain.resize(size, Image.Resampling.LANCZOS)


def _place(free_x: int, free_y: int, position: Position, seed: int | None) -> tuple[int, int]:
    if position == "centre":
        return free_x // 2, free_y // 2
    chance = random.Random(seed)
    return chance.randint(0, free_x), chance.randint(0, free_y)


def _check(size: int, fill: float, position: str) -> None:
    if size < 1:
        raise PitError(f"Expected a canvas of at least 1 pixel, got {size}.")
    if not (math.isfinite(fill) and 0 < fill <= 1):
        raise PitError(f"Expected a fill above 0 and up to 1 (0.92 is usual), got {fill!r}.")
    if position not in ("centre", "random"):
        raise PitError(f"Expected the position 'centre' or 'random', got {position!r}.")
