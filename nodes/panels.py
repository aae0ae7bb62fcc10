"""What runs inside a Flux model's joint attention: the right panel of a diptych looks harder at the left one.

The host asks for every attention an override, which is put there for one forward pass at a time. One that was
there before gives the attention that ours is made of, so that other packs' overrides keep working.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..pit_core.diptych.attention import panel_attention
from ..pit_core.diptych.layout import TOKEN
from ..pit_core.errors import PitError
from .attention import ALWAYS, COND, VIEW, Span, halves_of, spread, within

log = logging.getLogger(__name__)

KINDS = ("double", "single")
OVERRIDE = "optimized_attention_override"  # the host looks here
POST_INPUT = "post_input"
NAME = "Diptych Attention"
ALL, NONE = "all", "none"


@dataclass(eq=False)
class Panels:
    """One use of "Diptych Attention": where, when and how much harder the right panel looks.

    grid: (height, width) in tokens of the picture that is sampled. columns: how many are the left panel's.
    strength: a number, or (1 or pictures, left tokens). targets: which tokens of the right panel look harder,
    bool; all if None. span: between which parts of a run. blocks: kind -> numbers; all where None. cond_only:
    rows of the unconditional half stay as they are.
    """

    grid: tuple[int, int]
    columns: int
    strength: float | Tensor
    mode: str = "reference"
    targets: Tensor | None = None
    span: Span = ALWAYS
    blocks: Mapping[str, frozenset[int] | None] = field(default_factory=dict)
    cond_only: bool = False
    _steps: int = field(default=0, repr=False)
    _passes: int = field(default=0, repr=False)
    _said: set[str] = field(default_factory=set, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Panels:
        return self

    def step(self) -> None:
        """A step of a run begins."""
        self._steps += 1

    def finish(self) -> None:
        """A run ends, also one that failed."""
        if self._steps and not self._passes:
            self._say_unasked()
        self._steps = self._passes = 0
        self._said.clear()

    def override(self, options: Mapping[str, Any], size: Sequence[int], text: int) -> Override | None:
        """What is to stand in for attention in one forward pass; None where it should stay as it is.

        size: (height, width) in tokens of what the model is shown. text: how many tokens come before it.
        """
        self._passes += 1
        if not within(self.span, options):
            return None
        if tuple(size) != self.grid:
            self._say(
                "the model is shown %d x %d pixels, but the diptych has %d x %d; the attention stays as it "
                "is. Sample at the size that 'Diptych Prepare' hands out.",
                *(TOKEN * side for side in (*reversed(size), *reversed(self.grid))),
            )
            return None
        return Override(self, text, options.get(OVERRIDE))

    def in_block(self, options: Mapping[str, Any]) -> bool:
        chosen = self.blocks.get(str(options.get("block_type")))
        return chosen is None or options.get("block_index") in chosen

    def asked(self, override: Override) -> None:
        """A forward pass is over; whoever brings an attention of its own may never have asked."""
        if not override.asked:
            self._say_unasked()

    def _say_unasked(self) -> None:
        self._say(
            "this model never asked for another attention, so nothing has changed. Models of Nunchaku and "
            "TensorRT, and packs that replace Flux's blocks, bring an attention of their own."
        )

    def _say(self, text: str, *values: int) -> None:
        """Once a run."""
        if text not in self._said:
            self._said.add(text)
            log.warning(f"{NAME}: {text}", *values)


class Override:
    """The attention of one forward pass. text: tokens before the image's; `count_text` puts it right."""

    def __init__(self, panels: Panels, text: int, before: Callable[..., Tensor] | None) -> None:
        self.panels, self.text, self.before = panels, text, before
        self.asked = False

    def count_text(self, args: dict[str, Any]) -> dict[str, Any]:
        """As a patch behind all others that change what goes into the blocks: some add tokens to the text."""
        self.text = args["txt"].shape[1]
        return args

    def options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The host's options with this override in them."""
        patches = options.get("patches") or {}
        patches = {**patches, POST_INPUT: [*patches.get(POST_INPUT, ()), self.count_text]}
        return {**options, OVERRIDE: self, "patches": patches}

    def __call__(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        plain = func if self.before is None else partial(self.before, func)
        options = named.get("transformer_options") or {}
        trailing = k.shape[-2] - self.text - math.prod(self.panels.grid)
        self.asked = self.asked or trailing >= 0
        # A later use of the node has split the queries already, and what it left out is not ours either.
        if trailing < 0 or q.shape != k.shape or not self.panels.in_block(options):
            return plain(q, k, v, heads, mask=mask, **named)
        rows, strength = self._rows(len(q), options)
        return panel_attention(
            q,
            k,
            v,
            text_tokens=self.text,
            grid=self.panels.grid,
            columns=self.panels.columns,
            strength=strength,
            mode=self.panels.mode,
            rows=rows,
            targets=self.panels.targets,
            mask=mask,
            trailing_tokens=trailing,
            heads=heads,
            attend=lambda q, k, v, mask: plain(q, k, v, heads, mask=mask, **named),
        )

    def _rows(self, batch: int, options: Mapping[str, Any]) -> tuple[list[bool] | None, float | Tensor]:
        """Which rows of the batch are enhanced, and the strength for each."""
        halves, strength = halves_of(options), self.panels.strength
        if batch % len(halves):
            raise PitError(
                f"'{NAME}' cannot tell {len(halves)} conditions apart in {batch} rows; leave out the node "
                "that splits the batch."
            )
        pictures = batch // len(halves)
        if isinstance(strength, Tensor) and len(strength) > 1:
            each = spread(strength, pictures, options.get(VIEW), "reference_mask")
            strength = torch.cat([each] * len(halves))
        if not self.panels.cond_only:
            return None, strength
        return [half == COND for half in halves for _ in range(pictures)], strength


def block_numbers(text: str, count: int | None, name: str) -> frozenset[int] | None:
    """ "0-9, 12" -> the numbers; "all" -> None; "none" -> no number. count: how many blocks there are.

    Raises PitError, naming the input, for other words and for blocks that the model does not have.
    """
    words = text.strip().lower()
    if words in (ALL, NONE):
        return None if words == ALL else frozenset()
    found: set[int] = set()
    for piece in words.split(","):
        first, dash, last = (part.strip() for part in piece.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise PitError(f"{name} is 'all', 'none' or ranges such as '0-9, 12', but got '{text[:60]}'.")
        ends = int(first), int(last or first)
        if count is not None and max(ends) >= count:
            raise PitError(f"{name} names block {max(ends)}, but the model's are 0 to {count - 1}.")
        found.update(range(min(ends), max(ends) + 1))
    return frozenset(found)
