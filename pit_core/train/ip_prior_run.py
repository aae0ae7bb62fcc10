"""`pit train ip-prior`: from a YAML file and the shards of `pit data embed` to an IP-Prior."""

from __future__ import annotations

import json
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
from ..parts.joint import JointTokens, split_folders
from ..parts.shards import OPEN, read_index
from ..parts.token_data import TokenData
from .config import read_config
from .events import EventLog
from .ip_prior import IPPriorObjective
from .ip_prior_check import flow_losses
from .ip_prior_preview import LoadDecoder, Previews, PriorPreview
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

    tokens: a folder of `pit data embed`, or a list of them, which are mixed. weights: how often each of them
    comes; by default by its size. out: where everything goes. start: a prior to go on from, instead of fresh
    weights; it brings its sizes, and where its max_crops or use_ref are not the data's, they have to be set
    here. max_crops, empty_prob, use_ref, reference_prob: as in `Augment`; by default as the tokens were
    embedded. prefix, cond_dropout: as in `IPPriorObjective`.
    """

    tokens: Path | tuple[Path, ...]
    out: Path
    train: LoopConfig
    weights: tuple[float, ...] = ()
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
    preview: PriorPreview = field(default_factory=PriorPreview)

    def __post_init__(self) -> None:
        if not self.folders:
            raise PitError("Expected at least one folder of tokens, got an empty list.")

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders of tokens."""
        return self.tokens if isinstance(self.tokens, tuple) else (self.tokens,)

    def choice(self, embedded: Augment) -> Augment:
        """Which parts an example shows: as embedded, but for what is set here."""
        names = ("max_crops", "empty_prob", "use_ref", "reference_prob")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(embedded, **given)


def run(
    config_path: str | os.PathLike[str], *, quiet: bool = False, decoder: LoadDecoder | None = None
) -> Result:
    """Train a prior as the YAML file says; go on where an earlier run with the same `out` stopped.

    Writes into `out`: checkpoints/, log.jsonl, loss.png, events/ for tensorboard, and at every checkpoint
    ip_prior.safetensors, the averaged weights with their settings. `decoder` loads what draws the previews
    that the file asks for; they go into previews/. Runs in one process, or in several under `accelerate
    launch`.

    Raises PitError for settings that are unknown or out of range, for a folder of tokens that is not finished
    or damaged, for folders and a decoder that do not belong together, and for an `out` that was begun with
    other data or another model.
    """
    from accelerate import PartialState

    settings = read_config(config_path, PriorSettings)
    state = PartialState(cpu=not torch.cuda.is_available())
    data, check = _data(settings)
    objective = IPPriorObjective(
        _prior(settings, data),
        prefix=settings.prefix,
        cond_dropout=settings.cond_dropout,
        white=data.white,
    )
    _refuse_another_run(settings, data, check, objective, write=state.is_main_process)
    info = PriorInfo(
        objective.prior.config,
        use_ref=data.settings.use_ref,
        max_crops=data.settings.max_crops,
        sketch_prob=data.settings.sketch_prob,
    )
    previews = _previews(settings, check, info, decoder) if state.is_main_process else None
    publish = _publisher(settings, objective, data, info)
    validate = _validator(settings, objective, check, publish, previews)
    result = train(
        objective, data, settings.train, settings.out, validate=validate, quiet=quiet, description="ip-prior"
    )
    if state.is_main_process:
        publish(result.step)
    return result


def _data(settings: PriorSettings) -> tuple[JointTokens, JointTokens]:
    """What is trained on, and what is held out."""
    seed, held_seed = settings.train.seed, settings.validation.seed
    indices = [read_index(folder) for folder in settings.folders]
    sizes = [len(index) for index in indices]
    held = min(settings.validation.wholes, sum(sizes) // MOST_HELD_OUT)
    data, check = [], []
    rows = split_folders(sizes, held, held_seed)
    for number, (folder, index, (own, out)) in enumerate(zip(settings.folders, indices, rows, strict=True)):
        choice = settings.choice(index.augment)
        place = {"first": sum(sizes[:number]), "most_open": max(1, OPEN // len(sizes))}
        data.append(TokenData(folder, choice, seed=seed, rows=own, **place))
        check.append(TokenData(folder, choice, seed=held_seed, rows=out, **place))
    return JointTokens(data, settings.weights, seed=seed), JointTokens(check)


def _previews(
    settings: PriorSettings, check: JointTokens, info: PriorInfo, decoder: LoadDecoder | None
) -> Previews | None:
    if not settings.preview.model:
        return None
    if decoder is None:
        raise PitError(f"There is nothing here that draws previews by '{settings.preview.model}'.")
    return Previews(decoder(settings.preview), check, info, settings.preview)


def _prior(settings: PriorSettings, data: JointTokens) -> IPPrior:
    tokens, width = data.index.tokens, data.index.width
    if settings.start is not None:
        prior, info = load_prior(settings.start, dtype=torch.float32)
        found = (prior.config.num_tokens, prior.config.embedding_dim)
        if found != (tokens, width):
            raise PitError(
                f"'{settings.start.name}' works with {found[0]} tokens of width {found[1]}, but "
                f"'{settings.folders[0]}' holds {tokens} of width {width}; they belong to different adapters."
            )
        _check_slots(settings, info, data.settings)
    else:
        sizes = settings.prior
        prior = IPPrior(width, sizes.hidden_dim, sizes.num_layers, sizes.num_attention_heads, tokens)
        init_for_training(prior, torch.Generator().manual_seed(settings.train.seed))
    prior.gradient_checkpointing = settings.gradient_checkpointing
    return prior


def _check_slots(settings: PriorSettings, info: PriorInfo, choice: Augment) -> None:
    """A start knows its own slots: where the data's are others, the settings have to say that it is meant.

    Slot 0 of a prior with use_ref is its reference; trained on without one, it would take a part for it.
    """
    unset = [name for name in ("use_ref", "max_crops") if getattr(settings, name) is None]
    if differ := [name for name in unset if getattr(info, name) != getattr(choice, name)]:
        theirs, ours = (
            ", ".join(f"{name}: {json.dumps(getattr(each, name))}" for name in differ)
            for each in (info, choice)
        )
        raise PitError(
            f"The start was trained with '{theirs}', but the data comes with '{ours}'; set "
            f"{' and '.join(differ)} in the training's settings, to either (use_ref: true needs data that "
            "was embedded with it)."
        )


def _refuse_another_run(
    settings: PriorSettings,
    data: JointTokens,
    check: JointTokens,
    objective: IPPriorObjective,
    *,
    write: bool,
) -> None:
    held_out = [list(folder.rows) for folder in check.folders]
    now = {
        "tokens": sha256("\n".join(data.shards).encode()).hexdigest(),
        "weights": list(settings.weights) or None,
        "examples": len(data),
        "held_out": sha256(json.dumps(held_out).encode()).hexdigest(),
        "choice": asdict(data.settings),
        "prior": objective.prior.config.to_dict(),
        "prefix": settings.prefix,
        "cond_dropout": settings.cond_dropout,
    }
    refuse_another_run(settings.out, now, write=write)


def _publisher(
    settings: PriorSettings, objective: IPPriorObjective, data: JointTokens, info: PriorInfo
) -> Callable[[int], None]:
    events = EventLog(settings.out / "log.jsonl", settings.out / "events")
    index = data.index

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
    settings: PriorSettings,
    objective: IPPriorObjective,
    check: JointTokens,
    publish: Callable[[int], None],
    previews: Previews | None,
) -> Callable[[int], dict[str, float]]:
    often = settings.preview.every * settings.train.save_every

    def validate(step: int) -> dict[str, float]:
        publish(step)
        found: dict[str, float] = {}
        if len(check):
            how = settings.validation
            found = flow_losses(objective.prior, check, bins=how.bins, seed=how.seed)
        if previews is not None and (step % often == 0 or step == settings.train.steps):
            found |= previews.make(objective.prior, settings.out / "previews" / f"step-{step:08d}.png")
        return found

    return validate
