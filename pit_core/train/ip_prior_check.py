"""The IP-Prior's loss on wholes that it is not trained on, at fixed times and with fixed noise."""

from __future__ import annotations

import torch

from ..flow import interpolate, velocity_target
from ..ip_prior.model import IPPrior
from .loop import Data

CHUNK = 32  # wholes at a time


@torch.no_grad()
def flow_losses(prior: IPPrior, data: Data, *, bins: int = 8, seed: int = 0) -> dict[str, float]:
    """The velocity's mean square error at the middle of each bin of t, over all of `data` in its epoch 0.

    {"val_0.0625": ..., ...} and "val", their mean. The noise depends on `seed` and the place in `data` alone,
    so that two calls differ by the weights. Rectified flow, as in `IPPriorObjective`.
    """
    device = next(prior.parameters()).device
    times = [(number + 0.5) / bins for number in range(bins)]
    sums = [0.0] * bins
    for first in range(0, len(data), CHUNK):
        batch = data.fetch([(0, row) for row in range(first, min(first + CHUNK, len(data)))])
        target, cond = (batch[name].float().to(device) for name in ("target", "cond"))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        noise = torch.randn(target.shape, generator=generator).to(device)
        for number, time in enumerate(times):
            t = torch.full((len(target),), time, device=device)
            error = prior(interpolate(target, noise, t), t, cond) - velocity_target(target, noise)
            sums[number] += float(error.square().mean(dim=(1, 2)).sum())
    losses = {f"val_{time:.4g}": value / len(data) for time, value in zip(times, sums, strict=True)}
    return {"val": sum(losses.values()) / bins, **losses}
