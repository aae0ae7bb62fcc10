"""The host's IMAGE and MASK tensors, checked, and as the pictures that `pit_core` works on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..pit_core.errors import PitError


def to_pictures(images: Any, name: str, masks: Tensor | None = None) -> list[Image.Image]:
    """IMAGE (B, H, W, C) -> RGB or RGBA pictures; a mask (B or 1, H, W) becomes their transparency.

    `name` is the input's. Raises PitError for what is no image, empty, or not finite.
    """
    batch = to_floats(images, name)
    if masks is not None:
        batch = _with_mask(batch, masks, name)
    numbers = (batch.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(np.ascontiguousarray(row)) for row in numbers]


def to_image(picture: Image.Image) -> Tensor:
    """An RGB picture -> IMAGE (1, H, W, 3) in 0-1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def to_mask(mask: Any, name: str = "mask") -> Tensor | None:
    """MASK -> (B, H, W) float32 on the CPU in 0-1; None stays None. Raises PitError, naming the input."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise PitError(f"{name} is no mask but {type(mask).__name__}; connect a MASK output.")
    if mask.ndim == 4 and 1 in (mask.shape[1], mask.shape[-1]):
        mask = mask.squeeze(1) if mask.shape[1] == 1 else mask.squeeze(-1)
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or 0 in mask.shape:
        raise PitError(f"{name} has the shape (batch, height, width), but got {tuple(mask.shape)}.")
    mask = mask.detach().to("cpu", torch.float32)
    if not torch.isfinite(mask).all():
        raise PitError(f"{name} holds NaN or infinite values; an earlier step produced a broken mask.")
    return mask.clamp(0, 1)


def on_white(batch: Tensor) -> Tensor:
    """(B, H, W, 3 or 4) -> (B, H, W, 3): transparency shows white."""
    if batch.shape[-1] == 3:
        return batch
    return torch.lerp(torch.ones_like(batch[..., :3]), batch[..., :3], batch[..., 3:])


def fitted_masks(masks: Tensor, batch: Tensor, name: str) -> Tensor:
    """Masks (B or 1, H, W) at the size of pictures, one for each. Raises PitError for another number."""
    if masks.shape[0] not in (1, len(batch)):
        raise PitError(
            f"{name} has {masks.shape[0]} rows, but there are {len(batch)} pictures; give 1 or as many."
        )
    return resized_masks(masks, (batch.shape[1], batch.shape[2])).expand(len(batch), -1, -1)


def resized_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (B, H, W) at (height, width)."""
    if tuple(masks.shape[1:]) == size:
        return masks
    return torch.nn.functional.interpolate(masks[:, None], size=size, mode="bilinear")[:, 0]


def to_floats(images: Any, name: str) -> Tensor:
    """IMAGE -> (B, H, W, 3 or 4) float32 on the CPU. Raises PitError, naming the input, for what is none."""
    if not isinstance(images, Tensor):
        raise PitError(f"{name} is no image but {type(images).__name__}; connect an IMAGE output.")
    batch = images[None] if images.ndim == 3 else images
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4) or 0 in batch.shape[1:]:
        raise PitError(
            f"{name} has the shape (batch, height, width, channels) with 1, 3 or 4 channels, but got "
            f"{tuple(images.shape)}."
        )
    if not len(batch):
        raise PitError(f"{name} is an empty batch; give at least one picture.")
    if not batch.is_floating_point() and batch.dtype != torch.uint8:
        raise PitError(f"{name} holds {batch.dtype}, but images are floats from 0 to 1, or uint8.")
    batch = batch.detach().to("cpu", torch.float32) / (255 if batch.dtype == torch.uint8 else 1)
    if not torch.isfinite(batch).all():
        raise PitError(f"{name} holds NaN or infinite values; an earlier step produced a broken image.")
    return batch.expand(-1, -1, -1, 3) if batch.shape[-1] == 1 else batch


def _with_mask(batch: Tensor, masks: Tensor, name: str) -> Tensor:
    if masks.shape[0] not in (1, batch.shape[0]):
        raise PitError(
            f"mask has {masks.shape[0]} rows, but {name} {batch.shape[0]} pictures; give 1 or as many."
        )
    masks = resized_masks(masks, (batch.shape[1], batch.shape[2]))
    alpha = masks[..., None].expand(batch.shape[0], -1, -1, -1)
    alpha = alpha * batch[..., 3:] if batch.shape[-1] == 4 else alpha
    return torch.cat([batch[..., :3], alpha], dim=-1)
