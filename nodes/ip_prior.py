"""The IP-Prior in ComfyUI: tokens of parts in, tokens of whole concepts out."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..pit_core.errors import PitError
from ..pit_core.flow import SOLVERS, schedule
from ..pit_core.ip_adapter.tokens import IPTokens
from ..pit_core.ip_prior.sample import assemble, sample_prior
from . import host
from .miniature import WEIGHTS as MINIATURE_WEIGHTS
from .sockets import MINIATURE, IPPriorSocket, IPTokensSocket, naming, schema
from .token_tools import checked

SEEDS = 2**64
BATCH = 32  # concepts that the prior works on at a time


class PiTLoadPrior(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTLoadPrior",
            "Load IP-Prior",
            "Loads a prior that completes concepts out of parts: a released prior.ckpt with its cfg.yaml, or "
            "a converted safetensors file.",
            ["concept model", "prior.ckpt"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[MINIATURE, *host.files_in("ip_prior")],
                    tooltip="A file in models/ip_prior; keep cfg.yaml beside a prior.ckpt.",
                )
            ],
            outputs=[
                IPPriorSocket.Output(display_name="prior", tooltip="The prior, for 'Sample IP-Prior'."),
                io.String.Output(
                    display_name="report",
                    tooltip="What the file is: tokens, size, how many parts, whether it takes a reference.",
                ),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str:
        return "" if file == MINIATURE else host.state_of("ip_prior", file, "{stem}.yaml", "cfg.yaml")

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        name = "ip_prior.safetensors"
        with naming("file"):
            path = MINIATURE_WEIGHTS / name if file == MINIATURE else host.path_of("ip_prior", file)
            prior = host.ManagedPrior(path)
        text = report(prior)
        return io.NodeOutput(prior, text, ui=ui.PreviewText(text))


class PiTSamplePrior(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTSamplePrior",
            "Sample IP-Prior",
            "Completes a concept around the given parts, as often as asked; each row is one concept.",
            ["compose parts", "concepts", "ideas"],
            inputs=[
                IPPriorSocket.Input("prior", tooltip="The prior: what kind of concepts it makes."),
                IPTokensSocket.Input("parts", tooltip="Parts from 'Encode Parts', one row each, in order."),
                io.Int.Input("count", default=1, min=1, max=256, tooltip="How many concepts to make."),
                io.Int.Input("steps", default=25, min=1, max=1000, tooltip="Steps; the paper takes 25."),
                io.Float.Input(
                    "guidance",
                    default=2.0,
                    min=-20.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How strongly the parts steer; the paper takes 2, 1 is no guidance.",
                ),
                io.Combo.Input(
                    "solver",
                    options=list(SOLVERS),
                    default="euler",
                    tooltip="euler is the paper's; heun costs twice as much a step; ab2 is as cheap as euler "
                    "and closer.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SEEDS - 1,
                    control_after_generate=True,
                    tooltip="Concept number i is made from seed + i, whatever the count.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="With initial tokens: how much is made anew. 1 makes all of it.",
                ),
                IPTokensSocket.Input(
                    "initial", optional=True, tooltip="A concept to start from: one row, or one per concept."
                ),
            ],
            outputs=[
                IPTokensSocket.Output(
                    display_name="tokens", tooltip="One row per concept, for 'Apply IP Tokens'."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        prior: host.ManagedPrior,
        parts: IPTokens,
        count: int = 1,
        steps: int = 25,
        guidance: float = 2.0,
        solver: str = "euler",
        seed: int = 0,
        strength: float = 1.0,
        initial: IPTokens | None = None,
    ) -> io.NodeOutput:
        if not isinstance(prior, host.ManagedPrior):
            raise PitError(f"prior is {type(prior).__name__}; connect 'Load IP-Prior'.")
        if not 0 <= seed < SEEDS or count < 1:
            raise PitError(
                f"Expected a count of at least 1 and a seed from 0 to 2^64 - 1, got {count} and {seed}."
            )
        cond, negative = slots(prior, checked(parts, "parts"))
        init = None if initial is None else _initial(prior, checked(initial, "initial"), count)
        seeds = [(seed + i) % SEEDS for i in range(count)]
        options = {"steps": steps, "guidance": guidance, "solver": solver, "strength": strength}
        return io.NodeOutput(parts.with_tokens(_sampled(prior, cond, negative, init, seeds, **options)))


def report(prior: host.ManagedPrior) -> str:
    """What a prior is, in a few lines."""
    config, info = prior.prior.config, prior.info
    lines = [
        f"{prior.name}: IP-Prior for {config.num_tokens} tokens of width {config.embedding_dim}, "
        f"{config.n_layers} layers of width {config.hidden_dim}",
        f"trained with up to {info.max_crops} parts, {'with' if info.use_ref else 'without'} a reference slot"
        + (f", {info.sketch_prob:.0%} sketches" if info.sketch_prob else ""),
    ]
    return "\n".join([*lines, *info.notes])


def slots(prior: host.ManagedPrior, parts: IPTokens) -> tuple[Tensor, Tensor]:
    """(cond, negative), (1, tokens * slots, D) each: every part's tokens in order, padded as trained."""
    _check_fits(prior, parts, "parts")
    if parts.white is None:
        raise PitError(
            "parts carries no white picture's tokens, which the prior pads with; make it with 'Encode Parts'."
        )
    rows = parts.tokens.reshape(-1, 1, parts.unit, parts.width)
    return assemble(list(rows), parts.white, prior.info, parts.reference)


def _initial(prior: host.ManagedPrior, initial: IPTokens, count: int) -> Tensor:
    _check_fits(prior, initial, "initial")
    if initial.tokens.shape[1] != initial.unit or initial.rows not in (1, count):
        raise PitError(
            f"initial holds {initial}, but a start is one row, or {count}, of {initial.unit} tokens."
        )
    return initial.tokens.expand(count, -1, -1)


def _check_fits(prior: host.ManagedPrior, tokens: IPTokens, name: str) -> None:
    config = prior.prior.config
    ours, theirs = (config.num_tokens, config.embedding_dim), (tokens.unit, tokens.width)
    if ours != theirs:
        raise PitError(
            f"{name} holds {theirs[0]} tokens of width {theirs[1]} per picture, but {prior.name} works on "
            f"{ours[0]} of width {ours[1]}; encode with the adapter that the prior was trained with."
        )


def _sampled(
    prior: host.ManagedPrior,
    cond: Tensor,
    negative: Tensor,
    init: Tensor | None,
    seeds: list[int],
    **options: Any,
) -> Tensor:
    """Concepts (len(seeds), T, D) on the CPU, in batches, with one progress bar over all of them."""
    device = prior.managed.load()
    starts = range(0, len(seeds), BATCH)
    steps = max(1, len(schedule(options["steps"], options["strength"])) - 1)
    tell = host.progress(steps * len(starts))
    done = []
    for number, start in enumerate(starts):
        rows = slice(start, start + BATCH)
        done.append(
            sample_prior(
                prior.prior,
                cond.to(device),
                negative.to(device),
                seeds=seeds[rows],
                init=None if init is None else init[rows].to(device),
                dtype=torch.float32,
                callback=lambda step, _total, _x, before=number * steps: tell(before + step),
                **options,
            ).cpu()
        )
    return torch.cat(done)
