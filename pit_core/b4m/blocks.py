"""How much content, style and base count in each block of a UNet, as a short text and as presets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..errors import PitError
from ..lora.info import block_of
from ..lora.keys import module_name

REST = "*"
MAX_TEXT = 2000  # characters

PRESETS = {
    "all blocks": "",
    "B-LoRA": "up_blocks.0.attentions.0: 1 0; up_blocks.0.attentions.1: 0 1; *: 0",
    "output blocks": "up_blocks: 1; *: 0",
    "middle and output blocks": "down_blocks: 0",
    "style in output blocks": "up_blocks: 1; *: 1 0",
}
"""B-LoRA (arXiv 2403.14572) finds content in the first block after the middle one, style in the next."""

SAME_BLOCKS = {
    **{f"input_blocks.{n}": f"down_blocks.{i}.attentions.{j}"
       for n, i, j in ((4, 1, 0), (5, 1, 1), (7, 2, 0), (8, 2, 1))},
    "middle_block": "mid_block",
    **{f"output_blocks.{n}": f"up_blocks.{n // 3}.attentions.{n % 3}" for n in range(6)},
}  # fmt: skip
"""The original layout's names of SDXL's transformers -> diffusers'."""


class Share(NamedTuple):
    """What content, style and base are multiplied by in a block."""

    content: float = 1.0
    style: float = 1.0
    base: float = 1.0


Blocks = Mapping[str, Share]
"""Beginning of a block's name, or REST for all others -> share; blocks that nothing names count whole."""


def parse_blocks(text: str) -> dict[str, Share]:
    """ "up_blocks.0: 1 0; *: 0" -> shares. Entries stand on lines of their own or between semicolons.

    One number counts for content, style and base; two are content and style, three all of them. The name of a
    preset stands for its text. Raises PitError that quotes the entry which cannot be read.
    """
    if len(text) > MAX_TEXT:
        raise PitError(f"Expected at most {MAX_TEXT} characters of block weights, got {len(text)}.")
    entries = [entry.strip() for entry in re.split(r"[;\n]", PRESETS.get(text.strip(), text))]
    found: dict[str, Share] = {}
    for entry in filter(None, entries):
        name, colon, numbers = entry.partition(":")
        name = name.strip().rstrip(".")
        if not colon or not re.fullmatch(r"\*|[\w.]+", name) or name in found:
            raise _unreadable(entry)
        found[name] = _share(entry, numbers.split())
    return found


def share_of(layer: str, blocks: Blocks) -> Share:
    """The share of a layer, given by its kohya name; of several names that fit it the longest counts."""
    block = block_name(layer)
    fitting = [name for name in blocks if _begins(block, name)]
    return blocks[max(fitting, key=len)] if fitting else blocks.get(REST, Share())


def block_name(layer: str) -> str:
    """diffusers' name of the block that a layer (its kohya name) is in: `up_blocks.0.attentions.1`."""
    block = block_of(module_name(layer))
    return SAME_BLOCKS.get(block, block)


def check_blocks(blocks: Blocks, layers: Iterable[str]) -> None:
    """Raise PitError for a name that no block of these layers begins with; it lists the blocks."""
    known = dict.fromkeys(block_name(layer) for layer in layers)
    for name in blocks:
        if name != REST and not any(_begins(block, name) for block in known):
            raise PitError(f"There is no block '{name[:60]}' in this LoRA; it has {', '.join(known)[:600]}.")


def _begins(block: str, name: str) -> bool:
    return block == name or block.startswith(f"{name}.")


def _share(entry: str, numbers: list[str]) -> Share:
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        raise _unreadable(entry) from None
    if not 1 <= len(values) <= 3 or not all(map(math.isfinite, values)):
        raise _unreadable(entry)
    return Share(*values * 3) if len(values) == 1 else Share(*values)


def _unreadable(entry: str) -> PitError:
    return PitError(
        "Expected block weights such as 'up_blocks.0: 1 0; *: 0', each block once and behind it content and "
        f"style, got '{entry[:80]}'."
    )
