"""Diptych Prompting's attention in diffusers: the processors of a FluxTransformer2DModel, for a while."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import PitError
from .attention import MODES, panel_attention


@dataclass
class Look:
    """How much harder the right panel looks at the left one, and in which steps.

    grid, columns, strength, mode: as in `panel_attention`. start, end: the part of the run, 0-1. cond_only:
    leave the unconditional rows as they are, which `at_step` has to tell. Raises PitError for numbers out of
    range.
    """

    grid: tuple[int, int]
    columns: int
    strength: float | Tensor = 1.3
    mode: str = MODES[0]
    start: float = 0.0
    end: float = 1.0
    cond_only: bool = False
    active: bool = field(default=False, init=False)
    rows: Sequence[bool] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise PitError(
                "The enhanced part of a run starts and ends between 0 and 1, the start first, but got "
                f"{self.start} to {self.end}."
            )
        if self.mode not in MODES:
            raise PitError(f"The attention mode is one of {', '.join(MODES)}, but got '{self.mode}'.")
        if isinstance(self.strength, (int, float)) and not (
            math.isfinite(self.strength) and self.strength >= 0
        ):
            raise PitError(f"The strength is a number of 0 or more (1.3 is usual), but got {self.strength}.")

    @property
    def changes(self) -> bool:
        return isinstance(self.strength, Tensor) or self.strength != 1

    def at_step(self, step: int, steps: int, conditional: Sequence[bool] | None = None) -> None:
        """Step number `step` of `steps` comes next; conditional: which rows of its batch are."""
        self.active = self.changes and self.start <= step / steps <= self.end
        self.rows = conditional if self.cond_only else None


@contextmanager
def looking(transformer: Any, look: Look) -> Iterator[Look]:
    """Inside, the transformer's joint attention follows `look`; `Look.at_step` switches it on and off.

    The processors that were there come back afterwards, and serve all steps that are not enhanced.
    """
    before = dict(transformer.attn_processors)
    transformer.set_attn_processor({name: _PanelProcessor(look, old) for name, old in before.items()})
    try:
        yield look
    finally:
        transformer.set_attn_processor(before)


class _PanelProcessor:
    """Flux's joint attention through `panel_attention`, in double blocks and in single ones."""

    def __init__(self, look: Look, before: Any) -> None:
        self.look, self.before = look, before

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        look = self.look
        if not look.active:
            return self.before(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        q, k, v = _queries_keys_values(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        found = panel_attention(
            q,
            k,
            v,
            text_tokens=q.shape[2] - math.prod(look.grid),
            grid=look.grid,
            columns=look.columns,
            strength=look.strength,
            mode=look.mode,
            rows=look.rows,
            mask=attention_mask,
        )
        found = found.transpose(1, 2).flatten(2)  # (B, H, N, D) -> (B, N, H * D)
        if encoder_hidden_states is None:
            return found
        text, image = found.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def _queries_keys_values(attn: Any, image: Tensor, text: Tensor | None, rotary: Any) -> list[Tensor]:
    """(B, H, N, D) each; the text's tokens come first, in single blocks they are part of `image`."""
    from diffusers.models.embeddings import apply_rotary_emb

    def split(projection: Any, tokens: Tensor) -> Tensor:
        return projection(tokens).unflatten(-1, (attn.heads, -1))

    q, k, v = (split(projection, image) for projection in (attn.to_q, attn.to_k, attn.to_v))
    q, k = attn.norm_q(q), attn.norm_k(k)
    if text is not None:
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (split(projection, text) for projection in added)
        text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
        q, k, v = (torch.cat(pair, 1) for pair in ((text_q, q), (text_k, k), (text_v, v)))
    if rotary is not None:
        turn: Any = apply_rotary_emb  # gives a pair for other kinds of rotary embedding
        q, k = (turn(t, rotary, sequence_dim=1) for t in (q, k))
    return [t.transpose(1, 2) for t in (q, k, v)]
