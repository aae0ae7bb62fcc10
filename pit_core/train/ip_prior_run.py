"""`pit train ip-prior`: from a YAML file and the shards of `pit data embed` to an IP-Prior."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import torch

from ..errors import PitError
from ..ip_prior.checkpoint import load_prior
from ..ip_prior.info import PriorInfo
from ..ip_prior.model import IPPrior, init_for_training
from ..parts.augment import Augment
from ..parts.shards import read_index
from ..parts.token_data import TokenData, split_rows
from .config import read_config
from .events import EventLog
from .ip_prior import IPPriorObjective
from .ip_prior_check import flow_losses
from .loop import LoopConfig, Result, train
from .plot import plot_losses
from .same_run import refuse_another_run

PUBLISHED = "ip_prior.safetensors"
MOST_HELD_OUT = 10  # at most one whole of so many is held out


@dataclass(frozen=True)
class PriorSizes:
    """Sizes under the released cfg.yaml's names; the defaults are the released ones. Heads None: 64 wide."""

    hidden_dim: int = 2048
    num_layers: int = 4
    num_attention_heads: int | None = None


@dataclass(frozen=True)
class Validation:
    """How the loss on wholes that are not trained on is measured, with the averaged weights, at every save.

    wholes: how many are held out, at most a tenth of the set; 0 for none. bins: at how many times, evenly
    spaced. seed: which wholes, and their noise, the same at every save.
    """

    wholes: int = 64
    bins: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.wholes < 0 or self.bins < 1 or self.seed < 0:
            raise PitError(
                "Expected validation with at least 0 wholes, 1 bin and a seed from 0, "
                f"got {self.wholes}, {self.bins} and {self.seed}."
            )


@dataclass(frozen=True)
class PriorSettings:
    """What `pit train ip-prior` reads from its YAML file. Paths are relative to that file.

    tokens: a folder of `pit data embed`. out: where everything goes. start: a prior to go on from, instead
    of fresh weights; it brings its sizes. max_crops, empty_prob, use_ref, reference_prob: as in `Augment`;
    by default as the tokens were embedded. prefix, cond_dropout: as in `IPPriorObjective`.
    """

    tokens: Path
    out: Path
    train: LoopConfig
    prior: PriorSizes = field(default_factory=PriorSizes)
    start: Path | None = None
    max_crops: int | None = None
    empty_prob: float | None = None
    use_ref: bool | None = None
    reference_prob: float | None = None
    prefix: float = 0.5
    cond_dropout: float = 0.0
    gradient_checkpointing: bool = False
    validation: Validation = field(default_factory=Validation)

    def choice(self, embedded: Augment) -> Augment:
        """Which parts an example shows: as embedded, but for what is set here."""
        names = ("max_crops", "empty_prob", "use_ref", "reference_prob")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(embedded, **given)


def run(config_path: str | os.PathLike[str], *, quiet: bool = False) -> Result:
    """Train a prior as the YAML file says; go on where an earlier run with the same `out` stopped.

    Writes into `out`: checkpoints/, log.jsonl, loss.png, events/ for tensorboard, and at every checkpoint
    ip_prior.safetensors, the averaged weights with their settings. Runs in one process, or in several under
    `accelerate launch`.

    Raises PitError for settings that are unknown or out of range, for a folder of tokens that is not finished
    or damaged, and for an `out` that was begun with other data or another model.
    """
    from accelerate import PartialState

    settings = read_config(config_path, PriorSettings)
    state = PartialState(cpu=not torch.cuda.is_available())
    index = read_index(settings.tokens)
    choice, seed = settings.choice(index.augment), settings.train.seed
    held = min(settings.validation.wholes, len(index) // MOST_HELD_OUT)
    rows, held_rows = split_rows(len(index), held, settings.validation.seed)
    data = TokenData(settings.tokens, choice, seed=seed, rows=rows)
    check = TokenData(settings.tokens, choice, seed=settings.validation.seed, rows=held_rows)
    objective = IPPriorObjective(
        _prior(settings, index.tokens, index.width),
        prefix=settings.prefix,
        cond_dropout=settings.cond_dropout,
        white=data.white,
    )
    _refuse_another_run(settings, data, objective, write=state.is_main_process)
    publish = _publisher(settings, objective, data)
    validate = _validator(settings.validation, objective, check, publish)
    result = train(
        objective, data, settings.train, settings.out, validate=validate, quiet=quiet, description="ip-prior"
    )
    if state.is_main_process:
        publish(result.step)
    return result


def _prior(settings: PriorSettings, tokens: int, width: int) -> IPPrior:
    if settings.start is not None:
        prior, _ = load_prior(settings.start, dtype=torch.float32)
        found = (prior.config.num_tokens, prior.config.embedding_dim)
        if found != (tokens, width):
            raise PitError(
                f"'{settings.start.name}' works with {found[0]} tokens of width {found[1]}, but "
                f"'{settings.tokens}' holds {tokens} of width {width}; they belong to different adapters."
            )
    else:
        sizes = settings.prior
        prior = IPPrior(width, sizes.hidden_dim, sizes.num_layers, sizes.num_attention_heads, tokens)
        init_for_training(prior, torch.Generator().manual_seed(settings.train.seed))
    prior.gradient_checkpointing = settings.gradient_checkpointing
    return prior


def _refuse_another_run(
    settings: PriorSettings, data: TokenData, objective: IPPriorObjective, *, write: bool
) -> None:
    now = {
        "tokens": sha256("\n".join(name for name, _ in data.index.shards).encode()).hexdigest(),
        "examples": len(data),
        "choice": asdict(data.settings),
        "prior": objective.prior.config.to_dict(),
        "prefix": settings.prefix,
        "cond_dropout": settings.cond_dropout,
    }
    refuse_another_run(settings.out, now, write=write)


def _publisher(
    settings: PriorSettings, objective: IPPriorObjective, data: TokenData
) -> Callable[[int], None]:
    events = EventLog(settings.out / "log.jsonl", settings.out / "events")
    choice, index = data.settings, data.index
    info = PriorInfo(
        objective.prior.config,
        use_ref=choice.use_ref,
        max_crops=choice.max_crops,
        sketch_prob=choice.sketch_prob,
    )

    def publish(step: int) -> None:
        """Called with the averaged weights in place."""
        metadata = {
            "steps": step,
            "seed": settings.train.seed,
            "batch_size": settings.train.batch_size,
            "adapter": index.adapter,
            "image_encoder": index.encoder,
        }
        objective.save(settings.out / PUBLISHED, info, metadata)
        plot_losses(settings.out / "log.jsonl", settings.out / "loss.png")
        events.update()

    return publish


def _validator(
    settings: Validation, objective: IPPriorObjective, check: TokenData, publish: Callable[[int], None]
) -> Callable[[int], dict[str, float]]:
    def validate(step: int) -> dict[str, float]:
        publish(step)
        if not len(check):
            return {}
        return flow_losses(objective.prior, check, bins=settings.bins, seed=settings.seed)

    return validate
