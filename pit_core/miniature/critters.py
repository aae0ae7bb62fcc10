"""The critter world: procedural creatures, deterministic from a seed.

A critter has a body, eyes, and perhaps ears, wings and a tail, each with a shape and a colour; a build from thin to
wide, a pose, a surface style and a scene. Geometry is given in units of a 128 x 128 canvas, y down, and drawn at any
size with supersampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CANVAS = 128
KINDS = ("body", "eyes", "ears", "wings", "tail")
MANDATORY = ("body", "eyes")
SHAPES: dict[str, tuple[str, ...]] = {
    "body": ("round", "box", "pear", "turnip"),
    "eyes": ("round", "cyclops", "sleepy", "slit"),
    "ears": ("cat", "bunny", "horn", "antenna"),
    "wings": ("bat", "feather", "butterfly", "leaf"),
    "tail": ("bushy", "curl", "arrow", "fin"),
}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (250, 214, 70),
    "green": (72, 166, 84),
    "cyan": (80, 200, 214),
    "blue": (48, 88, 196),
    "purple": (138, 76, 186),
    "pink": (246, 156, 196),
}
STYLES = ("flat", "sketch", "paper", "stripes", "pixel")
SCENES = ("plain", "forest", "beach", "snow", "night", "desert", "meadow")
COLOUR_NAMES = tuple(COLOURS)

Point = tuple[float, float]
Polygon = tuple[list[Point], str]  # points on the canvas, colour role


@dataclass(frozen=True)
class Part:
    """One part: its shape and its colour, both by name."""

    shape: str
    colour: str


@dataclass(frozen=True)
class Pose:
    """Where the critter stands: offset in canvas units, scale, rotation in degrees, mirrored or not."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    rotation: float = 0.0
    mirror: bool = False


@dataclass(frozen=True)
class Critter:
    """A whole creature; ``build`` runs from 0 (thin) to 1 (wide)."""

    body: Part
    eyes: Part
    ears: Part | None = None
    wings: Part | None = None
    tail: Part | None = None
    build: float = 0.5
    pose: Pose = field(default_factory=Pose)
    style: str = "flat"
    scene: str = "plain"
    scene_seed: int = 0

    def part(self, kind: str) -> Part | None:
        return getattr(self, kind)

    def having(self, kind: str, part: Part) -> Critter:
        """This critter with one part replaced."""
        changes: dict[str, Any] = {kind: part}
        return replace(self, **changes)

    def parts(self) -> dict[str, Part]:
        """The parts that this critter has, by kind."""
        return {kind: part for kind in KINDS if (part := self.part(kind)) is not None}


def random_critter(
    rng: np.random.Generator,
    *,
    styles: Sequence[str] = ("flat",),
    scenes: Sequence[str] = ("plain",),
    posed: float = 1.0,
    held_out: bool | None = False,
) -> Critter:
    """Draw a critter; ``held_out`` picks the training combinations (False), the held-out ones (True), or any (None).

    ``posed`` scales the pose's jitter: 0 stands upright in the middle.
    """
    while True:
        critter = Critter(
            body=_random_part(rng, "body"),
            eyes=_random_part(rng, "eyes"),
            ears=_random_part(rng, "ears") if rng.random() < 0.85 else None,
            wings=_random_part(rng, "wings") if rng.random() < 0.85 else None,
            tail=_random_part(rng, "tail") if rng.random() < 0.85 else None,
            build=float(rng.random()),
            pose=random_pose(rng, posed),
            style=str(rng.choice(styles)),
            scene=str(rng.choice(scenes)),
            scene_seed=int(rng.integers(1 << 30)),
        )
        if held_out is None or is_held_out(critter) == held_out:
            return critter


def _random_part(rng: np.random.Generator, kind: str) -> Part:
    return Part(str(rng.choice(SHAPES[kind])), str(rng.choice(COLOUR_NAMES)))


def random_pose(rng: np.random.Generator, amount: float = 1.0) -> Pose:
    dx, dy = rng.uniform(-6, 6, 2) * amount
    scale = 1 + rng.uniform(-0.12, 0.04) * amount
    rotation = rng.uniform(-8, 8) * amount
    return Pose(float(dx), float(dy), float(scale), float(rotation), bool(rng.random() < 0.5 * amount))


def is_held_out(critter: Critter) -> bool:
    """True for the seventh of all shape combinations that no training set contains."""
    total = 0
    for weight, kind in zip((1, 2, 5, 3, 4), KINDS, strict=True):
        part = critter.part(kind)
        total += weight * (len(SHAPES[kind]) if part is None else SHAPES[kind].index(part.shape))
    return total % 7 == 3


# ---------------------------------------------------------------------------------------------------------------------
# Geometry: every part is a list of polygons, symmetric ones drawn for both sides.


def _ellipse(
    cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, power: float = 2.0
) -> list[Point]:
    turn = math.radians(angle)
    points = []
    for step in range(48):
        t = 2 * math.pi * step / 48
        x = rx * math.copysign(abs(math.cos(t)) ** (2 / power), math.cos(t))
        y = ry * math.copysign(abs(math.sin(t)) ** (2 / power), math.sin(t))
        points.append(
            (cx + x * math.cos(turn) - y * math.sin(turn), cy + x * math.sin(turn) + y * math.cos(turn))
        )
    return points


def _stroke(path: Sequence[Point], start: float, end: float) -> list[Point]:
    """A tapering stroke along a path, widths in canvas units, with a round end."""
    left, right = [], []
    for index, (x, y) in enumerate(path):
        x0, y0 = path[max(index - 1, 0)]
        x1, y1 = path[min(index + 1, len(path) - 1)]
        length = math.hypot(x1 - x0, y1 - y0) or 1.0
        half = (start + (end - start) * index / (len(path) - 1)) / 2
        nx, ny = -(y1 - y0) / length * half, (x1 - x0) / length * half
        left.append((x + nx, y + ny))
        right.append((x - nx, y - ny))
    return left + right[::-1]


def _bezier(a: Point, b: Point, c: Point, d: Point, count: int = 24) -> list[Point]:
    points = []
    for step in range(count + 1):
        t = step / count
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        points.append(
            (
                sum(w * p[0] for w, p in zip(weights, (a, b, c, d), strict=True)),
                sum(w * p[1] for w, p in zip(weights, (a, b, c, d), strict=True)),
            )
        )
    return points


def _both_sides(polygons: Iterable[Polygon]) -> list[Polygon]:
    right = list(polygons)
    return right + [([(2 * 64 - x, y) for x, y in points], role) for points, role in right]


def _width(build: float) -> float:
    return 19.0 + 13.0 * build


def _body(shape: str, w: float) -> list[Polygon]:
    if shape == "round":
        outline = _ellipse(64, 76, w * 1.05, 26)
    elif shape == "box":
        outline = _ellipse(64, 76, w, 25, power=6.0)
    else:
        narrow, wide = (0.55, 1.2) if shape == "pear" else (1.2, 0.5)
        outline = []
        for x, y in _ellipse(0, 0, 1, 1):
            t = (y + 1) / 2
            outline.append((64 + x * w * (narrow + (wide - narrow) * t * t * (3 - 2 * t)), 76 + 26 * y))
    foot = 0.42 if shape == "turnip" else 0.5
    feet = _both_sides([(_ellipse(64 + w * foot, 101.5, 7.5, 4.5), "dark")])
    mouth = _stroke(_bezier((58, 87), (61, 91), (67, 91), (70, 87)), 2.6, 2.6)
    return [*feet, (outline, "main"), (mouth, "black")]


def _eyes(shape: str, w: float) -> list[Polygon]:
    if shape == "cyclops":
        return [
            (_ellipse(64, 69, 14.5, 14.5), "white"),
            (_ellipse(64, 69, 10.5, 10.5), "main"),
            (_ellipse(64, 69, 4.5, 4.5), "black"),
        ]
    if shape == "round":
        eye: list[Polygon] = [
            (_ellipse(75, 68, 10, 10), "white"),
            (_ellipse(75, 68, 7.2, 7.2), "main"),
            (_ellipse(75, 68, 3.0, 3.0), "black"),
        ]
    elif shape == "sleepy":
        half = [(x, y) for x, y in _ellipse(75, 66, 10.5, 10.5) if y >= 65.9]
        iris = [(x, y) for x, y in _ellipse(75, 66, 7.6, 7.6) if y >= 65.9]
        eye = [
            (half, "white"),
            (iris, "main"),
            (_stroke([(64.2, 66), (75, 65.4), (86, 66)], 3.4, 3.4), "black"),
        ]
    else:
        lens = _bezier((64.5, 72), (69, 60), (80, 58), (87, 61)) + _bezier(
            (87, 61), (86, 72), (77, 79), (64.5, 72)
        )
        eye = [(lens, "main"), (_ellipse(76, 67.3, 2.2, 6.2), "black")]
    return _both_sides(eye)


def _ears(shape: str, w: float) -> list[Polygon]:
    if shape == "cat":
        return _both_sides(
            [
                ([(64 + 0.1 * w, 55), (64 + 0.72 * w, 25), (64 + 0.92 * w, 66)], "main"),
                ([(64 + 0.35 * w, 52), (64 + 0.68 * w, 34), (64 + 0.78 * w, 58)], "light"),
            ]
        )
    if shape == "bunny":
        x = 64 + 0.42 * w
        return _both_sides([(_ellipse(x, 35, 7, 22, 8), "main"), (_ellipse(x, 35, 3.4, 15, 8), "light")])
    if shape == "horn":
        path = _bezier((64 + 0.5 * w, 62), (64 + 1.15 * w, 52), (64 + 1.25 * w, 38), (64 + 0.85 * w, 24))
        return _both_sides([(_stroke(path, 13, 1.5), "main")])
    path = _bezier((64 + 0.25 * w, 56), (64 + 0.25 * w, 42), (64 + 0.4 * w, 34), (64 + 0.62 * w, 29))
    return _both_sides([(_stroke(path, 4, 4), "dark"), (_ellipse(64 + 0.65 * w, 26, 8, 8), "main")])


def _wings(shape: str, w: float) -> list[Polygon]:
    x, y = 64 + 0.7 * w, 74.0
    if shape == "bat":
        edge = [(x - 4, y - 10), (x + 12, y - 30), (x + 34, y - 24)]
        scallops = [
            *_bezier((x + 34, y - 24), (x + 26, y - 16), (x + 26, y - 8), (x + 30, y), 8),
            *_bezier((x + 30, y), (x + 22, y - 5), (x + 18, y), (x + 19, y + 8), 8),
            *_bezier((x + 19, y + 8), (x + 11, y + 3), (x + 4, y + 4), (x - 4, y + 8), 8),
        ]
        return _both_sides([(edge + scallops, "main")])
    if shape == "feather":
        lobes = [(x + 12, y + 5, 17, 6.5, 20), (x + 15, y - 5, 20, 7.5, -12), (x + 13, y - 15, 22, 7.5, -48)]
        return _both_sides([(_ellipse(*lobe), "main") for lobe in lobes])
    if shape == "butterfly":
        return _both_sides(
            [
                (_ellipse(x + 10, y + 10, 11, 10), "main"),
                (_ellipse(x + 16, y - 12, 17, 15, -20), "main"),
                (_ellipse(x + 18, y - 13, 8, 7, -20), "light"),
            ]
        )
    leaf = _bezier((x - 4, y), (x + 4, y - 26), (x + 24, y - 30), (x + 36, y - 26)) + _bezier(
        (x + 36, y - 26), (x + 36, y - 10), (x + 20, y + 8), (x - 4, y)
    )
    rib = _stroke(_bezier((x, y - 2), (x + 10, y - 12), (x + 20, y - 18), (x + 28, y - 21)), 3, 2.4)
    return _both_sides([(leaf, "main"), (rib, "light")])


def _tail(shape: str, w: float) -> list[Polygon]:
    x, y = 64 + 0.55 * w, 94.0
    if shape == "bushy":
        return [
            (_ellipse(x + 19, y - 6, 23, 9.5, -28), "main"),
            (_ellipse(x + 32, y - 13, 8, 7.5, -28), "light"),
        ]
    if shape == "curl":
        spiral = []
        for step in range(40):
            t = step / 39
            angle = math.radians(100 - 420 * t)
            radius = 15 - 9 * t
            spiral.append((x + 24 + radius * math.cos(angle), y - 9 + radius * math.sin(angle)))
        return [(_stroke([(x - 4, y + 1), (x + 10, y + 4), *spiral], 6.5, 5.0), "main")]
    if shape == "arrow":
        path = _bezier((x - 4, y), (x + 12, y + 8), (x + 22, y + 4), (x + 28, y - 8))
        tip = [(x + 18, y - 6), (x + 37, y - 25), (x + 39, y + 1), (x + 29, y - 4)]
        return [(_stroke(path, 6, 4.5), "main"), (tip, "main")]
    fin = [(x + 14, y - 2), (x + 38, y - 22), (x + 33, y - 3), (x + 40, y + 13), (x + 14, y + 3)]
    return [(_stroke([(x - 4, y), (x + 8, y + 1), (x + 18, y)], 10, 8), "main"), (fin, "main")]


_DRAW = {"body": _body, "eyes": _eyes, "ears": _ears, "wings": _wings, "tail": _tail}
BACK_TO_FRONT = ("wings", "tail", "ears", "body", "eyes")


def _placed(points: list[Point], pose: Pose, size: float) -> list[Point]:
    turn, unit = math.radians(pose.rotation), size / CANVAS
    flip = -1.0 if pose.mirror else 1.0
    out = []
    for x, y in points:
        x, y = (x - 64) * flip * pose.scale, (y - 68) * pose.scale
        out.append(
            (
                (x * math.cos(turn) - y * math.sin(turn) + 64 + pose.dx) * unit,
                (x * math.sin(turn) + y * math.cos(turn) + 68 + pose.dy) * unit,
            )
        )
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def _roles(colour: str, style: str) -> dict[str, tuple[int, int, int]]:
    main = np.array(COLOURS[colour], float)
    roles = {
        "main": main,
        "dark": main * 0.68,
        "light": main + (255 - main) * 0.55,
        "white": np.array((255, 255, 255), float),
        "black": np.array((40, 34, 48), float),
        "line": main * 0.78,
    }
    if style == "sketch":
        line = roles["line"]
        roles = {role: 255 - (255 - value) * 0.22 for role, value in roles.items() if role != "black"}
        roles |= {"line": line, "black": np.array((90, 84, 98), float)}
    return {role: (int(r), int(g), int(b)) for role, (r, g, b) in roles.items()}


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
    outline = round((3.0 if critter.style == "sketch" else 1.7) * unit)
    for points, role in _DRAW[kind](part.shape, _width(critter.build)):
        placed = _placed(points, critter.pose, wide)
        draw.polygon(placed, fill=roles[role])
        if role in ("main", "white", "dark"):
            line = roles["line"]
            draw.line([*placed, placed[0], placed[1]], fill=line, width=outline, joint="curve")
    if critter.style == "stripes":
        layer = _striped(layer, unit)
    return layer


def _striped(layer: Image.Image, unit: float) -> Image.Image:
    pixels = np.array(layer)
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    dark = ((x + y) / unit % 12 < 5)[..., None]
    rgb = np.where(dark, pixels[..., :3] * 0.72, pixels[..., :3])
    return Image.fromarray(np.concatenate([rgb.astype(np.uint8), pixels[..., 3:]], -1), "RGBA")


def compose(layers: Iterable[Image.Image], style: str, background: Image.Image) -> Image.Image:
    """Stack part layers, back to front, on a background of the final size; returns RGB of the background's size."""
    size = background.size[0]
    stacked: Image.Image | None = None
    for layer in layers:
        stacked = layer.copy() if stacked is None and style != "paper" else _over(stacked, layer, style)
    if stacked is None:
        return background
    flat = _premultiplied_resize(stacked, size)
    if style == "pixel":
        flat = _pixelate(flat)
    return Image.alpha_composite(background.convert("RGBA"), flat).convert("RGB")


def _over(under: Image.Image | None, layer: Image.Image, style: str) -> Image.Image:
    under = Image.new("RGBA", layer.size, (0, 0, 0, 0)) if under is None else under
    if style == "paper":
        unit = layer.size[0] / CANVAS
        alpha = layer.getchannel("A").filter(ImageFilter.GaussianBlur(2.2 * unit)).point(lambda a: a * 0.6)
        shadow = Image.new("RGBA", layer.size, (30, 24, 40, 0))
        shadow.putalpha(alpha)
        moved = Image.new("RGBA", layer.size, (0, 0, 0, 0))
        moved.paste(shadow, (round(2.5 * unit), round(3.5 * unit)))
        under = Image.alpha_composite(under, moved)
    return Image.alpha_composite(under, layer)


def _premultiplied_resize(image: Image.Image, size: int) -> Image.Image:
    """Shrink with a slightly soft filter; colours of transparent pixels do not bleed in."""
    factor = image.size[0] / size
    soft = image.convert("RGBa")
    if factor > 1:
        soft = soft.filter(ImageFilter.GaussianBlur(0.8 * factor))
    return soft.resize((size, size), Image.Resampling.BOX).convert("RGBA")


def _pixelate(image: Image.Image) -> Image.Image:
    size = image.size[0]
    blocks = max(size // 4, 1)
    small = image.convert("RGBa").resize((blocks, blocks), Image.Resampling.BOX).convert("RGBA")
    small.putalpha(small.getchannel("A").point(lambda a: 255 if a > 110 else 0))
    large = small.resize((size, size), Image.Resampling.NEAREST).convert("RGBa")
    return large.filter(ImageFilter.GaussianBlur(0.5)).convert("RGBA")


def render(
    critter: Critter, size: int = CANVAS, *, kinds: Sequence[str] = KINDS, supersample: int = 2
) -> Image.Image:
    """Draw a critter, or only some of its parts, in its scene: (size, size) RGB."""
    layers = [draw_layer(critter, kind, size, supersample) for kind in BACK_TO_FRONT if kind in kinds]
    return compose(layers, critter.style, draw_scene(critter.scene, size, critter.scene_seed))


def render_part(critter: Critter, kind: str, size: int = CANVAS, *, fill: float = 0.92) -> Image.Image:
    """One part alone, cut out tightly and centred on white, its long side ``fill`` of the square: (size, size) RGB."""
    cut = cut_out_part(critter, kind, 2 * size, supersample=1)
    side = max(round(size * fill), 1)
    scale = side / max(cut.size)
    small = cut.convert("RGBa").resize(
        (max(round(cut.width * scale), 1), max(round(cut.height * scale), 1)), Image.Resampling.LANCZOS
    )
    canvas = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    canvas.alpha_composite(small.convert("RGBA"), ((size - small.width) // 2, (size - small.height) // 2))
    return canvas.convert("RGB").filter(ImageFilter.GaussianBlur(0.6))


def cut_out_part(critter: Critter, kind: str, size: int, supersample: int = 2) -> Image.Image:
    """One part alone, transparent and tightly cropped, at the scale of a ``size`` canvas: RGBA of any aspect.

    Of a pair of wings only one is shown, as an artist would cut it out.
    """
    upright = replace(critter, pose=replace(critter.pose, dx=0.0, dy=0.0))
    layer = _premultiplied_resize(draw_layer(upright, kind, size, supersample), size)
    if critter.style == "pixel":
        layer = _pixelate(layer)
    if kind == "wings":
        layer = layer.crop((size // 2, 0, size, size))
    return layer.crop(layer.getchannel("A").getbbox() or (0, 0, *layer.size))


# ---------------------------------------------------------------------------------------------------------------------
# Scenes: a sky, a ground and a few soft things, simple enough to be told apart at a glance.

_SKY_GROUND = {
    "forest": ((188, 222, 190), (150, 196, 150), (92, 128, 78)),
    "beach": ((140, 206, 240), (210, 238, 246), (244, 220, 160)),
    "snow": ((176, 200, 226), (222, 232, 242), (246, 248, 252)),
    "night": ((22, 26, 66), (56, 52, 108), (38, 44, 62)),
    "desert": ((250, 206, 140), (252, 232, 190), (222, 164, 98)),
    "meadow": ((150, 208, 246), (226, 242, 250), (130, 196, 92)),
}


def draw_scene(scene: str, size: int, seed: int = 0) -> Image.Image:
    """The background alone: (size, size) RGB; the seed moves its trees, dunes and stars."""
    if scene == "plain":
        return Image.new("RGB", (size, size), (255, 255, 255))
    rng = np.random.default_rng(seed)
    top, low, ground = (np.array(c, float) for c in _SKY_GROUND[scene])
    wide = 2 * size
    ramp = np.linspace(0, 1, wide)[:, None, None]
    sky = np.broadcast_to(top + (low - top) * ramp, (wide, wide, 3))
    image = Image.fromarray(sky.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    unit, horizon = wide / CANVAS, float(rng.uniform(78, 90))
    _SCENERY[scene](draw, rng, unit, horizon, tuple(int(v) for v in ground))
    return image.filter(ImageFilter.GaussianBlur(0.8 * unit)).resize((size, size), Image.Resampling.BOX)


def _shape(draw: ImageDraw.ImageDraw, points: Sequence[Point], unit: float, colour: tuple[int, ...]) -> None:
    draw.polygon([(x * unit, y * unit) for x, y in points], fill=colour)


def _ground(
    draw: ImageDraw.ImageDraw, unit: float, horizon: float, colour: tuple[int, ...], swing: float
) -> None:
    ridge = [(x, horizon + swing * math.sin(x / 22 + horizon)) for x in range(-4, 136, 4)]
    _shape(draw, [(-4.0, 140.0), *ridge, (136.0, 140.0)], unit, colour)


def _forest(draw, rng, unit, horizon, ground) -> None:  # type: ignore[no-untyped-def]
    for index in range(5):
        x, width = 8 + 28 * index + rng.uniform(-8, 8), rng.uniform(11, 16)
        height = rng.uniform(52, 78)
        _shape(
            draw,
            [(x - 3, horizon + 6), (x - 3, horizon - 8), (x + 3, horizon - 8), (x + 3, horizon + 6)],
            unit,
            (112, 84, 60),
        )
        _shape(
            draw,
            [(x - width, horizon - 4), (x, horizon - height), (x + width, horizon - 4)],
            unit,
            (58, 118, 74),
        )
    _ground(draw, unit, horizon, ground, 2)


def _beach(draw, rng, unit, horizon, ground) -> None:  # type: ignore[no-untyped-def]
    x = rng.uniform(14, 114)
    _shape(draw, _ellipse(x, 20, 11, 11), unit, (255, 236, 130))
    _shape(draw, [(-4, horizon - 18), (132, horizon - 18), (132, 140), (-4, 140)], unit, (64, 156, 206))
    _ground(draw, unit, horizon, ground, 3)


def _snow(draw, rng, unit, horizon, ground) -> None:  # type: ignore[no-untyped-def]
    for index in range(3):
        x = 16 + 46 * index + rng.uniform(-10, 10)
        height = rng.uniform(44, 66)
        _shape(
            draw, [(x - 34, horizon + 6), (x, horizon - height), (x + 34, horizon + 6)], unit, (150, 172, 204)
        )
        _shape(
            draw,
            [(x - 11, horizon - height * 0.68), (x, horizon - height), (x + 11, horizon - height * 0.68)],
            unit,
            (250, 252, 255),
        )
    _ground(draw, unit, horizon, ground, 3)


def _night(draw, rng, unit, horizon, ground) -> None:  # type: ignore[no-untyped-def]
    x = rng.uniform(16, 112)
    _shape(draw, _ellipse(x, 20, 10, 10), unit, (246, 242, 206))
    for _ in range(12):
        _shape(draw, _ellipse(rng.uniform(2, 126), rng.uniform(4, 66), 1.5, 1.5), unit, (236, 236, 250))
    _ground(draw, unit, horizon, ground, 3)


def _desert(draw, rng, unit, horizon, ground) -> None:  # type: ignore[no-untyped-def]
    _ground(draw, unit, horizon - 10, (238, 190, 124), 6)
    for side in (-1, 1):
        x = 64 + side * rng.uniform(42, 54)
        _shape(draw, _stroke([(x, horizon + 8), (x, horizon - 34)], 9, 7), unit, (86, 146, 92))
        _shape(
            draw,
            _stroke([(x, horizon - 10), (x + 10, horizon - 12), (x + 10, horizon - 24)], 6, 5),
            unit,
            (86, 146, 92),
        )
    _ground(draw, unit, horizon, ground, 4)


def _meadow(draw, rng, unit, horizon, ground) -> None:  # type: ignore[no-untyped-def]
    for _ in range(2):
        x, y = rng.uniform(10, 118), rng.uniform(12, 34)
        for dx, r in ((-9, 6), (0, 9), (9, 6)):
            _shape(draw, _ellipse(x + dx, y, r + 2, r), unit, (255, 255, 255))
    _ground(draw, unit, horizon, ground, 4)
    for _ in range(9):
        x, y = rng.uniform(4, 124), rng.uniform(horizon + 10, 126)
        _shape(draw, _ellipse(x, y, 2.6, 2.6), unit, (250, 120 + int(rng.integers(120)), 120))


_SCENERY = {
    "forest": _forest,
    "beach": _beach,
    "snow": _snow,
    "night": _night,
    "desert": _desert,
    "meadow": _meadow,
}


# ---------------------------------------------------------------------------------------------------------------------
# Captions

SCENE_PHRASES = {
    "plain": "on a white background",
    "forest": "in a forest",
    "beach": "in a beach",
    "snow": "in a snowfield",
    "night": "in a night",
    "desert": "in a desert",
    "meadow": "in a meadow",
}
BUILD_WORDS = ("thin", "slim", "medium", "stout", "wide")


def build_word(build: float) -> str:
    return BUILD_WORDS[min(int(build * len(BUILD_WORDS)), len(BUILD_WORDS) - 1)]


def part_phrase(kind: str, part: Part) -> str:
    return f"{part.colour} {part.shape} {kind}"


def caption(critter: Critter, rng: np.random.Generator | None = None) -> str:
    """The critter in words; with ``rng`` some phrases are left out and the order of the parts changes."""
    parts = [(kind, part) for kind, part in critter.parts().items() if kind != "body"]
    keep = 1.0 if rng is None or rng.random() < 0.5 else float(rng.random())

    def kept() -> bool:
        return rng is None or rng.random() < keep

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
    if rng is None or rng.random() < max(keep, 0.7):
        text += f", {SCENE_PHRASES[critter.scene]}"
    if rng is None or rng.random() < max(keep, 0.7):
        text += f", {critter.style} style"
    return text


def part_caption(critter: Critter, kind: str) -> str:
    """The caption of a part picture."""
    part = critter.part(kind)
    if part is None:
        raise ValueError(f"this critter has no {kind}")
    return f"only {part_phrase(kind, part)}, {SCENE_PHRASES['plain']}, {critter.style} style"
