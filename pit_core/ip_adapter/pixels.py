"""Pictures as CLIP's image encoders want them, and the pictures that stand for "no image".

Equal to transformers' CLIPImageProcessor: shortest edge to the size (PIL bicubic on 8-bit pixels, the long
edge rounded down), centre crop, scale to 0-1, normalise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import PitError
from ..files import hash_tensors

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FITS = ("crop", "pad", "stretch")
NULLS = ("grey", "black", "white")
MAX_ASPECT = 32  # beyond it the ends, which the crop drops anyway, are cut before resizing, to save memory

Images = Image.Image | Sequence[Image.Image] | Tensor


def preprocess(
    images: Images,
    size: int = 224,
    fit: str = "crop",
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """One or more pictures -> normalised pixels (B, 3, size, size), float32 on the CPU.

    Pictures are PIL images of any mode, or a tensor (B, H, W, C) or (H, W, C) with 1, 3 or 4 channels, floats
    in 0-1 (clamped, rounded to 8 bits) or uint8. Transparency is put on white. `fit` says what happens to
    pictures that are not square: "crop" their ends, "pad" them with white, or "stretch" them. Raises PitError
    for an empty batch, another shape or dtype, NaN, and an unknown fit.
    """
    if fit not in FITS:
        raise PitError(f"The fit is one of {', '.join(FITS)}, but got '{fit}'.")
    pictures = _pictures(images)
    if not pictures:
        raise PitError("There is no picture to encode: the batch is empty.")
    squares = [np.asarray(_square(rgb_on_white(picture), size, fit), dtype=np.uint8) for picture in pictures]
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255  # BHWC -> BCHW
    return _normalised(pixels, mean, std)


def null_pixels(
    kind: str = "grey",
    *,
    size: int = 224,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    batch: int = 1,
) -> Tensor:
    """The picture that stands for "no image", normalised: (batch, 3, size, size).

    "grey" is the normalised zero, which SDXL decoding and the adapters' training use; "black" is the ComfyUI
    community's default; "white" is the IP-Prior's negative and padding.
    """
    if kind not in NULLS:
        raise PitError(f"The null picture is one of {', '.join(NULLS)}, but got '{kind}'.")
    if kind == "grey":
        return torch.zeros(batch, 3, size, size)
    return _normalised(torch.full((batch, 3, size, size), float(kind == "white")), mean, std)


def rgb_on_white(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB, its transparency put on white; 16-bit greys are scaled, not clipped."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):  # type: ignore[operator]
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def hash_pixels(pixels: Tensor) -> str:
    """SHA-256 of a tensor's numbers, shape and dtype, to cache what was encoded from it."""
    return hash_tensors({"pixels": pixels})


def _pictures(images: Images) -> list[Image.Image]:
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, Tensor):
        return [Image.fromarray(row) for row in _bytes(images)]
    return list(images)


def _bytes(images: Tensor) -> np.ndarray:
    """Tensor (B, H, W, C) or (H, W, C) -> uint8 array (B, H, W, 3), transparency on white."""
    batch = images.detach().cpu()
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4) or 0 in batch.shape[1:]:
        raise PitError(
            "Pictures are a tensor of the shape (batch, height, width, channels) with 1, 3 or 4 channels, "
            f"but got {tuple(images.shape)}."
        )
    if batch.dtype == torch.uint8:
        batch = batch.float() / 255
    elif not batch.is_floating_point():
        raise PitError(f"Pictures are floats from 0 to 1 or uint8, but got {batch.dtype}.")
    if not torch.isfinite(batch).all():
        raise PitError("The picture holds NaN or infinite values; an earlier step produced a broken image.")
    batch = batch.float().clamp(0, 1)
    if batch.shape[-1] == 4:
        colour, alpha = batch.split((3, 1), dim=-1)
        batch = colour * alpha + (1 - alpha)
    return (batch * 255).round().to(torch.uint8).expand(*batch.shape[:3], 3).numpy()


def _square(image: Image.Image, size: int, fit: str) -> Image.Image:
    if fit == "pad":
        image = _padded(image)
    if fit == "stretch":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    image = _without_far_ends(image)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_long = int(size * long / short)
    width, height = (size, new_long) if width <= height else (new_long, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _padded(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _without_far_ends(image: Image.Image) -> Image.Image:
    width, height = image.size
    limit = MAX_ASPECT * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(0, (width - limit) // 2), max(0, (height - limit) // 2)
    return image.crop((left, top, min(width, left + limit), min(height, top + limit)))


def _normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
