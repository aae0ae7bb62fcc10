"""What a LoRA file is: an IP-LoRA, a B4M file, or a plain LoRA."""

from __future__ import annotations

import re

from .keys import is_ip_layer
from .model import Lora, LoraLayer

IP_LORA, B4M, PLAIN = "IP-LoRA", "B4M", "plain"
KINDS = (IP_LORA, B4M, PLAIN)
KIND_KEY = "pit_lora_kind"
"""Where files that we write say their kind, in the metadata."""

PROJECTION = re.compile(r"(.+)\.(attn[12])\.(to_q|to_k|to_v|to_out\.0)")


def kind_of(lora: Lora) -> str:
    """One of KINDS: as the metadata says, else by what the tensors show.

    An IP-LoRA changes an IP-Adapter's own layers; one that does not is told only by its form (all projections
    of all attention layers and nothing else, one rank, scale 1), which a DreamBooth LoRA over the same layers
    shares. A B4M file has the doubled prefix, or a product of its frozen halves that is zero.
    """
    declared = lora.metadata.get(KIND_KEY)
    if declared in KINDS:
        return declared
    if any(is_ip_layer(module) for module in lora.layers):
        return IP_LORA
    if lora.doubled or _frozen_halves_cancel(lora):
        return B4M
    return IP_LORA if _covers_all_attention(lora) else PLAIN


def _frozen_halves_cancel(lora: Lora) -> bool:
    """The first m/2 rows of `up` times the first n/2 columns of `down` are exactly zero in every attn2.to_k.

    Both halves are frozen in B4M: the published files have zeros in the first, files trained from a zero
    start have them in different rank channels. Any other training leaves no such corner.
    """
    keys = [layer for module, layer in lora.layers.items() if module.endswith("attn2.to_k")]
    return bool(keys) and all(_corner_is_zero(layer) for layer in keys)


def _corner_is_zero(layer: LoraLayer) -> bool:
    rows, columns = layer.shape[0] // 2, layer.shape[1] // 2
    if len(layer.shape) != 2 or not rows or not columns:
        return False
    corner = LoraLayer(layer.module, layer.down[:, :columns], layer.up[:rows])
    return corner.norm() == 0 and layer.norm() > 0


def _covers_all_attention(lora: Lora) -> bool:
    blocks: dict[str, set[str]] = {}
    for module in lora.layers:
        match = PROJECTION.fullmatch(module)
        if match is None:
            return False
        blocks.setdefault(match[1], set()).add(f"{match[2]}.{match[3]}")
    whole = all(len(found) == 8 for found in blocks.values())
    return whole and len(lora.ranks) == 1 and all(layer.scale == 1 for layer in lora.layers.values())
