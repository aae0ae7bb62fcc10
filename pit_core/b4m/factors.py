"""The two factors of every layer of a LoRA, and their halves, between files and the rest of B4M.

Layers go by their kohya name, `lora_unet_` and the module's path with underscores, so that files of all key
styles meet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import PitError
from ..files import load_tensors, save_tensors
from ..lora import model
from ..lora.keys import kohya_name, module_name

KEY = re.compile(
    r"(?P<module>.+)\.(?:lora\.(?P<old>down|up)\.weight|lora_(?P<kohya>down|up|A|B)\.weight|(?P<alpha>alpha))"
)


class Factors(NamedTuple):
    """One layer's dW = up @ down: `down` V (r, n), `up` U (m, r)."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """dW, (m, n)."""
        return self.up @ self.down

    def halves(self) -> Halves:
        """Views of the four halves, cut at m // 2 rows and n // 2 columns."""
        rows, columns = self.up.shape[0] // 2, self.down.shape[1] // 2
        return Halves(self.up[:rows], self.up[rows:], self.down[:, :columns], self.down[:, columns:])


class Halves(NamedTuple):
    """U = [A ; B] and V = [C | D]: A and C are frozen, B holds the style and D the content."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor


Lora = Mapping[str, tuple[Tensor, Tensor]]
"""Layer -> (down, up)."""


def load_factors(path: str | os.PathLike[str]) -> tuple[dict[str, Factors], dict[str, str]]:
    """A LoRA file's layers and metadata. Raises PitError for a damaged file and for what is no plain LoRA."""
    tensors, metadata = load_tensors(path)
    return factors_of(tensors), metadata


def save_factors(
    path: str | os.PathLike[str],
    lora: Lora,
    metadata: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a kohya file, which ComfyUI's own LoRA loader reads: `lora_down`, `lora_up`, alpha = rank."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in lora.items():
        tensors[f"{name}.lora_down.weight"] = down.detach().to(dtype or down.dtype)
        tensors[f"{name}.lora_up.weight"] = up.detach().to(dtype or up.dtype)
        tensors[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
    save_tensors(path, tensors, metadata)


def factors_of(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """A state dict's layers; a scale of alpha / rank other than 1 goes into `up`.

    Raises PitError that names keys which are no LoRA's, or layers with one factor or factors that do not fit.
    """
    found: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or key.startswith("text_encoder"):
            strangers.append(key)
            continue
        part = match["old"] or match["kohya"] or "alpha"
        part = {"A": "down", "B": "up"}.get(part, part)
        found.setdefault(layer_name(match["module"]), {})[part] = tensor
    if strangers or not found:
        examples = ", ".join(key[:100] for key in strangers[:3]) or "none at all"
        raise PitError(f"Expected the keys of a plain LoRA, got {examples}; convert the file to kohya keys.")
    return {name: _one_layer(name, parts) for name, parts in found.items()}


def factors_of_lora(lora: model.Lora) -> dict[str, Factors]:
    """The layers of a LoRA that was read in any layout; a scale other than 1 goes into `up`."""
    return {
        kohya_name(module): Factors(layer.down, layer.up if layer.scale == 1 else layer.up * layer.scale)
        for module, layer in lora.layers.items()
    }


def lora_of_factors(
    factors: Lora, name: str = "This LoRA", metadata: Mapping[str, str] | None = None
) -> model.Lora:
    """The same tensors as a LoRA, to be placed in a model or saved."""
    modules = {module_name(layer): pair for layer, pair in factors.items()}
    layers = {module: model.LoraLayer(module, *pair) for module, pair in modules.items()}
    return model.Lora(layers, name=name, metadata=dict(metadata or {}))


def layer_name(module: str) -> str:
    """`unet.unet.down_blocks.1...to_out.0` -> `lora_unet_down_blocks_1...to_out_0`; kohya names stay."""
    if module.startswith("lora_"):
        return module
    return "lora_unet_" + re.sub(r"^(unet\.)+", "", module).replace(".", "_")


def _one_layer(name: str, parts: Mapping[str, Tensor]) -> Factors:
    if not {"down", "up"} <= parts.keys():
        raise PitError(f"The layer '{name}' has only {', '.join(parts)}; a LoRA's layer needs down and up.")
    down, up = parts["down"], parts["up"]
    if down.dim() < 2 or up.dim() < 2 or up.shape[1] != down.shape[0]:
        raise PitError(
            f"The layer '{name}' has down {tuple(down.shape)} and up {tuple(up.shape)}; "
            "expected (r, n) and (m, r)."
        )
    scale = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else 1.0
    return Factors(down, up if scale == 1 else up * scale)
