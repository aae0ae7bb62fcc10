"""Decoupled cross-attention: the text's attention plus the image tokens' own, sharing the queries.

Source: IP-Adapter (arXiv 2308.06721), equation 5. This file is the arithmetic and the bookkeeping, for any
host; `processor.py` hooks it into diffusers, the ComfyUI nodes into theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PitError
from .adapter import IPLayers

Weight = float | Mapping[int, float]


def decoupled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ip: Tensor,
    v_ip: Tensor,
    heads: int,
    weight: float | Tensor = 1.0,
    mask: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Attn(q, k, v) + weight * mask * Attn(q, k_ip, v_ip), before the output projection.

    All are (B, N, heads * d), each of k/v and k_ip/v_ip with its own N; k_ip and v_ip follow q's dtype and
    device. `mask` is (B, N_q) or (B, N_q, 1). One row of k_ip, v_ip or mask serves all. `attention_mask` is
    added to the text's scores only, (B, heads or 1, N_q or 1, N_k). At weight 0 the result is the plain
    attention's, bit for bit.
    """
    plain = plain_attention(q, k, v, heads, attention_mask)
    if isinstance(weight, int | float) and weight == 0:
        return plain
    return plain + image_term(q, k_ip, v_ip, heads, weight, mask)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Scaled dot-product attention of (B, N, heads * d) tensors -> (B, N_q, heads * d)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask).transpose(1, 2).flatten(2)


def image_term(
    q: Tensor,
    k_ip: Tensor,
    v_ip: Tensor,
    heads: int,
    weight: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """weight * mask * Attn(q, k_ip, v_ip), what an adapter adds; shapes as in decoupled_attention."""
    rows = q.shape[0]
    if k_ip.shape[0] not in (1, rows):
        raise PitError(
            f"The image tokens have {k_ip.shape[0]} rows, but the model runs {rows}; give 1 or {rows}."
        )
    k_ip, v_ip = (t.to(q).expand(rows, -1, -1) for t in (k_ip, v_ip))
    term = plain_attention(q, k_ip, v_ip, heads)
    if mask is not None:
        term = term * mask.to(q).reshape(mask.shape[0], -1, 1)
    return term * weight


# masks


def token_grid(tokens: int, latent: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a layer's token grid, from its token count and the latents' size.

    Every level of the UNet halves both sides, rounding up. Raises PitError when no level has that count.
    """
    height, width = latent
    while height * width > tokens and (height > 1 or width > 1):
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != tokens:
        raise PitError(f"A layer has {tokens} tokens, which no halving of the latent size {latent} gives.")
    return height, width


def resize_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mask (B, h, w) -> (B, grid height * grid width), bilinear, exactly the layer's tokens in row order."""
    if mask.ndim != 3:
        raise PitError(
            f"An attention mask has the shape (batch, height, width), but got {tuple(mask.shape)}."
        )
    return F.interpolate(mask[:, None].float(), size=grid, mode="bilinear", align_corners=False).flatten(1)


# tokens of one run


class TokenSource:
    """Image tokens for one run, with the adapter layers that read them.

    tokens: (B, T, D), one row for all pictures of the batch or one for each. uncond: the same for the
    unconditional half, None for the tokens themselves. weight: one number, or layer index n -> number (absent
    layers weigh 0). mask: (B, h, w), what the tokens may touch. K and V depend on neither step nor latents,
    so they are computed on first use and kept; `cache=False` computes them every time, for training.
    """

    def __init__(
        self,
        layers: IPLayers,
        tokens: Tensor,
        uncond: Tensor | None = None,
        *,
        weight: Weight = 1.0,
        mask: Tensor | None = None,
        cache: bool = True,
    ) -> None:
        self.layers = layers
        self.cond = _checked(tokens, layers)
        self.uncond = None if uncond is None else _same_length(_checked(uncond, layers), tokens)
        self.weight = weight
        self.mask = mask
        self.cache = cache
        self._kept: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def layer_weight(self, n: int) -> float:
        return float(self.weight.get(n, 0.0) if isinstance(self.weight, Mapping) else self.weight)

    def keys_values(self, n: int, half: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """K and V (B, T, width) of layer n for "cond" or "uncond", in `like`'s dtype and device."""
        place = (n, half if self.uncond is not None else "cond")
        kept = self._kept.get(place)
        if kept is None or kept[0].dtype != like.dtype or kept[0].device != like.device:
            tokens = self.cond if place[1] == "cond" or self.uncond is None else self.uncond
            k, v = self.layers.keys_values(n, tokens, like)
            kept = (k.to(like), v.to(like))
            if self.cache and not k.requires_grad:
                self._kept[place] = kept
        return kept

    def term(
        self,
        q: Tensor,
        n: int,
        heads: int,
        order: Sequence[str] = ("cond",),
        latent: tuple[int, int] | None = None,
    ) -> Tensor:
        """What these tokens add to layer n's attention: (R, N_q, width) -> the same shape.

        `order` names the halves in the batch, equal in size, such as ("uncond", "cond"). `latent` is the
        latents' (height, width), needed for a mask only.
        """
        rows = _rows_per_half(q.shape[0], order)
        halves = [[_repeated(t, rows) for t in self.keys_values(n, half, q)] for half in order]
        k, v = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*halves, strict=True))
        mask = None
        if self.mask is not None:
            if latent is None:
                raise PitError("A masked IP-Adapter needs the size of the latents, but the host gave none.")
            resized = resize_mask(self.mask, token_grid(q.shape[1], latent))
            mask = _repeated(resized, rows).repeat(len(order), 1)
        return image_term(q, k, v, heads, self.layer_weight(n), mask)


def _checked(tokens: Tensor, layers: IPLayers) -> Tensor:
    if tokens.ndim != 3 or tokens.shape[-1] != layers.context or 0 in tokens.shape:
        raise PitError(
            f"IP tokens for this adapter have the shape (batch, tokens, {layers.context}), "
            f"but got {tuple(tokens.shape)}."
        )
    return tokens


def _same_length(uncond: Tensor, tokens: Tensor) -> Tensor:
    """The unconditional tokens, repeated to the conditional ones' count; attention to copies is unchanged."""
    if tokens.shape[1] % uncond.shape[1]:
        raise PitError(
            f"The unconditional half has {uncond.shape[1]} tokens and the conditional one {tokens.shape[1]}; "
            "encode both with the same adapter."
        )
    return uncond.repeat(1, tokens.shape[1] // uncond.shape[1], 1)


def _rows_per_half(rows: int, order: Sequence[str]) -> int:
    if not order or rows % len(order):
        raise PitError(f"A batch of {rows} rows cannot be split into the parts {tuple(order)}.")
    return rows // len(order)


def _repeated(t: Tensor, rows: int) -> Tensor:
    """One row for all, or each row for an equal run of neighbours, as diffusers repeats prompts."""
    if rows % t.shape[0]:
        raise PitError(f"{t.shape[0]} rows of tokens or masks do not fit {rows} pictures; give 1 or {rows}.")
    return t.expand(rows, *t.shape[1:]) if t.shape[0] == 1 else t.repeat_interleave(rows // t.shape[0], dim=0)
