"""`pit train ip-lora`: from a YAML file to a LoRA that ComfyUI's own loader reads."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PitError
from ..ip_adapter.adapter import IPAdapter
from ..ip_adapter.checkpoint import check_encoder, load_ip_adapter
from ..ip_adapter.encode import load_image_encoder, preprocess, tokens_from_features
from ..parts.look import save_skipped
from .base_model import DTYPES, OF_PRECISION, BaseModel, Encoders, encoders_identity, load_base, unet_identity
from .buckets import BySize, Size, bucket_sizes, nearest_size
from .captioned import Shards, Tensors, build_together
from .config import read_config
from .events import EventLog
from .ip_adapter import Dropout
from .ip_lora import NO_DROPOUT, IPLoRAObjective
from .ip_lora_data import Example, Referenced, read_examples
from .ip_lora_preview import Preview, Previews, Shown
from .ip_lora_prompts import check_prompt
from .loop import LoopConfig, Result, train
from .plot import plot_losses
from .same_run import refuse_another_run

log = logging.getLogger(__name__)

CACHE_VERSION = 1
PUBLISHED = "ip_lora.safetensors"


@dataclass(frozen=True)
class IPLoRASettings:
    """What `pit train ip-lora` reads from its YAML file. Paths are relative to that file.

    base: an SDXL diffusers folder. image_encoder: a CLIP vision folder or file. ip_adapter: the adapter that
    the LoRA is trained beside. data: a folder of targets and refs or a manifest, see `read_pairs`. out: where
    everything goes. prompt: see `prompt_for`. rank: of the LoRA, its alpha too. lora_on_ip_adapter: also on
    the adapter's own keys and values. resolution: of the targets, with `buckets` that of a square one.
    min_snr: see `min_snr_loss`. frozen: dtype of the models that are not trained ("fp32", "bf16", "fp16"; by
    default train.precision's). save_as: dtype of the published file. cache: the folder of latents, text and
    image tokens, encoded once; by default in `out`.
    """

    base: Path
    image_encoder: Path
    ip_adapter: Path
    data: Path
    out: Path
    train: LoopConfig
    prompt: str = "caption"
    rank: int = 64
    lora_on_ip_adapter: bool = False
    resolution: int = 1024
    buckets: bool = False
    min_snr: float | None = None
    gradient_checkpointing: bool = False
    frozen: str | None = None
    save_as: str = "fp32"
    cache: Path | None = None
    dropout: Dropout = NO_DROPOUT
    preview: Preview = field(default_factory=Preview)

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
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
    def sizes(self) -> list[Size]:
        """The sizes that targets are brought to."""
        return bucket_sizes(self.resolution) if self.buckets else [(self.resolution, self.resolution)]


def run(config_path: str | os.PathLike[str], *, quiet: bool = False) -> Result:
    """Train an IP-LoRA as the YAML file says; go on where an earlier run with the same `out` stopped.

    Writes into `out`: checkpoints/, log.jsonl, loss.png, events/ for tensorboard, skipped.jsonl (what is left
    out of the data), and at every checkpoint previews/step-....png and ip_lora.safetensors, the averaged
    weights in kohya's layout. Runs in one process, or in several under `accelerate launch`.

    Raises PitError for settings that are unknown or out of range, for files that are missing or damaged, for
    models that do not belong together, and for an `out` that was begun with other data or another model.
    """
    from accelerate import PartialState

    settings = read_config(config_path, IPLoRASettings)
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():  # the others then find the index ready
        examples, skipped = read_examples(
            settings.data, settings.prompt, settings.out / "pictures.json", quiet=quiet
        )
    ready = _prepare(settings, examples, state, quiet=quiet)
    refuse_another_run(settings.out, _identity(settings, ready), write=state.is_main_process)
    if state.is_main_process:
        save_skipped(settings.out / "skipped.jsonl", skipped)
        log.info("%d examples, %d left out", len(examples), len(skipped))

    publish = _publisher(settings, ready.objective)

    def validate(step: int) -> dict[str, float]:
        publish(step)
        if ready.previews is not None:
            ready.previews.draw(settings.out / "previews" / f"step-{step:08d}.png")
        return {}

    result = train(
        ready.objective,
        ready.data,
        settings.train,
        settings.out,
        validate=validate,
        quiet=quiet,
        description="ip-lora",
    )
    if state.is_main_process:
        publish(result.step)
    return result


@dataclass
class _Ready:
    """What a training needs once everything is encoded."""

    objective: IPLoRAObjective
    data: BySize
    shards: dict[Size, Shards]
    previews: Previews | None


def _prepare(settings: IPLoRASettings, examples: list[Example], state: Any, *, quiet: bool) -> _Ready:
    """The encoders' memory is given back on return; for previews the VAE stays."""
    base = load_base(settings.base, settings.frozen_dtype)
    if not base.sdxl:
        raise PitError(f"'{settings.base}' is no SDXL model; IP-LoRAs are trained on SDXL.")
    vision = load_image_encoder(settings.image_encoder, dtype=settings.frozen_dtype)
    adapter = load_ip_adapter(settings.ip_adapter, dtype=torch.float32)
    check_encoder(adapter, vision.hidden_width, vision.projection_dim)
    encoders = Encoders(base, vision, plus=adapter.kind == "plus").to(state.device)
    nulls = encoders.nulls()
    null_tokens = tokens_from_features(adapter.to(state.device), nulls.features[None])[0]
    groups = _by_size(examples, settings.sizes)
    shards = _encoded(settings, groups, encoders, adapter, state, quiet=quiet)

    if settings.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()  # type: ignore[operator]
    adapter.layers.to(settings.frozen_dtype)  # the tokens were made in full precision
    objective = IPLoRAObjective(
        base.unet,
        adapter.cpu(),
        alphas_cumprod=base.alphas_cumprod,
        rank=settings.rank,
        lora_on_ip_adapter=settings.lora_on_ip_adapter,
        seed=settings.train.seed,
        min_snr=settings.min_snr,
        dropout=settings.dropout,
        null_tokens=null_tokens.cpu(),
        null_text=nulls.text.cpu(),
        null_pooled=None if nulls.pooled is None else nulls.pooled.cpu(),
    )
    previews = _previews(settings, base, objective, groups, shards) if state.is_main_process else None
    return _Ready(objective, BySize(list(shards.values())), shards, previews)


def _by_size(examples: list[Example], sizes: list[Size]) -> dict[Size, list[Example]]:
    groups: dict[Size, list[Example]] = {}
    for example in examples:
        groups.setdefault(nearest_size(example.width, example.height, sizes), []).append(example)
    return dict(sorted(groups.items()))


def _encoded(
    settings: IPLoRASettings,
    groups: dict[Size, list[Example]],
    encoders: Encoders,
    adapter: IPAdapter,
    state: Any,
    *,
    quiet: bool,
) -> dict[Size, Shards]:
    """Latents, text and image tokens of each size's examples, on disk."""
    vision = encoders.vision
    clip = partial(preprocess, size=vision.image_size, mean=vision.mean, std=vision.std)

    def encode(raw: Tensors) -> Tensors:
        batch = encoders(raw)
        batch["tokens"] = tokens_from_features(adapter, batch.pop("features"))
        return batch

    made = {}
    models = [adapter.content_hash, *encoders_identity(settings.base, encoders)]
    for size, examples in groups.items():
        parts = [CACHE_VERSION, "ip-lora", size, str(settings.frozen_dtype), models]
        key = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        made[size] = Shards(settings.cache or settings.out / "cache", examples, key)
        build_together(
            made[size], Referenced(examples, size, encoders.tokenize, clip), encode, state, quiet=quiet
        )
    return made


def _previews(
    settings: IPLoRASettings,
    base: BaseModel,
    objective: IPLoRAObjective,
    groups: dict[Size, list[Example]],
    shards: dict[Size, Shards],
) -> Previews | None:
    places = [(size, row) for size, examples in groups.items() for row in range(len(examples))]
    count = min(settings.preview.count, len(places))
    if not count:
        return None
    shown = []
    for size, row in (places[n * len(places) // count] for n in range(count)):
        batch = shards[size].fetch([(0, row)])
        encoded: dict[str, Tensor] = {name: batch[name][0] for name in ("text", "pooled", "tokens")}
        shown.append(Shown(groups[size][row], size, encoded))
    return Previews(settings.base, base.vae, objective, shown, settings.preview)


def _identity(settings: IPLoRASettings, ready: _Ready) -> dict[str, Any]:
    """What a resumed run has to have in common with the one before, besides the loop's settings."""
    names = [name for shards in ready.shards.values() for name in shards.names]
    return {
        "prompt": settings.prompt,
        "unet": unet_identity(settings.base),
        "data": sha256("\n".join(names).encode()).hexdigest(),
        "ip_adapter": ready.objective.adapter.content_hash,
        "rank": settings.rank,
        "lora_on_ip_adapter": settings.lora_on_ip_adapter,
        "min_snr": settings.min_snr,
        "dropout": asdict(settings.dropout),
    }


def _publisher(settings: IPLoRASettings, objective: IPLoRAObjective) -> Callable[[int], None]:
    events = EventLog(settings.out / "log.jsonl", settings.out / "events")

    def publish(step: int) -> None:
        """Called with the averaged weights in place."""
        metadata = {
            "prompt": settings.prompt,
            "base": settings.base.name,
            "ip_adapter": settings.ip_adapter.name,
            "ip_adapter_hash": objective.adapter.content_hash,
            "lora_on_ip_adapter": settings.lora_on_ip_adapter,
            "resolution": settings.resolution,
            "steps": step,
            "seed": settings.train.seed,
            "batch_size": settings.train.batch_size,
        }
        objective.save(settings.out / PUBLISHED, metadata, DTYPES[settings.save_as])
        plot_losses(settings.out / "log.jsonl", settings.out / "loss.png")
        events.update()

    return publish
