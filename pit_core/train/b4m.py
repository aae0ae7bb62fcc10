"""B4M's objective: content and style in separate halves of a LoRA's factors, first apart, then together.

Break-for-Make, arXiv 2403.19456. In the first stage every step looks at one picture of its own side and one
of each set of the other side, under the same noise and time step; each side's loss reaches its own factor
alone. In the second stage both losses reach both factors, and the step is preconditioned.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..b4m.factors import save_factors
from ..b4m.projection import Learns, SplitAdapter, SplitProjection
from ..b4m.riemannian import RiemannianAdamW
from ..errors import PitError
from ..files import check_finite
from ..lora.kinds import B4M, KIND_KEY
from .ip_adapter import add_noise, check_batch, noise_loss, predict_noise
from .loop import Draws, LoopConfig, Objective

Role = Literal["content", "style", "entity"]
"""What a file is for: one factor of two, or both of them trained together."""

OTHER: dict[str, Learns] = {"content": "style", "style": "content"}


class B4MObjective(Objective):
    """MSE between the noise and its prediction by a UNet with a split LoRA, at uniform steps.

    A batch holds B rows of K pictures each, the role's own first: "latents" (B, K, C, h, w), already scaled,
    "text" (B, K, T, D), and for a UNet of SDXL's kind "pooled" (B, K, P) and "time_ids" (B, K, 6). A row's
    pictures share noise and step. In the role "entity" the own picture is the content's.

    Only the adapter's halves learn; it is float32 and hooked into the UNet, which is frozen and runs in its
    own dtype. role "content": its own pictures reach D alone, the others B alone, whose learning rate is
    `other_lr_scale` times the loop's; "style": the mirror; AdamW. "entity": all pictures reach both, and the
    step is preconditioned with `damping` times trace / rank. `snr_limit`: see `noise_loss`.

    Raises PitError when the adapter does not fit the UNet, for options out of range, and for a batch without
    the expected entries.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        unet: nn.Module,
        adapter: SplitAdapter,
        *,
        role: Role,
        alphas_cumprod: Tensor,
        other_lr_scale: float = 0.1,
        damping: float = 1e-3,
        snr_limit: float | None = None,
    ) -> None:
        super().__init__()
        if other_lr_scale < 0:
            raise PitError(f"other_lr_scale must be zero or a positive number, got {other_lr_scale}.")
        self.unet = unet.requires_grad_(False)
        self.adapter = adapter.float()
        self.role, self.other_lr_scale = role, other_lr_scale
        self.damping, self.snr_limit = damping, snr_limit
        self.register_buffer("alphas_cumprod", alphas_cumprod.detach().float().clone(), persistent=False)
        self._split = _Split(role)
        # Left in place: gradient checkpointing runs the UNet once more on the way back.
        for layer, linear in adapter.places(unet):
            linear.register_forward_hook(_Adding(layer, self._split))
        self.eval()

    def train_mode(self) -> None:
        """Nothing here behaves otherwise while it learns; the frozen model's dropout stays off."""
        self.eval()

    def optimizer(self, config: LoopConfig) -> torch.optim.Optimizer:
        """AdamW with a rate for each factor, or the Riemannian one where both learn together."""
        betas, decay = config.betas, config.weight_decay
        if self.role == "entity":
            return RiemannianAdamW(
                self.adapter.pairs(), config.lr, decay, self.damping, relative=True, betas=betas
            )
        own, other = self.adapter.content, self.adapter.style
        if self.role == "style":
            own, other = other, own
        groups: list[dict[str, Any]] = [{"params": own}, {"params": other, "lr_scale": self.other_lr_scale}]
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, weight_decay=decay)

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """{"loss", "content", "style"}: each side's mean over rows, channels and pixels, and their sum."""
        rows, pictures = batch["latents"].shape[:2]
        if pictures < 2:
            raise PitError("A row of B4M's batch needs pictures of both sides, got one picture.")
        flat = {name: values.transpose(0, 1).flatten(0, 1) for name, values in batch.items()}
        check_batch(flat, self.unet, {})
        latents = flat["latents"].float()  # the own pictures of all rows, then the others
        noise = draws.randn(*latents.shape[1:]).repeat(pictures, 1, 1, 1)
        t = draws.randint(len(self.alphas_cumprod)).repeat(pictures)
        alphas = self.alphas_cumprod[t]
        self._split.own = rows
        predicted = predict_noise(self.unet, add_noise(latents, noise, alphas), t, flat)
        own, others = (
            noise_loss(predicted[part], noise[part], alphas[part], self.snr_limit)
            for part in (slice(rows), slice(rows, None))
        )
        content, style = (others, own) if self.role == "style" else (own, others)
        return {"loss": content + style, "content": content, "style": style}

    def draws_alone(self) -> None:
        """Let every row of a picture's batch pass both factors, as for sampling."""
        self._split.own = None

    def save(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, object] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write a kohya file with alpha, which ComfyUI's own loader reads, frozen halves included.

        The metadata says kind, role, rank and basis. Raises PitError for numbers too large for the dtype.
        """
        lora = self.adapter.factors()
        ready = {
            f"{name}.{i}": f.to(dtype or f.dtype) for name, pair in lora.items() for i, f in enumerate(pair)
        }
        check_finite(ready, f"The LoRA, written as {dtype or 'it is'},")
        told = {KIND_KEY: B4M, "role": self.role, **self.adapter.metadata(), **(metadata or {})}
        save_factors(path, lora, {"format": "pt", **told}, dtype)


@dataclass
class _Split:
    """Where in a batch the own side ends, and whose gradients go where. own: None outside of training."""

    role: Role
    own: int | None = None


class _Adding:
    """A layer's dW as a forward hook. An object, so that a copied model gets the copied layer."""

    def __init__(self, layer: SplitProjection, split: _Split) -> None:
        self.layer, self.split = layer, split

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, own, role = inputs[0].to(self.layer.d.dtype), self.split.own, self.split.role
        if own is None or role == "entity":
            return output + self.layer(x).to(output.dtype)
        parts = self.layer(x[:own], role), self.layer(x[own:], OTHER[role])
        return output + torch.cat(parts).to(output.dtype)
