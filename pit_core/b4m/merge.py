"""Content of one B4M file with the style of another, and a strength for each quadrant of dW.

With U = [A ; B] and V = [C | D], dW = [[A C, A D], [B C, B D]] (arXiv 2403.19456): content lives in D
and style in B, as in the released files; the paper's figure names them the other way round, hence `swap`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import PitError
from .factors import Factors, Lora, factors_of

SAME_BASIS = 1e-2
"""Frozen halves that differ by less, relatively, count as the same."""

Gains = tuple[float, float, float, float]
"""What multiplies A C, A D, B C and B D: upper left, upper right, lower left, lower right."""


class Quadrants(NamedTuple):
    """Four LoRAs that sum up to one: A C, A D (content), B C (style) and B D (both)."""

    base: dict[str, Factors]
    content: dict[str, Factors]
    style: dict[str, Factors]
    both: dict[str, Factors]


class Merged(NamedTuple):
    """`method` is "splice", "concatenation" or, of a single file, "entity"; `note` is for the user, empty
    when all is as it should be."""

    factors: dict[str, Factors]
    method: str
    note: str


def splice(
    content: Lora | Mapping[str, Tensor], style: Lora | Mapping[str, Tensor], swap: bool = False
) -> dict[str, Factors]:
    """U = [A_s ; B_s] of the style file and V = [C_c | D_c] of the content file, by layer, bit for bit.

    Both are {layer: (down, up)} or state dicts. `swap` takes content from B and style from D. Warns when the
    files' frozen halves differ; raises PitError when their layers, ranks or widths do.
    """
    content, style = _factors(content), _factors(style)
    difference, layer = basis_difference(content, style)
    if difference > SAME_BASIS:
        warnings.warn(_other_basis(difference, layer), stacklevel=2)
    return _spliced(style, content) if swap else _spliced(content, style)


def basis_difference(
    content: Lora | Mapping[str, Tensor], style: Lora | Mapping[str, Tensor]
) -> tuple[float, str]:
    """The largest relative difference of a frozen half between two files, and its layer. 0: trained alike.

    Raises PitError when layers, ranks or widths differ.
    """
    content, style = _factors(content), _factors(style)
    _check_alike(content, style)
    worst = (0.0, "")
    for name in content:
        ours, theirs = content[name].halves(), style[name].halves()
        for one, other in ((ours.a, theirs.a), (ours.c, theirs.c)):
            size = max(float(one.float().norm()), float(other.float().norm()))
            if size:
                worst = max(worst, (float((one.float() - other.float()).norm()) / size, name))
    return worst


def quadrant_lora(
    factors: Lora | Mapping[str, Tensor],
    base: float = 1.0,
    content: float = 1.0,
    style: float = 1.0,
    *,
    gains: Gains | None = None,
    swap: bool = False,
) -> dict[str, Factors]:
    """The same LoRA at twice the rank, with a strength for each quadrant; all strengths 1 give dW itself.

    `gains` (ul, ur, dl, dr) are taken as they are; else they are (base, base * content, style,
    style * content), so with base and style 0 the content has nothing to act through. `swap` exchanges the
    roles of content and style. Exact: U' = [[A, 0], [0, B]], V' = [[ul C, ur D], [dl C, dr D]].
    """
    if gains is None:
        right, down = (style, content) if swap else (content, style)
        gains = (base, base * right, down, down * right)
    ul, ur, dl, dr = gains
    weighed = {}
    for name, layer in _matrices(_factors(factors)).items():
        a, b, c, d = layer.halves()
        down_ = torch.cat([torch.cat([ul * c, ur * d], 1), torch.cat([dl * c, dr * d], 1)])
        weighed[name] = Factors(down_, torch.block_diag(a, b))
    return weighed


def split_entity(factors: Lora | Mapping[str, Tensor], swap: bool = False) -> Quadrants:
    """One trained entity as four LoRAs of its own rank, one for each quadrant; they sum up to it."""
    parts: list[dict[str, Factors]] = [{}, {}, {}, {}]
    for name, (down, up) in _matrices(_factors(factors)).items():
        rows, columns = up.shape[0] // 2, down.shape[1] // 2
        ups = _without(up, slice(rows, None), 0), _without(up, slice(None, rows), 0)
        downs = _without(down, slice(columns, None), 1), _without(down, slice(None, columns), 1)
        for part, (i, j) in zip(parts, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
            part[name] = Factors(downs[j], ups[i])
    ul, ur, dl, dr = parts
    return Quadrants(ul, dl, ur, dr) if swap else Quadrants(ul, ur, dl, dr)


def concatenate(
    loras: Sequence[Lora | Mapping[str, Tensor]], strengths: Sequence[float] | None = None
) -> dict[str, Factors]:
    """The exact sum of any LoRAs, each times its strength: ranks add up, nothing is blended.

    Raises PitError for layers of different widths, and for files that name the same blocks differently.
    """
    strengths = [1.0] * len(loras) if strengths is None else strengths
    if len(strengths) != len(loras) or not loras:
        raise PitError(f"Expected a strength for each LoRA, got {len(strengths)} for {len(loras)}.")
    layers: dict[str, list[Factors]] = {}
    for lora, strength in zip(loras, strengths, strict=True):
        for name, (down, up) in _factors(lora).items():
            layers.setdefault(name, []).append(Factors(down, up if strength == 1 else up * strength))
    _check_one_naming(layers)
    for name, found in layers.items():
        if len({(f.down.shape[1:], f.up.shape[0], f.up.shape[2:]) for f in found}) > 1:
            raise PitError(
                f"The layer '{name}' differs in width between the LoRAs: take files of one base model."
            )
    return {
        name: Factors(torch.cat([f.down for f in found]), torch.cat([f.up for f in found], 1))
        for name, found in layers.items()
    }


class Verdict(NamedTuple):
    """Whether two files can be spliced. reason: why not, empty when they were trained alike. difference: the
    largest relative one of a frozen half. possible: layers, ranks and widths agree, so that it can be forced.
    """

    reason: str
    difference: float
    possible: bool

    def __str__(self) -> str:
        if self.reason:
            return f"not made for each other: {self.reason}"
        return f"made for each other: their frozen halves agree (largest difference {self.difference:.2%})"


def verdict(content: Lora | Mapping[str, Tensor], style: Lora | Mapping[str, Tensor]) -> Verdict:
    """Compare the layers and the frozen halves of two files."""
    try:
        difference, layer = basis_difference(content, style)
    except PitError as error:
        return Verdict(str(error), float("inf"), False)
    same = difference <= SAME_BASIS
    return Verdict("" if same else _other_basis(difference, layer), difference, True)


def merge(content: Lora | Mapping[str, Tensor], style: Lora | Mapping[str, Tensor]) -> Merged:
    """Splice two B4M files; add up two LoRAs that do not share their frozen halves, and say so."""
    return join(content, style)


def join(
    content: Lora | Mapping[str, Tensor],
    style: Lora | Mapping[str, Tensor],
    *,
    swap: bool = False,
    mode: str = "auto",
    found: Verdict | None = None,
) -> Merged:
    """`merge` by a mode: "auto", "splice" (also across bases, with a note) or "sum" (as if never B4M).

    found: the verdict on the two files, where it is known. Raises PitError for a splice of files whose
    layers, ranks or widths differ.
    """
    content, style = _factors(content), _factors(style)
    if mode == "sum":
        return Merged(concatenate([content, style]), "concatenation", "")
    found = found or verdict(content, style)
    if mode == "auto" and found.reason:
        note = f"B4M does not apply, so the two LoRAs were added up. {found.reason}"
        return Merged(concatenate([content, style]), "concatenation", note)
    if not found.possible:
        raise PitError(found.reason)
    return Merged(_spliced(style, content) if swap else _spliced(content, style), "splice", found.reason)


def _spliced(content: Mapping[str, Factors], style: Mapping[str, Factors]) -> dict[str, Factors]:
    return {name: Factors(content[name].down.clone(), style[name].up.clone()) for name in content}


def _without(matrix: Tensor, part: slice, dim: int) -> Tensor:
    """A copy with zeros in some rows or columns."""
    copy = matrix.clone()
    (copy if dim == 0 else copy.mT)[part] = 0
    return copy


def _factors(lora: Lora | Mapping[str, Tensor]) -> dict[str, Factors]:
    state_dict = {key: value for key, value in lora.items() if isinstance(value, Tensor)}
    if state_dict:
        return factors_of(state_dict)
    return {name: Factors(*pair) for name, pair in lora.items()}


def _matrices(factors: dict[str, Factors]) -> dict[str, Factors]:
    for name, (down, up) in factors.items():
        if down.dim() != 2 or up.dim() != 2:
            raise PitError(f"The layer '{name}' is a convolution; B4M splits linear layers only.")
    return factors


def _check_alike(content: dict[str, Factors], style: dict[str, Factors]) -> None:
    _matrices(content), _matrices(style)
    if lonely := sorted(content.keys() ^ style.keys()):
        raise PitError(
            f"The content and style files must have the same layers, but {len(lonely)} are in one only, "
            f"such as '{lonely[0][:100]}'."
        )
    for name, (down, up) in content.items():
        if (down.shape, up.shape) != (style[name].down.shape, style[name].up.shape):
            raise PitError(
                f"The layer '{name}' has rank {down.shape[0]} and widths {down.shape[1]} -> {up.shape[0]} in "
                f"the content file, but rank {style[name].rank} and widths {style[name].down.shape[1]} -> "
                f"{style[name].up.shape[0]} in the style file."
            )


def _check_one_naming(names: Mapping[str, object]) -> None:
    """kohya files name SDXL's blocks in two ways; loaders let one layer of such a mixture hide the other."""
    ways = (r"lora_unet_((input|output)_blocks|middle_block)_", r"lora_unet_((down|up)_blocks|mid_block)_")
    found = {way for name in names for way in ways if re.match(way, name)}
    if len(found) > 1:
        raise PitError(
            "One LoRA names the blocks 'input_blocks', the other 'down_blocks'; convert one of them first."
        )


def _other_basis(difference: float, layer: str) -> str:
    return (
        f"Their frozen halves differ by {difference:.0%} (at '{layer}'), so content and style were not "
        "trained against each other's; train both with one basis seed and one rank."
    )
