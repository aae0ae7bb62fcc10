"""What runs inside the model's text cross-attention: any number of applied tokens, added to what was there.

Everything here is shared between clones of a model and never changes after it is made, but for the copies of
keys and values on the device, which a run makes on first use and `release` drops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..pit_core.errors import PitError
from ..pit_core.ip_adapter.attention import image_term, resize_mask, token_grid
from ..pit_core.ip_adapter.weights import LayerWeight, scaled_keys_values

COND, UNCOND = 0, 1
AREAS = "pit_areas"  # the key under which a run tells its patches where a condition's area lies
Attention = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
KeysValues = Mapping[int, tuple[Tensor, Tensor]]
"""Layer index n -> K and V, (B, T, width) on the CPU."""


@dataclass(frozen=True)
class Areas:
    """One step's conditions that cover only part of the picture: uuid -> (height, width, top, left)."""

    latent: tuple[int, int]
    by_uuid: Mapping[Any, tuple[int, int, int, int]]


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
        order = list(options.get("cond_or_uncond") or [COND])
        rows = q.shape[0] // len(order)
        halves = [self._rows(n, kind, rows, q) for kind in order]
        k, v = (torch.cat([half[i] for half in halves]) for i in (0, 1))
        mask = None if self.mask is None else self._masks(q, rows, order, options)
        return image_term(q, k, v, options["n_heads"], halves[0][2], mask)

    def _rows(self, n: int, kind: int, rows: int, like: Tensor) -> tuple[Tensor, Tensor, float]:
        k, v, weight = self._on_device(n, kind, like)
        return _tiled(k, rows, "tokens"), _tiled(v, rows, "tokens"), weight

    def _on_device(self, n: int, kind: int, like: Tensor) -> tuple[Tensor, Tensor, float]:
        place = (n, kind, like.dtype, like.device)
        if place not in self._kept:
            layer = self.weights[n]
            source = self.cond if layer.swapped or kind == COND else self.uncond
            k, v = (t.float() for t in source[n])
            k, v, weight = scaled_keys_values(k, v, layer.weight, self.scaling)
            if layer.swapped and kind == COND:  # attention to values of zero adds nothing
                k, v = torch.zeros_like(k), torch.zeros_like(v)
            self._kept[place] = (k.to(like), v.to(like), weight)
        return self._kept[place]

    def _masks(self, q: Tensor, rows: int, order: Sequence[int], options: Mapping[str, Any]) -> Tensor:
        grid = _grid(q.shape[1], options)
        areas, uuids = options.get(AREAS), options.get("uuids") or [None] * len(order)
        boxes = [None if areas is None else areas.by_uuid.get(uuid) for uuid in uuids]
        return torch.cat([_tiled(self._mask(grid, box, areas, q), rows, "mask") for box in boxes])

    def _mask(
        self, grid: tuple[int, int], box: tuple[int, ...] | None, areas: Areas | None, like: Tensor
    ) -> Tensor:
        """The mask on a layer's tokens, (1 or pictures, N); of a condition's area, its share of the mask."""
        place = ("mask", grid, box, like.dtype, like.device)
        if place not in self._kept:
            mask = self.mask
            if box is not None and areas is not None:
                height, width, top, left = box
                latent = areas.latent
                mask = resize_mask(mask, latent).unflatten(1, latent)
                mask = mask[:, top : top + height, left : left + width]
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


_last_sigma: tuple[Any, float] = (None, 0.0)


def _sigma(options: Mapping[str, Any]) -> float:
    """The step's noise level. Read once a step: every reading waits for the device."""
    global _last_sigma
    sigmas = options.get("sigmas")
    if sigmas is None:
        raise PitError("start_at and end_at need the noise level of each step, but this sampler tells none.")
    if _last_sigma[0] is not sigmas:
        _last_sigma = (sigmas, float(sigmas.max()))
    return _last_sigma[1]


def _grid(tokens: int, options: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of a layer's tokens."""
    shape = options.get("activations_shape")
    if shape is not None and shape[-2] * shape[-1] == tokens:
        return int(shape[-2]), int(shape[-1])
    height, width = options["original_shape"][-2:]
    return token_grid(tokens, (int(height), int(width)))


def _tiled(t: Tensor, rows: int, what: str) -> Tensor:
    """One row for all pictures of a batch, or the rows over and over, as the host repeats batches."""
    if rows % t.shape[0]:
        raise PitError(
            f"The {what} have {t.shape[0]} rows, but the batch has {rows} pictures; give 1 row, or as many "
            "as there are pictures."
        )
    return (
        t.expand(rows, *t.shape[1:]) if t.shape[0] == 1 else t.repeat(rows // t.shape[0], *[1] * (t.ndim - 1))
    )
