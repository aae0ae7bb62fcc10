"""Joint attention in which the right panel looks harder at the left one, without the attention matrix.

Source: Diptych Prompting (arXiv 2411.15466), reference attention enhancement: the probabilities that queries
of the right panel give to keys of the left panel are multiplied by a strength. Multiplying a probability or
the value that it weighs is the same sum, so two ordinary attention calls do it, one for each part of the
queries, with any backend and in memory linear in the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PitError

MODES = ("reference", "normalized")

# (q, k, v, mask) -> output, (B, H, N, D) or (B, N, H * D)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def panel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    text_tokens: int,
    grid: tuple[int, int],
    strength: float | Tensor,
    columns: int | None = None,
    mode: str = "reference",
    rows: Sequence[bool] | Tensor | None = None,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    trailing_tokens: int = 0,
    heads: int | None = None,
    attend: Attend | None = None,
) -> Tensor:
    """Attention over [text, image, trailing] tokens; the image's are `grid` = (h, w), row by row.

    q, k, v: (B, H, N, D), or (B, N, H * D) with `heads`; the output has the same layout. The left panel is
    the first `columns` of the grid, w // 2 if None. What queries of the left panel, of the text and of
    trailing tokens (further reference pictures) see is left as it is.

    strength: 0 or more, 1 changes nothing; a number, or a tensor (M,), (1, M) or (B, M), one for each key,
    where M counts the left panel's tokens, the image's, or all (only the left panel's are read), or 1. A
    tensor on the CPU is checked without waiting for the device.
    rows: which of the batch's B rows are enhanced, all if None; for guidance, the conditional ones.
    targets: which of the right panel's tokens look harder, (h * (w - columns),) bool, all if None.
    mask: what `attend` takes, (..., N or 1, N): added to the scores, or True where a query may look.
    mode: "reference" leaves the scaled probabilities as they are, "normalized" makes them sum to one again,
    at the price of a third call; it equals adding ln(strength) to the scores.
    attend: the attention to call, (q, k, v, mask) -> output in either layout; torch's if None.

    Raises PitError for shapes that do not fit, a strength that is negative or not finite, an unknown mode.
    """
    panels = _panels(q, text_tokens, grid, columns, trailing_tokens)
    if mode not in MODES:
        raise PitError(f"The attention mode is one of {', '.join(MODES)}, but got '{mode}'.")
    _check_inputs(q, k, v, heads, attend)
    _check_mask(mask, q, heads, attend)
    attend = attend or _torch_attention(heads)
    right, others = _split(panels, targets)
    gains = _key_gains(strength, rows, panels, q)
    if gains is None or not len(right):
        return attend(q, k, v, mask)

    right, others = right.to(q.device), others.to(q.device)
    scale = gains[:, None, :, None] if v.ndim == 4 else gains[..., None]
    plain = attend(_take(q, others), k, v, _mask_rows(mask, others))
    q_right, mask_right = _take(q, right), _mask_rows(mask, right)
    enhanced = attend(q_right, k, v.clone().mul_(scale), mask_right)
    if mode == "normalized":
        total = attend(q_right, k, torch.ones_like(v).mul_(scale), mask_right)
        enhanced = (enhanced.float() / total.float()).to(enhanced.dtype)
    return _merge(plain, others, enhanced, right)


# tokens


@dataclass(frozen=True)
class _Panels:
    """A sequence of text, image and trailing tokens; the image's first columns are the left panel."""

    text: int
    height: int
    width: int
    columns: int
    tokens: int

    @property
    def left_count(self) -> int:
        return self.height * self.columns

    @property
    def image_count(self) -> int:
        return self.height * self.width

    def left(self) -> Tensor:
        return self._image()[:, : self.columns].flatten()

    def right(self) -> Tensor:
        return self._image()[:, self.columns :].flatten()

    def others(self) -> Tensor:
        """Everything but the right panel."""
        everything = torch.arange(self.tokens)
        end = self.text + self.image_count
        return torch.cat([everything[: self.text], self.left(), everything[end:]])

    def _image(self) -> Tensor:
        end = self.text + self.image_count
        return torch.arange(self.text, end).view(self.height, self.width)


def _panels(q: Tensor, text: int, grid: tuple[int, int], columns: int | None, trailing: int) -> _Panels:
    if q.ndim not in (3, 4):
        raise PitError(
            f"Attention takes (batch, heads, tokens, width) or (batch, tokens, width), got {tuple(q.shape)}."
        )
    (height, width), tokens = grid, q.shape[_token_axis(q)]
    if min(height, width) < 1 or min(text, trailing) < 0 or text + height * width + trailing != tokens:
        extra = f", {trailing} trailing" if trailing else ""
        raise PitError(
            f"The attention has {tokens} tokens, which are not {text} of text{extra} and a grid of "
            f"{height} x {width}; give the layout of the picture that is sampled."
        )
    columns = width // 2 if columns is None else columns
    if not 0 < columns < width:
        raise PitError(
            f"The left panel is {columns} tokens wide, but must leave both panels at least 1 of {width}."
        )
    return _Panels(text, height, width, columns, tokens)


def _split(panels: _Panels, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """The places of the tokens that look harder, and of all others, on the CPU."""
    right, others = panels.right(), panels.others()
    if targets is None:
        return right, others
    if targets.shape != right.shape or targets.dtype != torch.bool:
        raise PitError(
            f"The targets are a bool for each of the right panel's {len(right)} tokens, but got "
            f"{targets.dtype} of shape {tuple(targets.shape)}."
        )
    chosen = targets.cpu()
    return right[chosen], torch.cat([others, right[~chosen]])


def _token_axis(t: Tensor) -> int:
    return 2 if t.ndim == 4 else 1


def _take(t: Tensor, places: Tensor) -> Tensor:
    return t.index_select(_token_axis(t), places)


def _merge(a: Tensor, at_a: Tensor, b: Tensor, at_b: Tensor) -> Tensor:
    axis = _token_axis(a)
    shape = list(a.shape)
    shape[axis] += b.shape[axis]
    return a.new_empty(shape).index_copy_(axis, at_a, a).index_copy_(axis, at_b, b)


# strength


def _key_gains(
    strength: float | Tensor, rows: Sequence[bool] | Tensor | None, panels: _Panels, q: Tensor
) -> Tensor | None:
    """What every key's value is multiplied by, (1 or B, N) float32; None where that is 1 throughout."""
    enhanced = _enhanced_rows(rows, q.shape[0])
    values = _left_strength(strength, panels, q.shape[0])
    if not any(enhanced) or (not isinstance(strength, Tensor) and strength == 1):
        return None
    values = values.to(q.device, torch.float32)
    if not all(enhanced):
        values = torch.where(torch.tensor(enhanced).to(q.device)[:, None], values, 1.0)
    gains = torch.ones(values.shape[0], panels.tokens, device=q.device)
    return gains.index_copy_(1, panels.left().to(q.device), values.expand(-1, panels.left_count))


def _left_strength(strength: float | Tensor, panels: _Panels, batch: int) -> Tensor:
    """The strength, checked, as (1 or B, the left panel's tokens or 1)."""
    values = torch.as_tensor(strength)
    if not (torch.isfinite(values) & (values >= 0)).all():
        came = "negative, NaN or infinite numbers" if values.ndim else f"{float(values)}"
        raise PitError(f"The strength is a number of 0 or more (1.3 is usual), but got {came}.")
    if values.ndim < 2:
        values = values.reshape(1, -1)
    known = (1, panels.left_count, panels.image_count, panels.tokens)
    if values.ndim != 2 or values.shape[0] not in (1, batch) or values.shape[1] not in known:
        raise PitError(
            f"A strength for each key has the shape ({batch}, {panels.left_count}), or a row for all, "
            f"but got {tuple(values.shape)}."
        )
    count = values.shape[1]
    if count in (1, panels.left_count):
        return values
    start = panels.text if count == panels.tokens else 0
    image = values[:, start : start + panels.image_count].unflatten(1, (panels.height, panels.width))
    return image[..., : panels.columns].flatten(1)


def _enhanced_rows(rows: Sequence[bool] | Tensor | None, batch: int) -> list[bool]:
    if rows is None:
        return [True] * batch
    given = rows.flatten().tolist() if isinstance(rows, Tensor) else list(rows)
    if len(given) != batch:
        raise PitError(f"The batch has {batch} rows, but rows says for {len(given)} which are enhanced.")
    return [bool(row) for row in given]


# attention


def _torch_attention(heads: int | None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if q.ndim == 4:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    return attend


def _mask_rows(mask: Tensor | None, places: Tensor) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask.index_select(-2, places)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, heads: int | None, attend: Attend | None) -> None:
    if not q.shape == k.shape == v.shape:
        raise PitError(
            "Joint attention has q, k and v of one shape, but got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if attend is None and q.ndim == 3 and (not heads or q.shape[-1] % heads):
        raise PitError(f"A width of {q.shape[-1]} has to be split into heads, but got heads={heads}.")


def _check_mask(mask: Tensor | None, q: Tensor, heads: int | None, attend: Attend | None) -> None:
    """Another attention than torch's has its own rules for what comes before a mask's last two sides."""
    if mask is None:
        return
    tokens = q.shape[_token_axis(q)]
    before = (q.shape[0], q.shape[1] if q.ndim == 4 else heads)
    fits = 2 <= mask.ndim <= 4 and mask.shape[-2] in (1, tokens) and mask.shape[-1] == tokens
    if fits and attend is None:
        sides = zip(reversed(mask.shape[:-2]), reversed(before), strict=False)
        fits = all(side in (1, whole) for side, whole in sides)
    if not fits:
        raise PitError(
            f"An attention mask for {tokens} tokens has the shape ({before[0]} or 1, {before[1]} or 1, "
            f"{tokens} or 1, {tokens}), but got {tuple(mask.shape)}."
        )
