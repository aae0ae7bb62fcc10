"""Where things are on the canvas of a diptych: panels, margins, tokens.

Diptych Prompting (arXiv 2411.15466): the reference on the left panel, the picture to be made on the right, a
margin around each that is trimmed afterwards. Every panel is a whole number of tokens wide and high, so that
the seam between them is a token's edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..errors import PitError

TOKEN = 16  # pixels along a side of one Flux token: 8 of the VAE times a patch of 2


@dataclass(frozen=True)
class DiptychLayout:
    """Sizes in pixels, without the margin, which surrounds each panel on all sides.

    width, height: the right panel, the picture to be made. reference_width: the left panel's, the same as
    `width` if None; narrower saves work, its height is the same. Raises PitError for sizes that are not whole
    and positive or that do not make whole tokens of 16 pixels, margins included.
    """

    width: int = 768
    height: int = 768
    reference_width: int | None = None
    margin: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.margin, int) or self.margin < 0:
            raise PitError(
                f"A panel's margin is a whole number of 0 or more pixels, but got {self.margin!r}."
            )
        self._check_side("width", self.width)
        self._check_side("height", self.height)
        self._check_side("reference width", self.left_width)

    @property
    def left_width(self) -> int:
        return self.width if self.reference_width is None else self.reference_width

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) of both panels with their margins."""
        return self.height + 2 * self.margin, self.left_width + self.width + 4 * self.margin

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in tokens, as `panel_attention` takes it."""
        return self.canvas[0] // TOKEN, self.canvas[1] // TOKEN

    @property
    def columns(self) -> int:
        """The left panel's width in tokens, as `panel_attention` takes it."""
        return self.seam // TOKEN

    @property
    def seam(self) -> int:
        """The first pixel column of the right panel, margin included."""
        return self.left_width + 2 * self.margin

    def compose(
        self, reference: Tensor, target: Tensor | None = None, edit: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The canvas (B, H, W, C) and its mask (B, H, W), 1 where a picture is to be made.

        reference: (B, height, left_width, C) in 0-1, on a white margin. Without a target all of the right
        panel is made. With target (B, height, width, C), whose edge pixels fill its margin, only what `edit`
        (B, height, width) marks is made, all of the panel without `edit`. One row serves all.
        """
        self._check_picture("reference", reference, self.left_width)
        panels = [reference] if target is None else [reference, target]
        if target is not None:
            self._check_picture("target", target, self.width, reference.shape[-1])
        if edit is not None:
            if target is None:
                raise PitError("A mask of what to edit needs the picture that is edited, but got no target.")
            self._check_shape("mask of what to edit", edit, (self.height, self.width), 3)
            panels.append(edit)
        batch = max(len(panel) for panel in panels)
        if any(len(panel) not in (1, batch) for panel in panels):
            rows = ", ".join(str(len(panel)) for panel in panels)
            raise PitError(f"The panels have {rows} rows, but need one row for all or as many as each other.")

        canvas = reference.new_zeros(batch, *self.canvas, reference.shape[-1])
        canvas[:, :, : self.seam] = 1
        canvas[self._inside(0, self.left_width)] = reference
        mask = reference.new_zeros(batch, *self.canvas)
        mask[:, :, self.seam :] = 1
        if target is not None:
            canvas[:, :, self.seam :] = _with_margin(target, self.margin)
        if edit is not None:
            mask[:, :, self.seam :] = _with_margin(edit[..., None], self.margin)[..., 0]
        return canvas, mask

    def crop(self, canvas: Tensor) -> Tensor:
        """The right panel without its margin: (B, H, W, C) -> (B, height, width, C)."""
        return self._checked(canvas)[self._inside(self.seam, self.width)]

    def left_panel(self, canvas: Tensor) -> Tensor:
        """The left panel without its margin: (B, H, W, C) -> (B, height, left_width, C)."""
        return self._checked(canvas)[self._inside(0, self.left_width)]

    def strength_map(self, mask: Tensor, strength: float, outside: float = 1.0) -> Tensor:
        """A strength for each of the left panel's tokens, from a mask (B, height, left_width) of the subject.

        -> (B, h * columns) for `panel_attention`: `strength` where the mask is 1, `outside` where it is 0,
        by the part of each token that it covers; the margin counts as its nearest pixel.
        """
        self._check_shape("mask of the subject", mask, (self.height, self.left_width), 3)
        return outside + (strength - outside) * self._covered(mask)

    def covered(self, mask: Tensor) -> Tensor:
        """How much of each of the right panel's tokens a mask (B, height, width) covers: (B, tokens), 0-1."""
        self._check_shape("mask of the target", mask, (self.height, self.width), 3)
        return self._covered(mask)

    def _covered(self, mask: Tensor) -> Tensor:
        planes = _with_margin(mask.float()[..., None], self.margin).movedim(-1, 1)
        return F.avg_pool2d(planes, TOKEN)[:, 0].flatten(1)

    def _checked(self, canvas: Tensor) -> Tensor:
        if canvas.ndim != 4 or tuple(canvas.shape[1:3]) != self.canvas:
            height, width = self.canvas
            raise PitError(
                f"The diptych has the shape (batch, {height}, {width}, channels), but got "
                f"{tuple(canvas.shape)}; give the picture that was made with this layout."
            )
        return canvas

    def _inside(self, left: int, width: int) -> tuple[slice, slice, slice]:
        """Index of a panel's rows and columns without its margin; `left` is the panel's first column."""
        m = self.margin
        return slice(None), slice(m, m + self.height), slice(left + m, left + m + width)

    def _check_side(self, name: str, side: int) -> None:
        whole = isinstance(side, int) and side > 0
        if whole and (side + 2 * self.margin) % TOKEN == 0:
            return
        near = "a whole number of pixels"
        if whole:
            tokens = max(1 + 2 * self.margin // TOKEN, (side + 2 * self.margin) // TOKEN)
            low, high = (n * TOKEN - 2 * self.margin for n in (tokens, tokens + 1))
            near = f"{low} or {high}" if low > 0 else f"{high}"
        raise PitError(
            f"With a margin of {self.margin}, a panel's {name} plus two margins is a multiple of {TOKEN}, "
            f"but got {side!r}; use {near}."
        )

    def _check_picture(self, name: str, picture: Tensor, width: int, channels: int | None = None) -> None:
        self._check_shape(f"{name} panel", picture, (self.height, width), 4)
        if channels is not None and picture.shape[-1] != channels:
            raise PitError(f"The panels have {channels} and {picture.shape[-1]} channels; give both as RGB.")

    def _check_shape(self, name: str, given: Tensor, size: tuple[int, int], ndim: int) -> None:
        if given.ndim != ndim or tuple(given.shape[1:3]) != size or 0 in given.shape:
            sides = f"batch, {size[0]}, {size[1]}" + (", channels" if ndim == 4 else "")
            raise PitError(f"The {name} has the shape ({sides}), but got {tuple(given.shape)}.")


def _with_margin(panel: Tensor, margin: int) -> Tensor:
    """The panel (B, H, W, C) with its edge pixels repeated on all sides."""
    return F.pad(panel.movedim(-1, 1), (margin,) * 4, mode="replicate").movedim(1, -1)
