"""LoRA files from one layout to another, and what of a file a model has a place for.

ComfyUI's own loader reads kohya's layout completely; of files as IP-LoRA and B4M publish them it loads
nothing and only logs it. Hence the conversion, and a report that is made before anything is applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import PitError
from ..files import check_finite, save_tensors
from .keys import diffusers_name, is_ip_layer, is_original, kohya_name, module_name
from .kinds import KIND_KEY, kind_of
from .model import Lora, LoraLayer, fits, patched_weight
from .reading import ADAPTER_METADATA, as_lora, load_lora, lora_from_tensors

__all__ = [
    "Lora",
    "LoraLayer",
    "MatchReport",
    "check_fits",
    "kind_of",
    "load_lora",
    "lora_from_tensors",
    "match_report",
    "patched_weights",
    "save_lora",
    "to_diffusers",
    "to_kohya",
]

Source = Lora | Mapping[str, Tensor]
"""A LoRA that was read, or the content of a file in any layout."""


class MatchReport(NamedTuple):
    """What of a LoRA has a place. matched: the model's names of the layers that are changed. unmatched: the
    LoRA's layers that the model does not have. kind: see `kind_of`. ranks: rank -> how many layers."""

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    kind: str
    ranks: dict[int, int]


def to_kohya(state_dict: Source) -> dict[str, Tensor]:
    """A LoRA in kohya's layout: `lora_unet_..._to_q.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    The factors are the same tensors, uncopied; alpha is the rank where the file names none. Layers of an
    IP-Adapter stay in it; `Lora.split` parts them for a loader that knows only the UNet. Raises PitError for
    a file that is not a LoRA, see `lora_from_tensors`.
    """
    made: dict[str, Tensor] = {}
    for module, layer in as_lora(state_dict).layers.items():
        name = kohya_name(module)
        made[f"{name}.lora_down.weight"] = layer.down
        made[f"{name}.lora_up.weight"] = layer.up
        made[f"{name}.alpha"] = torch.tensor(float(layer.rank if layer.alpha is None else layer.alpha))
    return made


def to_diffusers(state_dict: Source) -> dict[str, Tensor]:
    """A LoRA in diffusers' layout: `unet.<module>.lora_A.weight` and `.lora_B.weight`.

    That layout has no alpha, so a scale other than 1 is multiplied into `lora_B`. Raises PitError for a file
    that is not a LoRA, and for one that names its layers as the original layout does.
    """
    lora = as_lora(state_dict)
    original = [module for module in lora.layers if is_original(module)]
    if original:
        raise PitError(
            f"{lora.name} names its layers as in '{original[0][:120]}', which diffusers' layout cannot say; "
            "load it as it is, or write kohya's layout."
        )
    made: dict[str, Tensor] = {}
    for module, layer in lora.layers.items():
        name = diffusers_name(module)
        made[f"{name}.lora_A.weight"] = layer.down
        made[f"{name}.lora_B.weight"] = layer.up if layer.scale == 1 else _scaled(layer)
    return made


LAYOUTS = {"kohya": to_kohya, "diffusers": to_diffusers}


def save_lora(
    path: str | PathLike[str],
    source: Source,
    *,
    layout: str = "kohya",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write a LoRA as safetensors in one of LAYOUTS, atomically; `dtype` None keeps the factors' own.

    The metadata that was read is kept, and gets the kind. Raises PitError for another suffix or layout, for
    numbers too large for the dtype (nothing is written), and for a place that cannot be written.
    """
    if layout not in LAYOUTS:
        raise PitError(f"Expected the layout to be one of {', '.join(LAYOUTS)}, got '{str(layout)[:60]}'.")
    if Path(path).suffix != ".safetensors":
        raise PitError(f"LoRAs are saved as safetensors; name the file {Path(path).stem}.safetensors.")
    lora = as_lora(source)
    tensors = LAYOUTS[layout](lora)
    ready = {key: t.to(dtype=dtype) if dtype and t.ndim else t for key, t in tensors.items()}
    check_finite(ready, f"The LoRA for '{Path(path).name}', written as {dtype or 'it is'},")
    kept = {key: value for key, value in lora.metadata.items() if key != ADAPTER_METADATA}
    save_tensors(path, ready, {"format": "pt", **kept, KIND_KEY: kind_of(lora), **(metadata or {})})


def match_report(state_dict: Source, module_names: Iterable[str]) -> MatchReport:
    """Which layers of a LoRA are among a model's modules.

    Names are compared as all layouts spell them, so `module_names` may be diffusers' (with `unet.` or
    without), the original ones, or kohya's, with `.weight` at the end or without. An IP-Adapter's layers
    match only when their names are given too. Raises PitError for a file that is not a LoRA.
    """
    lora = as_lora(state_dict)
    found = _places(lora, module_names)
    return MatchReport(
        matched=tuple(name for name in found.values() if name is not None),
        unmatched=tuple(module for module, name in found.items() if name is None),
        kind=kind_of(lora),
        ranks=lora.ranks,
    )


def check_fits(source: Source, shapes: Mapping[str, Iterable[int]]) -> dict[str, LoraLayer]:
    """The LoRA's layers by the model's own names, when each has a place of its shape.

    shapes: module name -> shape of its weight. Raises PitError that names what has no place, or the first
    layer whose shape differs.
    """
    lora = as_lora(source)
    found, unmatched = matched_layers(lora, shapes)
    if unmatched:
        raise PitError(unmatched_message(lora, tuple(found), unmatched))
    check_shapes(lora, found, shapes)
    return found


def matched_layers(lora: Lora, names: Iterable[str]) -> tuple[dict[str, LoraLayer], tuple[str, ...]]:
    """The layers by the model's own names, and those without a place by ours."""
    places = _places(lora, names)
    found = {name: lora.layers[module] for module, name in places.items() if name is not None}
    return found, tuple(module for module, name in places.items() if name is None)


def check_shapes(lora: Lora, found: Mapping[str, LoraLayer], shapes: Mapping[str, Iterable[int]]) -> None:
    """Raise PitError for the first layer whose weight has another shape in the model."""
    for name, layer in found.items():
        shape = tuple(shapes[name])
        if not fits(layer, shape):
            raise PitError(
                f"{lora.name} changes '{layer.module[:120]}' as a weight of shape {layer.shape}, but the "
                f"model's is {shape}; it was made for another model."
            )


def patched_weights(
    weights: Mapping[str, Tensor], source: Source, strength: float = 1.0
) -> dict[str, Tensor]:
    """The weights that a LoRA changes, changed: W + strength * scale * up @ down, in W's dtype.

    weights: module name, or that and `.weight` -> W. The rest is left out, so the result goes over the old
    ones. Raises PitError when a layer of the LoRA has no place or another shape.
    """
    layers = check_fits(source, {name: weight.shape for name, weight in weights.items()})
    return {name: patched_weight(weights[name], layer, strength) for name, layer in layers.items()}


def unmatched_message(lora: Lora, matched: tuple[str, ...], unmatched: tuple[str, ...]) -> str:
    """One sentence on layers that have no place: how many, which, and what the reason may be."""
    shown = ", ".join(module[:120] for module in unmatched[:3])
    more = f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else ""
    if all(is_ip_layer(module) for module in unmatched):
        advice = "these belong to an IP-Adapter, so apply them to one"
    elif matched:
        advice = "it was made for another model, or for more than this one"
    else:
        advice = "it was made for another model, such as SD1.5 instead of SDXL"
    return (
        f"{lora.name} changes {len(matched) + len(unmatched)} layers, but {len(unmatched)} of them are not "
        f"in the model ({shown}{more}); {advice}."
    )


def _places(lora: Lora, module_names: Iterable[str]) -> dict[str, str | None]:
    """Our name of each layer -> the model's, None where it has no such module."""
    places: dict[str, str] = {}
    for name in module_names:
        places.setdefault(kohya_name(module_name(name.removesuffix(".weight"))), name)
    return {module: places.get(kohya_name(module)) for module in lora.layers}


def _scaled(layer: LoraLayer) -> Tensor:
    return (layer.up.float() * layer.scale).to(layer.up.dtype)
