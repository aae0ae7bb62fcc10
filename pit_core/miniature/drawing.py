"""Critters as pictures: a layer per part, stacked in a surface style on a scene, drawn with supersampling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .geometry import placed
from .scenes import draw_scene
from .shapes import outlines
from .world import CANVAS, COLOURS, KINDS, Critter

BACK_TO_FRONT = ("wings", "tail", "ears", "body", "eyes")
OUTLINED = ("main", "white", "dark")  # the roles that get a line around them

Colour = tuple[int, int, int]


def render(
    critter: Critter, size: int = CANVAS, *, kinds: Sequence[str] = KINDS, supersample: int = 2
) -> Image.Image:
    """Draw a critter, or only some of its parts, in its scene: (size, size) RGB."""
    layers = [draw_layer(critter, kind, size, supersample) for kind in BACK_TO_FRONT if kind in kinds]
    return compose(layers, critter.style, draw_scene(critter.scene, size, critter.scene_seed))


def render_part(critter: Critter, kind: str, size: int = CANVAS, *, fill: float = 0.92) -> Image.Image:
    """One part alone, cut out tightly, its long side ``fill`` of a white square: (size, size) RGB."""
    cut = cut_out_part(critter, kind, 2 * size, supersample=1)
    scale = max(round(size * fill), 1) / max(cut.size)
    fitted = (max(round(cut.width * scale), 1), max(round(cut.height * scale), 1))
    small = cut.convert("RGBa").resize(fitted, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    canvas.alpha_composite(small.convert("RGBA"), ((size - small.width) // 2, (size - small.height) // 2))
    return canvas.convert("RGB").filter(ImageFilter.GaussianBlur(0.6))


def cut_out_part(critter: Critter, kind: str, size: int, supersample: int = 2) -> Image.Image:
    """One part alone, transparent and tightly cropped, at the scale of a ``size`` canvas: RGBA of any aspect.

    Of a pair of wings only one is shown, as an artist would cut it out.
    """
    upright = replace(critter, pose=replace(critter.pose, dx=0.0, dy=0.0))
    layer = _shrunk(draw_layer(upright, kind, size, supersample), size)
    if critter.style == "pixel":
        layer = _pixelated(layer)
    if kind == "wings":
        layer = layer.crop((size // 2, 0, size, size))
    return layer.crop(layer.getchannel("A").getbbox() or (0, 0, *layer.size))


def draw_layer(critter: Critter, kind: str, size: int, supersample: int = 2) -> Image.Image:
    """One part on a transparent canvas of ``size * supersample`` pixels: (W, H) RGBA."""
    part = critter.part(kind)
    wide = size * supersample
    layer = Image.new("RGBA", (wide, wide), (0, 0, 0, 0))
    if part is None:
        return layer
    draw = ImageDraw.Draw(layer)
    unit = wide / CANVAS
    roles = _roles(part.colour, critter.style)
    width = round((3.0 if critter.style == "sketch" else 1.7) * unit)
    for points, role in outlines(kind, part.shape, critter.build):
        pixels = placed(points, critter.pose, wide)
        draw.polygon(pixels, fill=roles[role])
        if role in OUTLINED:
            draw.line([*pixels, pixels[0], pixels[1]], fill=roles["line"], width=width, joint="curve")
    return _striped(layer, unit) if critter.style == "stripes" else layer


def compose(layers: Iterable[Image.Image], style: str, background: Image.Image) -> Image.Image:
    """Stack part layers, back to front, on a background of the final size; RGB of the background's size."""
    size = background.size[0]
    stacked: Image.Image | None = None
    for layer in layers:
        stacked = layer.copy() if stacked is None and style != "paper" else _over(stacked, layer, style)
    if stacked is None:
        return background
    flat = _shrunk(stacked, size)
    if style == "pixel":
        flat = _pixelated(flat)
    return Image.alpha_composite(background.convert("RGBA"), flat).convert("RGB")


# styles


def _roles(colour: str, style: str) -> dict[str, Colour]:
    """The colours of a part's polygons and of their outlines, by role."""
    main = np.array(COLOURS[colour], float)
    roles = {
        "main": main,
        "dark": main * 0.68,
        "light": main + (255 - main) * 0.55,
        "white": np.array((255, 255, 255), float),
        "black": np.array((40, 34, 48), float),
        "line": main * 0.78,
    }
    if style == "sketch":  # pale fills, strong lines
        line = roles["line"]
        roles = {role: 255 - (255 - value) * 0.22 for role, value in roles.items()}
        roles |= {"line": line, "black": np.array((90, 84, 98), float)}
    return {role: (int(r), int(g), int(b)) for role, (r, g, b) in roles.items()}


def _striped(layer: Image.Image, unit: float) -> Image.Image:
    pixels = np.array(layer)
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    dark = ((x + y) / unit % 12 < 5)[..., None]
    rgb = np.where(dark, pixels[..., :3] * 0.72, pixels[..., :3])
    return Image.fromarray(np.concatenate([rgb.astype(np.uint8), pixels[..., 3:]], -1), "RGBA")


def _over(under: Image.Image | None, layer: Image.Image, style: str) -> Image.Image:
    """A layer on what is below it; paper throws a shadow."""
    under = Image.new("RGBA", layer.size, (0, 0, 0, 0)) if under is None else under
    if style == "paper":
        under = Image.alpha_composite(under, _shadow(layer))
    return Image.alpha_composite(under, layer)


def _shadow(layer: Image.Image) -> Image.Image:
    unit = layer.size[0] / CANVAS
    alpha = layer.getchannel("A").filter(ImageFilter.GaussianBlur(2.2 * unit)).point(lambda a: a * 0.6)
    shadow = Image.new("RGBA", layer.size, (30, 24, 40, 0))
    shadow.putalpha(alpha)
    moved = Image.new("RGBA", layer.size, (0, 0, 0, 0))
    moved.paste(shadow, (round(2.5 * unit), round(3.5 * unit)))
    return moved


def _shrunk(image: Image.Image, size: int) -> Image.Image:
    """Shrink with a slightly soft filter; colours of transparent pixels do not bleed in."""
    factor = image.size[0] / size
    soft = image.convert("RGBa")
    if factor > 1:
        soft = soft.filter(ImageFilter.GaussianBlur(0.8 * factor))
    return soft.resize((size, size), Image.Resampling.BOX).convert("RGBA")


def _pixelated(image: Image.Image) -> Image.Image:
    size = image.size[0]
    blocks = max(size // 4, 1)
    small = image.convert("RGBa").resize((blocks, blocks), Image.Resampling.BOX).convert("RGBA")
    small.putalpha(small.getchannel("A").point(lambda a: 255 if a > 110 else 0))
    large = small.resize((size, size), Image.Resampling.NEAREST).convert("RGBa")
    return large.filter(ImageFilter.GaussianBlur(0.5)).convert("RGBA")
