"""What runs inside the model's text cross-attention: any number of applied tokens, added to what was there.

Everything here is shared between clones of a model and never changes after it is made, but for the copies of
keys and values on the device, which a run makes on first use and `release` drops. For SDXL in half precision
these are 11 MB for each row of tokens, in float32 twice as much, times the pictures that were concatenated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..pit_core.errors import PitError
from ..pit_core.ip_adapter.attention import image_term, resize_mask, token_grid
from ..pit_core.ip_adapter.weights import LayerWeight, scaled_keys_values

log = logging.getLogger(__name__)

COND, UNCOND = 0, 1
HALVES = "pit_halves"  # under this key a run tells its patches each condition's half: uuid -> COND or UNCOND
VIEW = "pit_view"  # and under this one, what part of the latents the model is shown
Attention = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
KeysValues = Mapping[int, tuple[Tensor, Tensor]]
"""Layer index n -> K and V, (B, T, width) on the CPU."""
Area = tuple[int, int, int, int]
"""(height, width, top, left) in latent pixels."""
Span = tuple[float, float]
"""(first, last) of a run, from 0 to 1."""
ALWAYS: Span = (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class View:
    """What the model is shown of the latents in one step.

    shape: of the whole, (pictures, channels, height, width). sigmas: the step's noise level. areas: uuid of a
    condition -> what it covers, for those that do not cover all. window: (dimension, indices) where the host
    shows one window after the other: some of the pictures (dimension 0), rows (2) or columns (3). level: how
    far in a run (0 to 1) -> the noise level there, by the sampling that the model has now.
    """

    shape: tuple[int, ...]
    sigmas: Tensor
    areas: Mapping[Any, Area]
    window: tuple[int, tuple[int, ...]] | None
    level: Callable[[float], float]
    _spans: dict[Span, bool] = field(default_factory=dict, repr=False)
    _orders: dict[tuple[int, int], bool] = field(default_factory=dict, repr=False)

    @cached_property
    def sigma(self) -> float:
        """Read once a step: every reading waits for the device."""
        return float(self.sigmas.max())

    def within(self, span: Span) -> bool:
        """Whether the step lies in a span of the run; looked up once a step."""
        if span not in self._spans:
            first, last = (float(self.level(at)) for at in span)
            self._spans[span] = last <= self.sigma <= first
        return self._spans[span]

    @property
    def pictures(self) -> tuple[int, ...] | None:
        """The numbers of the pictures that are shown; None for all."""
        return self.window[1] if self.window is not None and self.window[0] == 0 else None

    @property
    def rows(self) -> int:
        """How many pictures are shown."""
        return self.shape[0] if self.pictures is None else len(self.pictures)

    def size(self, area: Area | None) -> tuple[int, int]:
        """(height, width) in latent pixels of what is shown."""
        sides = list(self.shape)
        if self.window is not None:
            sides[self.window[0]] = len(self.window[1])
        return (sides[-2], sides[-1]) if area is None else area[:2]

    def in_turn(self, prompts: Tensor, once: int) -> bool:
        """Whether tiles that a pack batches come one after the other, each with all `once` rows.

        That is how the host repeats batches. Else each row's tiles lie side by side; the prompts tell.
        """
        if (len(prompts), once) not in self._orders:
            equal = torch.equal(prompts[:once], prompts[once : 2 * once])
            self._orders[len(prompts), once] = equal
        return self._orders[len(prompts), once]

    def part_of(self, mask: Tensor, area: Area | None) -> Tensor:
        """What is shown of a mask over the whole picture, (B, H, W); areas lie inside the window."""
        if self.pictures is None and self.window is not None:
            dimension, indices = self.window
            mask = mask.index_select(dimension - 1, torch.tensor(indices))  # a mask has no channels
        if area is not None:
            height, width, top, left = area
            mask = mask[:, top : top + height, left : left + width]
        return mask


@dataclass(eq=False)
class Application:
    """One use of "Apply IP tokens": keys and values of both halves, and when, where and how much they count.

    key: what orders applications in a layer, so that the order of the nodes leaves every bit as it is.
    span: (first, last), from 0 to 1 of a run, between which they count. mask: (1 or pictures, H, W) in 0-1.
    source: what keys and values were made of: the adapter's content hash, the tokens of both halves.
    """

    key: str
    cond: KeysValues
    uncond: KeysValues
    weights: Mapping[int, LayerWeight]
    scaling: str = "V only"
    span: Span = ALWAYS
    mask: Tensor | None = None
    source: tuple[str, Tensor, Tensor] | None = None
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)
    _warned: list[bool] = field(default_factory=list, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Application:
        return self

    def release(self) -> None:
        """Drop the copies on the device."""
        self._kept.clear()
        self._warned.clear()

    def active(self, options: Mapping[str, Any]) -> bool:
        return within(self.span, options)

    def term(self, q: Tensor, prompts: Tensor, n: int, options: Mapping[str, Any]) -> Tensor:
        """What these tokens add to layer n: queries (rows, N, width) -> the same shape; prompts: its keys."""
        halves, view = halves_of(options), options.get(VIEW)
        rows, tiles = _rows(len(q), len(halves), view)
        found = {half: self._on_device(n, half, q) for half in set(halves)}
        parts = [[spread(found[half][i], rows, view, "tokens") for half in halves] for i in (0, 1)]
        if self.mask is not None:
            parts.append(self._masks(q, rows, len(halves), options))
        k, v, *mask = (_tiled(torch.cat(part), tiles, prompts, view) for part in parts)
        return image_term(q, k, v, options["n_heads"], found[halves[0]][2], *mask)

    def _on_device(self, n: int, half: int, like: Tensor) -> tuple[Tensor, Tensor, float]:
        place = (n, half, like.dtype, like.device)
        if place not in self._kept:
            layer = self.weights[n]
            source = self.cond if layer.swapped or half == COND else self.uncond
            k, v = (t.float() for t in source[n])
            k, v, weight = scaled_keys_values(k, v, layer.weight, self.scaling)
            if layer.swapped and half == COND:  # attention to values of zero adds nothing
                k, v = torch.zeros_like(k), torch.zeros_like(v)
            k, v = (t.to(like.dtype) for t in (k, v))
            if not (torch.isfinite(k).all() and torch.isfinite(v).all()):
                name = str(like.dtype).removeprefix("torch.")
                raise PitError(
                    f"tokens give layer {n} numbers that are too large for the model's {name}; lower the "
                    "weight, or run the model in bfloat16 or float32."
                )
            self._kept[place] = (k.to(like.device), v.to(like.device), weight)
        return self._kept[place]

    def _masks(self, q: Tensor, rows: int, conditions: int, options: Mapping[str, Any]) -> list[Tensor]:
        grid, view = _grid(q.shape[1], options), options.get(VIEW)
        areas = {} if view is None else view.areas
        boxes = [areas.get(uuid) for uuid in _uuids(options, conditions)]
        if view is not None:
            self._look_for_tiles({view.size(box) for box in boxes}, options["original_shape"])
        return [spread(self._mask(grid, box, view, q), rows, view, "mask") for box in boxes]

    def _look_for_tiles(self, shown: set[tuple[int, int]], shape: Sequence[int]) -> None:
        """Say once a run that a mask cannot be cut like the picture: nobody tells where a tile lies."""
        height, width = shape[-2:]
        if (height, width) not in shown and not self._warned:
            self._warned.append(True)
            log.warning(
                "The mask of 'Apply IP Tokens' is laid on each tile of %d x %d pixels as on a whole picture: "
                "the node that cuts tiles does not say where they lie; leave out that node or the mask.",
                8 * width,
                8 * height,
            )

    def _mask(self, grid: tuple[int, int], area: Area | None, view: View | None, like: Tensor) -> Tensor:
        """The mask on a layer's tokens, (1 or pictures, N): of what is shown, its own share of the mask."""
        window = None if view is None or view.pictures else view.window
        place = ("mask", grid, area, window, like.dtype, like.device)
        if place not in self._kept:
            mask = self.mask
            if view is not None and (area or window):
                latent = (view.shape[-2], view.shape[-1])
                mask = view.part_of(resize_mask(mask, latent).unflatten(1, latent), area)
            self._kept[place] = resize_mask(mask, grid).to(like)
        return self._kept[place]


class StackedAttention:
    """A replacement for one layer's attention: the attention that was there, and what applications add.

    before: another pack's replacement, which then gives the base. attention: the host's own.
    """

    def __init__(
        self,
        n: int,
        applications: Sequence[Application],
        attention: Attention,
        before: Attention | None = None,
    ) -> None:
        self.n = n
        self.applications = tuple(sorted(applications, key=lambda each: each.key))
        self.attention = attention
        self.before = before

    def __deepcopy__(self, memo: dict[int, Any]) -> StackedAttention:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        out = (self.before or self.attention)(q, k, v, extra_options)
        for application in self.applications:
            if application.active(extra_options):
                out = out + application.term(q, k, self.n, extra_options).to(out)
        return out


def stacked(
    n: int, application: Application, attention: Attention, before: Attention | None
) -> StackedAttention:
    """One more application on a layer, whatever is there: nothing, our own, or another pack's."""
    if isinstance(before, StackedAttention):
        return StackedAttention(n, [*before.applications, application], attention, before.before)
    return StackedAttention(n, [application], attention, before)


def within(span: Span, options: Mapping[str, Any]) -> bool:
    """Whether this step lies in a span of the run."""
    if span[0] <= 0 and span[1] >= 1:
        return True
    if (view := options.get(VIEW)) is None:
        raise PitError("start_at and end_at need the noise level of each step, but this sampler tells none.")
    return view.within(span)


def halves_of(options: Mapping[str, Any]) -> list[int]:
    """The half of each condition in a batch: as its guider calls it, else by its number, where 0 is cond."""
    numbers = list(options.get("cond_or_uncond") or [COND])
    told, uuids = options.get(HALVES) or {}, _uuids(options, len(numbers))
    by_number = [COND if number == COND else UNCOND for number in numbers]
    return [told.get(uuid, half) for uuid, half in zip(uuids, by_number, strict=True)]


def _uuids(options: Mapping[str, Any], conditions: int) -> list[Any]:
    """The conditions' own names; None each where a pack that batches by its own rules tells none."""
    uuids = list(options.get("uuids") or [])
    return uuids if len(uuids) == conditions else [None] * conditions


def _grid(tokens: int, options: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of a layer's tokens."""
    shape = options.get("activations_shape")
    if shape is not None and shape[-2] * shape[-1] == tokens:
        return int(shape[-2]), int(shape[-1])
    height, width = options["original_shape"][-2:]
    return token_grid(tokens, (int(height), int(width)))


def _rows(rows: int, conditions: int, view: View | None) -> tuple[int, int]:
    """(pictures to a condition, tiles that a pack has cut each into and batched) of so many rows."""
    if rows % conditions:
        raise PitError(
            f"tokens cannot tell {conditions} conditions apart in {rows} rows; leave out the node that "
            "splits the batch."
        )
    if view is None or rows % (conditions * view.rows):
        return rows // conditions, 1
    return view.rows, rows // (conditions * view.rows)


def _tiled(t: Tensor, tiles: int, prompts: Tensor, view: View | None) -> Tensor:
    """The rows of one batch as those of all its tiles."""
    if tiles == 1 or view is None:
        return t
    return torch.cat([t] * tiles) if view.in_turn(prompts, len(t)) else t.repeat_interleave(tiles, dim=0)


def spread(t: Tensor, rows: int, view: View | None, what: str) -> Tensor:
    """One row for all pictures shown, or the rows over and over, as the host repeats batches."""
    pictures = None if view is None else view.pictures
    whole = rows if pictures is None else view.shape[0]
    if whole % t.shape[0]:
        raise PitError(
            f"The {what} have {t.shape[0]} rows, but the batch has {whole} pictures; give 1 row, or as many "
            "as there are pictures."
        )
    if t.shape[0] == 1:
        return t.expand(rows, *t.shape[1:])
    if pictures is not None:
        return t[[i % t.shape[0] for i in pictures]]
    return t.repeat(rows // t.shape[0], *[1] * (t.ndim - 1))
