"""An IP-Adapter in memory: its projection and its key and value weights, under the released names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PitError
from .layers import AttentionLayer, describe_layers, describe_plan, layers_of_unet
from .resampler import ImageProjection, Resampler

FAMILIES = {2048: "sdxl", 768: "sd15"}


class IPLayer(nn.Module):
    """Key and value projections of the image tokens for one cross-attention layer."""

    def __init__(
        self,
        context: int,
        width: int,
        *,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.to_k_ip = operations.Linear(context, width, bias=False, dtype=dtype, device=device)
        self.to_v_ip = operations.Linear(context, width, bias=False, dtype=dtype, device=device)

    def forward(self, tokens: Tensor, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens (B, T, context) of any dtype and device -> K and V (B, T, width).

        torch's own layers compute in their weights' dtype and place. A host's layers move and convert their
        weights themselves, and those may be anywhere, so they compute where and as `like` is.
        """
        plain = like is None or type(self.to_k_ip) is nn.Linear
        tokens = tokens.to(self.to_k_ip.weight if plain else like)
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


class IPLayers(nn.ModuleDict):
    """All layers of an adapter. Its state dict has the released names: `1.to_k_ip.weight`, `3.to_k_ip...`."""

    def __init__(
        self,
        widths: Sequence[int],
        context: int,
        *,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        options = {"operations": operations, "dtype": dtype, "device": device}
        super().__init__({str(2 * n + 1): IPLayer(context, w, **options) for n, w in enumerate(widths)})
        self.widths = tuple(widths)
        self.context = context

    def keys_values(self, n: int, tokens: Tensor, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """K and V of layer n, in adapter order from 0: (B, T, context) -> twice (B, T, width), as IPLayer."""
        return self[str(2 * n + 1)](tokens, like)

    def check_fits(self, layers: Sequence[AttentionLayer], name: str = "This IP-Adapter") -> None:
        """Raise PitError unless every layer of the UNet finds its weights; names both families."""
        wanted = tuple(layer.width for layer in layers)
        same_text = all(layer.context == self.context for layer in layers)
        if self.widths == wanted and same_text:
            return
        ours, theirs = describe_plan(len(self.widths), self.context), describe_layers(layers)
        if ours == theirs:
            n = next(n for n, pair in enumerate(zip(self.widths, wanted, strict=True)) if pair[0] != pair[1])
            theirs += f" where layer {n} is {wanted[n]} wide instead of {self.widths[n]}"
        raise PitError(
            f"{name} is made for {ours}, but the loaded model is {theirs}; pair it with its own family."
        )

    @torch.no_grad()
    def copy_from_unet(self, unet: nn.Module) -> None:
        """Start from the UNet's own text weights, as training does (IP-Adapter, section 3.2.2)."""
        layers = layers_of_unet(unet)
        self.check_fits(layers)
        for layer in layers:
            ours: Any = self[str(layer.key)]
            theirs: Any = unet.get_submodule(layer.module)
            ours.to_k_ip.weight.copy_(theirs.to_k.weight)
            ours.to_v_ip.weight.copy_(theirs.to_v.weight)


class IPAdapter(nn.Module):
    """A projection and the layers' weights; `state_dict()` is a released file's content, key by key.

    name: what messages call it. content_hash: SHA-256 of the weights it was loaded from, "" if it was built.
    """

    def __init__(
        self, projector: Resampler | ImageProjection, layers: IPLayers, name: str = "", content_hash: str = ""
    ) -> None:
        super().__init__()
        if projector.output_dim != layers.context:
            raise PitError(
                f"The projection makes tokens of width {projector.output_dim}, but the layers read width "
                f"{layers.context}; the two belong to different adapters."
            )
        self.image_proj = projector
        self.ip_adapter = layers
        self.name = name or "This IP-Adapter"
        self.content_hash = content_hash

    @property
    def projector(self) -> Resampler | ImageProjection:
        return self.image_proj

    @property
    def layers(self) -> IPLayers:
        return self.ip_adapter

    @property
    def kind(self) -> str:
        """Either "plus" (reads hidden states) or "base" (reads the image embedding)."""
        return self.image_proj.kind

    @property
    def num_tokens(self) -> int:
        return self.image_proj.num_tokens

    @property
    def cross_attention_dim(self) -> int:
        return self.image_proj.output_dim

    @property
    def encoder_width(self) -> int:
        """Plus: the hidden width of the image encoder it reads; base: the encoder's projection width."""
        return self.image_proj.embedding_dim

    @property
    def family(self) -> str:
        """By the width of the tokens: "sdxl", "sd15" or "other"."""
        return FAMILIES.get(self.cross_attention_dim, "other")

    def forward(self, features: Tensor) -> Tensor:
        """Image features -> tokens (B, num_tokens, cross_attention_dim); see the two projections."""
        return self.image_proj(features)


def new_ip_adapter(unet: nn.Module, projector: Resampler | ImageProjection, name: str = "") -> IPAdapter:
    """An adapter to train: the projection, and fp32 layers copied from the UNet's own text weights."""
    layers = layers_of_unet(unet)
    weights = IPLayers([layer.width for layer in layers], layers[0].context)
    weights.copy_from_unet(unet)
    return IPAdapter(projector, weights, name)
