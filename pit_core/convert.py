"""`pit convert`: released checkpoints as safetensors files that carry their settings."""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import PitError
from .files import load_tensors
from .ip_adapter.checkpoint import adapter_from_tensors, describe_adapter, save_ip_adapter
from .ip_prior.checkpoint import convert_prior


def convert_file(source: Path, target: Path, dtype: str | None = None, config: Path | None = None) -> str:
    """Convert an IP-Prior or an IP-Adapter, told by its content; returns a sentence on what was written.

    `dtype` None keeps every bit. Raises PitError for any other file, and as the two formats' readers do.
    """
    wanted: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    if target.suffix != ".safetensors":
        raise PitError(f"Expected a target that ends in .safetensors, got '{target.name}'.")
    if target.exists() and source.exists() and target.samefile(source):
        raise PitError(f"'{target.name}' is the file being converted; choose another target.")
    if source.is_dir():
        return str(convert_prior(source, target, wanted, config=config))
    tensors, metadata = load_tensors(source)
    if not any("image_proj" in key for key in tensors):
        return str(convert_prior(source, target, wanted, config=config))
    adapter = adapter_from_tensors(tensors, metadata, name=source.name, dtype=wanted)
    save_ip_adapter(target, adapter)
    return f"{source.name} -> {target} ({describe_adapter(adapter)})"
