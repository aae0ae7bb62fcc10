"""Broken critters with known damage, so that a reader learns to call a mess a mess.

A part can be missing, doubled, or garbled: blended with another, smeared, warped, or half erased. The labels
say which; parts that are merely covered by the damage of others keep their own label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from . import critters
from .critters import BACK_TO_FRONT, COLOUR_NAMES, KINDS, SHAPES, Critter, Part, Pose
from .data import ABSENT, DOUBLED, GARBLED, NO_COLOUR, labels_of

SIZE, SUPERSAMPLE = critters.CANVAS, 2


def corrupt(critter: Critter, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A damaged picture (128, 128, 3) uint8 and its labels (LABELS,)."""
    layers = {kind: critters.draw_layer(critter, kind, SIZE, SUPERSAMPLE) for kind in KINDS}
    labels = labels_of(critter)
    present = list(critter.parts())
    for kind in rng.choice(present, size=int(rng.integers(1, min(3, len(present)) + 1)), replace=False):
        _damage(layers, labels, critter, str(kind), rng)
    ordered = [layers[kind] for kind in BACK_TO_FRONT]
    image = critters.compose(
        ordered, critter.style, critters.draw_scene(critter.scene, SIZE, critter.scene_seed)
    )
    return np.asarray(image), labels


def _damage(
    layers: dict[str, Image.Image], labels: np.ndarray, critter: Critter, kind: str, rng: np.random.Generator
) -> None:
    slot = KINDS.index(kind)
    choice = rng.random()
    if choice < 0.25:
        layers[kind] = Image.new("RGBA", layers[kind].size, (0, 0, 0, 0))
        state, colour = ABSENT, NO_COLOUR
    elif choice < 0.5:
        layers[kind] = _doubled(layers[kind], critter, kind, rng)
        state, colour = DOUBLED, NO_COLOUR
    else:
        garble = _GARBLES[int(rng.integers(len(_GARBLES)))]
        layers[kind] = garble(layers[kind], critter, kind, rng)
        state, colour = GARBLED, NO_COLOUR
    labels[slot], labels[len(KINDS) + slot] = state, colour


def _doubled(layer: Image.Image, critter: Critter, kind: str, rng: np.random.Generator) -> Image.Image:
    """The part a second time, clearly elsewhere: mirrored for a tail, moved or turned for the rest."""
    pose = critter.pose
    side = 1.0 if rng.random() < 0.5 else -1.0
    moves: dict[str, Callable[[], Pose]] = {
        "tail": lambda: replace(pose, mirror=not pose.mirror, dy=pose.dy + float(rng.uniform(-8, 0))),
        "eyes": lambda: replace(pose, dy=pose.dy + side * float(rng.uniform(18, 26))),
        "ears": lambda: replace(pose, rotation=pose.rotation + side * float(rng.uniform(28, 45))),
        "wings": lambda: replace(pose, rotation=pose.rotation + side * float(rng.uniform(35, 60))),
        "body": lambda: replace(
            pose, dx=pose.dx + side * float(rng.uniform(24, 36)), dy=pose.dy + float(rng.uniform(-14, 4))
        ),
    }
    again = critters.draw_layer(replace(critter, pose=moves[kind]()), kind, SIZE, SUPERSAMPLE)
    return Image.alpha_composite(again, layer)


def _other_part(part: Part, kind: str, rng: np.random.Generator) -> Part:
    """Another shape, and usually another colour, of the same kind."""
    shape = str(rng.choice([s for s in SHAPES[kind] if s != part.shape]))
    return Part(shape, part.colour if rng.random() < 0.4 else str(rng.choice(COLOUR_NAMES)))


def _blended(layer: Image.Image, critter: Critter, kind: str, rng: np.random.Generator) -> Image.Image:
    """Two shapes at once, as an average of two latents would show them."""
    other = critter.having(kind, _other_part(critter.parts()[kind], kind, rng))
    second = critters.draw_layer(other, kind, SIZE, SUPERSAMPLE)
    mixed = Image.blend(layer.convert("RGBa"), second.convert("RGBa"), float(rng.uniform(0.35, 0.65)))
    return mixed.convert("RGBA")


def _smeared(layer: Image.Image, critter: Critter, kind: str, rng: np.random.Generator) -> Image.Image:
    radius = rng.uniform(4.0, 8.0) * SUPERSAMPLE
    return layer.convert("RGBa").filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")


def _warped(layer: Image.Image, critter: Critter, kind: str, rng: np.random.Generator) -> Image.Image:
    """Every pixel moved by a smooth random field of several canvas units."""
    wide = layer.size[0]
    field = ndimage.zoom(rng.normal(0, 1, (2, 9, 9)), (1, wide / 9, wide / 9), order=1)[:, :wide, :wide]
    y, x = np.mgrid[:wide, :wide] + field * rng.uniform(7, 11) * SUPERSAMPLE
    pixels = np.asarray(layer.convert("RGBa"))
    moved = np.stack([ndimage.map_coordinates(pixels[..., c], [y, x], order=1) for c in range(4)], -1)
    return Image.frombytes("RGBa", layer.size, np.ascontiguousarray(moved).tobytes()).convert("RGBA")


def _erased(layer: Image.Image, critter: Critter, kind: str, rng: np.random.Generator) -> Image.Image:
    """About half of the part gone, along a straight soft cut through its middle."""
    box = layer.getchannel("A").getbbox() or (0, 0, *layer.size)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[: layer.size[1], : layer.size[0]]
    distance = (x - (box[0] + box[2]) / 2) * np.cos(angle) + (y - (box[1] + box[3]) / 2) * np.sin(angle)
    keep = 1 / (1 + np.exp(np.clip(distance / (1.5 * SUPERSAMPLE), -30, 30)))
    alpha = Image.fromarray((np.asarray(layer.getchannel("A")) * keep).astype(np.uint8))
    cut = layer.copy()
    cut.putalpha(alpha)
    return cut


_GARBLES = (_blended, _blended, _smeared, _warped, _erased)
