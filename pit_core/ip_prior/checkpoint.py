"""Reading, writing and converting IP-Priors.

Two forms: the released `prior.ckpt` with `cfg.yaml` beside it, and a safetensors file that carries its
settings in the metadata (`kind`, `version`, `pit_config`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import PitError
from ..files import check_finite, check_shapes, existing_file, hash_tensors, load_tensors, save_tensors
from .info import PriorInfo, info_from, read_yaml_settings
from .model import IPPrior, IPPriorConfig

log = logging.getLogger(__name__)

KIND = "ip_prior"
VERSION = 1
MARK = "x_embedder.weight"  # the key whose prefix is everything's prefix

FOREIGN = {
    r"(^|\.)(image_proj|ip_adapter)\.": "an IP-Adapter",
    r"lora": "a LoRA",
    r"^model\.diffusion_model\.": "a full Stable Diffusion checkpoint",
    r"(^|\.)(down_blocks|input_blocks)\.": "a UNet or VAE",
    r"(^|\.)(double_blocks|transformer_blocks)\.": "a diffusion transformer",
    r"(^|\.)vision_model\.": "an image encoder",
    r"(^|\.)text_model\.": "a text encoder",
    r"^(tensor|direction)$": "a direction or another single tensor",
}
"""A pattern found in the keys -> what the file is instead."""

Path_ = str | PathLike[str]
Settings = Path_ | Mapping[str, Any] | None


@dataclass(frozen=True)
class Conversion:
    """What `convert_prior` wrote."""

    source: Path
    target: Path
    dtype: torch.dtype
    tensors: int
    bytes: int
    info: PriorInfo

    def __str__(self) -> str:
        size = f"{self.tensors} tensors, {self.bytes:,} bytes"
        return f"{self.source.name} -> {self.target} ({str(self.dtype).removeprefix('torch.')}, {size})"


def load_prior(
    path: Path_,
    *,
    config: Settings = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    operations: Any = nn,
) -> tuple[IPPrior, PriorInfo]:
    """A prior and what is known of it, from a file, or a folder that holds `prior.ckpt` or one safetensors.

    Settings come from the file's metadata; else from `<stem>.yaml` or `cfg.yaml` beside it. `config`, a YAML
    file or a mapping with cfg.yaml's names, goes before both. Sizes are read from the weights; the head count
    cannot be, and is hidden_dim / 64 where no settings name it (logged, and in the info's notes). dtype None
    keeps the file's; layers come from `operations`.

    Raises PitError for a file that is missing, damaged, a pickle with code, of another family, not finite, or
    at odds with its settings.
    """
    weights, info = _read(path, config)
    dtype = dtype or weights[MARK].dtype
    prior = IPPrior.from_config(info.config, operations=operations, dtype=dtype, device="meta")
    prior.to_empty(device=device or "cpu")
    prior.load_state_dict(weights)
    for note in info.notes:
        log.warning(note)
    return prior.eval(), info


def recorded_max_crops(path: Path_) -> int:
    """`max_crops` of a prior from its settings alone; the default where they do not say.

    Reads no weights. What is wrong with the file is left for `load_prior` to say.
    """
    try:
        path = _locate(path)
        value = _settings(path, _metadata_alone(path), None).get("max_crops")
    except PitError:
        value = None
    return value if type(value) is int and value >= 1 else PriorInfo.max_crops


def save_prior(
    path: Path_, prior: IPPrior, info: PriorInfo, metadata: Mapping[str, object] | None = None
) -> PriorInfo:
    """Write a safetensors file with its settings in the metadata, completely or not at all.

    `metadata` adds entries of the caller's own (seed, steps). Returns the info with the hash of what was
    written. Raises PitError where info describes other sizes, weights are not finite, or the disk refuses.
    """
    if info.config != prior.config:
        raise PitError(
            f"The prior has {prior.config}, but its info describes {info.config}; pass its own info."
        )
    state = prior.state_dict()
    check_finite(state, "The prior")
    _write(path, state, info, metadata)
    return replace(info, content_hash=hash_tensors(state), version=VERSION, notes=())


def convert_prior(
    src: Path_, dst: Path_, dtype: torch.dtype | None = None, *, config: Settings = None
) -> Conversion:
    """Any readable prior -> one safetensors file with its settings inside; `dtype` None keeps every bit.

    Raises PitError as `load_prior` does, for a target that is the source or not named .safetensors, and for
    weights that `dtype` cannot hold.
    """
    source, target = _locate(src), Path(dst)
    if target.suffix != ".safetensors":
        raise PitError(f"Expected a target that ends in .safetensors, got '{target.name}'.")
    if target.exists() and target.samefile(source):
        raise PitError(f"'{target.name}' is the file being converted; choose another target.")
    weights, info = _read(source, config)
    if dtype is not None:
        weights = {key: tensor.to(dtype) for key, tensor in weights.items()}
        _check_range(weights, source, dtype)
    _write(target, weights, info, None)
    info = replace(info, content_hash=hash_tensors(weights), version=VERSION)
    return Conversion(source, target, weights[MARK].dtype, len(weights), target.stat().st_size, info)


def _read(path: Path_, config: Settings) -> tuple[dict[str, Tensor], PriorInfo]:
    path = _locate(path)
    tensors, metadata = load_tensors(path)
    weights = _own_weights(tensors, metadata, path)
    shapes, qk_norm = _read_shapes(weights, path)
    info = info_from(
        _settings(path, metadata, config),
        shapes,
        qk_norm=qk_norm,
        source=f"'{path.name}'",
        content_hash=hash_tensors(weights),
        version=_version(metadata, path),
    )
    _check_weights(weights, info.config, path)
    return weights, info


def _write(
    path: Path_, weights: Mapping[str, Tensor], info: PriorInfo, metadata: Mapping[str, object] | None
) -> None:
    own = {"kind": KIND, "version": str(VERSION), "pit_config": json.dumps(info.settings())}
    save_tensors(path, weights, {**(metadata or {}), **own})


def _locate(path: Path_) -> Path:
    """The weight file that is meant: the path itself, or the one inside a folder."""
    path = Path(path)
    if not path.is_dir():
        return existing_file(path)
    if (path / "prior.ckpt").is_file():
        return path / "prior.ckpt"
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:3]) or "none"
        raise PitError(
            f"Expected prior.ckpt or one .safetensors file in '{path}', found {names}; name the file."
        )
    return found[0]


def _own_weights(tensors: dict[str, Tensor], metadata: Mapping[str, str], path: Path) -> dict[str, Tensor]:
    """The prior's tensors under their own names, whatever they are wrapped in (`state_dict.`, `module.`)."""
    prefixes = [key.removesuffix(MARK) for key in tensors if key == MARK or key.endswith("." + MARK)]
    kind = metadata.get("kind", KIND)
    if kind != KIND or not prefixes:
        what = _foreign_kind(tensors) if kind == KIND else f"a file of kind '{kind}'"
        raise PitError(f"'{path.name}' is {what}, not an IP-Prior; choose a prior.ckpt or a converted prior.")
    if len(prefixes) > 1:
        raise PitError(
            f"'{path.name}' holds several IP-Priors ({', '.join(p or 'no prefix' for p in prefixes[:4])}); "
            "save the one to use on its own."
        )
    prefix = prefixes[0]
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _foreign_kind(tensors: Mapping[str, Tensor]) -> str:
    for pattern, what in FOREIGN.items():
        if any(re.search(pattern, key) for key in tensors):
            return what
    return "an unknown kind of file"


def _read_shapes(weights: Mapping[str, Tensor], path: Path) -> tuple[dict[str, int], bool]:
    """Sizes that the weights themselves tell, and whether queries and keys are normalised."""
    layers = {key.split(".")[1] for key in weights if key.startswith("layers.")}
    if weights[MARK].ndim != 2 or not layers:
        raise PitError(
            f"'{path.name}' has {MARK} of shape {tuple(weights[MARK].shape)} and {len(layers)} layers, "
            "which no IP-Prior has; it is another kind of file."
        )
    hidden, embedding = weights[MARK].shape
    qk_norm = any(".q_norm." in key for key in weights)
    return {"embedding_dim": embedding, "hidden_dim": hidden, "n_layers": len(layers)}, qk_norm


def _settings(path: Path, metadata: Mapping[str, str], config: Settings) -> dict[str, Any]:
    own = _metadata_settings(metadata, path) if "pit_config" in metadata else _sibling_settings(path)
    if config is None:
        return own
    return own | dict(config if isinstance(config, Mapping) else read_yaml_settings(existing_file(config)))


def _metadata_alone(path: Path) -> dict[str, str]:
    """A safetensors file's metadata; of any other file none."""
    try:
        with safe_open(str(path), framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return {}


def _metadata_settings(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(metadata["pit_config"])
    except (ValueError, RecursionError) as error:
        raise PitError(f"'{path.name}' has settings that are not JSON; convert the prior again.") from error
    if not isinstance(settings, dict):
        raise PitError(f"'{path.name}' has settings that are no mapping; convert the prior again.")
    return settings


def _sibling_settings(path: Path) -> dict[str, Any]:
    for sibling in (path.with_suffix(".yaml"), path.with_name("cfg.yaml")):
        if sibling.is_file():
            return read_yaml_settings(sibling)
    return {}


def _version(metadata: Mapping[str, str], path: Path) -> int:
    text = metadata.get("version", str(VERSION)) if metadata.get("kind") == KIND else str(VERSION)
    if not text.isdecimal() or int(text) > VERSION:
        raise PitError(
            f"'{path.name}' has format version {text[:20]}, newer than this release reads; update it."
        )
    return int(text)


def _check_weights(weights: Mapping[str, Tensor], config: IPPriorConfig, path: Path) -> None:
    expected = IPPrior.from_config(config, device="meta").state_dict()
    check_shapes({key: tuple(tensor.shape) for key, tensor in expected.items()}, weights, f"'{path.name}'")
    whole = [key for key, tensor in weights.items() if not tensor.is_floating_point()]
    if whole:
        raise PitError(
            f"'{path.name}' holds {weights[whole[0]].dtype} in {whole[0]}; expected floating point."
        )
    check_finite(weights, f"'{path.name}'")


def _check_range(weights: Mapping[str, Tensor], source: Path, dtype: torch.dtype) -> None:
    if not all(bool(torch.isfinite(tensor.float()).all()) for tensor in weights.values()):
        name = str(dtype).removeprefix("torch.")
        raise PitError(f"'{source.name}' has weights too large for {name}; use bfloat16 or float32.")
