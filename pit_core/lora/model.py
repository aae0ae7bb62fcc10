"""A LoRA in memory: pairs of factors by layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import PitError
from .keys import is_ip_layer


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """One layer's change of weight, scale * up @ down.

    module: the layer, see `keys`. down: (r, in), up: (out, r); of a convolution (r, in, h, w) and
    (out, r, 1, 1). alpha: scale = alpha / r; None for a file that names none, which means scale 1.
    """

    module: str
    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it changes, (out, in) or (out, in, h, w)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """The change of weight at strength 1, fp32, in `shape`."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).reshape(self.shape)

    def norm(self) -> float:
        """The Frobenius norm of `delta`, without making it: |U V|^2 = sum(U'U * VV')."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        squared = ((up.T @ up).double() * (down @ down.T).double()).sum().item()
        return abs(self.scale) * math.sqrt(max(squared, 0.0))


@dataclass(frozen=True, eq=False)
class Lora:
    """A file's layers by module name, in the file's order.

    doubled: its keys began with `unet.unet.`, as those of published B4M files do. name: what messages call
    it. metadata: what stood beside the tensors.
    """

    layers: Mapping[str, LoraLayer]
    doubled: bool = False
    name: str = "This file"
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[int, int]:
        """Rank -> how many layers have it, lowest first."""
        return dict(sorted(Counter(layer.rank for layer in self.layers.values()).items()))

    def split(self) -> tuple[Lora, Lora]:
        """The model's layers, and the IP-Adapter's own (`to_k_ip`, `to_v_ip`); either may be empty."""
        of_ip = {name: layer for name, layer in self.layers.items() if is_ip_layer(name)}
        of_model = {name: layer for name, layer in self.layers.items() if name not in of_ip}
        return replace(self, layers=of_model), replace(self, layers=of_ip)


def patched_weight(weight: Tensor, layer: LoraLayer, strength: float = 1.0) -> Tensor:
    """W + strength * scale * up @ down, computed in fp32, in the weight's dtype and place.

    A linear layer's pair fits a 1x1 convolution of the same widths and the other way round. Raises PitError
    when the shapes differ, and for a strength that is not finite.
    """
    check_strength(strength)
    if not fits(layer, tuple(weight.shape)):
        raise PitError(
            f"The LoRA's layer '{layer.module}' changes a weight of shape {layer.shape}, but the model's is "
            f"{tuple(weight.shape)}; it was made for another model."
        )
    delta = layer.delta().to(weight.device).reshape(weight.shape)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + strength * delta).to(weight.dtype)


def fits(layer: LoraLayer, shape: tuple[int, ...]) -> bool:
    """Whether the layer changes a weight of this shape; trailing ones, as of a 1x1 convolution, are free."""
    return _trimmed(layer.shape) == _trimmed(shape)


def check_strength(strength: float) -> None:
    """Raise PitError for a strength that is not finite."""
    if not math.isfinite(strength):
        raise PitError(f"Expected the strength to be a finite number (1 is usual), got {strength!r}.")


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape
