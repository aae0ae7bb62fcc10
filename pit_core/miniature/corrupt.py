"""Broken critters with known damage, so that a reader learns to call a mess a mess.

A part can be missing, doubled, or garbled: blended with another, smeared, warped, or half erased. The labels
say which, as far as the picture shows it: damage is done to what can be seen of a part, and a part that the
damage of others covers is absent.
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
COVERED = 0.3  # of what was seen of a part, below which it counts as absent
ADDED, TRIES = (
    0.5,
    6,
)  # how much of a part a second one has to add to what is seen, and how often that is tried


Layers = dict[str, Image.Image]


def corrupt(critter: Critter, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A damaged picture (128, 128, 3) uint8 and its labels (LABELS,)."""
    layers = {kind: critters.draw_layer(critter, kind, SIZE, SUPERSAMPLE) for kind in KINDS}
    labels = labels_of(critter)
    present = list(critter.parts())
    before = {kind: _visible(layers, kind).sum() for kind in present}
    for kind in rng.choice(present, size=int(rng.integers(1, min(3, len(present)) + 1)), replace=False):
        state = _damage(layers, critter, str(kind), rng)
        _relabel(labels, str(kind), state)
    for kind in present:
        if _visible(layers, kind).sum() < COVERED * before[kind]:
            _relabel(labels, kind, ABSENT)
    ordered = [layers[kind] for kind in BACK_TO_FRONT]
    image = critters.compose(
        ordered, critter.style, critters.draw_scene(critter.scene, SIZE, critter.scene_seed)
    )
    return np.asarray(image), labels


def _relabel(labels: np.ndarray, kind: str, state: int) -> None:
    slot = KINDS.index(kind)
    labels[slot], labels[len(KINDS) + slot] = state, NO_COLOUR


def _visible(layers: Layers, kind: str) -> np.ndarray:
    """(H, W) in [0, 1]: what of a part nothing in front of it covers."""
    seen = _alpha(layers[kind])
    for front in BACK_TO_FRONT[BACK_TO_FRONT.index(kind) + 1 :]:
        seen = seen * (1 - _alpha(layers[front]))
    return seen


def _alpha(layer: Image.Image) -> np.ndarray:
    return np.asarray(layer.getchannel("A"), dtype=np.float32) / 255


def _damage(layers: Layers, critter: Critter, kind: str, rng: np.random.Generator) -> int:
    """Damage one of the layers; the state that a reader should see."""
    choice = rng.random()
    if choice < 0.25:
        layers[kind] = Image.new("RGBA", layers[kind].size, (0, 0, 0, 0))
        return ABSENT
    if choice < 0.5:
        layers[kind] = _doubled(layers, critter, kind, rng)
        return DOUBLED
    garble = _GARBLES[int(rng.integers(len(_GARBLES)))]
    layers[kind] = garble(layers, critter, kind, rng)
    return GARBLED


def _doubled(layers: Layers, critter: Critter, kind: str, rng: np.random.Generator) -> Image.Image:
    """The part a second time, clearly elsewhere: mirrored for a tail, moved or turned for the rest.

    Of a few places the first is taken at which enough of the second one is seen, or else the best.
    """
    least = ADDED * _visible(layers, kind).sum()
    tried = []
    for _ in range(TRIES):
        again = critters.draw_layer(_moved(critter, kind, rng), kind, SIZE, SUPERSAMPLE)
        both = Image.alpha_composite(again, layers[kind])
        added = _visible({**layers, kind: both}, kind).sum() - _visible(layers, kind).sum()
        tried.append((added, both))
        if added >= least:
            break
    return max(tried, key=lambda each: each[0])[1]


def _moved(critter: Critter, kind: str, rng: np.random.Generator) -> Critter:
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
    return replace(critter, pose=moves[kind]())


def _other_part(part: Part, rng: np.random.Generator, kind: str) -> Part:
    """Another shape in another colour, of the same kind."""
    shape = str(rng.choice([s for s in SHAPES[kind] if s != part.shape]))
    return Part(shape, str(rng.choice([c for c in COLOUR_NAMES if c != part.colour])))


def _blended(layers: Layers, critter: Critter, kind: str, rng: np.random.Generator) -> Image.Image:
    """Two shapes at once, as an average of two latents would show them."""
    other = critter.having(kind, _other_part(critter.parts()[kind], rng, kind))
    second = critters.draw_layer(other, kind, SIZE, SUPERSAMPLE)
    mixed = Image.blend(layers[kind].convert("RGBa"), second.convert("RGBa"), float(rng.uniform(0.35, 0.65)))
    return mixed.convert("RGBA")


def _smeared(layers: Layers, critter: Critter, kind: str, rng: np.random.Generator) -> Image.Image:
    radius = rng.uniform(4.0, 8.0) * SUPERSAMPLE
    return layers[kind].convert("RGBa").filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")


def _warped(layers: Layers, critter: Critter, kind: str, rng: np.random.Generator) -> Image.Image:
    """Every pixel moved by a random field as fine as the part, which is torn rather than moved."""
    layer, nodes = layers[kind], 17
    wide = layer.size[0]
    field = ndimage.zoom(rng.normal(0, 1, (2, nodes, nodes)), (1, wide / nodes, wide / nodes), order=1)
    y, x = np.mgrid[:wide, :wide] + field[:, :wide, :wide] * rng.uniform(6, 9) * SUPERSAMPLE
    pixels = np.asarray(layer.convert("RGBa"))
    moved = np.stack([ndimage.map_coordinates(pixels[..., c], [y, x], order=1) for c in range(4)], -1)
    return Image.frombytes("RGBa", layer.size, np.ascontiguousarray(moved).tobytes()).convert("RGBA")


def _erased(layers: Layers, critter: Critter, kind: str, rng: np.random.Generator) -> Image.Image:
    """About half of what is seen of the part gone, along a straight soft cut through its middle."""
    layer, seen = layers[kind], _visible(layers, kind)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[: seen.shape[0], : seen.shape[1]]
    along = x * np.cos(angle) + y * np.sin(angle)
    shown = along[seen > 0.5]
    distance = along - (np.median(shown) if shown.size else np.median(along))
    keep = 1 / (1 + np.exp(np.clip(distance / (1.5 * SUPERSAMPLE), -30, 30)))
    alpha = Image.fromarray((np.asarray(layer.getchannel("A")) * keep).astype(np.uint8))
    cut = layer.copy()
    cut.putalpha(alpha)
    return cut


_GARBLES = (_blended, _blended, _smeared, _warped, _erased)
