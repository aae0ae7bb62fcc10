"""What a LoRA holds, in words and numbers: kind, ranks, layers, and how strong it is in which block."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import Source
from .keys import is_ip_layer
from .kinds import kind_of
from .model import Lora
from .reading import as_lora

GROUPS = ("self-attention", "text", "image", "other")
"""What a layer serves: attn1, attn2, an IP-Adapter's own layers, and everything else."""

BLOCK = re.compile(
    r"((?:down|up)_blocks\.\d+(?:\.attentions\.\d+)?|mid_block|(?:in|out)put_blocks\.\d+|middle_block|"
    r"text_encoder(?:_2)?)(?:\.|$)"
)
ORDER = ("text_encoder", "down", "input", "mid", "up", "output")


@dataclass(frozen=True)
class BlockNorms:
    """One block's layers. norms: group -> Frobenius norm of all their changes of weight taken together."""

    block: str
    layers: int
    norms: Mapping[str, float]

    @property
    def norm(self) -> float:
        """Over all groups: the root of the sum of the squares."""
        return math.hypot(*self.norms.values())


@dataclass(frozen=True)
class LoraInfo:
    """A LoRA at a glance. ranks: rank -> layers. scales: the lowest and highest alpha / rank. blocks: in the
    order in which the model runs them. parameters: numbers in the factors, alphas not counted."""

    name: str
    kind: str
    ranks: Mapping[int, int]
    layers: int
    parameters: int
    scales: tuple[float, float]
    dtypes: tuple[str, ...]
    blocks: tuple[BlockNorms, ...]

    def __str__(self) -> str:
        ranks = " and ".join(f"{rank} ({count} layers)" for rank, count in self.ranks.items())
        low, high = self.scales
        scale = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        kind = "plain LoRA" if self.kind == "plain" else self.kind
        size = f"{self.parameters / 1e6:.3g} M parameters in {' and '.join(self.dtypes)}"
        return f"{kind}, rank {ranks}, scale {scale}, {size}"


def lora_info(source: Source) -> LoraInfo:
    """Everything about a LoRA that can be said without its model. Raises PitError when it is none."""
    lora = as_lora(source)
    layers = list(lora.layers.values())
    scales = [layer.scale for layer in layers]
    factors: list[Tensor] = [t for layer in layers for t in (layer.down, layer.up)]
    return LoraInfo(
        name=lora.name,
        kind=kind_of(lora),
        ranks=lora.ranks,
        layers=len(layers),
        parameters=sum(t.numel() for t in factors),
        scales=(min(scales), max(scales)) if scales else (1.0, 1.0),
        dtypes=tuple(sorted({_dtype_name(t.dtype) for t in factors})),
        blocks=block_norms(lora),
    )


def block_norms(lora: Lora) -> tuple[BlockNorms, ...]:
    """How much a LoRA changes each block at strength 1; text encoders first, then as the UNet runs."""
    squares: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for module, layer in lora.layers.items():
        block, group = block_of(module), group_of(module)
        mine = squares.setdefault(block, {})
        mine[group] = mine.get(group, 0.0) + layer.norm() ** 2
        counts[block] = counts.get(block, 0) + 1
    return tuple(
        BlockNorms(
            block, counts[block], {g: math.sqrt(squares[block][g]) for g in GROUPS if g in squares[block]}
        )
        for block in sorted(squares, key=_place)
    )


def block_of(module: str) -> str:
    """The block that a layer is in: a spatial transformer where there is one, else the whole block."""
    match = BLOCK.match(module)
    return match[1] if match else module.partition(".")[0]


def group_of(module: str) -> str:
    """One of GROUPS."""
    if is_ip_layer(module):
        return "image"
    if ".attn1." in module:
        return "self-attention"
    return "text" if ".attn2." in module else "other"


def _place(block: str) -> tuple[int, list[int], str]:
    rank = next((i for i, start in enumerate(ORDER) if block.startswith(start)), len(ORDER))
    return rank, [int(number) for number in re.findall(r"\d{1,9}", block)], block


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
