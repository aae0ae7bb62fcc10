"""Direction files: our own safetensors with what is known of them, and bare tensors as they were released.

Our own hold one tensor, `direction`, and say in their metadata: kind "direction", version, space, names of
the piles, hashes of adapter and encoder, and the evidence as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import PitError
from ..files import load_tensors, save_tensors
from .direction import Direction, Evidence

KIND = "direction"
VERSION = 1
MOST_TOKENS = 32  # in a bare tensor: adapters make 4 or 16 tokens, image encoders give 50 states or more

Tensors = Mapping[str, Tensor]


def save_direction(
    path: str | PathLike[str], direction: Direction, metadata: Mapping[str, object] | None = None
) -> None:
    """Write a direction file, completely or not at all.

    Raises PitError for another suffix than .safetensors, and for a place that cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise PitError(f"Directions are saved as safetensors; name the file {Path(path).stem}.safetensors.")
    own = {
        "kind": KIND,
        "version": str(VERSION),
        "space": direction.space,
        "names": list(direction.names),
        "adapter": direction.adapter,
        "encoder": direction.encoder,
        "norm": direction.norm,
        **({} if direction.evidence is None else {"evidence": _to_json(direction.evidence)}),
    }
    save_tensors(path, {"direction": direction.vector}, {**(metadata or {}), **own})


def load_direction(path: str | PathLike[str], *, space: str | None = None) -> Direction:
    """Read a direction: our own file, or a file with a single tensor, such as the released .pt files.

    A bare tensor of two dimensions is taken for IP tokens with up to 32 rows, for CLIP features beyond, and
    one of a single dimension for CLIP features, unless `space` says what it is. Raises PitError for a file
    that is missing, damaged, or of another kind; a pickle's code is never run.
    """
    path = Path(path)
    tensors, metadata = load_tensors(path)
    quoted = f"'{path.name}'"
    try:
        if "kind" in metadata:
            return _own(tensors, metadata, quoted, path.stem)
        return _bare(tensors, quoted, path.stem, space)
    except PitError as error:
        if str(error).startswith(quoted):
            raise
        raise PitError(f"{quoted} is no usable direction. {error}") from error


def _own(tensors: Tensors, metadata: Mapping[str, str], quoted: str, stem: str) -> Direction:
    if metadata["kind"] != KIND:
        raise PitError(f"{quoted} is a file of kind '{metadata['kind'][:40]}', not a direction.")
    version = metadata.get("version", "1")
    if not version.isdecimal() or int(version) > VERSION:
        raise PitError(
            f"{quoted} has format version {version[:20]}, newer than this release reads; update it."
        )
    if set(tensors) != {"direction"} or not tensors["direction"].is_floating_point():
        raise PitError(f"{quoted} is damaged: a direction file holds one tensor of floats, 'direction'.")
    try:
        first, second = map(str, json.loads(metadata.get("names", '["", ""]')))
        evidence = _from_json(json.loads(metadata["evidence"])) if "evidence" in metadata else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise PitError(f"{quoted} is damaged: its names or its evidence cannot be read.") from error
    hashes = {name: metadata.get(name, "")[:64] for name in ("adapter", "encoder")}
    space = metadata.get("space", "tokens")[:20]
    return Direction(tensors["direction"], space, (first, second), evidence, **hashes, file=stem)


def _bare(tensors: Tensors, quoted: str, stem: str, space: str | None) -> Direction:
    if len(tensors) != 1:
        raise PitError(f"{quoted} holds {len(tensors)} tensors, but a direction is a single one.")
    (tensor,) = tensors.values()
    while tensor.ndim > 2 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim == 2 and len(tensor) == 1:  # (1, W): an embedding with its batch
        tensor = tensor[0]
    if not tensor.is_floating_point() or not 1 <= tensor.ndim <= 2:
        raise PitError(
            f"{quoted} holds {tensor.dtype} of shape {tuple(tensor.shape)}, but a direction is floats of the "
            "shape (tokens, width), (positions, width) or (width,)."
        )
    if space is None:
        space = "tokens" if tensor.ndim == 2 and len(tensor) <= MOST_TOKENS else "clip"
    return Direction(tensor, space, file=stem)


def _to_json(evidence: Evidence) -> dict[str, Any]:
    """JSON knows no infinity: the mean has no ridge."""
    ridge = None if math.isinf(evidence.ridge) else evidence.ridge
    return {**evidence.__dict__, "counts": list(evidence.counts), "ridge": ridge}


def _from_json(found: Mapping[str, Any]) -> Evidence:
    shares = {name: found.get(name) for name in ("accuracy", "confirmed", "spread")}
    first, second = (int(count) for count in found["counts"])
    return Evidence(
        counts=(first, second),
        method=str(found["method"])[:20],
        ridge=math.inf if found["ridge"] is None else float(found["ridge"]),
        gap=float(found["gap"]),
        length=float(found["length"]),
        **{name: None if value is None else float(value) for name, value in shares.items()},
    )
