"""What runs inside the model's text cross-attention: any number of applied tokens, added to what was there.

Everything here is shared between clones of a model and never changes after it is made, but for the copies of
keys and values on the device, which a run makes on first use and `release` drops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..pit_core.errors import PitError
from ..pit_core.ip_adapter.attention import image_term, resize_mask, token_grid
from ..pit_core.ip_adapter.weights import LayerWeight, scaled_keys_values

COND, UNCOND = 0, 1
HALVES = "pit_halves"  # under this key a run tells its patches each condition's half: uuid -> COND or UNCOND
VIEW = "pit_view"  # and under this one, what part of the latents the model is shown
Attention = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
KeysValues = Mapping[int, tuple[Tensor, Tensor]]
"""Layer index n -> K and V, (B, T, width) on the CPU."""
Area = tuple[int, int, int, int]
"""(height, width, top, left) in latent pixels."""


@dataclass(frozen=True, eq=False)
class View:
    """What the model is shown of the latents in one step.

    shape: of the whole, (pictures, channels, height, width). sigmas: the step's noise level. areas: uuid of a
    condition -> what it covers, for those that do not cover all. window: (dimension, indices) where the host
    shows one window after the other: some of the pictures (dimension 0), rows (2) or columns (3).
    """

    shape: tuple[int, ...]
    sigmas: Tensor
    areas: Mapping[Any, Area]
    window: tuple[int, tuple[int, ...]] | None = None

    @cached_property
    def sigma(self) -> float:
        """Read once a step: every reading waits for the device."""
        return float(self.sigmas.max())

    @property
    def pictures(self) -> tuple[int, ...] | None:
        """The numbers of the pictures that are shown; None for all."""
        return self.window[1] if self.window is not None and self.window[0] == 0 else None

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
    sigmas: (first, last) between which they count, None for always. mask: (1 or pictures, H, W) in 0-1.
    """

    key: str
    cond: KeysValues
    uncond: KeysValues
    weights: Mapping[int, LayerWeight]
    scaling: str = "V only"
    sigmas: tuple[float, float] | None = None
    mask: Tensor | None = None
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Application:
        return self

    def release(self) -> None:
        """Drop the copies on the device."""
        self._kept.clear()

    def active(self, options: Mapping[str, Any]) -> bool:
        return self.sigmas is None or self.sigmas[1] <= _sigma(options) <= self.sigmas[0]

    def term(self, q: Tensor, n: int, options: Mapping[str, Any]) -> Tensor:
        """What these tokens add to layer n: queries (rows, N, width) -> the same shape."""
        halves, view = _halves(options), options.get(VIEW)
        rows = q.shape[0] // len(halves)
        found = {half: self._on_device(n, half, q) for half in set(halves)}
        k, v = (torch.cat([_spread(found[half][i], rows, view, "tokens") for half in halves]) for i in (0, 1))
        mask = None if self.mask is None else self._masks(q, rows, len(halves), options)
        return image_term(q, k, v, options["n_heads"], found[halves[0]][2], mask)

    def _on_device(self, n: int, half: int, like: Tensor) -> tuple[Tensor, Tensor, float]:
        place = (n, half, like.dtype, like.device)
        if place not in self._kept:
            layer = self.weights[n]
            source = self.cond if layer.swapped or half == COND else self.uncond
            k, v = (t.float() for t in source[n])
            k, v, weight = scaled_keys_values(k, v, layer.weight, self.scaling)
            if layer.swapped and half == COND:  # attention to values of zero adds nothing
                k, v = torch.zeros_like(k), torch.zeros_like(v)
            self._kept[place] = (k.to(like), v.to(like), weight)
        return self._kept[place]

    def _masks(self, q: Tensor, rows: int, conditions: int, options: Mapping[str, Any]) -> Tensor:
        grid, view = _grid(q.shape[1], options), options.get(VIEW)
        areas = {} if view is None else view.areas
        boxes = [areas.get(uuid) for uuid in _uuids(options, conditions)]
        return torch.cat([_spread(self._mask(grid, box, view, q), rows, view, "mask") for box in boxes])

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
                out = out + application.term(q, self.n, extra_options).to(out)
        return out


def stacked(
    n: int, application: Application, attention: Attention, before: Attention | None
) -> StackedAttention:
    """One more application on a layer, whatever is there: nothing, our own, or another pack's."""
    if isinstance(before, StackedAttention):
        return StackedAttention(n, [*before.applications, application], attention, before.before)
    return StackedAttention(n, [application], attention, before)


def _halves(options: Mapping[str, Any]) -> list[int]:
    """The half of each condition in a batch: as its guider calls it, else by its number, where 0 is cond."""
    numbers = list(options.get("cond_or_uncond") or [COND])
    told, uuids = options.get(HALVES) or {}, _uuids(options, len(numbers))
    by_number = [COND if number == COND else UNCOND for number in numbers]
    return [told.get(uuid, half) for uuid, half in zip(uuids, by_number, strict=True)]


def _uuids(options: Mapping[str, Any], conditions: int) -> list[Any]:
    """The conditions' own names; None each where a pack that batches by its own rules tells none."""
    uuids = list(options.get("uuids") or [])
    return uuids if len(uuids) == conditions else [None] * conditions


def _sigma(options: Mapping[str, Any]) -> float:
    view, sigmas = options.get(VIEW), options.get("sigmas")
    if view is not None:
        return view.sigma
    if sigmas is None:
        raise PitError("start_at and end_at need the noise level of each step, but this sampler tells none.")
    return float(sigmas.max())


def _grid(tokens: int, options: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of a layer's tokens."""
    shape = options.get("activations_shape")
    if shape is not None and shape[-2] * shape[-1] == tokens:
        return int(shape[-2]), int(shape[-1])
    height, width = options["original_shape"][-2:]
    return token_grid(tokens, (int(height), int(width)))


def _spread(t: Tensor, rows: int, view: View | None, what: str) -> Tensor:
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
