"""Piles of pictures or tokens on disk, and the direction between two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import PitError
from ..files import existing_file
from ..ip_adapter.adapter import IPAdapter
from ..ip_adapter.encode import ImageEncoder, tokens_from_features
from ..ip_adapter.tokens import IPTokens, load_ip_tokens
from ..pictures import picture_files
from ..runs import matched_paths
from .direction import Direction
from .find import find_direction
from .run import Progress, features_of


@dataclass(frozen=True, eq=False)
class Pile:
    """Files of pictures, and tokens, of one kind. name: of its folder or file, where nobody named it."""

    pictures: tuple[Path, ...]
    tokens: tuple[IPTokens, ...]
    name: str = ""


@dataclass(frozen=True, eq=False)
class Encoders:
    """What turns pictures into features and tokens."""

    encoder: ImageEncoder
    adapter: IPAdapter


def pile_of(paths: Sequence[Path], name: str = "") -> Pile:
    """Everything that the paths name: pictures, patterns, folders of pictures, token files.

    Raises PitError for what is missing, for token files that are none, and for a folder without pictures.
    """
    files: list[Path] = []
    for path in matched_paths(paths):
        found = picture_files(path) if path.is_dir() else [existing_file(path)]
        if not found:
            raise PitError(f"'{path}' holds no pictures; a pile of them was expected.")
        files += found
    saved = [path for path in files if path.suffix == ".safetensors"]
    pictures = tuple(path for path in files if path not in saved)
    return Pile(pictures, tuple(load_ip_tokens(path) for path in saved), name or _own_name(paths, files))


def _own_name(paths: Sequence[Path], files: Sequence[Path]) -> str:
    """Of the only folder or file that was named, or of the folder where all of them lie."""
    if len(paths) > 1 or not paths[0].exists():
        name = files[0].absolute().parent.name
    else:
        name = paths[0].name if paths[0].is_dir() else paths[0].stem
    return name.replace("_", " ")


def find_between(
    first: Pile,
    second: Pile,
    encoders: Encoders | None = None,
    *,
    space: str = "tokens",
    method: str = "auto",
    progress: Progress | None = None,
) -> Direction:
    """The direction from the first pile to the second. Tokens alone need no encoders.

    Raises PitError as find_direction does, for pictures that cannot be read, for tokens of several adapters,
    and for tokens where CLIP features are wanted.
    """
    if space == "clip" and (first.tokens or second.tokens):
        raise PitError("CLIP features are read off pictures, and token files hold none; give pictures.")
    known = {each.adapter for each in (*first.tokens, *second.tokens) if each.adapter}
    if encoders is not None:
        known |= {encoders.adapter.content_hash} - {""}
    if len(known) > 1:
        raise PitError(
            f"The piles were made with different adapters ({', '.join(sorted(h[:8] for h in known))}); "
            "encode both with the same one."
        )
    rows = [_rows(pile, encoders, space, progress) for pile in (first, second)]
    return find_direction(
        *rows,
        space=space,
        method=method,
        names=(first.name, second.name),
        adapter=next(iter(known), ""),
        encoder="" if encoders is None else encoders.encoder.content_hash,
    )


def rows_of(tokens: IPTokens) -> Tensor:
    """Every picture's tokens on their own, (pictures, unit, D), also of pictures side by side."""
    return tokens.tokens.reshape(-1, tokens.unit, tokens.width)


def _rows(pile: Pile, encoders: Encoders | None, space: str, progress: Progress | None) -> Tensor:
    rows = [rows_of(each) for each in pile.tokens]
    if pile.pictures:
        if encoders is None:
            raise PitError("Pictures need an image encoder and an IP-Adapter to become tokens.")
        features = features_of(encoders.encoder, encoders.adapter, pile.pictures, progress)
        rows.append(features if space == "clip" else _projected(encoders.adapter, features))
    if len({row.shape[1:] for row in rows}) > 1:
        raise PitError(f"The pile '{pile.name}' mixes tokens of different adapters; encode all with one.")
    return torch.cat(rows)


def _projected(adapter: IPAdapter, features: Tensor) -> Tensor:
    return torch.cat([tokens_from_features(adapter, rows).cpu() for rows in features.split(64)])
