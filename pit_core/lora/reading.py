"""Reading LoRA files in every layout, and saying in one sentence what is wrong with the others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PitError
from ..files import check_finite, load_tensors
from .keys import kohya_name, parse_key
from .model import Lora, LoraLayer

Pieces = dict[str, tuple[str, Tensor]]
"""What belongs to one layer: "down", "up" or "alpha" -> (key in the file, tensor)."""

FOREIGN = {
    r"\.hada_w": "LoHa factors",
    r"\.lokr_w": "LoKr factors",
    r"\.dora_scale$|\.lora_magnitude_vector": "DoRA magnitudes",
    r"\.lora_mid\.": "Tucker cores",
    r"\.oft_": "OFT blocks",
    r"\.lora_?\w*\.(\w+\.)?bias$": "biases",
    r"\.diff(_b)?$": "whole differences of weights",
}
"""A pattern in the keys -> what it stands for: related methods that are not a pair of factors."""

ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers writes the scale of PEFT files


def load_lora(path: str | PathLike[str]) -> Lora:
    """Read a LoRA from a safetensors or torch file. Raises PitError as `lora_from_tensors`, and for files
    that are missing or damaged."""
    path = Path(path)
    tensors, metadata = load_tensors(path)
    return lora_from_tensors(tensors, metadata, name=path.name)


def lora_from_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, name: str = ""
) -> Lora:
    """The LoRA in a file's flat content, called `name` in messages. Dtypes are kept.

    Read are, for each layer, `.lora.down/up`, `.lora_A/B` (also `.default`), kohya's `lora_unet_...` and
    diffusers' processor forms (`.processor.to_q_lora.down`), behind any number of `unet.`, with `alpha` or
    without. Raises PitError, one sentence each, when there is no LoRA in it, for keys of another kind, for
    half a pair, for shapes that do not go together, and for numbers that are not finite.
    """
    quoted = f"'{name}'" if name else "This LoRA"
    pieces, prefixes = _sorted_by_layer(tensors, quoted)
    declared = _declared_scales(metadata or {}, quoted)
    layers = {module: _layer(module, found, declared, quoted) for module, found in pieces.items()}
    check_finite(tensors, quoted)
    return Lora(layers, prefixes > 1, quoted, dict(metadata or {}))


def as_lora(source: Lora | Mapping[str, Tensor]) -> Lora:
    """A LoRA as it is, a file's content read."""
    return source if isinstance(source, Lora) else lora_from_tensors(source)


def _sorted_by_layer(tensors: Mapping[str, Tensor], quoted: str) -> tuple[dict[str, Pieces], int]:
    """Module -> its pieces, and the most `unet.` that stood before a key."""
    parsed = {key: parse_key(key) for key in tensors}
    unknown = [key for key, found in parsed.items() if found is None]
    if unknown:
        raise PitError(_unknown_message(unknown, len(tensors), quoted))
    modules: dict[str, str] = {}  # two names that differ in dots and underscores are one layer
    pieces: dict[str, Pieces] = {}
    prefixes = 0
    for key, found in parsed.items():
        if found is None:
            continue
        module = modules.setdefault(kohya_name(found.module), found.module)
        mine = pieces.setdefault(module, {})
        if found.part in mine:
            raise PitError(
                f"{quoted} holds the same part of one layer twice, as '{mine[found.part][0][:120]}' and "
                f"'{key[:120]}'; it is damaged, or two LoRAs in one."
            )
        mine[found.part] = (key, tensors[key])
        prefixes = max(prefixes, found.prefixes)
    if not pieces:
        raise PitError(f"{quoted} holds no tensors, so it is not a LoRA.")
    return pieces, prefixes


def _unknown_message(unknown: list[str], count: int, quoted: str) -> str:
    shown = ", ".join(repr(key[:100]) for key in unknown[:3])
    kinds = {what for pattern, what in FOREIGN.items() if any(re.search(pattern, k[-60:]) for k in unknown)}
    if kinds:
        return (
            f"{quoted} holds {' and '.join(sorted(kinds))} ({shown}), which are not plain LoRA factors; "
            "use a LoRA made of pairs (down and up)."
        )
    if len(unknown) == count:
        return (
            f"{quoted} is not a LoRA: none of its {count} keys names a pair of factors (they begin {shown})."
        )
    return f"{quoted} holds keys beside its LoRA factors that mean nothing to a LoRA: {shown}."


def _layer(module: str, pieces: Pieces, declared: _Declared, quoted: str) -> LoraLayer:
    for part, other in (("down", "up"), ("up", "down")):
        if part not in pieces:
            key = pieces.get(other, pieces.get("alpha", ("", None)))[0]
            raise PitError(f"{quoted} lacks the {part} half that belongs to '{key[:120]}'; fetch it again.")
    (down_key, down), (up_key, up) = pieces["down"], pieces["up"]
    for key, tensor in pieces.values():
        _check_plain(key, tensor, quoted)
    _check_pair(down_key, down, up_key, up, quoted)
    alpha = _alpha(*pieces["alpha"], quoted) if "alpha" in pieces else declared.alpha(module, down.shape[0])
    return LoraLayer(module, down, up, alpha)


def _check_plain(key: str, tensor: Tensor, quoted: str) -> None:
    number = tensor.is_floating_point() or (key.endswith(".alpha") and not tensor.is_complex())
    if not number or tensor.layout != torch.strided:
        raise PitError(f"{quoted} stores '{key[:120]}' as {tensor.dtype}, but LoRA factors are plain floats.")


def _check_pair(down_key: str, down: Tensor, up_key: str, up: Tensor, quoted: str) -> None:
    for key, tensor in ((down_key, down), (up_key, up)):
        if tensor.ndim not in (2, 4) or 0 in tensor.shape:
            raise PitError(
                f"{quoted} has '{key[:120]}' of shape {tuple(tensor.shape)}; factors are matrices, or those "
                "of a convolution."
            )
    if up.ndim != down.ndim or any(size != 1 for size in up.shape[2:]):
        raise PitError(
            f"{quoted} pairs '{down_key[:120]}' of shape {tuple(down.shape)} with an up half of shape "
            f"{tuple(up.shape)}, which do not multiply."
        )
    if down.shape[0] != up.shape[1]:
        raise PitError(
            f"{quoted} has rank {down.shape[0]} in '{down_key[:120]}' but rank {up.shape[1]} in its up half; "
            "the two belong to different LoRAs."
        )


def _alpha(key: str, tensor: Tensor, quoted: str) -> float:
    if tensor.numel() != 1:
        raise PitError(f"{quoted} has '{key[:120]}' of shape {tuple(tensor.shape)}; an alpha is one number.")
    return float(tensor.item())


# the scale that diffusers writes into the metadata, because PEFT's keys have no place for it


class _Declared:
    """PEFT's settings by part of the pipeline, such as "unet"."""

    def __init__(self, settings: Mapping[str, Any], quoted: str) -> None:
        self.settings = settings
        self.quoted = quoted

    def alpha(self, module: str, rank: int) -> float | None:
        """The alpha for which alpha / rank is the declared scale; None where nothing is declared."""
        part = module.partition(".")[0] if module.startswith("text_encoder") else "unet"
        patterns = self.settings.get(f"{part}.alpha_pattern") or {}
        if not isinstance(patterns, dict):
            self._damaged("alpha_pattern", patterns)
        ours = [value for name, value in patterns.items() if f".{module}".endswith(f".{name}")]
        value = ours[0] if ours else self.settings.get(f"{part}.lora_alpha")
        if value is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value):
            self._damaged("lora_alpha", value)
        stabilised = self.settings.get(f"{part}.use_rslora") is True  # scale = alpha / sqrt(r)
        return float(value) * (math.sqrt(rank) if stabilised else 1.0)

    def _damaged(self, name: str, value: Any) -> None:
        raise PitError(f"{self.quoted} has damaged metadata: {name} is {str(value)[:60]!r}.")


def _declared_scales(metadata: Mapping[str, str], quoted: str) -> _Declared:
    text = metadata.get(ADAPTER_METADATA)
    if text is None:
        return _Declared({}, quoted)
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PitError(f"{quoted} has damaged metadata: {ADAPTER_METADATA} is not JSON.") from error
    if not isinstance(settings, dict):
        raise PitError(f"{quoted} has damaged metadata: {ADAPTER_METADATA} is not a table of settings.")
    return _Declared(settings, quoted)
