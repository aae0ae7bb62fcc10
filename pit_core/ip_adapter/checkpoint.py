"""Reading and writing IP-Adapters in the released layouts.

Read: `.bin` (nested `{image_proj, ip_adapter}`), `.safetensors` (flat, with those prefixes), and training
checkpoints that say `image_proj_model.` and `adapter_modules.`. What a file is, is told by its shapes, never
by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PitError
from ..files import check_finite, check_shapes, common_dtype, hash_tensors, load_tensors, save_tensors
from .adapter import IPAdapter, IPLayers
from .layers import AttentionLayer, describe_plan
from .resampler import ImageProjection, Resampler

Tensors = dict[str, Tensor]

DIM_HEAD = 64  # in every released Resampler; our own files carry theirs in the metadata
FACE_WIDTH = 512  # of the face embeddings that FaceID and InstantID read instead of CLIP

ENCODERS = {
    "CLIP ViT-H/14": (1280, 1024),
    "CLIP ViT-bigG/14": (1664, 1280),
    "CLIP ViT-L/14": (1024, 768),
}
"""Image encoder -> (hidden width, projection width). bigG's projection is as wide as ViT-H's hidden states"""

FOREIGN = {
    r"(double|single)_(blocks|stream)|ip_adapter_proj_model": "made for a diffusion transformer such as Flux",
    r"(^|[._])lora([._]|$)|\.hada_": "a LoRA",
    r"^model\.diffusion_model\.": "a full Stable Diffusion checkpoint",
    r"(^|\.)vision_model\.": "an image encoder",
    r"(^|\.)text_model\.": "a text encoder",
    r"(^|\.)(down_blocks|input_blocks)\..*attn2|^unet\.": "a UNet",
    r"(^|\.)decoder\.": "a VAE",
    r"(^|\.)x_embedder\.weight": "an IP-Prior or a diffusion transformer",
    r"^(tensor|direction)$": "a single tensor, such as a direction",
}
"""A pattern found in the keys -> what the file is instead of an IP-Adapter."""


def load_ip_adapter(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    operations: Any = nn,
) -> IPAdapter:
    """Read an adapter, frozen and in eval mode. `dtype` None keeps the file's; layers come from `operations`.

    Raises PitError, one sentence each, for a file that is missing or damaged, that is not an IP-Adapter (it
    says what it is instead), a FaceID or InstantID one, or one with tensors missing, misshapen or not finite.
    """
    path = Path(path)
    tensors, metadata = load_tensors(path)
    return adapter_from_tensors(
        tensors, metadata, name=path.name, dtype=dtype, device=device, operations=operations
    )


def adapter_from_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    name: str = "This file",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    operations: Any = nn,
) -> IPAdapter:
    """The adapter in a file's flattened content, called `name` in messages. Raises as load_ip_adapter."""
    quoted = f"'{name}'"
    plain = _released_names(tensors, quoted)
    config = _read_config(plain, metadata or {}, quoted)
    _check_tensors(plain, config, quoted)
    content_hash = hash_tensors(plain)
    dtype = dtype or common_dtype(plain)
    if operations is nn:  # nothing to initialise first, the file's tensors become the parameters
        adapter = _build(config, nn, None, "meta")
        adapter.load_state_dict({k: t.to(device, dtype) for k, t in plain.items()}, assign=True)
    else:
        adapter = _build(config, operations, dtype, device)
        adapter.load_state_dict(plain)
    adapter.name, adapter.content_hash = quoted, content_hash
    return adapter.eval().requires_grad_(False)


def save_ip_adapter(
    path: str | PathLike[str],
    adapter: IPAdapter,
    metadata: Mapping[str, object] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the adapter as safetensors with the released keys, atomically.

    The metadata gets `pit_config`, which holds what shapes do not tell. Raises PitError for another suffix,
    for weights that are not finite (nothing is written), and for a place that cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise PitError(f"IP-Adapters are saved as safetensors; name the file {Path(path).stem}.safetensors.")
    tensors = {key: t.to(dtype=dtype) if dtype else t for key, t in adapter.state_dict().items()}
    check_finite(tensors, f"The adapter for '{Path(path).name}'")
    config = {"kind": adapter.kind, **adapter.projector.config}
    save_tensors(path, tensors, {"format": "pt", **(metadata or {}), "pit_config": config})


# checks against the models around it


def check_encoder(adapter: IPAdapter, hidden_width: int, projection_dim: int | None) -> None:
    """Raise PitError unless the image encoder is the adapter's; the sentence names the right one.

    Plus reads the hidden states, base the projected embedding, so each is compared with its own width: bigG's
    projection and ViT-H's hidden states are both 1280 wide.
    """
    read = hidden_width if adapter.kind == "plus" else projection_dim
    if read == adapter.encoder_width:
        return
    what = "hidden states" if adapter.kind == "plus" else "image embeddings"
    loaded = f"{_encoder_name(hidden_width, projection_dim)} ({what} of width {read})"
    raise PitError(
        f"{adapter.name} reads {what} of width {adapter.encoder_width}, which {matching_encoder(adapter)} "
        f"makes, but the loaded image encoder is {loaded}; load the matching one."
    )


def matching_encoder(adapter: IPAdapter) -> str:
    """The image encoder that belongs to the adapter, such as "CLIP ViT-H/14", or its width in words."""
    part = 0 if adapter.kind == "plus" else 1
    names = [name for name, widths in ENCODERS.items() if widths[part] == adapter.encoder_width]
    return names[0] if names else f"an encoder of width {adapter.encoder_width}"


def check_family(adapter: IPAdapter, layers: Sequence[AttentionLayer]) -> None:
    """Raise PitError unless the adapter fits a UNet with these layers; the sentence names both families."""
    adapter.layers.check_fits(layers, adapter.name)


def describe_adapter(adapter: IPAdapter) -> str:
    """One line: kind, tokens, family, encoder."""
    kind = "IP-Adapter Plus" if adapter.kind == "plus" else "IP-Adapter"
    plan = describe_plan(len(adapter.layers), adapter.cross_attention_dim)
    return f"{kind}, {adapter.num_tokens} tokens, for {plan}, reads {matching_encoder(adapter)}"


def _encoder_name(hidden_width: int, projection_dim: int | None) -> str:
    names = [name for name, widths in ENCODERS.items() if widths == (hidden_width, projection_dim)]
    return names[0] if names else "another one"


# what a file holds


def _released_names(tensors: Mapping[str, Tensor], quoted: str) -> Tensors:
    """The adapter's tensors as `image_proj.*` and `ip_adapter.*`; PitError when there is no adapter in it."""
    wrapper = _wrapper_of(tensors)
    if wrapper is None:
        raise PitError(f"{quoted} is {_foreign_kind(tensors)}, not an IP-Adapter for SD1.5 or SDXL.")
    plain = {}
    for key, tensor in tensors.items():
        key = key.removeprefix(wrapper)
        key = re.sub(r"^(image_proj)_model\.|^adapter_modules\.", lambda m: f"{m[1] or 'ip_adapter'}.", key)
        if not key.startswith("unet."):  # training checkpoints carry the frozen UNet along
            plain[key] = tensor
    _refuse_face_adapters(plain, quoted)
    if not any(key.startswith("ip_adapter.") for key in plain):
        raise PitError(
            f"{quoted} holds an image projection but no attention layers; it is part of an IP-Adapter."
        )
    return plain


def _wrapper_of(keys: Mapping[str, Any]) -> str | None:
    """What stands before every key of a wrapped checkpoint, such as "state_dict." or "module."; often ""."""
    for key in keys:
        if match := re.match(r"((?:\w+\.)*?)image_proj(?:_model)?\.", key):
            return match[1]
    return None


def _foreign_kind(keys: Mapping[str, Any]) -> str:
    for pattern, kind in FOREIGN.items():
        if any(re.search(pattern, key) for key in keys):
            return kind
    return "something else (its keys begin with " + ", ".join(key[:60] for key in list(keys)[:3]) + ")"


def _refuse_face_adapters(tensors: Tensors, quoted: str) -> None:
    first = tensors.get("image_proj.proj_in.weight", tensors.get("image_proj.proj.0.weight"))
    face = first is not None and first.shape[-1] == FACE_WIDTH
    lora = any(re.search(r"_lora\.|perceiver_resampler", key) for key in tensors)
    if face or lora:
        raise PitError(
            f"{quoted} is a FaceID or InstantID adapter: it reads face embeddings, not CLIP images; "
            "use an IP-Adapter or IP-Adapter Plus file."
        )
    if "image_proj.proj.0.weight" in tensors:
        raise PitError(
            f"{quoted} is a full-face adapter, whose projection is another; use a Plus or base file."
        )


def _read_config(tensors: Tensors, metadata: Mapping[str, str], quoted: str) -> dict[str, Any]:
    """{kind, projector: arguments, widths, context}, from shapes and, for the heads, our own metadata."""
    layers = [k for k in tensors if re.fullmatch(r"ip_adapter\.\d+\.to_k_ip\.weight", k)]
    layers.sort(key=lambda k: int(k.split(".")[1]))
    widths = [_sizes(tensors, key, 2, quoted)[0] for key in layers]
    if "image_proj.latents" in tensors:
        return {"kind": "plus", "projector": _plus_config(tensors, metadata, quoted), "widths": widths}
    if "image_proj.norm.weight" not in tensors:
        raise PitError(f"{quoted} has an image projection of a kind that is neither Plus nor base.")
    (context,) = _sizes(tensors, "image_proj.norm.weight", 1, quoted)
    out, width = _sizes(tensors, "image_proj.proj.weight", 2, quoted)
    projector = {"embedding_dim": width, "output_dim": context, "num_tokens": out // context}
    return {"kind": "base", "projector": projector, "widths": widths}


def _plus_config(tensors: Tensors, metadata: Mapping[str, str], quoted: str) -> dict[str, int]:
    _, queries, dim = _sizes(tensors, "image_proj.latents", 3, quoted)
    inner = _sizes(tensors, "image_proj.layers.0.0.to_q.weight", 2, quoted)[0]
    depths = [int(m[1]) for k in tensors if (m := re.match(r"image_proj\.layers\.(\d+)\.", k))]
    dim_head = _dim_head(metadata, quoted)
    if inner % dim_head:
        raise PitError(
            f"{quoted} has attention of width {inner}, which is not a multiple of {dim_head} per head, "
            "so its head count is unknown; its metadata would have to name dim_head."
        )
    return {
        "dim": dim,
        "depth": 1 + max(depths),
        "dim_head": dim_head,
        "heads": inner // dim_head,
        "num_queries": queries,
        "embedding_dim": _sizes(tensors, "image_proj.proj_in.weight", 2, quoted)[1],
        "output_dim": _sizes(tensors, "image_proj.proj_out.weight", 2, quoted)[0],
        "ff_mult": max(1, _sizes(tensors, "image_proj.layers.0.1.1.weight", 2, quoted)[0] // dim),
    }


def _dim_head(metadata: Mapping[str, str], quoted: str) -> int:
    if "pit_config" not in metadata:
        return DIM_HEAD
    try:
        value = json.loads(metadata["pit_config"])["dim_head"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PitError(f"{quoted} has damaged metadata: pit_config is not JSON with a dim_head.") from error
    if type(value) is not int or value < 1:
        raise PitError(
            f"{quoted} has damaged metadata: dim_head is {str(value)[:40]}, not a positive number."
        )
    return value


def _sizes(tensors: Tensors, key: str, dimensions: int, quoted: str) -> tuple[int, ...]:
    tensor = tensors.get(key)
    if tensor is None:
        raise PitError(f"{quoted} lacks '{key}', so it is no complete IP-Adapter; fetch it again.")
    if tensor.ndim != dimensions or 0 in tensor.shape:
        raise PitError(f"{quoted} has '{key}' of shape {tuple(tensor.shape)}, which no IP-Adapter has.")
    return tuple(tensor.shape)


def _check_tensors(tensors: Tensors, config: dict[str, Any], quoted: str) -> None:
    expected = {key: t.shape for key, t in _build(config, nn, None, "meta").state_dict().items()}
    check_shapes(expected, tensors, quoted)
    odd = [key for key, t in tensors.items() if not t.is_floating_point() or t.layout != torch.strided]
    if odd:
        raise PitError(f"{quoted} stores '{odd[0]}' as {tensors[odd[0]].dtype}, but weights are floats.")
    check_finite(tensors, quoted)


def _build(config: dict[str, Any], operations: Any, dtype: torch.dtype | None, device: Any) -> IPAdapter:
    options: dict[str, Any] = {"operations": operations, "dtype": dtype, "device": device}
    kind: Any = Resampler if config["kind"] == "plus" else ImageProjection
    projector = kind(**config["projector"], **options)
    return IPAdapter(projector, IPLayers(config["widths"], projector.output_dim, **options))
