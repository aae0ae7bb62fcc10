"""`pit train ip-adapter`: from a YAML file to an adapter in the released layout."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PitError
from ..ip_adapter.adapter import IPAdapter, new_ip_adapter
from ..ip_adapter.checkpoint import check_encoder, describe_adapter, load_ip_adapter
from ..ip_adapter.encode import load_image_encoder, preprocess
from ..ip_adapter.resampler import ImageProjection, Resampler
from ..parts.look import save_skipped
from .base_model import DTYPES, OF_PRECISION, BaseModel, Encoders, Nulls, encoders_identity, load_base
from .captioned import Captioned, Picture, Shards, build_together, read_rows, scan
from .config import read_config
from .ip_adapter import Dropout, IPAdapterObjective
from .loop import Data, Draws, LoopConfig, Result, train
from .plot import plot_losses

log = logging.getLogger(__name__)

CACHE_VERSION = 1
PUBLISHED = "ip_adapter.safetensors"


@dataclass(frozen=True)
class ResamplerSettings:
    """Sizes of a Plus adapter's projection; the defaults are the released SDXL file's."""

    dim: int = 1280
    depth: int = 4
    dim_head: int = 64
    heads: int = 20
    ff_mult: int = 4


@dataclass(frozen=True)
class AdapterSettings:
    """What `pit train ip-adapter` reads from its YAML file. Paths are relative to that file.

    base: a diffusers folder, SD1.5 or SDXL. image_encoder: a CLIP vision folder or file. rows: JSON lines or
    a JSON list of {image_file, text}. images: the folder that image_file starts from. out: where everything
    goes. adapter: "plus" or "base". tokens: 16 and 4 by default. resolution: 1024 for SDXL, 512 else.
    start: an adapter file to go on from, instead of a fresh projection and the UNet's own keys and values.
    train_layers: false trains the projection alone. frozen: dtype of the frozen models ("fp32", "bf16",
    "fp16"; by default train.precision's). save_as: dtype of the published file. cache: a folder for latents,
    text and image features, encoded once; without it they are made anew for every batch.
    """

    base: Path
    image_encoder: Path
    rows: Path
    images: Path
    out: Path
    train: LoopConfig
    adapter: str = "plus"
    tokens: int | None = None
    resolution: int | None = None
    start: Path | None = None
    train_layers: bool = True
    gradient_checkpointing: bool = False
    frozen: str | None = None
    save_as: str = "fp32"
    cache: Path | None = None
    resampler: ResamplerSettings = field(default_factory=ResamplerSettings)
    dropout: Dropout = field(default_factory=Dropout)

    def __post_init__(self) -> None:
        if self.adapter not in ("plus", "base"):
            raise PitError(f"adapter must be 'plus' or 'base', got {self.adapter!r}.")
        for name in ("frozen", "save_as"):
            value = getattr(self, name)
            if value is not None and value not in DTYPES:
                raise PitError(f"{name} must be one of {', '.join(DTYPES)}, got {value!r}.")
        if self.tokens is not None and self.tokens < 1:
            raise PitError(f"tokens must be at least 1, got {self.tokens}.")
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise PitError(f"resolution must be a multiple of 8, got {self.resolution}.")

    @property
    def plus(self) -> bool:
        return self.adapter == "plus"

    @property
    def frozen_dtype(self) -> torch.dtype:
        return DTYPES[self.frozen or OF_PRECISION[self.train.precision]]


class LiveObjective(IPAdapterObjective):
    """The objective on raw batches: pictures and captions are encoded in every step."""

    def __init__(self, encoders: Encoders, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.encoders = encoders

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        return super().forward(self.encoders(batch), draws)


def run(config_path: str | os.PathLike[str], *, quiet: bool = False) -> Result:
    """Train an adapter as the YAML file says; go on where an earlier run with the same `out` stopped.

    Writes into `out`: checkpoints/, log.jsonl, loss.png, skipped.jsonl (rows whose picture cannot be read),
    and ip_adapter.safetensors, the averaged weights in the released layout, at every checkpoint. Runs in
    one process, or in several under `accelerate launch`.

    Raises PitError for settings that are unknown or out of range, for files that are missing or damaged, and
    for models that do not belong together.
    """
    from accelerate import PartialState

    settings = read_config(config_path, AdapterSettings)
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():  # the others then find the index ready
        pictures, skipped = scan(
            read_rows(settings.rows), _folder(settings.images), settings.out / "pictures.json", quiet=quiet
        )
    objective, data = _prepare(settings, pictures, state, quiet=quiet)
    if state.is_main_process:
        save_skipped(settings.out / "skipped.jsonl", skipped)
        adapter = describe_adapter(objective.adapter)
        log.info("%s; %d pictures, %d left out", adapter, len(pictures), len(skipped))

    publish = _publisher(settings, objective)
    result = train(
        objective,
        data,
        settings.train,
        settings.out,
        validate=publish,
        quiet=quiet,
        description="ip-adapter",
    )
    if state.is_main_process:
        publish(result.step)
    return result


def _prepare(
    settings: AdapterSettings, pictures: list[Picture], state: Any, *, quiet: bool
) -> tuple[IPAdapterObjective, Data]:
    """What `train` needs. With a cache, the encoders' memory is given back on return."""
    base = load_base(settings.base, settings.frozen_dtype)
    vision = load_image_encoder(settings.image_encoder, dtype=settings.frozen_dtype)
    encoders = Encoders(base, vision, plus=settings.plus)
    adapter = _adapter(settings, base, encoders)
    nulls = encoders.to(state.device).nulls()
    live = _live(settings, base, encoders, pictures)
    data: Data = live
    if settings.cache is not None:
        data = Shards(settings.cache, pictures, _cache_key(settings, encoders, live.resolution))
        build_together(data, live, encoders, state, quiet=quiet)
    return _objective(settings, base, adapter, encoders, nulls), data


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise PitError(
            f"There is no folder '{path}'; images should name the one that image_file starts from."
        )
    return path


def _adapter(settings: AdapterSettings, base: BaseModel, encoders: Encoders) -> IPAdapter:
    hidden, projection = encoders.vision.hidden_width, encoders.vision.projection_dim
    if settings.start is not None:
        adapter = load_ip_adapter(settings.start, dtype=torch.float32)
        if adapter.kind != settings.adapter:
            raise PitError(
                f"{adapter.name} is a {adapter.kind} adapter, but the settings say {settings.adapter}."
            )
        check_encoder(adapter, hidden, projection)
        return adapter
    context = int(base.unet.config.cross_attention_dim)  # type: ignore[union-attr, arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.train.seed)
        if not settings.plus:
            return new_ip_adapter(base.unet, ImageProjection(projection, context, settings.tokens or 4))
        sizes = vars(settings.resampler)
        resampler = Resampler(
            **sizes, num_queries=settings.tokens or 16, embedding_dim=hidden, output_dim=context
        )
        return new_ip_adapter(base.unet, resampler)


def _objective(
    settings: AdapterSettings, base: BaseModel, adapter: IPAdapter, encoders: Encoders, nulls: Nulls
) -> IPAdapterObjective:
    if settings.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()  # type: ignore[operator]
    options: dict[str, Any] = {
        "alphas_cumprod": base.alphas_cumprod,
        "null_features": nulls.features,
        "null_text": nulls.text,
        "null_pooled": nulls.pooled,
        "dropout": settings.dropout,
        "train_layers": settings.train_layers,
    }
    if settings.cache is None:
        return LiveObjective(encoders, base.unet, adapter, **options)
    return IPAdapterObjective(base.unet, adapter, **options)


def _live(
    settings: AdapterSettings, base: BaseModel, encoders: Encoders, pictures: list[Picture]
) -> Captioned:
    resolution = settings.resolution or (1024 if base.sdxl else 512)
    vision = encoders.vision
    clip = partial(preprocess, size=vision.image_size, mean=vision.mean, std=vision.std)
    return Captioned(pictures, resolution, encoders.tokenize, clip)


def _cache_key(settings: AdapterSettings, encoders: Encoders, resolution: int) -> str:
    """Everything that the encoded tensors depend on, besides the pictures and captions."""
    models = encoders_identity(settings.base, encoders)
    parts = [CACHE_VERSION, resolution, settings.adapter, str(settings.frozen_dtype), *models]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _publisher(settings: AdapterSettings, objective: IPAdapterObjective) -> Callable[[int], dict[str, float]]:
    def publish(step: int) -> dict[str, float]:
        """Called with the averaged weights in place."""
        metadata = {"steps": step, "seed": settings.train.seed, "batch_size": settings.train.batch_size}
        target = settings.out / PUBLISHED
        objective.save(target, metadata, DTYPES[settings.save_as])
        plot_losses(settings.out / "log.jsonl", settings.out / "loss.png")
        return {}

    return publish
