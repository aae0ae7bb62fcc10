"""A window of a picture for a panel, and the panel put back into the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PitError

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Crop:
    """A window of a picture, scaled to a panel, and the way back.

    source, panel: (height, width) in pixels. box: (top, left, height, width) in the source's pixels; it may
    reach beyond the picture. Points map as continuous coordinates, (0, 0) the corner of the first pixel.
    """

    source: tuple[int, int]
    box: tuple[int, int, int, int]
    panel: tuple[int, int]

    def __post_init__(self) -> None:
        top, left, height, width = self.box
        if min(*self.source, *self.panel, height, width) < 1:
            raise PitError(
                f"A crop needs sizes of at least 1 pixel, but got the picture {self.source}, the box "
                f"{self.box} and the panel {self.panel}."
            )
        if top >= self.source[0] or left >= self.source[1] or top + height <= 0 or left + width <= 0:
            raise PitError(f"The box {self.box} lies outside the picture, which is {self.source}.")

    @classmethod
    def whole(cls, source: tuple[int, int], panel: tuple[int, int]) -> Crop:
        """The smallest box of the panel's proportions that holds the whole picture, centred."""
        return cls._around((0, 0, *source), source, panel)

    @classmethod
    def around(cls, mask: Tensor, panel: tuple[int, int], context: float = 1.5) -> Crop:
        """A box of the panel's proportions around what a mask (height, width) marks.

        It is `context` times as large as the marked region's box, and inside the picture where it can be.
        Raises PitError for an empty mask, another shape, and a context below 1.
        """
        if mask.ndim != 2:
            raise PitError(f"A crop's mask has the shape (height, width), but got {tuple(mask.shape)}.")
        if not (math.isfinite(context) and context >= 1):
            raise PitError(f"A crop's context is a number of 1 or more (1.5 is usual), but got {context!r}.")
        marked = (mask > 0).nonzero()
        if not len(marked):
            raise PitError("The mask marks nothing; paint over what is to be changed.")
        top, left = (int(n) for n in marked.amin(0))
        bottom, right = (int(n) + 1 for n in marked.amax(0))
        height, width = (math.ceil(context * side) for side in (bottom - top, right - left))
        region = ((top + bottom - height) // 2, (left + right - width) // 2, height, width)
        return cls._around(region, (mask.shape[0], mask.shape[1]), panel)

    @classmethod
    def _around(
        cls, region: tuple[int, int, int, int], source: tuple[int, int], panel: tuple[int, int]
    ) -> Crop:
        top, left, height, width = region
        tall = max(height, math.ceil(width * panel[0] / max(1, panel[1])))
        wide = max(width, math.ceil(height * panel[1] / max(1, panel[0])))
        top = _shifted(top - (tall - height) // 2, tall, source[0])
        left = _shifted(left - (wide - width) // 2, wide, source[1])
        return cls(source, (top, left, tall, wide), panel)

    def to_panel(self, y: float, x: float) -> tuple[float, float]:
        """A point of the source as a point of the panel."""
        top, left, height, width = self.box
        return (y - top) * self.panel[0] / height, (x - left) * self.panel[1] / width

    def to_source(self, y: float, x: float) -> tuple[float, float]:
        """A point of the panel as a point of the source."""
        top, left, height, width = self.box
        return y * height / self.panel[0] + top, x * width / self.panel[1] + left

    def apply(self, picture: Tensor, fill: float = 1.0) -> Tensor:
        """The window of a picture (B, H, W, C), or of a mask (B, H, W), at the panel's size.

        `fill` is what lies beyond the picture: 1 is white, and 0 is for masks.
        """
        self._check(picture, self.source, "picture")
        height, width = self.box[2:]
        window = picture.new_full((len(picture), height, width, *picture.shape[3:]), fill)
        ours, theirs = self._overlap()
        window[ours] = picture[theirs]
        return _resized(window, self.panel)

    def restore(self, panel: Tensor, picture: Tensor, mask: Tensor | None = None) -> Tensor:
        """The picture (B, H, W, C) with the panel put back where it came from.

        mask: (B, H, W), the source's own; between 0 and 1 it blends; where it is 0, and outside the box,
        pixels stay bit for bit. Where the box has the panel's size nothing is resampled, and a panel that was
        not changed gives the picture back exactly.
        """
        self._check(panel, self.panel, "panel")
        self._check(picture, self.source, "picture")
        ours, theirs = self._overlap()
        window, old = _resized(panel.to(picture), self.box[2:])[ours], picture[theirs]
        if mask is not None:
            self._check(mask, self.source, "mask", (3,))
            window = torch.lerp(old, window, mask.to(picture).clamp(0, 1)[theirs][..., None])
        out = picture.clone() if len(window) == len(picture) else picture.repeat(len(window), 1, 1, 1)
        out[theirs] = window
        return out

    def _overlap(self) -> tuple[Index, Index]:
        """Where box and picture meet, as an index into the box and one into the picture."""
        inside, outside = [slice(None)], [slice(None)]
        for start, length, size in zip(self.box[:2], self.box[2:], self.source, strict=True):
            low, high = max(0, start), min(size, start + length)
            inside.append(slice(low - start, high - start))
            outside.append(slice(low, high))
        return tuple(inside), tuple(outside)

    def _check(
        self, given: Tensor, size: tuple[int, int], name: str, sides: tuple[int, ...] = (3, 4)
    ) -> None:
        if given.ndim not in sides or tuple(given.shape[1:3]) != size or 0 in given.shape:
            raise PitError(
                f"The {name} of this crop has the shape (batch, {size[0]}, {size[1]}, ...), but got "
                f"{tuple(given.shape)}."
            )


def _shifted(start: int, length: int, size: int) -> int:
    """Where a stretch of that length begins, to lie inside 0-size if it can, centred if it cannot."""
    return min(max(start, 0), size - length) if length <= size else (size - length) // 2


def _resized(picture: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, H, W, C) or (B, H, W), bicubic or for masks bilinear; the same tensor where it fits already."""
    if tuple(picture.shape[1:3]) == tuple(size):
        return picture
    planes = picture.movedim(-1, 1) if picture.ndim == 4 else picture[:, None]
    mode = "bicubic" if picture.ndim == 4 else "bilinear"
    planes = F.interpolate(planes, size=tuple(size), mode=mode, antialias=True).clamp(0, 1)
    return planes.movedim(1, -1) if picture.ndim == 4 else planes[:, 0]
