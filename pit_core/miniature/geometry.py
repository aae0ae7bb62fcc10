"""Points and outlines on a canvas of 128 x 128 units, y down."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .world import CANVAS, Pose

Point = tuple[float, float]
Polygon = tuple[list[Point], str]  # points on the canvas, colour role

MIDDLE = CANVAS // 2
FEET = 68  # poses scale and turn about (MIDDLE, FEET)


def ellipse(
    cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, power: float = 2.0
) -> list[Point]:
    """48 points of a superellipse: power 2 is an ellipse, higher powers near a box; angle in degrees."""
    turn = math.radians(angle)
    cos, sin = math.cos(turn), math.sin(turn)
    points = []
    for step in range(48):
        t = 2 * math.pi * step / 48
        x = rx * math.copysign(abs(math.cos(t)) ** (2 / power), math.cos(t))
        y = ry * math.copysign(abs(math.sin(t)) ** (2 / power), math.sin(t))
        points.append((cx + x * cos - y * sin, cy + x * sin + y * cos))
    return points


def stroke(path: Sequence[Point], start: float, end: float) -> list[Point]:
    """The outline of a tapering stroke along a path, from width ``start`` to ``end``."""
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


def bezier(a: Point, b: Point, c: Point, d: Point, count: int = 24) -> list[Point]:
    """``count + 1`` points of the cubic curve from a to d."""
    points = []
    for step in range(count + 1):
        t = step / count
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        x, y = (sum(w * p[axis] for w, p in zip(weights, (a, b, c, d), strict=True)) for axis in (0, 1))
        points.append((x, y))
    return points


def both_sides(polygons: Iterable[Polygon]) -> list[Polygon]:
    """The polygons and their mirror images."""
    right = list(polygons)
    return right + [([(2 * MIDDLE - x, y) for x, y in points], role) for points, role in right]


def placed(points: Iterable[Point], pose: Pose, size: float) -> list[Point]:
    """Canvas points as the pose moves them, in pixels of a ``size`` wide picture."""
    turn, unit = math.radians(pose.rotation), size / CANVAS
    cos, sin = math.cos(turn), math.sin(turn)
    flip = -1.0 if pose.mirror else 1.0
    out = []
    for x, y in points:
        x, y = (x - MIDDLE) * flip * pose.scale, (y - FEET) * pose.scale
        out.append(
            (
                (x * cos - y * sin + MIDDLE + pose.dx) * unit,
                (x * sin + y * cos + FEET + pose.dy) * unit,
            )
        )
    return out
