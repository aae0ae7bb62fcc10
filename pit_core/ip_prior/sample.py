"""Sampling the IP-Prior: parts' tokens in, a concept's tokens out.

assemble -> prepare -> schedule -> solve. Richardson et al. 2025, "Piece it Together" (arXiv 2503.10365).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from .. import flow
from ..errors import PitError
from .model import IPPrior

MIN_SLOTS = 3
"""The prior never sees fewer part slots at inference; white fills the rest."""

SEED_RANGE = (-(2**63), 2**64 - 1)

CfgBatch = Literal["auto", "one", "two"]


class HasReference(Protocol):
    """What `assemble` asks of a prior's description: PriorInfo has it."""

    @property
    def use_ref(self) -> bool: ...


@torch.no_grad()
def sample_prior(
    prior: IPPrior,
    cond: Tensor,
    negative: Tensor | None = None,
    *,
    steps: int = 25,
    guidance: float = 2.0,
    noise: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    seeds: Sequence[int] | None = None,
    init: Tensor | None = None,
    strength: float = 1.0,
    solver: str = "euler",
    cfg_batch: CfgBatch = "auto",
    dtype: torch.dtype | None = None,
    callback: flow.StepCallback | None = None,
) -> Tensor:
    """Concept tokens (B, 16, D), float32, on cond's device.

    cond and negative are (B, 16 * slots, D), any number of slots each; a batch of 1 is used for every row.
    Guidance: v = v_u + guidance (v_c - v_u), u the negative; at guidance 1 only cond runs and the negative
    may be left out. `cfg_batch`: both in "one" forward (faster), in "two" (less memory), or "auto": in one
    where their slot counts agree.

    Noise comes from one of: `noise` (B or 1, 16, D); `seeds`, one per row; `generator`, one for the batch or
    a list with one per row; else torch's global generator. A row's noise depends on its own seed or generator
    only, so it is the same bits as when the row is sampled alone.

    With `init` (B or 1, 16, D), the run starts from strength * noise + (1 - strength) * init and takes only
    the last ceil(steps * strength) steps. Solvers: flow.SOLVERS. `callback(done, total, x)` runs after every
    step; raise from it to interrupt.

    The prior runs in `dtype` (by default its parameters'); the state between steps stays in float32. Raises
    PitError for values out of range and for tensors of another shape.
    """
    _check_settings(steps, guidance, strength, init)
    solve = flow.get_solver(solver)
    negative = _check_tokens(prior, cond, negative, guidance)
    shape = (prior.config.num_tokens, prior.config.embedding_dim)
    _check_start("noise", noise, shape)
    _check_start("init", init, shape)
    rows = _count_rows(cond, negative, noise, init, generator, seeds)

    state = torch.promote_types(dtype or _dtype_of(prior), torch.float32)
    noise = _make_noise(noise, generator, seeds, rows, shape).to(device=cond.device, dtype=state)
    x = noise if init is None else _blend(_expand(init, rows).to(noise), noise, strength)

    velocity = guided_velocity(
        prior,
        _expand(cond, rows),
        None if negative is None else _expand(negative, rows),
        guidance,
        cfg_batch=cfg_batch,
        dtype=dtype,
    )
    return solve(velocity, x, flow.schedule(steps, strength), callback)


def guided_velocity(
    prior: IPPrior,
    cond: Tensor,
    negative: Tensor | None,
    guidance: float,
    *,
    cfg_batch: CfgBatch = "auto",
    dtype: torch.dtype | None = None,
) -> flow.Velocity:
    """The prior as a flow under classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""
    dtype = dtype or _dtype_of(prior)
    cond = cond.to(dtype)

    def predict(x: Tensor, t: float, tokens: Tensor) -> Tensor:
        times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.float32)
        return prior(x.to(dtype), times, tokens).to(x.dtype)

    if guidance == 1 or negative is None:
        return lambda x, t: predict(x, t, cond)
    white = negative.to(cond)

    def in_two(x: Tensor, t: float) -> Tensor:
        unconditional = predict(x, t, white)
        return unconditional + guidance * (predict(x, t, cond) - unconditional)

    if not _together(cfg_batch, cond, white):
        return in_two
    both = torch.cat([cond, white])

    def in_one(x: Tensor, t: float) -> Tensor:
        conditional, unconditional = predict(torch.cat([x, x]), t, both).chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return in_one


def assemble(
    parts: Sequence[Tensor], white: Tensor, config: HasReference, reference: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Part tokens -> (cond, negative), each (B, tokens * slots, D), as the prior saw them in training.

    `parts` in order, `white` (a white image's tokens) and `reference` are (tokens, D), or (B, tokens, D) for
    a batch. Where the prior was trained with a reference (`config.use_ref`) slot 0 holds it, or white. White
    fills up to 3 slots, the reference slot counted; there is no upper bound. The negative is white in every
    slot. Both come on white's device, in its dtype.

    Raises PitError for tokens of another shape or batch, and for a reference without a slot.
    """
    white = _slot("the white tokens", white, white)
    slots = [_slot(f"part {i + 1}", part, white) for i, part in enumerate(parts)]
    if reference is not None and not config.use_ref:
        raise PitError("This prior was trained without a reference slot; leave the reference out.")
    if config.use_ref:
        slots.insert(0, white if reference is None else _slot("the reference", reference, white))
    slots += [white] * (MIN_SLOTS - len(slots))

    sizes = [slot.shape[0] for slot in slots]
    batch = max(sizes)
    if any(size not in (1, batch) for size in sizes):
        raise PitError(f"Expected the slots' batches of one size (or 1), got {sizes}.")
    cond = torch.cat([_expand(slot, batch) for slot in slots], dim=1)
    return cond, _expand(white, batch).repeat(1, len(slots), 1)


def row_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(len(seeds), *shape) float32 on the CPU: row i is drawn from seeds[i] alone, whatever the other rows.

    Equal to torch.randn((1, *shape)) from a generator with that seed. Raises PitError for what is no seed.
    """
    return torch.stack([torch.randn(tuple(shape), generator=_seeded(seed)) for seed in seeds])


def _seeded(seed: int) -> torch.Generator:
    if isinstance(seed, bool) or not isinstance(seed, int) or not SEED_RANGE[0] <= seed <= SEED_RANGE[1]:
        raise PitError(f"Expected a seed that is a whole number below 2^64, got {seed!r}.")
    return torch.Generator().manual_seed(seed)


def _make_noise(
    noise: Tensor | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    seeds: Sequence[int] | None,
    rows: int,
    shape: tuple[int, int],
) -> Tensor:
    if noise is not None:
        return _expand(noise, rows)
    if seeds is not None:
        return row_noise(seeds, shape)
    if generator is None or isinstance(generator, torch.Generator):
        device = torch.device("cpu") if generator is None else generator.device
        return torch.randn((rows, *shape), generator=generator, device=device)
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generator])


def _blend(init: Tensor, noise: Tensor, strength: float) -> Tensor:
    """The start of a run that keeps something of `init`: a point on the line from init to the noise."""
    return strength * noise + (1 - strength) * init


def _check_settings(steps: int, guidance: float, strength: float, init: Tensor | None) -> None:
    flow.check_steps(steps)
    flow.check_strength(strength)
    if not math.isfinite(guidance):
        raise PitError(f"Expected a finite guidance (2 is usual, 1 is none), got {guidance!r}.")
    if init is None and strength != 1:
        raise PitError(f"Strength {strength} needs initial tokens to start from; give init, or strength 1.")


def _check_tokens(prior: IPPrior, cond: Tensor, negative: Tensor | None, guidance: float) -> Tensor | None:
    _check_slots(prior, "cond", cond)
    if guidance == 1:
        return None
    if negative is None:
        raise PitError(f"Guidance {guidance} needs negative tokens (white slots); give them, or guidance 1.")
    _check_slots(prior, "negative", negative)
    return negative.to(cond.device)


def _check_slots(prior: IPPrior, name: str, tokens: Tensor) -> None:
    per_slot, dim = prior.config.num_tokens, prior.config.embedding_dim
    got = tuple(tokens.shape)
    if len(got) != 3 or not got[0] or not got[1] or got[1] % per_slot or got[2] != dim:
        raise PitError(
            f"Expected {name} tokens of shape (B, {per_slot} * slots, {dim}) for this prior, got {got}."
        )
    _check_finite(name, tokens)


def _count_rows(
    cond: Tensor,
    negative: Tensor | None,
    noise: Tensor | None,
    init: Tensor | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    seeds: Sequence[int] | None,
) -> int:
    """The batch that all inputs agree on. A single row of tokens serves any batch; seeds are never reused."""
    if sum(source is not None for source in (noise, generator, seeds)) > 1:
        raise PitError("Expected one source of noise, got several; give noise, a generator, or seeds.")
    tensors = {"cond": cond, "negative": negative, "noise": noise, "init": init}
    sizes = {name: tensor.shape[0] for name, tensor in tensors.items() if tensor is not None}
    rows = max(sizes.values())
    listed = seeds if seeds is not None else generator
    if listed is not None and not isinstance(listed, torch.Generator):
        rows = len(listed) if rows == 1 else rows
        if not 0 < len(listed) == rows:
            raise PitError(
                f"Expected one seed or generator per row, got {len(listed)} for {_listing(sizes)}."
            )
    if any(size not in (1, rows) for size in sizes.values()):
        raise PitError(f"Expected batches of one size (or 1), got {_listing(sizes)}.")
    return rows


def _listing(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _check_start(name: str, tokens: Tensor | None, shape: tuple[int, int]) -> None:
    if tokens is None:
        return
    if tokens.ndim != 3 or tuple(tokens.shape[1:]) != shape:
        raise PitError(f"Expected {name} of shape (B, {shape[0]}, {shape[1]}), got {tuple(tokens.shape)}.")
    _check_finite(name, tokens)


def _check_finite(name: str, tokens: Tensor) -> None:
    if not bool(torch.isfinite(tokens).all()):
        raise PitError(f"The {name} tokens hold NaN or infinite numbers; check what made them.")


def _expand(tensor: Tensor, rows: int) -> Tensor:
    return tensor.expand(rows, -1, -1)


def _slot(name: str, tokens: Tensor, white: Tensor) -> Tensor:
    """(tokens, D) or (B, tokens, D) -> (B, tokens, D), on white's device."""
    if tokens.ndim not in (2, 3) or tokens.shape[-2:] != white.shape[-2:]:
        raise PitError(
            f"Expected {name} as (tokens, D) or (B, tokens, D), like white's {tuple(white.shape[-2:])}, "
            f"got {tuple(tokens.shape)}."
        )
    return (tokens if tokens.ndim == 3 else tokens[None]).to(white)


def _together(cfg_batch: CfgBatch, cond: Tensor, negative: Tensor) -> bool:
    if cfg_batch not in ("auto", "one", "two"):
        raise PitError(f"Expected cfg_batch to be 'auto', 'one' or 'two', got {cfg_batch!r}.")
    same = cond.shape == negative.shape
    if cfg_batch == "one" and not same:
        raise PitError(
            f"One forward needs cond and negative of one length, got {cond.shape[1]} and {negative.shape[1]} "
            "tokens; use cfg_batch 'auto' or 'two'."
        )
    return same and cfg_batch != "two"


def _dtype_of(prior: IPPrior) -> torch.dtype:
    return next(prior.parameters()).dtype
