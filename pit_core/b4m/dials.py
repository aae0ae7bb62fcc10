"""Content, style and base as three dials: on one trained entity, or on a content and a style file.

The strengths [[base, base * content], [style, style * content]] of dW's quadrants are an outer product, so
they go into the halves themselves, [base * A ; style * B] and [C | content * D], and the rank stays as it is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import PitError
from ..lora.formats import load_lora
from ..lora.info import lora_info
from ..lora.kinds import B4M, KIND_KEY, PLAIN, kind_of
from ..lora.model import Lora
from .blocks import Blocks, Share, check_blocks, share_of
from .factors import Factors, factors_of_lora, lora_of_factors
from .merge import Merged, Verdict, concatenate, join, verdict

MODES = ("auto", "splice", "sum")
"""auto: splice two files of one basis, else add them up and say so."""

KEPT = ("basis_seed", "basis_hash")


@dataclass(frozen=True)
class Dials:
    """The three strengths; any sign. Raises PitError for numbers that are not finite and other modes.

    swap: content is in B and style in D, as the paper's figure has it. blocks: shares by block.
    """

    content: float = 1.0
    style: float = 1.0
    base: float = 1.0
    swap: bool = False
    mode: str = "auto"
    blocks: Blocks = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("content", "style", "base"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise PitError(f"Expected {name} to be a finite number (1 is as trained), got {value!r}.")
        if self.mode not in MODES:
            raise PitError(f"Expected the mode to be one of {', '.join(MODES)}, got '{str(self.mode)[:40]}'.")

    def idle(self) -> str:
        """Which dial does nothing because the others are 0, as a sentence; empty when all do something."""
        names = ("style", "content") if self.swap else ("content", "style")
        acting, through = (getattr(self, name) for name in names)
        if self.base or through or not acting:
            return ""
        return f"With base and {names[1]} 0 the {names[0]} has nothing to act through."

    def at(self, layer: str) -> Share:
        """Content, style and base of a layer, given by its kohya name."""
        share = share_of(layer, self.blocks)
        return Share(self.content * share.content, self.style * share.style, self.base * share.base)


class Dialled(NamedTuple):
    """A LoRA under its dials. factors: without the layers that are switched off; whole: all layers, before
    the dials. method: "entity", "splice" or "sum". notes: what the user should know, a sentence each."""

    factors: dict[str, Factors]
    whole: dict[str, Factors]
    method: str
    notes: tuple[str, ...]


class Source:
    """One entity, or a content and a style file, read once; joined and weighed as often as is wanted."""

    def __init__(self, content: Lora, style: Lora | None = None) -> None:
        self.content, self.style = content, style

    def __str__(self) -> str:
        return self.content.name if self.style is None else f"{self.content.name} and {self.style.name}"

    @cached_property
    def factors(self) -> tuple[dict[str, Factors], dict[str, Factors]]:
        """Of the content file and of the style file; of an entity's twice."""
        content = factors_of_lora(self.content)
        return content, content if self.style is None else factors_of_lora(self.style)

    @cached_property
    def verdict(self) -> Verdict:
        """Whether the two files can be spliced, and how far their frozen halves are apart."""
        return verdict(*self.factors)

    def join(self, swap: bool = False, mode: str = "auto") -> Merged:
        """All layers at full strength. Raises PitError for a splice that cannot be, and for no layers."""
        if not self.content.layers:
            raise PitError("There is nothing left of this B4M: all of its dials were 0.")
        if self.style is None:
            note = "" if kind_of(self.content) == B4M else _no_entity(self.content.name)
            return Merged(self.factors[0], "entity", note)
        return join(*self.factors, swap=swap, mode=mode, found=None if mode == "sum" else self.verdict)

    def dialled(self, dials: Dials) -> Dialled:
        """Joined and weighed. Raises PitError as `join`, for convolutions and for blocks that are missing."""
        whole, method, note = self.join(dials.swap, dials.mode)
        check_blocks(dials.blocks, whole)
        notes = [note] if note else []
        if method == "concatenation":
            weighed = self._sum(dials)
            if dials.base != 1:
                notes.append("A sum of two LoRAs has no base; that dial does nothing.")
            return Dialled(weighed, whole, "sum", tuple(notes))
        if note := dials.idle():
            notes.append(note)
        return Dialled(dial(whole, dials), whole, method, tuple(notes))

    def _sum(self, dials: Dials) -> dict[str, Factors]:
        content, style = (
            {name: _times(pair, share) for name, pair in found.items() if (share := shares[name])}
            for found, shares in zip(self.factors, self._shares(dials), strict=True)
        )
        return concatenate([content, style])

    def _shares(self, dials: Dials) -> tuple[dict[str, float], dict[str, float]]:
        content, style = self.factors
        return {n: dials.at(n).content for n in content}, {n: dials.at(n).style for n in style}

    def report(self) -> str:
        """What the files are, a line each, and whether they were trained for each other."""
        files = [self.content] if self.style is None else [self.content, self.style]
        lines = [f"{lora.name}: {lora_info(lora)}" for lora in files]
        if self.style is not None:
            lines.append(str(self.verdict))
        elif kind_of(self.content) != B4M:
            lines.append(f"warning: {_no_entity(self.content.name)}")
        return "\n".join(lines)

    def saved(self, dialled: Dialled, dials: Dials) -> Lora:
        """The weighed LoRA, named and with metadata that says what it was made of."""
        made = self.lora(dialled.factors, dialled.method)
        files = {"content_file": self.content.name.strip("'")}
        files |= {} if self.style is None else {"style_file": self.style.name.strip("'")}
        strengths = {name: f"{getattr(dials, name):g}" for name in ("content", "style", "base")}
        basis = {key: self.content.metadata[key] for key in KEPT if key in self.content.metadata}
        about = {**basis, **files, **strengths, "method": dialled.method}
        return replace(made, metadata={**made.metadata, **about})

    def lora(self, factors: Mapping[str, Factors], method: str) -> Lora:
        """These factors, made by a method of `Dialled`, as a LoRA of the right name and kind."""
        kind = PLAIN if method == "sum" else kind_of(self.content)
        name = str(self) if method == "entity" else f"{self} ({method})"
        return lora_of_factors(factors, name, {KIND_KEY: kind})


def load_source(content: str | os.PathLike[str], style: str | os.PathLike[str] | None = None) -> Source:
    """Read an entity, or a content and a style file, in any LoRA layout. Raises PitError as `load_lora`."""
    return Source(load_lora(content), None if style is None else load_lora(style))


def dial(factors: Mapping[str, Factors], dials: Dials) -> dict[str, Factors]:
    """An entity's layers under the dials, at their own rank; `quadrant_lora` of the same strengths is equal.

    Layers that come to nothing are left out. Raises PitError for convolutions.
    """
    weighed = {}
    for name, layer in factors.items():
        content, style, base = dials.at(name)
        lower, right = (content, style) if dials.swap else (style, content)
        if base or lower:
            if layer.down.dim() != 2 or layer.up.dim() != 2:
                raise PitError(f"The layer '{name}' is a convolution; B4M splits linear layers only.")
            weighed[name] = Factors(
                _halves_times(layer.down, (1.0, right), 1), _halves_times(layer.up, (base, lower), 0)
            )
    return weighed


def _halves_times(factor: Tensor, strengths: tuple[float, float], dim: int) -> Tensor:
    """The factor itself at strengths 1, which keeps every bit and no second copy."""
    if strengths == (1, 1):
        return factor
    cut = factor.shape[dim] // 2
    halves = factor.split([cut, factor.shape[dim] - cut], dim)
    return torch.cat([half * s for half, s in zip(halves, strengths, strict=True)], dim)


def _times(pair: Factors, strength: float) -> Factors:
    return pair if strength == 1 else Factors(pair.down, pair.up * strength)


def _no_entity(name: str) -> str:
    return (
        f"{name} was not trained as B4M, so its halves are not content and style; the dials weigh halves "
        "that mean nothing by themselves."
    )
