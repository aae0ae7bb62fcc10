"""IP tokens as a picture, so that people can look at what they have: lengths and similarities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .tokens import IPTokens

CELL = 192  # pixels of a panel's side
GAP = 12
TITLE = 16
ROWS = 8
PAPER, INK, BAR, QUIET = (250, 250, 248), (40, 40, 44), (70, 110, 190), (140, 140, 146)
COLD, WARM = np.array([49, 84, 160]), np.array([196, 62, 48])


def token_picture(tokens: IPTokens, max_rows: int = ROWS) -> Image.Image:
    """An RGB picture: for each row of tokens the lengths (dots mark the null's) and the cosine similarities.

    Similarity runs from blue (-1) over paper (0) to red (+1). With several rows, a last panel compares the
    rows with each other. Rows beyond `max_rows` are counted, not drawn.
    """
    values = tokens.tokens.numpy().astype(np.float64)
    shown = values[:max_rows]
    null = None if tokens.null is None else np.linalg.norm(tokens.null[0].double().numpy(), axis=-1)
    top = float(np.linalg.norm(shown, axis=-1).max()) or 1.0
    top = max(top, float(null.max())) if null is not None else top
    panels = [[_bars(np.linalg.norm(row, axis=-1), top, null), _heat(_cosines(row))] for row in shown]
    titles = [f"row {i}: token lengths up to {top:.3g}; similarity of the tokens" for i in range(len(shown))]
    if len(values) > 1:
        panels.append([_heat(_cosines(shown.reshape(len(shown), -1)))])
        titles.append("similarity of the rows")
    if len(values) > max_rows:
        titles[-1] += f" (first {max_rows} of {len(values)})"
    return _sheet(panels, titles)


def _cosines(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit = vectors / np.maximum(lengths, 1e-12)
    return unit @ unit.T


def _heat(values: np.ndarray) -> Image.Image:
    """(N, N) in -1..1 as colours, one square per number."""
    amount = np.clip(values, -1, 1)[..., None]
    colours = np.where(amount > 0, WARM, COLD) * abs(amount) + np.array(PAPER) * (1 - abs(amount))
    return Image.fromarray(colours.round().astype(np.uint8)).resize((CELL, CELL), Image.Resampling.NEAREST)


def _bars(lengths: np.ndarray, top: float, null: np.ndarray | None) -> Image.Image:
    panel = Image.new("RGB", (CELL, CELL), PAPER)
    pen = ImageDraw.Draw(panel)
    step = CELL / len(lengths)
    for i, length in enumerate(lengths):
        left, right = round(i * step), max(round(i * step), round((i + 1) * step) - 2)
        pen.rectangle((left, CELL - round(CELL * length / top), right, CELL), fill=BAR)
        if null is not None:
            y = CELL - round(CELL * float(null[i % len(null)]) / top)
            pen.line((left, y, right, y), fill=INK, width=2)
    pen.line((0, CELL - 1, CELL, CELL - 1), fill=QUIET)
    return panel


def _sheet(panels: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    width = 3 * GAP + 2 * CELL
    sheet = Image.new("RGB", (width, GAP + len(panels) * (TITLE + CELL + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (row, title) in enumerate(zip(panels, titles, strict=True)):
        y = GAP + i * (TITLE + CELL + GAP)
        pen.text((GAP, y), title, fill=INK)
        for j, panel in enumerate(row):
            sheet.paste(panel, (GAP + j * (CELL + GAP), y + TITLE))
    return sheet
