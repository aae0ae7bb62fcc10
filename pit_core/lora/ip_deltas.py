"""What an IP-LoRA changes in the IP-Adapter itself: its `to_k_ip` and `to_v_ip`, W + strength * up @ down.

A loader of LoRAs knows only the UNet's weights; these belong to the adapter.
"""

from __future__ import annotations

import copy
import hashlib
import re

import torch

from ..errors import PitError
from ..files import hash_tensors
from ..ip_adapter.adapter import IPAdapter, IPLayers
from .formats import Source, to_kohya
from .model import Lora, LoraLayer, check_strength, fits, patched_weight
from .reading import as_lora

NAME = re.compile(r"(.+)\.(to_[kv]_ip)")
ORDER = ("down", "input", "up", "output", "mid")  # adapters number their layers down, up, mid


def apply_ip_deltas(adapter: IPAdapter, source: Source, strength: float = 1.0) -> IPAdapter:
    """A new adapter with the LoRA's changes in its layers; the projection is shared, the old one as it was.

    For weights that torch holds; a host that moves weights itself patches by `ip_layers`. The content hash
    is a new one, so caches of keys and values notice. Raises PitError as `ip_layers`, and for a strength that
    is not finite.
    """
    check_strength(strength)
    lora = as_lora(source)
    changes = ip_layers(adapter, lora)
    layers = copy.deepcopy(adapter.layers)
    with torch.no_grad():
        for key, layer in changes.items():
            weight = layers.get_parameter(key.removeprefix("ip_adapter."))
            weight.copy_(patched_weight(weight, layer, strength))
    return with_layers(adapter, layers, lora, strength)


def with_layers(adapter: IPAdapter, layers: IPLayers, lora: Lora, strength: float) -> IPAdapter:
    """The adapter with other layers, or the same ones where a host patches them, as a LoRA has changed them:
    named so, and with a content hash of its own."""
    digest = hash_tensors(to_kohya(lora.split()[1]))
    made = f"{adapter.content_hash}|{digest}|{strength!r}".encode()
    changed = IPAdapter(
        adapter.projector, layers, f"{adapter.name} with {lora.name}", hashlib.sha256(made).hexdigest()
    )
    return changed.train(adapter.training)


def ip_layers(adapter: IPAdapter, source: Source) -> dict[str, LoraLayer]:
    """The adapter's state-dict key, such as `ip_adapter.1.to_k_ip.weight` -> what the LoRA changes there.

    LoRAs name these layers by the UNet's modules, adapters by number, in the order down, up, mid. The order
    is all it takes, so a file has to change all layers of the adapter. Raises PitError when it changes none
    or only some, and when the shapes differ.
    """
    lora = as_lora(source)
    found = _by_attention(lora)
    ours = [f"ip_adapter.{number}" for number in adapter.layers]
    if len(found) != len(ours) or any(len(pair) != 2 for pair in found.values()):
        count = sum(map(len, found.values()))
        raise PitError(
            f"{lora.name} changes {count} of the IP-Adapter's own layers (to_k_ip, to_v_ip), but "
            f"{adapter.name} has {2 * len(ours)}; use a LoRA that was trained with this kind of adapter."
        )
    matched: dict[str, LoraLayer] = {}
    for prefix, module in zip(ours, sorted(found, key=_place), strict=True):
        for name, layer in found[module].items():
            key = f"{prefix}.{name}.weight"
            shape = tuple(adapter.get_parameter(key).shape)
            if not fits(layer, shape):
                raise PitError(
                    f"{lora.name} changes '{layer.module[:120]}' as a weight of shape {layer.shape}, but in "
                    f"{adapter.name} it is {shape}; use a LoRA that was trained with this kind of adapter."
                )
            matched[key] = layer
    return matched


def _by_attention(lora: Lora) -> dict[str, dict[str, LoraLayer]]:
    """Attention module -> "to_k_ip" and "to_v_ip" -> layer."""
    found: dict[str, dict[str, LoraLayer]] = {}
    for layer in lora.split()[1].layers.values():
        if match := NAME.fullmatch(layer.module):
            found.setdefault(match[1], {})[match[2]] = layer
    return found


def _place(module: str) -> tuple[int, list[int]]:
    side = next((i for i, start in enumerate(ORDER) if module.startswith(start)), len(ORDER))
    return side, [int(number) for number in re.findall(r"\d{1,9}", module)]
