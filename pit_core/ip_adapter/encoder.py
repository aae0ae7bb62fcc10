"""CLIP's image encoder from local files: a transformers folder, or one file in ComfyUI's clip_vision layout.

What a single file holds is read from its shapes, so a renamed file does no harm. Nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PitError
from ..files import (
    check_finite,
    check_shapes,
    common_dtype,
    existing_file,
    hash_tensors,
    load_tensors,
    save_tensors,
)
from .pixels import CLIP_MEAN, CLIP_STD, Images, preprocess

Tensors = dict[str, Tensor]

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
SIXTEEN_HEADS = (1280, 1664)  # ViT-H and bigG; all other widths have heads of 64
OPENAI_WIDTHS = (768, 1024)  # ViT-B and ViT-L are OpenAI's, with their own activation function
MARK = "embeddings.class_embedding"  # the key whose prefix is that of the vision part
PARTS = re.compile(r"(embeddings|encoder|pre_layrnorm|post_layernorm)\.")


class ImageEncoder:
    """A CLIP vision model with what its pictures need.

    hidden_width, projection_dim: widths of its two outputs. image_size, mean, std: for `preprocess`.
    content_hash: SHA-256 of its weights, for caches.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        name: str = "The image encoder",
        content_hash: str = "",
    ) -> None:
        self.model = model.eval()
        self.config: Any = model.config
        self.mean, self.std = tuple(mean), tuple(std)
        self.name = name
        self.content_hash = content_hash

    @property
    def hidden_width(self) -> int:
        return int(self.config.hidden_size)

    @property
    def projection_dim(self) -> int:
        return int(self.config.projection_dim)

    @property
    def image_size(self) -> int:
        return int(self.config.image_size)

    def to(self, *args: Any, **kwargs: Any) -> ImageEncoder:
        """Move or convert the weights, as torch modules do."""
        self.model.to(*args, **kwargs)
        return self

    def preprocess(self, images: Images, fit: str = "crop") -> Tensor:
        """Pictures -> pixels (B, 3, S, S) of this encoder's size and normalisation."""
        return preprocess(images, size=self.image_size, fit=fit, mean=self.mean, std=self.std)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, S, S) -> hidden_states[-2] (B, N, hidden_width), embedding (B, projection_dim)."""
        expected = (3, self.image_size, self.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise PitError(
                f"{self.name} takes pixels (batch, {str(expected)[1:]}, but got {tuple(pixels.shape)}."
            )
        weight = next(self.model.parameters())
        out = self.model(pixel_values=pixels.to(weight), output_hidden_states=True)
        return out.hidden_states[-2], out.image_embeds


def load_image_encoder(
    path: str | PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> ImageEncoder:
    """Read an image encoder, frozen. `dtype` None keeps the file's.

    `path` is a transformers folder (config.json beside the weights, whole CLIP models too) or a single file
    with the keys `vision_model.*` and `visual_projection.weight`. Raises PitError, one sentence each, for
    what is missing, damaged, not finite or no CLIP image encoder.
    """
    path = Path(path)
    folder = path.is_dir()
    tensors, metadata = _read_folder(path) if folder else load_tensors(path)
    quoted = f"'{path.name}'"
    vision = _vision_part(tensors, quoted)
    config, mean, std = _folder_settings(path, quoted) if folder else _file_settings(vision, metadata, quoted)
    dtype = dtype or common_dtype(vision)
    model = _build(config, vision, quoted, dtype, device)
    return ImageEncoder(model, mean=mean, std=std, name=quoted, content_hash=hash_tensors(vision))


def save_image_encoder(
    path: str | PathLike[str],
    encoder: ImageEncoder | nn.Module,
    metadata: Mapping[str, object] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an encoder, ours or transformers', as one safetensors file that `load_image_encoder` reads.

    The metadata gets `pit_config`: what shapes do not tell. Raises PitError for weights that are not finite.
    """
    encoder = encoder if isinstance(encoder, ImageEncoder) else ImageEncoder(encoder)
    tensors = _vision_part(encoder.model.state_dict(), encoder.name)
    tensors = {key: t.to(dtype=dtype) if dtype else t for key, t in tensors.items()}
    check_finite(tensors, encoder.name)
    settings = {
        "num_attention_heads": encoder.config.num_attention_heads,
        "hidden_act": encoder.config.hidden_act,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
    save_tensors(path, tensors, {"format": "pt", **(metadata or {}), "pit_config": settings})


# names


def _vision_names(keys: Iterable[str], quoted: str) -> dict[str, str]:
    """Key -> `vision_model.*` or `visual_projection.weight`, for the vision part, whatever version saved it.

    Versions of transformers differ in the `vision_model.` prefix, in the spelling of `pre_layrnorm`, and in
    whether the buffer `position_ids` is saved; whole CLIP models hold a text part too.
    """
    keys = list(keys)
    prefix = next((key.removesuffix(MARK) for key in keys if key.endswith(MARK)), None)
    if prefix is None:
        raise PitError(f"{quoted} is not a CLIP image encoder in transformers' layout{_what_instead(keys)}.")
    outer = prefix.removesuffix("vision_model.")
    names = {f"{outer}visual_projection.weight": "visual_projection.weight"}
    for key in keys:
        name = key.removeprefix(prefix).replace("pre_layernorm.", "pre_layrnorm.")
        if key.startswith(prefix) and PARTS.match(name) and not name.endswith("position_ids"):
            names[key] = f"vision_model.{name}"
    return {key: name for key, name in names.items() if key in keys}


def _vision_part(tensors: Mapping[str, Tensor], quoted: str) -> Tensors:
    return {name: tensors[key] for key, name in _vision_names(tensors, quoted).items()}


def _what_instead(keys: Iterable[str]) -> str:
    if any(key.startswith("visual.") for key in keys):
        return ", but in OpenCLIP's; take the file named model.safetensors instead of open_clip"
    if any("image_proj." in key for key in keys):
        return ", but an IP-Adapter"
    if any("text_model." in key for key in keys):
        return ", but a text encoder"
    return ""


# settings


def _file_settings(
    vision: Tensors, metadata: Mapping[str, str], quoted: str
) -> tuple[dict[str, Any], Any, Any]:
    """Config, mean and std from shapes; heads and activation from our metadata, or by the known models."""
    stored = _json(metadata.get("pit_config", "{}"), quoted)
    patch_weight = _sized(vision, "vision_model.embeddings.patch_embedding.weight", 4, quoted)
    positions = _sized(vision, "vision_model.embeddings.position_embedding.weight", 2, quoted)[0]
    width, _, patch, _ = patch_weight
    layers = [int(m[1]) for k in vision if (m := re.match(r"vision_model\.encoder\.layers\.(\d+)\.", k))]
    config = {
        "hidden_size": width,
        "intermediate_size": _sized(vision, "vision_model.encoder.layers.0.mlp.fc1.weight", 2, quoted)[0],
        "projection_dim": _sized(vision, "visual_projection.weight", 2, quoted)[0],
        "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": 16 if width in SIXTEEN_HEADS else max(1, width // 64),
        "hidden_act": "quick_gelu" if width in OPENAI_WIDTHS else "gelu",
        "patch_size": patch,
        "image_size": math.isqrt(positions - 1) * patch,
    }
    config.update({key: stored[key] for key in ("num_attention_heads", "hidden_act") if key in stored})
    return config, *_normalisation(stored, quoted)


def _folder_settings(folder: Path, quoted: str) -> tuple[dict[str, Any], Any, Any]:
    config = _json_file(existing_file(folder / "config.json"), quoted)
    if "vision_config" in config:  # a whole CLIP model
        if not isinstance(config["vision_config"], dict):
            raise PitError(f"{quoted} has damaged settings: vision_config is not a JSON object.")
        config = {**config["vision_config"], "projection_dim": config.get("projection_dim", 512)}
    known = ("clip_vision_model", "clip", "chinese_clip_vision_model")
    if config.get("model_type", "clip_vision_model") not in known:
        raise PitError(f"{quoted} holds a model of type {config['model_type']}, not a CLIP image encoder.")
    processor: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        processor = _json_file(folder / "preprocessor_config.json", quoted)
    return config, *_normalisation(processor, quoted)


def _normalisation(settings: Mapping[str, Any], quoted: str) -> tuple[Any, Any]:
    """Mean and deviation per colour, CLIP's where the settings name none."""
    mean, std = settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
    for values in (mean, std):
        numbers = isinstance(values, list | tuple) and all(type(v) in (int, float) for v in values)
        if (
            not numbers
            or len(values) != 3
            or not all(map(math.isfinite, values))
            or (values is std and 0 in std)
        ):
            raise PitError(
                f"{quoted} has damaged settings: image_mean and image_std should be three numbers each, "
                f"and no deviation 0, got {str(values)[:60]}."
            )
    return mean, std


def _json_file(path: Path, quoted: str) -> dict[str, Any]:
    try:
        return _json(path.read_text(encoding="utf-8"), quoted)
    except (OSError, UnicodeDecodeError) as error:
        raise PitError(f"{quoted} has damaged settings: '{path.name}' cannot be read.") from error


def _json(text: str, quoted: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PitError(f"{quoted} has damaged settings: they are not JSON.") from error
    if not isinstance(value, dict):
        raise PitError(f"{quoted} has damaged settings: they are not a JSON object.")
    return value


def _sized(tensors: Tensors, key: str, dimensions: int, quoted: str) -> tuple[int, ...]:
    tensor = tensors.get(key)
    if tensor is None or tensor.ndim != dimensions or 0 in tensor.shape:
        found = "is missing" if tensor is None else f"has the shape {tuple(tensor.shape)}"
        raise PitError(f"{quoted} is no complete CLIP image encoder: '{key}' {found}.")
    return tuple(tensor.shape)


# weights


def _read_folder(folder: Path) -> tuple[Tensors, dict[str, str]]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _json_file(index, f"'{index.name}'").get("weight_map")
        shards: set[Any] = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
        if not all(isinstance(shard, str) for shard in shards):
            raise PitError(f"'{index.name}' has damaged settings: weight_map should name a file per tensor.")
        tensors: Tensors = {}
        for shard in sorted(shards):
            tensors.update(
                load_tensors(folder / Path(shard).name)[0]
            )  # the name alone: it stays in the folder
        return tensors, {}
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return load_tensors(folder / name)
    raise PitError(f"The folder '{folder}' holds no image encoder: neither {' nor '.join(WEIGHT_FILES[:2])}.")


def _build(
    config: dict[str, Any],
    vision: Tensors,
    quoted: str,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    try:
        with torch.device("meta"):  # nothing to initialise, the file's tensors become the parameters
            model: nn.Module = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    except Exception as error:  # transformers raises what it likes for settings that make no sense
        raise PitError(
            f"{quoted} has settings that make no CLIP image encoder: {str(error)[:150]}."
        ) from error
    own = {name: key for key, name in _vision_names(model.state_dict(), quoted).items()}
    shapes = {key: t.shape for key, t in model.state_dict().items()}
    check_shapes({name: shapes[key] for name, key in own.items()}, vision, quoted)
    check_finite(vision, quoted)
    weights = {own[name]: tensor.to(device, dtype) for name, tensor in vision.items()}
    model.load_state_dict(weights, strict=False, assign=True)  # complete by the check above, but for buffers
    _count_positions(model, device)
    return model.eval().requires_grad_(False)


def _count_positions(model: nn.Module, device: torch.device | str | None) -> None:
    """`position_ids`, the only buffer, counts from 0; files do not store it."""
    for name, buffer in list(model.named_buffers()):
        owner = model.get_submodule(name.rpartition(".")[0])
        owner.register_buffer(
            "position_ids", torch.arange(buffer.shape[-1], device=device)[None], persistent=False
        )
