"""The IP-Adapter's objective: a frozen UNet denoises a picture, helped by the picture's own image tokens.

Ye et al. 2023, "IP-Adapter" (arXiv 2308.06721), section 3.2; noise and epsilon target are those of DDPM
(Ho et al. 2020, arXiv 2006.11239, algorithm 1).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PitError
from ..ip_adapter.adapter import IPAdapter
from ..ip_adapter.checkpoint import save_ip_adapter
from ..ip_adapter.processor import install_ip_adapter
from .loop import Draws, Objective


@dataclass(frozen=True)
class Dropout:
    """How often a row loses its image, its text, or both at once; the three exclude each other."""

    image: float = 0.05
    text: float = 0.05
    both: float = 0.05

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        wrong = [f"{name} {value}" for name, value in values.items() if not 0 <= value <= 1]
        if wrong or sum(values.values()) > 1:
            raise PitError(
                "Expected the dropout of image, text and both as probabilities from 0 to 1 whose sum is at "
                f"most 1, got {', '.join(f'{k} {v}' for k, v in values.items())}."
            )


class IPAdapterObjective(Objective):
    """MSE between the noise and the UNet's prediction of it, at uniform DDPM steps.

    A batch holds "latents" (B, 4, h, w), already scaled; "text" (B, T, C); "features", the image encoder's
    hidden states (B, N, W) for a Plus adapter or its embeddings (B, W) for a base one; and for a UNet of
    SDXL's kind "pooled" (B, P) and "time_ids" (B, 6). Any float dtype will do.

    `null_features` (N, W) or (W,), `null_text` (T, C) and `null_pooled` (P,) are what a dropped image (the
    grey picture's features) and a dropped text (the empty prompt's) turn into. `alphas_cumprod` (steps,) is
    the noise schedule's. The UNet is frozen and stays in eval mode; it runs in its own dtype. With
    `train_layers=False` only the projection learns. Make the adapter with `new_ip_adapter(unet, projector)`,
    which copies the UNet's own key and value weights. `snr_limit`: see `noise_loss`.

    Raises PitError when the adapter does not fit the UNet and for a batch without the expected entries.
    """

    null_features: Tensor
    null_text: Tensor
    null_pooled: Tensor | None
    alphas_cumprod: Tensor

    def __init__(
        self,
        unet: nn.Module,
        adapter: IPAdapter,
        *,
        alphas_cumprod: Tensor,
        null_features: Tensor,
        null_text: Tensor,
        null_pooled: Tensor | None = None,
        dropout: Dropout = Dropout(),
        train_layers: bool = True,
        snr_limit: float | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet.requires_grad_(False)
        self.adapter = adapter.requires_grad_(True)
        self.adapter.layers.requires_grad_(train_layers)
        self.dropout, self.train_layers, self.snr_limit = dropout, train_layers, snr_limit
        self.context = install_ip_adapter(unet)
        self.context.train = True
        self.adapter.layers.check_fits(self.context.layers, self.adapter.name)
        self.needs_sdxl = reads_sizes(unet)
        if self.needs_sdxl and null_pooled is None:
            raise PitError(
                "An SDXL UNet reads a pooled text embedding; give the empty prompt's as null_pooled."
            )
        # Not persistent: all of this belongs to the base model, not to the adapter.
        self.register_buffer("alphas_cumprod", alphas_cumprod.detach().float().clone(), persistent=False)
        for name, null in (("features", null_features), ("text", null_text), ("pooled", null_pooled)):
            copy = None if null is None else null.detach().clone()
            self.register_buffer(f"null_{name}", copy, persistent=False)

    @property
    def nulls(self) -> dict[str, Tensor | None]:
        """What the rows of each entry turn into when they are dropped."""
        return {"features": self.null_features, "text": self.null_text, "pooled": self.null_pooled}

    def train_mode(self) -> None:
        """Only the adapter trains; a UNet's dropout and the like stay off."""
        self.eval()
        self.adapter.train()

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """{"loss"}: the mean over rows, channels and pixels, in float32."""
        shapes = {"features": tuple(self.null_features.shape), "text": tuple(self.null_text.shape)}
        check_batch(batch, self.unet, shapes)
        batch = drop_rows(batch, draws.rand(), self.dropout, self.nulls)
        latents = batch["latents"].float()
        noise = draws.randn(*latents.shape[1:])
        t = draws.randint(len(self.alphas_cumprod))
        alphas = self.alphas_cumprod[t]
        tokens = self.adapter(batch["features"].to(next(self.adapter.parameters()).dtype))
        # Not cleared afterwards: gradient checkpointing runs the UNet once more on the way back.
        self.context.set_tokens(tokens, adapter=self.adapter)
        predicted = predict_noise(self.unet, add_noise(latents, noise, alphas), t, batch)
        return {"loss": noise_loss(predicted, noise, alphas, self.snr_limit)}

    def save(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, object] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write the adapter in the released layout, as safetensors; `dtype` None keeps the weights' own."""
        save_ip_adapter(path, self.adapter, dtype=dtype, metadata=metadata)


def reads_sizes(unet: nn.Module) -> bool:
    """Whether a UNet reads a pooled text embedding and picture sizes, as SDXL's does."""
    return getattr(unet.config, "addition_embed_type", None) == "text_time"


def check_batch(batch: Mapping[str, Tensor], unet: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise PitError for a batch that lacks what this UNet reads, or whose rows have other shapes."""
    wanted = {"latents", "text", *shapes} | ({"pooled", "time_ids"} if reads_sizes(unet) else set())
    missing = sorted(wanted - batch.keys())
    if missing:
        raise PitError(f"A training batch for this UNet lacks {', '.join(missing)}.")
    for name, shape in shapes.items():
        got = tuple(batch[name].shape[1:])
        if got != shape:
            raise PitError(f"Expected {name} of shape {('B', *shape)}, got {('B', *got)} in the batch.")


def drop_rows(
    batch: dict[str, Tensor], chance: Tensor, dropout: Dropout, nulls: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Replace what a row loses: chance (B,) in [0, 1) falls into one of image, text, both, nothing.

    nulls: "text", "pooled" and the image's entry -> what a row's turns into; an entry of None is left alone.
    """
    p = dropout
    both = (chance >= p.image + p.text) & (chance < p.image + p.text + p.both)
    image = (chance < p.image) | both
    text = ((chance >= p.image) & (chance < p.image + p.text)) | both
    dropped = {
        name: _replace(batch[name], text if name in ("text", "pooled") else image, null)
        for name, null in nulls.items()
        if null is not None and name in batch
    }
    return {**batch, **dropped}


def predict_noise(unet: nn.Module, noisy: Tensor, t: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """The noise that a UNet of diffusers sees in noisy latents (B, C, h, w), computed in its own dtype.

    batch: "text" (B, T, C), and for SDXL "pooled" (B, P) and "time_ids" (B, 6).
    """
    dtype = next(unet.parameters()).dtype
    added = None
    if reads_sizes(unet):
        # Sizes in pixels stay in float32: bfloat16 cannot tell 1023 from 1024.
        added = {"text_embeds": batch["pooled"].to(dtype), "time_ids": batch["time_ids"].float()}
    text = batch["text"].to(dtype)
    return unet(noisy.to(dtype), t, encoder_hidden_states=text, added_cond_kwargs=added).sample


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """sqrt(a) x + sqrt(1 - a) noise, with a (B,) one per row. DDPM, equation 4."""
    a = alphas_cumprod.reshape(-1, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def noise_loss(
    predicted: Tensor, noise: Tensor, alphas_cumprod: Tensor, snr_limit: float | None = None
) -> Tensor:
    """Mean squared error of the predicted noise, (B, C, h, w) both, with alphas_cumprod (B,) one per row.

    Plain (`snr_limit` None) it is DDPM's loss, most of which comes from the last, fine steps. With a limit a
    row counts as the picture's own error times min(SNR + 1, limit): Salimans & Ho 2022 (arXiv 2202.00512),
    section 4, cut off as Hang et al. 2023 (arXiv 2303.09556) do. Models too small for both then spend
    themselves on the steps that decide shapes.
    """
    if snr_limit is None:
        return F.mse_loss(predicted.float(), noise)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    errors = (predicted.float() - noise).pow(2).mean(dim=(1, 2, 3))
    return (errors * (snr + 1).clamp(max=snr_limit) / snr).mean()


def _replace(values: Tensor, rows: Tensor, null: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *[1] * null.ndim), null.to(values), values)
