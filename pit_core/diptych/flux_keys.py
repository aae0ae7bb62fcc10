"""Weights of a Flux model: diffusers' names and layout <-> those of the published files, which ComfyUI reads.

The published files keep query, key and value (in single blocks the MLP's input, too) in one matrix, and the
last layer's modulation as (shift, scale), where diffusers has (scale, shift).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import PitError

EMBEDDERS = {
    "time_in": "timestep_embedder",
    "guidance_in": "guidance_embedder",  # not in schnell
    "vector_in": "text_embedder",
}
ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "linear2": ("proj_out",),
}
LAST = "final_layer.adaLN_modulation.1."


def to_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of diffusers' FluxTransformer2DModel under the published names.

    Raises PitError where they are not all of a Flux model's, or more than those.
    """
    table = _table(weights, ("transformer_blocks", "single_transformer_blocks"), "time_text_embed.guidance")
    _check({part for parts in table.values() for part in parts}, weights)
    whole = {key: _joined([weights[part] for part in parts]) for key, parts in table.items()}
    return {key: _swapped(t) if key.startswith(LAST) else t for key, t in whole.items()}


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way: published weights under the names of diffusers' FluxTransformer2DModel.

    Raises PitError as `to_published` does.
    """
    table = _table(weights, ("double_blocks", "single_blocks"), "guidance_in")
    _check(table, weights)
    width = weights["img_in.weight"].shape[0]
    found: dict[str, Tensor] = {}
    for key, parts in table.items():
        whole = _swapped(weights[key]) if key.startswith(LAST) else weights[key]
        sizes = [width] * (len(parts) - 1)
        pieces = whole.split([*sizes, len(whole) - sum(sizes)]) if sizes else [whole]
        found |= dict(zip(parts, pieces, strict=True))
    return found


def _table(
    weights: Mapping[str, Tensor], lists: tuple[str, str], guidance: str
) -> dict[str, tuple[str, ...]]:
    """Published key -> diffusers' keys that make it up, in order, for a model with as many blocks."""
    names: dict[str, tuple[str, ...]] = {name: (theirs,) for name, theirs in ENDS.items()}
    for name, theirs in EMBEDDERS.items():
        if name == "guidance_in" and not any(key.startswith(guidance) for key in weights):
            continue
        for ours, number in (("in_layer", 1), ("out_layer", 2)):
            names[f"{name}.{ours}"] = (f"time_text_embed.{theirs}.linear_{number}",)
    kinds = (
        ("double_blocks", "transformer_blocks", DOUBLE),
        ("single_blocks", "single_transformer_blocks", SINGLE),
    )
    for (ours, theirs, block), counted in zip(kinds, lists, strict=True):
        for i in range(_count(weights, counted)):
            for name, parts in block.items():
                names[f"{ours}.{i}.{name}"] = tuple(f"{theirs}.{i}.{part}" for part in parts)
    return {
        f"{name}.{end}": tuple(f"{part}.{'weight' if end == 'scale' else end}" for part in parts)
        for name, parts in names.items()
        for end in (("scale",) if name.endswith("_norm") else ("weight", "bias"))
    }


def _count(weights: Mapping[str, Tensor], blocks: str) -> int:
    found = (re.match(rf"{blocks}\.(\d+)\.", key) for key in weights)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _check(expected: Collection[str], weights: Mapping[str, Tensor]) -> None:
    missing, unknown = [k for k in expected if k not in weights], [k for k in weights if k not in expected]
    if missing or unknown:
        raise PitError(
            f"These are not the weights of a Flux model: {len(missing)} are missing "
            f"({', '.join(sorted(missing)[:2]) or 'none'}), {len(unknown)} unknown "
            f"({', '.join(sorted(unknown)[:2]) or 'none'})."
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _swapped(modulation: Tensor) -> Tensor:
    """(scale, shift) <-> (shift, scale)."""
    first, second = modulation.chunk(2)
    return torch.cat([second, first])
