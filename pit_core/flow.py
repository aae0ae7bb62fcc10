"""Rectified flow: data at t = 0, noise at t = 1, and straight lines between them.

Interpolation, the velocity a model learns, the times it learns at, and the ODE solvers that walk back
from noise to data. Liu et al. 2022, "Flow Straight and Fast" (arXiv 2209.03003).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .errors import PitError

Velocity = Callable[[Tensor, float], Tensor]
"""(x, t) -> dx/dt, both of x's shape."""

StepCallback = Callable[[int, int, Tensor], None]
"""Called after each step with (steps done, steps in all, x). To interrupt a run, raise from it."""

Solver = Callable[..., Tensor]


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise; x0 and noise (B, ...), t (B,)."""
    t = _per_row(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the model learns to predict: dx_t/dt = noise - x0, the same at every t."""
    return noise - x0


def logit_normal_times(
    batch: int | None = None,
    *,
    normals: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Training times t = sigmoid(n), n ~ N(0, 1), as (B,) in (0, 1).

    Give `batch` (with a generator, if the draw is to be repeatable) or the ready `normals`. The draw is
    made on the generator's own device, so a CPU generator gives the same times for every `device`.
    Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1 (arXiv 2403.03206).
    """
    if normals is None and batch is not None:
        source = generator.device if generator is not None else torch.device("cpu")
        normals = torch.randn(batch, generator=generator, device=source)
    elif normals is None or batch is not None:
        raise PitError(
            "Expected either a batch size or ready normals for the training times, not both or none."
        )
    return torch.sigmoid(normals).to(device=device)


def schedule(steps: int, strength: float = 1.0) -> list[float]:
    """The times of a run, from 1 down to 0 in equal steps: steps + 1 numbers.

    With strength below 1 the run starts late, at step ceil(steps * strength) counted from the end: that
    many steps remain. Strength 0 leaves [0.0], no step at all.
    """
    check_steps(steps)
    check_strength(strength)
    # 25 * 0.28 is 7.000000000000001 in floating point and must not become 8 steps.
    first = math.ceil(round(steps * strength, 9))
    return [i / steps for i in range(first, -1, -1)]


def euler(
    velocity: Velocity, x: Tensor, times: Sequence[float], callback: StepCallback | None = None
) -> Tensor:
    """Euler's method, order 1, one evaluation a step. Hairer, Norsett, Wanner, "Solving ODEs I", I.7."""
    for i, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * velocity(x, t)
        _report(callback, i, times, x)
    return x


def heun(
    velocity: Velocity, x: Tensor, times: Sequence[float], callback: StepCallback | None = None
) -> Tensor:
    """Heun's method, order 2, two evaluations a step. Hairer, Norsett, Wanner, "Solving ODEs I", II.1."""
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x, t)
        ahead = velocity(x + (t_next - t) * v, t_next)
        x = x + (t_next - t) * (v + ahead) / 2
        _report(callback, i, times, x)
    return x


def adams_bashforth2(
    velocity: Velocity, x: Tensor, times: Sequence[float], callback: StepCallback | None = None
) -> Tensor:
    """Two-step Adams-Bashforth, order 2, one evaluation a step. Hairer, Norsett, Wanner, III.1 and III.5.

    The first step is Euler's, which keeps the order; step sizes may differ (ratio r to the last one).
    """
    previous, last_dt = None, 1.0
    for i, (t, t_next) in enumerate(pairwise(times)):
        v, dt = velocity(x, t), t_next - t
        r = 0.0 if previous is None else dt / last_dt
        x = x + dt * ((1 + r / 2) * v - (r / 2) * (v if previous is None else previous))
        previous, last_dt = v, dt
        _report(callback, i, times, x)
    return x


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "ab2": adams_bashforth2}


def get_solver(name: str) -> Solver:
    """The solver of that name. Raises PitError for a name that is not in SOLVERS."""
    if name not in SOLVERS:
        raise PitError(f"Expected a solver out of {', '.join(SOLVERS)}, got '{name}'.")
    return SOLVERS[name]


def check_steps(steps: int) -> None:
    """Raise PitError unless steps is a whole number of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PitError(f"Expected a whole number of at least 1 step, got {steps!r}.")


def check_strength(strength: float) -> None:
    """Raise PitError unless 0 <= strength <= 1; NaN is outside."""
    if not 0 <= strength <= 1:
        raise PitError(f"Expected a strength from 0 (keep the start) to 1 (all noise), got {strength!r}.")


def _per_row(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like).reshape(-1, *[1] * (like.ndim - 1))


def _report(callback: StepCallback | None, i: int, times: Sequence[float], x: Tensor) -> None:
    if callback is not None:
        callback(i + 1, len(times) - 1, x)
