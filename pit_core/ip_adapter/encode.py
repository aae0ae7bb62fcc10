"""From pictures to IP tokens: CLIP's image encoder, then the adapter's projection.

Plus adapters read `hidden_states[-2]`, before the last layer and without the final norm; base adapters read
the projected image embedding (IP-Adapter, arXiv 2308.06721, section 3.2.1). Inside ComfyUI its own
CLIP_VISION takes the encoder's place; `tokens_from_features` is the part that both share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from ..errors import PitError
from .adapter import IPAdapter
from .checkpoint import check_encoder
from .encoder import ImageEncoder, load_image_encoder, save_image_encoder
from .pixels import CLIP_MEAN, CLIP_STD, hash_pixels, null_pixels, preprocess, rgb_on_white

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "ImageEncoder",
    "encode_tokens",
    "hash_pixels",
    "load_image_encoder",
    "null_pixels",
    "null_tokens",
    "preprocess",
    "rgb_on_white",
    "save_image_encoder",
    "tokens_from_features",
]


@torch.no_grad()
def encode_tokens(
    encoder: ImageEncoder,
    adapter: IPAdapter,
    pictures: Tensor | Image | Sequence[Image],
    chunk: int = 8,
    *,
    fit: str = "crop",
) -> Tensor:
    """Pictures -> tokens (B, T, D), float32 on the adapter's device.

    A tensor is normalised pixels (B, 3, S, S), see `preprocess`; PIL pictures are prepared here, with `fit`.
    At most `chunk` pictures are encoded at a time, so that long batches fit the memory. Raises PitError when
    the encoder is not the adapter's, and when the tokens are not finite.
    """
    check_encoder(adapter, encoder.hidden_width, encoder.projection_dim)
    pixels = pictures if isinstance(pictures, Tensor) else encoder.preprocess(pictures, fit)
    if not len(pixels):
        raise PitError("There is no picture to encode: the batch is empty.")
    part = 0 if adapter.kind == "plus" else 1
    return torch.cat(
        [tokens_from_features(adapter, encoder(rows)[part]) for rows in pixels.split(max(1, chunk))]
    )


@torch.no_grad()
def null_tokens(encoder: ImageEncoder, adapter: IPAdapter, kind: str | None = None) -> Tensor:
    """Tokens (1, T, D) of "no image", for the unconditional half.

    kind: "grey", "black" or "white" (see null_pixels), or for base adapters "zeros", the embedding of zeros.
    None takes what the adapter was trained with: grey for Plus, zeros for base.
    """
    kind = kind or ("grey" if adapter.kind == "plus" else "zeros")
    if kind != "zeros":
        pixels = null_pixels(kind, size=encoder.image_size, mean=encoder.mean, std=encoder.std)
        return encode_tokens(encoder, adapter, pixels)
    if adapter.kind == "plus":
        raise PitError(
            "The null 'zeros' belongs to base adapters; for a Plus adapter use grey, black or white."
        )
    return tokens_from_features(adapter, torch.zeros(1, adapter.encoder_width))


@torch.no_grad()
def tokens_from_features(adapter: IPAdapter, features: Tensor) -> Tensor:
    """Hidden states (B, N, W) for Plus, image embeddings (B, W) for base -> tokens (B, T, D), float32.

    Raises PitError for features of another shape, and for such as give tokens that are not finite.
    """
    wanted = 3 if adapter.kind == "plus" else 2
    if features.ndim != wanted or features.shape[-1] != adapter.encoder_width:
        raise PitError(
            f"{adapter.name} reads features of {wanted} dimensions and width {adapter.encoder_width}, "
            f"but got the shape {tuple(features.shape)}."
        )
    place: Any = next(adapter.projector.parameters()).device
    tokens = adapter(features.to(place)).float()
    if not torch.isfinite(tokens).all():
        broken = "features" if not torch.isfinite(features).all() else "tokens"
        raise PitError(f"The image {broken} are not finite; load the image encoder and adapter in float32.")
    return tokens
