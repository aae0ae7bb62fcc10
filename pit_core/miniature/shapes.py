"""The outlines of all part shapes, a function each: half the body's width in canvas units -> polygons.

A polygon's role says how it is coloured: main, light and dark shades of the part's colour, white, or black.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .geometry import Point, Polygon, bezier, both_sides, ellipse, stroke


def outlines(kind: str, shape: str, build: float) -> list[Polygon]:
    """The polygons of a part, back to front, for a critter of this build."""
    return _OUTLINES[kind][shape](19.0 + 13.0 * build)


# bodies: all have two feet and a mouth


def _body(outline: list[Point], w: float, foot: float = 0.5) -> list[Polygon]:
    feet = both_sides([(ellipse(64 + w * foot, 101.5, 7.5, 4.5), "dark")])
    mouth = stroke(bezier((58, 87), (61, 91), (67, 91), (70, 87)), 2.6, 2.6)
    return [*feet, (outline, "main"), (mouth, "black")]


def _round_body(w: float) -> list[Polygon]:
    return _body(ellipse(64, 76, w * 1.05, 26), w)


def _box_body(w: float) -> list[Polygon]:
    return _body(ellipse(64, 76, w, 25, power=6.0), w)


def _pear_body(w: float) -> list[Polygon]:
    return _body(_widening(w, 0.55, 1.2), w)


def _turnip_body(w: float) -> list[Polygon]:
    return _body(_widening(w, 1.2, 0.5), w, foot=0.42)


def _widening(w: float, top: float, bottom: float) -> list[Point]:
    """An egg whose width goes smoothly from ``top`` to ``bottom``."""
    outline = []
    for x, y in ellipse(0, 0, 1, 1):
        t = (y + 1) / 2
        outline.append((64 + x * w * (top + (bottom - top) * t * t * (3 - 2 * t)), 76 + 26 * y))
    return outline


# eyes: the same on every body


def _round_eyes(w: float) -> list[Polygon]:
    return both_sides(
        [
            (ellipse(75, 68, 10, 10), "white"),
            (ellipse(75, 68, 7.2, 7.2), "main"),
            (ellipse(75, 68, 3.0, 3.0), "black"),
        ]
    )


def _cyclops_eyes(w: float) -> list[Polygon]:
    return [
        (ellipse(64, 69, 14.5, 14.5), "white"),
        (ellipse(64, 69, 10.5, 10.5), "main"),
        (ellipse(64, 69, 4.5, 4.5), "black"),
    ]


def _sleepy_eyes(w: float) -> list[Polygon]:
    half = [(x, y) for x, y in ellipse(75, 66, 10.5, 10.5) if y >= 65.9]
    iris = [(x, y) for x, y in ellipse(75, 66, 7.6, 7.6) if y >= 65.9]
    lid = stroke([(64.2, 66), (75, 65.4), (86, 66)], 3.4, 3.4)
    return both_sides([(half, "white"), (iris, "main"), (lid, "black")])


def _slit_eyes(w: float) -> list[Polygon]:
    upper = bezier((64.5, 72), (69, 60), (80, 58), (87, 61))
    lower = bezier((87, 61), (86, 72), (77, 79), (64.5, 72))
    return both_sides([(upper + lower, "main"), (ellipse(76, 67.3, 2.2, 6.2), "black")])


# ears and what grows in their place


def _cat_ears(w: float) -> list[Polygon]:
    outer: list[Point] = [(64 + 0.1 * w, 55), (64 + 0.72 * w, 25), (64 + 0.92 * w, 66)]
    inner: list[Point] = [(64 + 0.35 * w, 52), (64 + 0.68 * w, 34), (64 + 0.78 * w, 58)]
    return both_sides([(outer, "main"), (inner, "light")])


def _bunny_ears(w: float) -> list[Polygon]:
    x = 64 + 0.42 * w
    return both_sides([(ellipse(x, 35, 7, 22, 8), "main"), (ellipse(x, 35, 3.4, 15, 8), "light")])


def _horns(w: float) -> list[Polygon]:
    path = bezier((64 + 0.5 * w, 62), (64 + 1.15 * w, 52), (64 + 1.25 * w, 38), (64 + 0.85 * w, 24))
    return both_sides([(stroke(path, 13, 1.5), "main")])


def _antennae(w: float) -> list[Polygon]:
    path = bezier((64 + 0.25 * w, 56), (64 + 0.25 * w, 42), (64 + 0.4 * w, 34), (64 + 0.62 * w, 29))
    return both_sides([(stroke(path, 4, 4), "dark"), (ellipse(64 + 0.65 * w, 26, 8, 8), "main")])


# wings: (x, y) is the right shoulder


def _shoulder(w: float) -> Point:
    return 64 + 0.7 * w, 74.0


def _bat_wings(w: float) -> list[Polygon]:
    x, y = _shoulder(w)
    edge = [(x - 4, y - 10), (x + 12, y - 30), (x + 34, y - 24)]
    scallops = [
        *bezier((x + 34, y - 24), (x + 26, y - 16), (x + 26, y - 8), (x + 30, y), 8),
        *bezier((x + 30, y), (x + 22, y - 5), (x + 18, y), (x + 19, y + 8), 8),
        *bezier((x + 19, y + 8), (x + 11, y + 3), (x + 4, y + 4), (x - 4, y + 8), 8),
    ]
    return both_sides([(edge + scallops, "main")])


def _feather_wings(w: float) -> list[Polygon]:
    x, y = _shoulder(w)
    lobes = [(x + 12, y + 5, 17, 6.5, 20), (x + 15, y - 5, 20, 7.5, -12), (x + 13, y - 15, 22, 7.5, -48)]
    return both_sides([(ellipse(*lobe), "main") for lobe in lobes])


def _butterfly_wings(w: float) -> list[Polygon]:
    x, y = _shoulder(w)
    return both_sides(
        [
            (ellipse(x + 10, y + 10, 11, 10), "main"),
            (ellipse(x + 16, y - 12, 17, 15, -20), "main"),
            (ellipse(x + 18, y - 13, 8, 7, -20), "light"),
        ]
    )


def _leaf_wings(w: float) -> list[Polygon]:
    x, y = _shoulder(w)
    upper = bezier((x - 4, y), (x + 4, y - 26), (x + 24, y - 30), (x + 36, y - 26))
    lower = bezier((x + 36, y - 26), (x + 36, y - 10), (x + 20, y + 8), (x - 4, y))
    rib = stroke(bezier((x, y - 2), (x + 10, y - 12), (x + 20, y - 18), (x + 28, y - 21)), 3, 2.4)
    return both_sides([(upper + lower, "main"), (rib, "light")])


# tails: (x, y) is where they begin, low on the right


def _root(w: float) -> Point:
    return 64 + 0.55 * w, 94.0


def _bushy_tail(w: float) -> list[Polygon]:
    x, y = _root(w)
    return [(ellipse(x + 19, y - 6, 23, 9.5, -28), "main"), (ellipse(x + 32, y - 13, 8, 7.5, -28), "light")]


def _curl_tail(w: float) -> list[Polygon]:
    x, y = _root(w)
    spiral = []
    for step in range(40):
        t = step / 39
        angle, radius = math.radians(100 - 420 * t), 15 - 9 * t
        spiral.append((x + 24 + radius * math.cos(angle), y - 9 + radius * math.sin(angle)))
    return [(stroke([(x - 4, y + 1), (x + 10, y + 4), *spiral], 6.5, 5.0), "main")]


def _arrow_tail(w: float) -> list[Polygon]:
    x, y = _root(w)
    path = bezier((x - 4, y), (x + 12, y + 8), (x + 22, y + 4), (x + 28, y - 8))
    tip = [(x + 18, y - 6), (x + 37, y - 25), (x + 39, y + 1), (x + 29, y - 4)]
    return [(stroke(path, 6, 4.5), "main"), (tip, "main")]


def _fin_tail(w: float) -> list[Polygon]:
    x, y = _root(w)
    fin = [(x + 14, y - 2), (x + 38, y - 22), (x + 33, y - 3), (x + 40, y + 13), (x + 14, y + 3)]
    return [(stroke([(x - 4, y), (x + 8, y + 1), (x + 18, y)], 10, 8), "main"), (fin, "main")]


_OUTLINES: dict[str, dict[str, Callable[[float], list[Polygon]]]] = {
    "body": {"round": _round_body, "box": _box_body, "pear": _pear_body, "turnip": _turnip_body},
    "eyes": {
        "round": _round_eyes,
        "cyclops": _cyclops_eyes,
        "sleepy": _sleepy_eyes,
        "slit": _slit_eyes,
    },
    "ears": {"cat": _cat_ears, "bunny": _bunny_ears, "horn": _horns, "antenna": _antennae},
    "wings": {
        "bat": _bat_wings,
        "feather": _feather_wings,
        "butterfly": _butterfly_wings,
        "leaf": _leaf_wings,
    },
    "tail": {"bushy": _bushy_tail, "curl": _curl_tail, "arrow": _arrow_tail, "fin": _fin_tail},
}
