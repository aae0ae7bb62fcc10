"""How much image tokens weigh in each layer: schedules, layer maps, and what exactly the weight scales.

Layers are named by their transformer index, the rank of a spatial transformer in execution order (down, mid,
up; 0 to 10 in SDXL). That layer 6 carries style and layer 3 composition was found for SDXL's eleven
(InstantStyle, arXiv 2404.02733), so those schedules refuse other plans.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import PitError
from .layers import AttentionLayer

STYLE, COMPOSITION = 6, 3
SDXL_TRANSFORMERS = 11
LAYER_MAP = "layer map"
C_PENALTY_WIDTH = 1280

SCALINGS = ("V only", "K+V", "K+V with C penalty", "K+mean(V) with C penalty")


@dataclass(frozen=True)
class LayerWeight:
    """One layer's weight. swapped: the unconditional half reads the conditional tokens, the other none."""

    weight: float
    swapped: bool = False


Factor = Callable[[float, float], float]
"""(transformer index, how many there are) -> factor."""

RAMPS: dict[str, Factor] = {
    "even": lambda t, L: 1.0,
    "ease in": lambda t, L: 0.05 + 0.95 * (1 - t / L),
    "ease out": lambda t, L: 0.05 + 0.95 * t / L,
    "ease in-out": lambda t, L: 0.05 + 0.95 * (1 - abs(t - L / 2) / (L / 2)),
    "reverse in-out": lambda t, L: 0.05 + 0.95 * abs(t - L / 2) / (L / 2),
}
WEAK: dict[str, tuple[str, ...]] = {
    "weak input": ("input",),
    "weak middle": ("middle",),
    "weak output": ("output",),
    "strong middle": ("input", "output"),
}
"""Schedule -> the groups of layers that get a fifth of the weight."""


def _style(w: float, c: float, t: int) -> LayerWeight:
    return LayerWeight(w if t == STYLE else 0.0)


def _composition(w: float, c: float, t: int) -> LayerWeight:
    return LayerWeight(w if t == COMPOSITION else 0.0)


def _strong_style(w: float, c: float, t: int) -> LayerWeight:
    return LayerWeight(0.0 if t == COMPOSITION else w)


def _style_and_composition(w: float, c: float, t: int) -> LayerWeight:
    return LayerWeight({STYLE: w, COMPOSITION: c}.get(t, 0.0))


def _strong_style_and_composition(w: float, c: float, t: int) -> LayerWeight:
    return LayerWeight(c if t == COMPOSITION else w)


def _precise_style(w: float, c: float, t: int) -> LayerWeight:
    return LayerWeight(w if t in (STYLE, COMPOSITION) else 0.0, swapped=t == COMPOSITION)


def _precise_composition(w: float, c: float, t: int) -> LayerWeight:
    return LayerWeight(w if t in (STYLE, COMPOSITION) else 0.1 * w, swapped=t != COMPOSITION)


TRANSFERS: dict[str, Callable[[float, float, int], LayerWeight]] = {
    "style": _style,
    "composition": _composition,
    "strong style": _strong_style,
    "style and composition": _style_and_composition,
    "strong style and composition": _strong_style_and_composition,
    "precise style": _precise_style,
    "precise composition": _precise_composition,
}
"""Schedules that follow what SDXL's layers are known to carry: (weight, composition weight, t) -> weight."""

SCHEDULES = (*RAMPS, *WEAK, *TRANSFERS, LAYER_MAP)


def layer_weights(
    layers: Sequence[AttentionLayer],
    schedule: str = "even",
    weight: float = 1.0,
    *,
    composition_weight: float = 1.0,
    layer_map: str = "",
) -> dict[int, LayerWeight]:
    """Layer index n -> its weight; layers that weigh nothing are left out.

    composition_weight: of layer 3 in the two "... and composition" schedules. layer_map: for the schedule of
    that name, "index:weight, ..." by transformer index, each times `weight`; what is not named weighs 0.
    Raises PitError for an unknown schedule, weights that are not finite, a broken map, and for a schedule
    that needs SDXL's layers on another plan.
    """
    for name, value in (("weight", weight), ("composition_weight", composition_weight)):
        if not math.isfinite(value):
            raise PitError(f"Expected {name} to be a finite number (1 is usual), got {value!r}.")
    count = max(layer.transformer_index for layer in layers) + 1
    if schedule in TRANSFERS and count != SDXL_TRANSFORMERS:
        raise PitError(
            f"The schedule '{schedule}' is known for SDXL's {SDXL_TRANSFORMERS} transformers, but this model "
            f"has {count}; use '{LAYER_MAP}' instead."
        )
    mapped = parse_layer_map(layer_map, count) if schedule == LAYER_MAP else {}
    found = {}
    for layer in layers:
        each = _one(layer, schedule, weight, composition_weight, count, mapped)
        if each.weight != 0:
            found[layer.index] = each
    return found


def _one(
    layer: AttentionLayer,
    schedule: str,
    weight: float,
    composition_weight: float,
    count: int,
    mapped: Mapping[int, float],
) -> LayerWeight:
    t = layer.transformer_index
    if schedule in RAMPS:
        return LayerWeight(weight * RAMPS[schedule](t, count))
    if schedule in WEAK:
        return LayerWeight(weight * (0.2 if layer.group in WEAK[schedule] else 1.0))
    if schedule in TRANSFERS:
        return TRANSFERS[schedule](weight, composition_weight, t)
    if schedule == LAYER_MAP:
        return LayerWeight(weight * mapped.get(t, 0.0))
    raise PitError(f"Expected a weight schedule out of {', '.join(SCHEDULES)}, got '{schedule}'.")


def parse_layer_map(text: str, count: int) -> dict[int, float]:
    """The layer map "3:1, 6:0.5" as numbers. Raises PitError for anything else."""
    found: dict[int, float] = {}
    for entry in filter(None, (piece.strip() for piece in re.split(r"[,\n;]", text))):
        match = re.fullmatch(r"(\d{1,4})\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,2})?)", entry)
        if match is None:
            raise PitError(
                f"The layer map reads 'index:weight, ...', such as '3:1, 6:0.5', but got '{entry[:60]}'."
            )
        t, value = int(match[1]), float(match[2])
        if t >= count:
            raise PitError(f"The layer map names layer {t}, but this model has the layers 0 to {count - 1}.")
        if t in found:
            raise PitError(f"The layer map names layer {t} twice; name each once.")
        found[t] = value
    if not found:
        raise PitError("The layer map is empty; write 'index:weight, ...', such as '3:1, 6:0.5'.")
    return found


def scaled_keys_values(k: Tensor, v: Tensor, weight: float, scaling: str) -> tuple[Tensor, Tensor, float]:
    """K and V (B, T, C) as the weight leaves them, and what is left to multiply the attention's output with.

    "V only" is the weight on the output. The other three put it on K too, which sharpens or flattens the
    attention itself; the C penalty is weight * C / 1280, and mean(V) is taken over the tokens. Raises
    PitError for another scaling.
    """
    if scaling == "V only":
        return k, v, weight
    if scaling not in SCALINGS:
        raise PitError(f"Expected the embeds scaling to be one of {', '.join(SCALINGS)}, got '{scaling}'.")
    if scaling == "K+V":
        return k * weight, v * weight, 1.0
    weight = weight * k.shape[-1] / C_PENALTY_WIDTH
    if scaling == "K+V with C penalty":
        return k * weight, v * weight, 1.0
    mean = v.mean(dim=1, keepdim=True)
    return k * weight, (v - mean) + mean * weight, 1.0
