"""Parts as sketches: the contours of the foreground, drawn with a few smooth strokes.

The augmentation that lets a prior take drawings: 8 to 15 cubic Bezier curves, allotted to the contours by arc
length, black on white, each left out now and then. "Piece it Together" (arXiv 2503.10365); the fit
with fixed end points follows Schneider 1990, "An Algorithm for Automatically Fitting Digitized Curves".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ..errors import PitError
from .canvas import flatten

CURVES = (8, 15)
DROP = 0.1
WIDTH = 2.0  # pixels
PAPER = 20  # how far from white a pixel has to be to count as foreground, of 255
TRACED = 512  # contours are traced at this size at most; strokes are smoother than that anyway
SHORT = 0.03  # contours below this share of the longest are specks


Corner = tuple[int, int]


def sketch(
    image: Image.Image,
    *,
    seed: int | None = None,
    curves: tuple[int, int] = CURVES,
    drop: float = DROP,
    width: float = WIDTH,
) -> Image.Image:
    """A sketch of what stands on white in `image` (any mode, transparency counts as white), RGB, same size.

    `curves` bounds the number of strokes, `drop` is each stroke's chance to be left out (one always stays),
    `width` is theirs in pixels. The same seed gives the same sketch. A white picture stays white.
    Raises PitError for values out of range.
    """
    if not (2 <= curves[0] <= curves[1] and 0 <= drop <= 1 and width > 0):
        raise PitError(
            "Expected at least 2 curves, a drop from 0 to 1 and a positive width, "
            f"got {curves}, {drop}, {width}."
        )
    rng = np.random.default_rng(seed)
    loops = contours(foreground(image))
    strokes = fit_strokes(loops, int(rng.integers(curves[0], curves[1] + 1)))
    kept = [stroke for stroke in strokes if rng.random() >= drop] or strokes[:1]
    return _draw(kept, image.size, width)


def as_sketch(image: Image.Image) -> Image.Image:
    """The sketch without chance: 12 strokes, none left out. Raises PitError where nothing stands on white."""
    if not foreground(image).any():
        raise PitError(
            "A sketch is drawn along the outline of what stands on white, but this picture is white."
        )
    return sketch(image, seed=0, curves=(12, 12), drop=0.0)


def foreground(image: Image.Image) -> np.ndarray:
    """(H, W) bool: pixels that differ from white, specks of one pixel removed and filled."""
    darkest = np.asarray(flatten(image)).min(axis=-1)
    mask = Image.fromarray((darkest < 255 - PAPER).astype(np.uint8) * 255)
    if min(image.size) < 3:
        return np.asarray(mask) > 0
    return np.asarray(mask.filter(ImageFilter.MedianFilter(3))) > 0


def contours(mask: np.ndarray) -> list[np.ndarray]:
    """The closed outlines of a (H, W) bool mask, longest first: each (N, 2) float, x and y in pixels.

    Holes have outlines of their own. Outlines much shorter than the longest are left out.
    """
    scale = max(1.0, max(mask.shape) / TRACED)
    if scale > 1:
        size = (max(1, round(mask.shape[1] / scale)), max(1, round(mask.shape[0] / scale)))
        small = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
        mask, factors = np.asarray(small) > 127, np.array([mask.shape[1] / size[0], mask.shape[0] / size[1]])
    else:
        factors = np.ones(2)
    loops = sorted(_loops(mask), key=len, reverse=True)
    return [loop * factors for loop in loops if len(loop) >= SHORT * len(loops[0])]


def fit_strokes(loops: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """`count` cubic Bezier curves along the loops (longest first), each (4, 2): ends and two control points.

    Every loop gets at least two, so the shortest are left out where `count` does not reach.
    """
    loops = loops[: count // 2]
    if not loops:
        return []
    strokes = []
    for loop, share in zip(loops, _allot([_length(loop) for loop in loops], count), strict=True):
        strokes += [fit_cubic(piece) for piece in _pieces(loop, share)]
    return strokes


def fit_cubic(points: np.ndarray) -> np.ndarray:
    """The cubic Bezier curve (4, 2) that starts and ends with `points` (N, 2) and fits the rest best.

    Least squares over the two inner control points, at chord-length parameters.
    """
    first, last = points[0], points[-1]
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    total = steps.sum()
    if len(points) < 4 or total == 0:
        return np.stack([first, first + (last - first) / 3, first + 2 * (last - first) / 3, last])
    t = np.concatenate([[0.0], np.cumsum(steps)]) / total
    weights = _bernstein(t)
    rest = points - weights[:, [0]] * first - weights[:, [3]] * last
    inner, *_ = np.linalg.lstsq(weights[:, 1:3], rest, rcond=None)
    return np.stack([first, inner[0], inner[1], last])


def curve_points(stroke: np.ndarray, count: int = 48) -> np.ndarray:
    """(count, 2) points along a cubic Bezier curve (4, 2)."""
    return _bernstein(np.linspace(0, 1, count)) @ stroke


def _bernstein(t: np.ndarray) -> np.ndarray:
    s = 1 - t
    return np.stack([s**3, 3 * s**2 * t, 3 * s * t**2, t**3], axis=1)


def _loops(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines along the cracks between pixels, as the cracks' midpoints in order."""
    starts = _cracks(mask)
    loops = []
    while starts:
        corner = next(iter(starts))
        middles = []
        while corner in starts:
            ends = starts[corner]
            following = ends.pop()
            if not ends:
                del starts[corner]
            middles.append(((corner[0] + following[0]) / 2, (corner[1] + following[1]) / 2))
            corner = following
        loops.append(np.array(middles))
    return loops


def _cracks(mask: np.ndarray) -> dict[Corner, list[Corner]]:
    """Corner (x, y) -> the corners that the outline goes on to, the foreground always on the right."""
    padded = np.pad(mask, 1).astype(np.int8)
    starts: dict[Corner, list[Corner]] = {}
    for y, x, sign in _steps(np.diff(padded, axis=0)):  # a horizontal crack above pixel (x - 1, y)
        a, b = (x - 1, y), (x, y)
        starts.setdefault(a if sign > 0 else b, []).append(b if sign > 0 else a)
    for y, x, sign in _steps(np.diff(padded, axis=1)):  # a vertical crack left of pixel (x, y - 1)
        a, b = (x, y), (x, y - 1)
        starts.setdefault(a if sign > 0 else b, []).append(b if sign > 0 else a)
    return starts


def _steps(change: np.ndarray) -> list[tuple[int, int, int]]:
    return [(y, x, int(change[y, x])) for y, x in np.argwhere(change).tolist()]


def _length(loop: np.ndarray) -> float:
    return float(np.linalg.norm(np.diff(loop, axis=0, append=loop[:1]), axis=1).sum())


def _allot(lengths: Sequence[float], count: int) -> list[int]:
    """Whole shares of `count` in proportion to the lengths, at least 2 each (largest remainder)."""
    spare = count - 2 * len(lengths)
    exact = [spare * length / sum(lengths) for length in lengths]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: spare - sum(shares)]:
        shares[i] += 1
    return [share + 2 for share in shares]


def _pieces(loop: np.ndarray, count: int) -> list[np.ndarray]:
    """The closed loop cut into `count` runs of equal length that share their ends."""
    closed = np.concatenate([loop, loop[:1]])
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1))])
    cuts = np.searchsorted(along, np.linspace(0, along[-1], count + 1)[1:-1])
    bounds = [0, *cuts.tolist(), len(closed) - 1]
    return [closed[a : b + 1] for a, b in pairwise(bounds) if b > a]


def _draw(strokes: Sequence[np.ndarray], size: tuple[int, int], width: float) -> Image.Image:
    zoom = 2 if max(size) >= 512 else 4
    paper = Image.new("L", (size[0] * zoom, size[1] * zoom), 255)
    pen = ImageDraw.Draw(paper)
    for stroke in strokes:
        line = [(float(x), float(y)) for x, y in curve_points(stroke) * zoom]
        pen.line(line, fill=0, width=max(1, round(width * zoom)), joint="curve")
    return paper.resize(size, Image.Resampling.BOX).convert("RGB")
