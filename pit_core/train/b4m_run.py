"""`pit train b4m content|style|join`: from a YAML file to a LoRA that ComfyUI's own loader reads."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ..b4m.factors import load_factors
from ..b4m.merge import splice
from ..b4m.projection import SplitAdapter
from ..errors import PitError
from ..files import existing_file, sha256_of
from ..parts.look import Skipped, save_skipped
from .b4m import B4MObjective, Role
from .b4m_data import PictureFolder, Rows, read_folder
from .b4m_preview import Preview, Previews
from .base_model import (
    DTYPES,
    OF_PRECISION,
    BaseModel,
    CaptionEncoders,
    base_identity,
    load_base,
    unet_identity,
)
from .captioned import Captioned, Picture, Shards, build_together
from .config import read_config
from .events import EventLog
from .loop import LoopConfig, Result, train
from .plot import plot_losses
from .same_run import refuse_another_run

log = logging.getLogger(__name__)

CACHE_VERSION = 1
STAGES: dict[str, Role] = {"content": "content", "style": "style", "join": "entity"}
"""What the command calls a stage -> what its file is for."""


@dataclass(frozen=True, kw_only=True)
class B4MSettings:
    """What both stages of `pit train b4m` read from their YAML files. Paths are relative to the file.

    base: an SDXL diffusers folder. out: where everything goes. resolution: of the pictures, centre squares.
    frozen: dtype of the models that are not trained ("fp32", "bf16", "fp16"; by default train.precision's).
    save_as: dtype of the published file. cache: the folder of latents and text, encoded once; by default in
    `out`.
    """

    base: Path
    out: Path
    train: LoopConfig
    resolution: int = 512
    gradient_checkpointing: bool = False
    frozen: str | None = None
    save_as: str = "fp32"
    cache: Path | None = None
    preview: Preview = field(default_factory=Preview)

    def __post_init__(self) -> None:
        for name in ("frozen", "save_as"):
            value = getattr(self, name)
            if value is not None and value not in DTYPES:
                raise PitError(f"{name} must be one of {', '.join(DTYPES)}, got {value!r}.")
        if self.resolution < 8 or self.resolution % 8:
            raise PitError(f"resolution must be a multiple of 8, got {self.resolution}.")

    @property
    def frozen_dtype(self) -> torch.dtype:
        return DTYPES[self.frozen or OF_PRECISION[self.train.precision]]

    @property
    def folders(self) -> list[PictureFolder]:
        """The own pictures, then those of the other side; in the second stage content, then style."""
        raise NotImplementedError

    @property
    def loras(self) -> list[Path]:
        """The files that the training starts from."""
        return []

    @property
    def options(self) -> dict[str, float]:
        """What the objective is told besides its role."""
        raise NotImplementedError

    def start(self, base: BaseModel) -> SplitAdapter:
        """The adapter before its first step."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SplitSettings(B4MSettings):
    """The first stage: one content among several styles, or one style among several contents.

    own: the pictures that are learned. others: sets of the other side. other_lr: their factor's learning
    rate, the own one's is train.lr. rank, basis_seed: the frozen halves; content and style files only go
    together with the same ones.
    """

    own: PictureFolder
    others: tuple[PictureFolder, ...]
    other_lr: float = 1e-5
    rank: int = 64
    basis_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.others:
            raise PitError("others must name at least one set of the other side; several are better.")
        if not 0 <= self.other_lr <= self.train.lr:
            raise PitError(
                f"other_lr must lie between 0 and train.lr ({self.train.lr:g}), got {self.other_lr:g}."
            )

    @property
    def folders(self) -> list[PictureFolder]:
        return [self.own, *self.others]

    @property
    def options(self) -> dict[str, float]:
        return {"other_lr_scale": self.other_lr / self.train.lr}

    def start(self, base: BaseModel) -> SplitAdapter:
        return SplitAdapter.new(base.unet, self.rank, self.basis_seed)


@dataclass(frozen=True)
class Trained(PictureFolder):
    """A file of the first stage, with the pictures that it was trained on."""

    lora: Path


@dataclass(frozen=True, kw_only=True)
class JoinSettings(B4MSettings):
    """The second stage: content and style together. damping: of the preconditioner, times trace / rank."""

    content: Trained
    style: Trained
    damping: float = 1e-3

    @property
    def folders(self) -> list[PictureFolder]:
        return [self.content, self.style]

    @property
    def loras(self) -> list[Path]:
        return [self.content.lora, self.style.lora]

    @property
    def options(self) -> dict[str, float]:
        return {"damping": self.damping}

    def start(self, base: BaseModel) -> SplitAdapter:
        """The content file's D and the style file's B, bit for bit, in float32."""
        content, its_metadata = load_factors(self.content.lora)
        style, other_metadata = load_factors(self.style.lora)
        _check_role(self.content.lora, its_metadata, "content")
        _check_role(self.style.lora, other_metadata, "style")
        factors = splice(content, style)
        seed = its_metadata.get("basis_seed")
        known = seed is not None and seed == other_metadata.get("basis_seed")
        whole = {name: (down.float(), up.float()) for name, (down, up) in factors.items()}
        return SplitAdapter(whole, int(seed) if seed is not None and known else None)


def _check_role(path: Path, metadata: Mapping[str, str], role: str) -> None:
    if metadata.get("role", role) != role:
        raise PitError(f"'{path.name}' is a {metadata['role']}, but the settings name it as {role}.")


def settings_of(config_path: str | os.PathLike[str], stage: str) -> SplitSettings | JoinSettings:
    """Read a stage's YAML file; PitError as `read_config`."""
    if stage == "join":
        return read_config(config_path, JoinSettings)
    return read_config(config_path, SplitSettings)


def published(settings: B4MSettings, stage: str) -> Path:
    """Where a stage's LoRA is written to."""
    return settings.out / f"b4m_{STAGES[stage]}.safetensors"


def run(config_path: str | os.PathLike[str], stage: str, *, quiet: bool = False) -> Result:
    """Train one stage as the YAML file says; go on where an earlier run with the same `out` stopped.

    stage: "content", "style" or "join". Writes into `out`: checkpoints/, log.jsonl, loss.png, events/ for
    tensorboard, skipped.jsonl (pictures that cannot be read), and at every checkpoint previews/step-....png
    and b4m_content, b4m_style or b4m_entity.safetensors, the averaged weights in kohya's layout. Runs in one
    process, or in several under `accelerate launch`.

    Raises PitError for settings that are unknown or out of range, for files that are missing, damaged or of
    the other role, for a base that is not SDXL, and for an `out` that was begun with something else.
    """
    from accelerate import PartialState

    settings = settings_of(config_path, stage)
    state = PartialState(cpu=not torch.cuda.is_available())
    for path in settings.loras:
        existing_file(path)
    with state.main_process_first():  # the others then find the indices ready
        found = [
            read_folder(folder, settings.out / f"pictures-{number}.json", quiet=quiet)
            for number, folder in enumerate(settings.folders)
        ]
    base = load_base(settings.base, settings.frozen_dtype)
    if not base.sdxl:
        raise PitError(f"'{settings.base}' is no SDXL model; B4M is trained on SDXL.")
    ready = _prepare(settings, STAGES[stage], base, [pictures for pictures, _ in found], state, quiet=quiet)
    refuse_another_run(settings.out, _identity(settings, ready), write=state.is_main_process)
    if state.is_main_process:
        _note_skipped(settings.out, [skipped for _, skipped in found])

    publish = _publisher(settings, stage, ready)

    def validate(step: int) -> dict[str, float]:
        publish(step)
        ready.previews.draw(settings.out / "previews" / f"step-{step:08d}.png")
        return {}

    result = train(
        ready.objective,
        Rows(ready.shards[0], ready.shards[1:]),
        settings.train,
        settings.out,
        validate=validate,
        quiet=quiet,
        description=f"b4m {stage}",
    )
    if state.is_main_process:
        publish(result.step)
    return result


@dataclass
class _Ready:
    """What a training needs once everything is encoded. shards: one for each folder, in order."""

    objective: B4MObjective
    shards: list[Shards]
    previews: Previews


def _prepare(
    settings: B4MSettings,
    role: Role,
    base: BaseModel,
    pictures: list[list[Picture]],
    state: Any,
    *,
    quiet: bool,
) -> _Ready:
    """The text encoders' memory is given back on return; for previews the VAE stays."""
    encoders = CaptionEncoders(base).to(state.device)
    shards = _encoded(settings, pictures, encoders, state, quiet=quiet)
    prompts = settings.preview.prompts or _prompts(pictures)
    text = encoders.text(encoders.tokenize(prompts).to(state.device)) if state.is_main_process else {}
    if settings.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()  # type: ignore[operator]
    objective = B4MObjective(
        base.unet,
        settings.start(base),
        role=role,
        alphas_cumprod=base.alphas_cumprod,
        **settings.options,
    )
    objective.to(state.device)  # before the optimizer looks: it batches layers by where they are
    size = (settings.resolution, settings.resolution)
    shown = {name: values.cpu() for name, values in text.items()}
    previews = Previews(settings.base, base.vae, objective, prompts, shown, size, settings.preview)
    return _Ready(objective, shards, previews)


def _prompts(pictures: list[list[Picture]]) -> list[str]:
    """What each set's first picture is trained with."""
    return list(dict.fromkeys(found[0].text for found in pictures))


def _encoded(
    settings: B4MSettings,
    pictures: list[list[Picture]],
    encoders: CaptionEncoders,
    state: Any,
    *,
    quiet: bool,
) -> list[Shards]:
    """Latents and text of each set's pictures, on disk."""
    models = base_identity(settings.base)
    parts = [CACHE_VERSION, "b4m", settings.resolution, str(settings.frozen_dtype), models]
    key = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    made = []
    for found in pictures:
        shards = Shards(settings.cache or settings.out / "cache", found, key)
        source = Captioned(found, settings.resolution, encoders.tokenize)
        build_together(shards, source, encoders, state, quiet=quiet)
        made.append(shards)
    return made


def _identity(settings: B4MSettings, ready: _Ready) -> dict[str, Any]:
    """What a resumed run has to have in common with the one before, besides the loop's settings."""
    objective = ready.objective
    names = [name for shards in ready.shards for name in shards.names]
    return {
        "role": objective.role,
        "unet": unet_identity(settings.base),
        "data": sha256("\n".join(names).encode()).hexdigest(),
        "loras": [sha256_of(path) for path in settings.loras],
        **settings.options,
        **objective.adapter.metadata(),
    }


def _note_skipped(out: Path, skipped: list[list[Skipped]]) -> None:
    everything = [item for found in skipped for item in found]
    save_skipped(out / "skipped.jsonl", everything)
    log.info("%d pictures left out", len(everything))


def _publisher(settings: B4MSettings, stage: str, ready: _Ready) -> Callable[[int], None]:
    events = EventLog(settings.out / "log.jsonl", settings.out / "events")

    def publish(step: int) -> None:
        """Called with the averaged weights in place."""
        metadata = {
            "prompts": [folder.prompt for folder in settings.folders],
            **settings.options,
            "base": settings.base.name,
            "resolution": settings.resolution,
            "steps": step,
            "seed": settings.train.seed,
            "batch_size": settings.train.batch_size,
        }
        ready.objective.save(published(settings, stage), metadata, DTYPES[settings.save_as])
        plot_losses(settings.out / "log.jsonl", settings.out / "loss.png")
        events.update()

    return publish
