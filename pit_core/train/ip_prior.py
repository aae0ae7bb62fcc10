"""The IP-Prior's objective: rectified flow from noise to a concept's tokens, given its parts' tokens.

Richardson et al. 2025, "Piece it Together" (arXiv 2503.10365), section 3; Liu et al. 2022 (arXiv 2209.03003).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PitError
from ..flow import interpolate, logit_normal_times, velocity_target
from ..ip_prior.checkpoint import save_prior
from ..ip_prior.info import PriorInfo
from ..ip_prior.model import IPPrior
from .loop import Draws, Objective


class IPPriorObjective(Objective):
    """MSE between the predicted velocity and noise - target, at logit-normal times.

    A batch holds "target" (B, tokens, D) and "cond" (B, tokens * slots, D): a concept's tokens and its parts'
    tokens, padded with white. On `prefix` of the batches only the first few slots are kept (any number from
    one to all), so that the prior also sees inputs without padding. With probability `cond_dropout` a row's
    slots are all made `white`, a white image's tokens (tokens, D): the negative of guidance.

    Raises PitError for a batch or white tokens of another shape, and for probabilities outside [0, 1].
    """

    white: Tensor | None

    def __init__(
        self,
        prior: IPPrior,
        *,
        prefix: float = 0.5,
        cond_dropout: float = 0.0,
        white: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_settings(prior, prefix, cond_dropout, white)
        self.prior = prior.requires_grad_(True)
        self.prefix, self.cond_dropout = prefix, cond_dropout
        # Not persistent: the white tokens belong to the adapter, not to the prior.
        self.register_buffer("white", None if white is None else white.detach().clone(), persistent=False)

    @property
    def blocks(self) -> list[str]:
        return [f"prior.layers.{number}" for number in range(len(self.prior.layers))]

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """{"loss"}: the mean over rows, tokens and channels, in float32."""
        target, cond = batch["target"].float(), batch["cond"].float()
        self._check(target, cond)
        cond = self._drop(self._keep_prefix(cond, draws), draws)
        noise = draws.randn(*target.shape[1:])
        t = logit_normal_times(normals=draws.randn(), device=target.device)
        velocity = self.prior(interpolate(target, noise, t), t, cond)
        return {"loss": F.mse_loss(velocity.float(), velocity_target(target, noise))}

    def save(
        self,
        path: str | os.PathLike[str],
        info: PriorInfo | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> PriorInfo:
        """Write the prior as safetensors with its settings inside; `info` None: only its sizes are known."""
        return save_prior(path, self.prior, info or PriorInfo(self.prior.config), metadata)

    def _keep_prefix(self, cond: Tensor, draws: Draws) -> Tensor:
        """One decision for the whole batch, because the rows share one length."""
        tokens = self.prior.config.num_tokens
        slots = cond.shape[1] // tokens
        chance, length = draws.common(2).tolist()
        if chance >= self.prefix:
            return cond
        return cond[:, : tokens * (1 + int(length * slots))]

    def _drop(self, cond: Tensor, draws: Draws) -> Tensor:
        if self.white is None or not self.cond_dropout:
            return cond
        white = self.white.to(cond).repeat(cond.shape[1] // self.white.shape[0], 1)
        return torch.where(draws.rand(1, 1) < self.cond_dropout, white, cond)

    def _check(self, target: Tensor, cond: Tensor) -> None:
        tokens, dim = self.prior.config.num_tokens, self.prior.config.embedding_dim
        fits = cond.ndim == 3 and cond.shape[1] >= tokens and cond.shape[1] % tokens == 0
        if tuple(target.shape[1:]) != (tokens, dim) or not fits or cond.shape[2] != dim:
            raise PitError(
                f"Expected target (B, {tokens}, {dim}) and cond (B, {tokens} * slots, {dim}) for this prior, "
                f"got {tuple(target.shape)} and {tuple(cond.shape)}."
            )


def _check_settings(prior: IPPrior, prefix: float, cond_dropout: float, white: Tensor | None) -> None:
    for name, value in (("prefix", prefix), ("cond_dropout", cond_dropout)):
        if not 0 <= value <= 1:
            raise PitError(f"Expected {name} to be a probability from 0 to 1, got {value}.")
    if cond_dropout and white is None:
        raise PitError(f"cond_dropout {cond_dropout} needs the white tokens to drop to; give white, or 0.")
    shape = (prior.config.num_tokens, prior.config.embedding_dim)
    if white is not None and tuple(white.shape) != shape:
        raise PitError(f"Expected white tokens of shape {shape} for this prior, got {tuple(white.shape)}.")
