"""Optimizers that precondition a LoRA's factors by each other, for all layers of a shape at once.

For dW = U V (U `up`, V `down`) a gradient step on U is scaled by V and one on V by U. Dividing that out,
G_U <- G_U (V V^T + delta I)^-1 and G_V <- (U^T U + delta I)^-1 G_V, makes the step depend on dW alone; B4M
(arXiv 2403.19456) trains content and style together so. The preconditioner of one factor does not mix the
rows (columns) of the other, so a frozen half takes part in it without having a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from ..errors import PitError

Member = Parameter | tuple[Tensor, Parameter]
"""A factor: learnable as a whole, or a (frozen, learnable) pair of halves."""

SMALL = 1e-6
"""A factor of this Frobenius norm or less does not precondition the other one."""

ONE_BY_ONE = ("cpu",)
"""Kinds of devices on which stacking the layers' factors costs more than one call for each of them."""

CPU_BATCH = 1 << 18
"""Numbers that are updated at once on a CPU, so that they stay in its cache."""


@dataclass
class _Factors:
    """The same factor of some layers of one shape: what precondition the layers' other factors."""

    learnable: list[Parameter]
    frozen: list[Tensor]  # empty, or one for each layer
    rank_dim: int  # 0 for `down` (r, n), 1 for `up` (m, r)
    room: Tensor | None  # (layers or more, ...) for results, where each layer is computed by itself
    fixed_gram: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.learnable[0].shape[self.rank_dim]

    def gram(self, kept: float, out: Tensor) -> None:
        """V V^T or U^T U of each layer with the learnable half times `kept`, into `out` (layers, r, r)."""
        if self.frozen and self.fixed_gram is None:  # they are frozen, so once is enough
            self.fixed_gram = torch.empty_like(out)
            self._gram_of([half.to(out.device) for half in self.frozen], None, 1.0, self.fixed_gram)
        self._gram_of(self.learnable, self.fixed_gram, kept**2, out)

    def _gram_of(self, halves: Sequence[Tensor], more: Tensor | None, scale: float, out: Tensor) -> None:
        """more + scale * (V V^T or U^T U) of each layer, into `out`."""
        beta = 0 if more is None else 1
        more = out if more is None else more
        if self.room is None:
            rows = self._rows(torch.stack(tuple(halves)))
            torch.baddbmm(more, rows, rows.mT, beta=beta, alpha=scale, out=out)
            return
        for half, first, gram in zip(halves, more, out, strict=True):
            rows = self._rows(half)
            torch.addmm(first, rows, rows.mT, beta=beta, alpha=scale, out=gram)

    def _rows(self, factor: Tensor) -> Tensor:
        """(..., r, n) of `down` or (..., r, m) of `up`, at least in single precision."""
        wide = _wide(factor)
        return wide if self.rank_dim == 0 else wide.mT

    def preconditioned(self, inverses: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, and their gradients divided by the other factor's gram."""
        having = [i for i, parameter in enumerate(self.learnable) if parameter.grad is not None]
        if not having:
            return [], []
        parameters: list[Tensor] = [self.learnable[i] for i in having]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if len(having) < len(self.learnable):
            inverses = inverses[having]
        if self.room is None:
            return parameters, list(self._divided(inverses, torch.stack(gradients), None).unbind())
        each = zip(inverses, gradients, self.room[: len(having)], strict=True)
        return parameters, [self._divided(*one) for one in each]

    def _divided(self, inverse: Tensor, gradient: Tensor, room: Tensor | None) -> Tensor:
        wide = _wide(gradient)
        factors = (inverse, wide) if self.rank_dim == 0 else (wide, inverse)
        return torch.matmul(*factors, out=room).to(gradient.dtype)


class _Riemannian(torch.optim.Optimizer):
    def __init__(
        self,
        pairs: Sequence[tuple[Member, Member]],
        damping: float,
        relative: bool,
        defaults: dict[str, Any],
    ) -> None:
        if not pairs:
            raise PitError("A Riemannian optimizer needs at least one (down, up) pair, got none.")
        if not (math.isfinite(damping) and damping > 0):
            raise PitError(f"damping must be a positive number, got {damping}; 1e-3 is a good start.")
        for name in ("lr", "weight_decay"):
            if not (math.isfinite(defaults[name]) and defaults[name] >= 0):
                raise PitError(f"{name} must be zero or a positive number, got {defaults[name]}.")
        self._batches = _batches(pairs)
        parameters = [half for pair in pairs for half in (_learnable(pair[0]), _learnable(pair[1]))]
        super().__init__(parameters, {**defaults, "damping": damping, "relative": relative, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all learnable factors, each preconditioned by its partner's value before the step.

        Raises PitError, with nothing changed, when the damping is too small for the weights to be inverted.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        inverses = (
            self._inverses()
        )  # all of them before the first update, so that an error leaves no half step
        for (down, up), (by_up, by_down) in zip(self._batches, inverses, strict=True):
            down_parameters, down_gradients = down.preconditioned(by_up)
            up_parameters, up_gradients = up.preconditioned(by_down)
            if parameters := down_parameters + up_parameters:
                self._update(parameters, down_gradients + up_gradients, self.param_groups[0])
        self.param_groups[0]["steps"] += 1
        return loss

    def _inverses(self) -> list[tuple[Tensor, Tensor]]:
        """For each batch the damped inverses that `down` is multiplied by, and those for `up`."""
        group = self.param_groups[0]
        kept = self._kept(group)
        partners = [factor for down, up in self._batches for factor in (up, down)]
        inverses: dict[int, Tensor] = {}
        failures = []
        for kind in {_gram_kind(factor) for factor in partners}:  # usually one: one factorisation for all
            places = [i for i, factor in enumerate(partners) if _gram_kind(factor) == kind]
            counts = [len(partners[i].learnable) for i in places]
            rank, dtype, device = kind
            grams = torch.empty(sum(counts), rank, rank, dtype=dtype, device=device)
            for i, part in zip(places, grams.split(counts), strict=True):
                partners[i].gram(kept, part)
            inverse, info = _damped_inverse(grams, group["damping"], group["relative"])
            failures.append(info.any())
            inverses |= dict(zip(places, inverse.split(counts), strict=True))
        if any(failures):
            raise PitError(
                f"The factors cannot be inverted at damping {group['damping']:g}: take a larger one, and "
                "look for NaN or infinite weights."
            )
        return [(inverses[i], inverses[i + 1]) for i in range(0, len(partners), 2)]

    def _kept(self, group: dict[str, Any]) -> float:
        """What is left of the learnable halves when the preconditioners are formed."""
        return 1.0

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError


class RiemannianSGD(_Riemannian):
    """Preconditioned gradient descent: theta <- (1 - lr * weight_decay) theta, then theta <- theta - lr G.

    The preconditioners are those of the decayed factors, as in the published numbers.

    A pair is (down, up) with down (r, n) and up (m, r); a member is a Parameter, or a (frozen, learnable)
    pair of halves: columns [C | D] of `down`, rows [A ; B] of `up`. Frozen halves take part in the
    preconditioner, are never written and never decay; they must keep their values. `damping` is added to the
    diagonals as it is, or times trace / r of the layer if `relative`; layers whose factors are partly zero
    need it. fp16 and bf16 are preconditioned in fp32. Raises PitError for members that are no factors of one
    LoRA layer.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Member, Member]],
        lr: float = 1e-4,
        weight_decay: float = 1e-2,
        damping: float = 1e-3,
        relative: bool = False,
    ) -> None:
        super().__init__(pairs, damping, relative, {"lr": lr, "weight_decay": weight_decay})

    def _kept(self, group: dict[str, Any]) -> float:
        return float(1 - group["lr"] * group["weight_decay"])

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, gradients, alpha=-group["lr"])


class RiemannianAdamW(_Riemannian):
    """AdamW on preconditioned gradients; the decoupled weight decay follows the step.

    Pairs, damping and errors are those of `RiemannianSGD`. All parameters share one count of steps.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Member, Member]],
        lr: float = 1e-4,
        weight_decay: float = 1e-2,
        damping: float = 1e-3,
        relative: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise PitError(f"betas must lie in [0, 1), got {tuple(betas)}.")
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(pairs, damping, relative, defaults)

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        device = parameters[0].device
        fused = device.type in ("cpu", "cuda")
        # torch decays before the step, with these numbers to the same effect as decaying after it
        lr, kept = group["lr"], 1 - group["lr"] * group["weight_decay"]
        # torch wants a count for each parameter, and counts them on itself
        counts = torch.full((len(parameters),), float(group["steps"]), device=device if fused else "cpu")
        adamw(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            list(counts.unbind()),
            foreach=not fused,
            fused=fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr * kept,
            weight_decay=group["weight_decay"] / kept,
            eps=group["eps"],
            maximize=False,
        )


def _damped_inverse(grams: Tensor, damping: float, relative: bool) -> tuple[Tensor, Tensor]:
    """(gram + damping I)^-1 of (layers, r, r), identity where the factor is all but zero; and what failed.

    Overwrites the grams.
    """
    rank = grams.shape[-1]
    diagonal = grams.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1, keepdim=True)
    nothing = trace <= SMALL**2  # the trace is the factor's squared norm
    diagonal.add_(damping * trace / rank if relative else damping)
    diagonal.masked_fill_(nothing, 1.0)  # what is beside it is below rounding
    root, info = torch.linalg.cholesky_ex(grams)
    if root.device.type == "cpu":  # faster there, but on a GPU it may go matrix by matrix
        return torch.cholesky_inverse(root), info
    identity = torch.eye(rank, dtype=grams.dtype, device=grams.device)
    inverse_root = torch.linalg.solve_triangular(root, identity.expand_as(root), upper=False)
    return inverse_root.mT @ inverse_root, info


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _gram_kind(factor: _Factors) -> tuple[int, torch.dtype, torch.device]:
    """Rank, dtype and device of a factor's grams."""
    first = factor.learnable[0]
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    return factor.rank, wide, first.device


def _learnable(member: Member) -> Parameter:
    return member[1] if isinstance(member, tuple) else member


def _batches(pairs: Sequence[tuple[Member, Member]]) -> list[tuple[_Factors, _Factors]]:
    groups: dict[Any, list[tuple[Member, Member]]] = {}
    for number, (down, up) in enumerate(pairs):
        _check(number, down, up)
        key = tuple(_kind(member) for member in (down, up))
        groups.setdefault(key, []).append((down, up))
    return [batch for group in groups.values() for batch in _batches_of_one_kind(_small_enough(group))]


def _batches_of_one_kind(batches: list[list[tuple[Member, Member]]]) -> list[tuple[_Factors, _Factors]]:
    """Batches share the room for their results: on a CPU fresh memory costs more than writing there."""
    most = max(map(len, batches))
    down, up = (_room(_learnable(member), most) for member in batches[0][0])
    return [
        (_factors([d for d, _ in batch], 0, down), _factors([u for _, u in batch], 1, up))
        for batch in batches
    ]


def _room(parameter: Parameter, layers: int) -> Tensor | None:
    if parameter.device.type not in ONE_BY_ONE:
        return None
    return _wide(parameter.detach()).new_empty(layers, *parameter.shape)


def _small_enough(group: list[tuple[Member, Member]]) -> list[list[tuple[Member, Member]]]:
    """On a CPU batches that fit its cache, which saves more than few large operations; else all at once."""
    halves = [_learnable(member) for member in group[0]]
    if halves[0].device.type != "cpu":
        return [group]
    layers = max(1, CPU_BATCH // max(half.numel() for half in halves))
    return [group[start : start + layers] for start in range(0, len(group), layers)]


def _kind(member: Member) -> tuple[Any, ...]:
    frozen = member[0].shape if isinstance(member, tuple) else None
    learnable = _learnable(member)
    return frozen, learnable.shape, learnable.dtype, learnable.device


def _factors(members: Sequence[Member], rank_dim: int, room: Tensor | None) -> _Factors:
    frozen = [member[0] for member in members if isinstance(member, tuple)]
    return _Factors([_learnable(member) for member in members], frozen, rank_dim, room)


def _check(number: int, down: Member, up: Member) -> None:
    ranks = set()
    for name, member, rank_dim in (("down", down, 0), ("up", up, 1)):
        halves = member if isinstance(member, tuple) else (member,)
        if not isinstance(halves[-1], Parameter) or any(half.dim() != 2 for half in halves):
            raise PitError(
                f"Pair {number}: '{name}' must be a matrix Parameter or a (frozen, learnable) pair of "
                "matrices."
            )
        if isinstance(member, tuple) and member[0].requires_grad:
            raise PitError(f"Pair {number}: the frozen half of '{name}' must not require a gradient.")
        ranks |= {half.shape[rank_dim] for half in halves}
    if len(ranks) != 1:
        raise PitError(
            f"Pair {number}: down (r, n) and up (m, r) must share one rank, got {sorted(ranks)}; "
            "the order is (down, up)."
        )
