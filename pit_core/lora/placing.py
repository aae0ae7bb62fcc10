"""Where the layers of a LoRA go, into a UNet, into an IP-Adapter or nowhere, and how much each counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from ..errors import PitError
from ..ip_adapter.adapter import IPAdapter
from .formats import check_shapes, matched_layers, unmatched_message
from .info import lora_info
from .ip_deltas import ip_layers
from .keys import is_ip_layer
from .model import Lora, LoraLayer

GROUPS = {
    "input": ("down_blocks.", "input_blocks."),
    "middle": ("mid_block.", "middle_block."),
    "output": ("up_blocks.", "output_blocks."),
}
"""Group of blocks -> how the names of its layers begin."""

SHOWN = 3  # names in a message; a file has up to 700


@dataclass(frozen=True)
class Strengths:
    """How much a LoRA counts: `whole` times the number of the group that a layer is in.

    adapter: the IP-Adapter's own layers. Layers outside of all groups (the UNet's time embedding, say) count
    `whole`. Raises PitError for numbers that are not finite.
    """

    whole: float = 1.0
    input: float = 1.0
    middle: float = 1.0
    output: float = 1.0
    adapter: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise PitError(f"Expected the strengths to be finite numbers (1 is usual), got {value!r}.")

    def of(self, module: str) -> float:
        """The strength of a layer, by our name of it (see `keys`)."""
        group = group_of_blocks(module)
        return self.whole * (getattr(self, group) if group else 1.0)


@dataclass(frozen=True, eq=False)
class Placed:
    """A LoRA's layers where they belong.

    model: the model's own name of a weight -> layer. adapter: the IP-Adapter's state-dict key -> layer.
    left: layers without a place, by our names.
    """

    lora: Lora
    model: Mapping[str, LoraLayer]
    adapter: Mapping[str, LoraLayer]
    left: tuple[str, ...]

    def by_strength(self, strengths: Strengths) -> dict[float, dict[str, LoraLayer]]:
        """Strength -> the model's layers that count so much; those of strength 0 are left out."""
        found: dict[float, dict[str, LoraLayer]] = {}
        for name, layer in self.model.items():
            if strength := strengths.of(layer.module):
                found.setdefault(strength, {})[name] = layer
        return found

    @property
    def warning(self) -> str | None:
        """What is not applied and why, in one sentence; None when everything has its place."""
        if not self.left:
            return None
        reasons = [
            f"{count} {reason}" for reason, count in Counter(map(_reason, self.left)).most_common() if count
        ]
        return (
            f"{len(self.left)} of {len(self.lora.layers)} layers of {self.lora.name} are not applied "
            f"({named(self.left)}): {', '.join(reasons)}."
        )

    def report(self) -> str:
        """What the file is and where its layers went, a line each; the warning comes last."""
        of_ip = sum(map(is_ip_layer, self.lora.layers))
        groups = Counter(group_of_blocks(layer.module) or "other" for layer in self.model.values())
        shares = ", ".join(f"{group} {groups[group]}" for group in (*GROUPS, "other") if groups[group])
        lines = [
            f"{self.lora.name}: {lora_info(self.lora)}",
            f"model: {len(self.model)} of {len(self.lora.layers) - of_ip} layers patched"
            + (f" ({shares})" if shares else ""),
        ]
        if of_ip:
            lines.append(f"ip_adapter: {len(self.adapter)} of {of_ip} layers patched")
        return "\n".join([*lines, *([f"warning: {self.warning}"] if self.left else [])])


def place_lora(lora: Lora, shapes: Mapping[str, Iterable[int]], adapter: IPAdapter | None = None) -> Placed:
    """Find each layer's place. shapes: the model's own name of a weight, in any spelling -> its shape.

    Raises PitError that names the layers when nothing has a place, for a weight of another shape, and for an
    adapter that the file's own layers for one do not fit (see `ip_layers`).
    """
    unet, of_ip = lora.split()
    matched, unmatched = matched_layers(unet, shapes)
    check_shapes(lora, matched, shapes)
    in_adapter = ip_layers(adapter, of_ip) if adapter is not None and of_ip.layers else {}
    left = (*unmatched, *(() if in_adapter else of_ip.layers))
    if not matched and not in_adapter:
        raise PitError(unmatched_message(lora, (), left))
    return Placed(lora, matched, in_adapter, left)


def group_of_blocks(module: str) -> str | None:
    """The name in GROUPS of the blocks that a layer of the UNet is in, if any."""
    return next((group for group, starts in GROUPS.items() if module.startswith(starts)), None)


def named(modules: tuple[str, ...]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else ""
    return ", ".join(module[:120] for module in modules[:SHOWN]) + more


def _reason(module: str) -> str:
    if is_ip_layer(module):
        return "belong to an IP-Adapter, and none is connected"
    if module.startswith(("text_encoder.", "text_encoder_2.")):
        return "belong to a text encoder, which is left as it is"
    return "are not in this model"
