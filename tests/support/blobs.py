"""A source of part data that draws an ellipse for each picture, in no time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pit_core.parts.generate import Order, Rejected
from pit_core.parts.masks import Found, Piece, cut_out
from pit_core.parts.sources import noise_seed


class Blobs:
    """Every fourth picture cannot be used; every second of the others has two parts.

    stop_at: the picture at which Ctrl-C is pressed. slow: seconds that the search for parts takes.
    """

    def __init__(self, seed: int = 0, batch: int = 2, *, stop_at: int = -1, slow: float = 0.0) -> None:
        self.seed, self.batch, self.stop_at, self.slow = seed, batch, stop_at, slow
        self.entry: Mapping[str, Any] = {"seed": seed}
        self.drawn: list[int] = []

    def order(self, index: int) -> Order:
        return Order(index, f"blob {index}", noise_seed(self.seed, index), "blobs", f"{index:06d}")

    def draw(self, orders: Sequence[Order]) -> list[Image.Image | Rejected]:
        self.drawn += [order.index for order in orders]
        if self.stop_at in self.drawn:
            raise KeyboardInterrupt
        return [self._blob(order) for order in orders]

    def find(self, image: Image.Image, order: Order) -> list[Piece] | Rejected:
        time.sleep(self.slow)
        if order.index % 4 == 3:
            return Rejected("too few parts")
        return [cut_out(image, Found("blob", np.asarray(image.convert("L")) < 250))] * (1 + order.index % 2)

    def _blob(self, order: Order) -> Image.Image:
        image = Image.new("RGB", (40, 40), "white")
        colour = (order.seed % 200, order.index * 9 % 200, 40)
        ImageDraw.Draw(image).ellipse([8, 8, 20 + order.seed % 9, 30], fill=colour)
        return image
