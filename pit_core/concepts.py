"""The main job: pictures of parts in, pictures of whole concepts out.

encode parts -> assemble slots -> sample the IP-Prior -> render the tokens.
"Piece it Together" (arXiv 2503.10365).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import flow
from .errors import PitError
from .ip_adapter.adapter import IPAdapter
from .ip_adapter.checkpoint import check_encoder, load_ip_adapter
from .ip_adapter.encode import ImageEncoder, encode_tokens, load_image_encoder, null_tokens
from .ip_prior.checkpoint import load_prior
from .ip_prior.info import PriorInfo
from .ip_prior.model import IPPrior
from .ip_prior.sample import assemble, sample_prior
from .parts.canvas import SIZE, on_white_square, reference_grid
from .parts.sketch import as_sketch as draw_as_sketch
from .render import Renderer, RenderSettings, check_adapter_fits, layers_on_disk, load_renderer

FULL_ENCODER = 224  # pixels: the released encoder; its parts are placed on the paper's 1024 px canvas
PRIOR_BATCH = 32  # rows of the prior at a time
SEEDS = 2**64

Stage = Callable[[str, int, int], None]
"""Called after each step with (what runs, steps done, steps in all); raise to interrupt."""

Edit = Callable[[Tensor], Tensor]
"""Tokens (B, T, D) of concepts -> those to draw instead, of the same shape."""


@dataclass
class Stack:
    """Everything from a part picture to a concept picture: image encoder, adapter, prior, renderer.

    defaults: the render settings that suit these models. hashes: SHA-256 by model, for records.
    """

    encoder: ImageEncoder
    adapter: IPAdapter
    prior: IPPrior
    prior_info: PriorInfo
    renderer: Renderer
    name: str = "custom"
    defaults: RenderSettings = field(default_factory=RenderSettings)
    hashes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_encoder(self.adapter, self.encoder.hidden_width, self.encoder.projection_dim)
        check_prior_fits(self.prior, self.adapter)
        check_adapter_fits(self.renderer.unet, self.adapter)
        self._nulls: dict[str, Tensor] = {}

    @property
    def canvas(self) -> int:
        """Side of the white square that parts are placed on: 1024 px, or what a smaller encoder sees."""
        return SIZE if self.encoder.image_size >= FULL_ENCODER else self.encoder.image_size

    def null(self, kind: str) -> Tensor:
        """Tokens (1, T, D) of a null picture, "white" or "grey"; computed once."""
        if kind not in self._nulls:
            self._nulls[kind] = null_tokens(self.encoder, self.adapter, kind)
        return self._nulls[kind]

    def encode(self, squares: Sequence[Image.Image]) -> Tensor:
        """Square pictures -> tokens (B, T, D), float32."""
        return encode_tokens(self.encoder, self.adapter, self.encoder.preprocess(squares))


@dataclass(frozen=True)
class StackFiles:
    """Local files of a stack, in the released layouts: see the loaders of each for what they may be.

    sdxl: a diffusers folder, or one .safetensors file with `sdxl_config` beside it (see load_renderer).
    """

    sdxl: Path
    image_encoder: Path
    ip_adapter: Path
    prior: Path
    sdxl_config: Path | None = None

    def named(self) -> dict[str, Path]:
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}


def load_stack(
    files: StackFiles, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Stack:
    """A stack out of files, checked against each other from the smallest to the largest.

    Encoder, adapter and renderer run in `dtype`, the prior in float32, which it is sampled in.
    Raises PitError for what is missing, damaged, or does not belong together.
    """
    layers = layers_on_disk(files.sdxl)
    adapter = load_ip_adapter(files.ip_adapter, dtype=dtype, device=device)
    adapter.layers.check_fits(layers, adapter.name)
    prior, info = load_prior(files.prior, dtype=torch.float32, device=device)
    check_prior_fits(prior, adapter)
    encoder = load_image_encoder(files.image_encoder, dtype=dtype, device=device)
    check_encoder(adapter, encoder.hidden_width, encoder.projection_dim)
    renderer = load_renderer(files.sdxl, adapter, config=files.sdxl_config, device=device, dtype=dtype)
    hashes = {
        "image_encoder": encoder.content_hash,
        "ip_adapter": adapter.content_hash,
        "prior": _prior_hash(info),
    }
    return Stack(encoder, adapter, prior, info, renderer, name="files", hashes=hashes)


def _prior_hash(info: PriorInfo) -> str:
    """Weights and settings: a released prior has the latter in a file of its own."""
    settings = json.dumps(info.settings(), sort_keys=True)
    return hashlib.sha256(f"{info.content_hash} {settings}".encode()).hexdigest()


@dataclass(frozen=True)
class PriorSettings:
    """How the prior completes parts; the defaults are the paper's.

    strength: with an initial concept, how much of it is made anew (1: all). solver: a name of flow.SOLVERS.
    """

    steps: int = 25
    guidance: float = 2.0
    solver: str = "euler"
    strength: float = 1.0

    def __post_init__(self) -> None:
        flow.check_steps(self.steps)
        flow.check_strength(self.strength)
        flow.get_solver(self.solver)


@dataclass(frozen=True)
class Job:
    """One set of parts (any size, RGB or RGBA, in order) and a seed for each concept to make of them.

    reference: up to four pictures for the reference slot. init: a concept to start from (see strength).
    """

    parts: Sequence[Image.Image]
    seeds: Sequence[int]
    reference: Sequence[Image.Image] = ()
    init: Image.Image | None = None
    as_sketch: bool = False


@dataclass(frozen=True)
class Concept:
    """One concept: its picture, its seed, and its tokens (T, D) float32 on the CPU."""

    image: Image.Image
    seed: int
    tokens: Tensor


def make_concepts(
    stack: Stack,
    parts: Sequence[Image.Image],
    *,
    count: int = 8,
    seed: int = 0,
    reference: Sequence[Image.Image] = (),
    init: Image.Image | None = None,
    as_sketch: bool = False,
    prior_settings: PriorSettings | None = None,
    render_settings: RenderSettings | None = None,
    stage: Stage | None = None,
    **changes: Any,
) -> list[Concept]:
    """`count` concepts of these parts, from the seeds seed, seed + 1, ...

    `changes` replace single settings: of the prior (`prior_steps`, `prior_guidance`, `solver`, `strength`)
    and of the rendering (`prompt`, `negative`, `steps`, `guidance`, `weight`, `size`, `batch`).
    Raises PitError for no parts, values out of range, and what the prior has no slot for.
    """
    job = Job(parts, concept_seeds(seed, count), reference, init, as_sketch)
    prior, render = settings_from(stack, changes, prior_settings, render_settings)
    return make_many(stack, [job], prior, render, stage=stage)[0]


def make_many(
    stack: Stack,
    jobs: Sequence[Job],
    prior: PriorSettings | None = None,
    render: RenderSettings | None = None,
    *,
    edit: Edit | None = None,
    stage: Stage | None = None,
) -> list[list[Concept]]:
    """The concepts of each job. All jobs share the batches; a concept's noise depends on its seed alone.

    edit: what happens to the tokens between the prior and the drawing.
    """
    rows = sample_jobs(stack, jobs, prior or PriorSettings(), stage=stage)
    tokens = torch.cat(rows)
    tokens = tokens if edit is None else edit(tokens)
    seeds = [seed for job in jobs for seed in job.seeds]
    images = stack.renderer.render(
        tokens,
        stack.null("grey"),
        render or stack.defaults,
        seeds=[picture_seed(seed) for seed in seeds],
        progress=_named(stage, "drawing"),
    )
    concepts = iter(Concept(*each) for each in zip(images, seeds, tokens.cpu(), strict=True))
    return [[next(concepts) for _ in job.seeds] for job in jobs]


def sample_jobs(
    stack: Stack, jobs: Sequence[Job], settings: PriorSettings, *, stage: Stage | None = None
) -> list[Tensor]:
    """The concepts' tokens of each job, (seeds, T, D) float32 on the prior's device."""
    slots = [job_tokens(stack, job, settings) for job in jobs]
    rows = [(number, seed) for number, job in enumerate(jobs) for seed in job.seeds]
    done: dict[int, list[Tensor]] = {number: [] for number in range(len(jobs))}
    batches = list(_batches(rows, slots))
    for index, batch in enumerate(batches):
        cond, negative, inits = zip(*(slots[number] for number, _ in batch), strict=True)
        sampled = sample_prior(
            stack.prior,
            torch.cat(cond),
            torch.cat(negative),
            steps=settings.steps,
            guidance=settings.guidance,
            solver=settings.solver,
            seeds=[seed for _, seed in batch],
            init=None if inits[0] is None else torch.cat(inits),
            strength=settings.strength,
            callback=_prior_callback(stage, index, len(batches)),
        )
        for (number, _), tokens in zip(batch, sampled, strict=True):
            done[number].append(tokens)
    return [torch.stack(done[number]) for number in range(len(jobs))]


def job_tokens(stack: Stack, job: Job, settings: PriorSettings) -> tuple[Tensor, Tensor, Tensor | None]:
    """(cond, negative, init): (1, T * slots, D) twice and (1, T, D) or None, on the prior's device."""
    check_job(stack, job, settings)
    squares = prepare_parts(stack, job.parts, job.as_sketch)
    if job.reference:
        squares.append(reference_grid(job.reference, stack.canvas))
    if job.init is not None:
        squares.append(on_white_square(job.init, stack.canvas, fill=1.0))
    device = next(stack.prior.parameters()).device
    tokens = list(stack.encode(squares).to(device))
    init = tokens.pop()[None] if job.init is not None else None
    reference = tokens.pop() if job.reference else None
    cond, negative = assemble(tokens, stack.null("white").to(device), stack.prior_info, reference)
    return cond, negative, init


def prepare_parts(stack: Stack, parts: Sequence[Image.Image], as_sketch: bool = False) -> list[Image.Image]:
    """The parts as the encoder gets them: centred on white squares, as sketches if asked."""
    squares = [on_white_square(part, stack.canvas) for part in parts]
    return [draw_as_sketch(square) for square in squares] if as_sketch else squares


# checks, before anything heavy


def check_job(stack: Stack, job: Job, settings: PriorSettings) -> None:
    """Raise PitError for a job that cannot run, in plain words."""
    if not job.parts and not job.reference and job.init is None:
        raise PitError("Expected at least one part picture, got none.")
    if not job.seeds:
        raise PitError("Expected at least one concept to make, got none.")
    if job.reference and not stack.prior_info.use_ref:
        raise PitError("This prior was trained without a reference slot; leave the reference out.")
    if job.init is None and settings.strength != 1:
        raise PitError(f"Strength {settings.strength} needs an initial concept to start from (--init).")


def check_prior_fits(prior: IPPrior, adapter: IPAdapter) -> None:
    """Raise PitError unless the prior works on the tokens that this adapter makes."""
    ours = (prior.config.num_tokens, prior.config.embedding_dim)
    theirs = (adapter.num_tokens, adapter.cross_attention_dim)
    if ours != theirs:
        raise PitError(
            f"The prior works on {ours[0]} tokens of width {ours[1]}, but {adapter.name} makes {theirs[0]}"
            f" of width {theirs[1]}; the released priors belong to ip-adapter-plus_sdxl_vit-h."
        )


def advice(stack: Stack, job: Job) -> list[str]:
    """What a user should know about a job that runs all the same, one sentence each."""
    notes = list(stack.prior_info.notes)
    if len(job.parts) > stack.prior_info.max_crops:
        notes.append(
            f"{len(job.parts)} parts were given, but this prior was trained with up to "
            f"{stack.prior_info.max_crops}; some may be ignored."
        )
    if job.as_sketch and stack.prior_info.sketch_prob == 0:
        notes.append("This prior was not trained on sketches; they may be read as thin black parts.")
    return notes


def concept_seeds(seed: int, count: int) -> list[int]:
    """The seeds of `count` concepts: seed, seed + 1, ..., wrapping at 2^64. Raises PitError out of range."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise PitError(f"Expected a seed from 0 to 2^64 - 1, got {seed!r}.")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 10_000:
        raise PitError(f"Expected a count from 1 to 10000 concepts, got {count!r}.")
    return [(seed + i) % SEEDS for i in range(count)]


def picture_seed(seed: int) -> int:
    """The seed of the picture's noise: another one, or both noises would begin with equal numbers."""
    return seed ^ 0x5EED_1A7E


def settings_from(
    stack: Stack,
    changes: Mapping[str, Any],
    prior: PriorSettings | None = None,
    render: RenderSettings | None = None,
) -> tuple[PriorSettings, RenderSettings]:
    """Both kinds of settings from one flat set of changes; None keeps a default. PitError for others."""
    given = {name: value for name, value in changes.items() if value is not None}
    for_prior = {
        ours: given.pop(name)
        for name, ours in {
            "prior_steps": "steps",
            "prior_guidance": "guidance",
            "solver": "solver",
            "strength": "strength",
        }.items()
        if name in given
    }
    known = {each.name for each in fields(RenderSettings)} - {"strength"}
    if unknown := given.keys() - known:
        raise PitError(f"There is no setting '{min(unknown)}'; the settings are {', '.join(sorted(known))}.")
    return replace(prior or PriorSettings(), **for_prior), replace(render or stack.defaults, **given)


def _batches(
    rows: Sequence[tuple[int, int]], slots: Sequence[tuple[Tensor, Tensor, Tensor | None]]
) -> list[list[tuple[int, int]]]:
    """Rows (job, seed) grouped so that each batch has one length of condition, at most PRIOR_BATCH rows."""
    groups: dict[tuple[int, bool], list[tuple[int, int]]] = {}
    for row in rows:
        cond, _, init = slots[row[0]]
        groups.setdefault((cond.shape[1], init is not None), []).append(row)
    return [
        group[start : start + PRIOR_BATCH]
        for group in groups.values()
        for start in range(0, len(group), PRIOR_BATCH)
    ]


def _prior_callback(stage: Stage | None, index: int, count: int) -> flow.StepCallback | None:
    if stage is None:
        return None
    return lambda done, total, _x: stage("composing", index * total + done, count * total)


def _named(stage: Stage | None, what: str) -> Callable[[int, int], None] | None:
    return None if stage is None else lambda done, total: stage(what, done, total)
