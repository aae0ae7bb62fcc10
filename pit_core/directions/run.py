"""`pit direction edit`: tokens or pictures in; edited pictures, a labelled grid and the tokens out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import PitError
from ..ip_adapter.adapter import IPAdapter
from ..ip_adapter.encode import ImageEncoder, null_tokens, tokens_from_features
from ..ip_adapter.tokens import IPTokens, check_tokens_fit, load_ip_tokens, save_ip_tokens
from ..pictures import read_picture, save_png
from ..render import Renderer, RenderSettings
from ..runs import RunFolder
from .edit import Source, picture_features, swept
from .grid import sweep_grid
from .moves import Moves
from .text import parse_mask, step_labels

Progress = Callable[[str, int, int], None]
CHUNK = 8  # pictures that are encoded at a time


@dataclass
class Models:
    """What turns pictures into tokens and tokens into pictures. settings: that suit the renderer."""

    encoder: ImageEncoder
    adapter: IPAdapter
    renderer: Renderer
    settings: RenderSettings


@dataclass(frozen=True)
class Sweep:
    """What to make: every row at every factor of the moves' steps. mask: as people write it."""

    moves: Moves
    factors: Sequence[float] = (0.0, 1.0)
    mask: str = ""
    seed: int = 0

    def labels(self) -> list[str]:
        """Below the pictures of a row: the step, or of several directions the factor."""
        steps = [step for _, step in self.moves.moves]
        one = steps[0] if len(steps) == 1 else 1.0
        return step_labels([factor * one for factor in self.factors])

    def title(self) -> str:
        return ", ".join(direction.title for direction, _ in self.moves.moves)


@dataclass(frozen=True)
class Output:
    """The files that a run wrote."""

    grid: Path
    pictures: tuple[Path, ...]
    tokens: Path


def encode_pictures(
    models: Models, pictures: Sequence[Image.Image], progress: Progress | None = None
) -> tuple[IPTokens, Source]:
    """Whole pictures, padded with white to squares, as tokens, and what these were made of."""
    encoder, adapter = models.encoder, models.adapter
    features = features_of(encoder, adapter, pictures, progress)
    tokens = IPTokens(
        tokens_from_features(adapter, features),
        adapter.num_tokens,
        null=null_tokens(encoder, adapter),
        white=null_tokens(encoder, adapter, "white"),
        adapter=adapter.content_hash,
    )
    return tokens, Source(features, lambda rows: tokens_from_features(adapter, rows))


def features_of(
    encoder: ImageEncoder,
    adapter: IPAdapter,
    pictures: Sequence[Image.Image | Path],
    progress: Progress | None = None,
) -> Tensor:
    """Pictures or their files -> what the adapter reads of them, (B, N, W) or (B, W), float32 on the CPU.

    Files are opened a few at a time. Raises PitError as read_picture does.
    """
    done = []
    for start in range(0, len(pictures), CHUNK):
        part = [
            read_picture(each) if isinstance(each, Path) else each for each in pictures[start : start + CHUNK]
        ]
        pixels = encoder.preprocess(part, "pad")
        done.append(picture_features(encoder, adapter, pixels, CHUNK))
        if progress is not None:
            progress("encoding", min(start + CHUNK, len(pictures)), len(pictures))
    return torch.cat(done)


def read_tokens(models: Models, path: Path) -> IPTokens:
    """A token file that the models can draw, with a null. Raises PitError for another one."""
    tokens = load_ip_tokens(path)
    check_tokens_fit(tokens, models.adapter, f"tokens in '{path.name}'")
    if tokens.null is not None:
        return tokens
    return replace(tokens, null=null_tokens(models.encoder, models.adapter))


def run(
    models: Models,
    tokens: IPTokens,
    sweep: Sweep,
    folder: RunFolder,
    *,
    source: Source | None = None,
    progress: Progress | None = None,
) -> Output:
    """Edit, draw and write; a run that fails leaves nothing behind.

    All steps of a row are drawn from the same noise, so that what differs is the step. Raises PitError for
    directions that do not fit, and as the renderer and the writing do.
    """
    made = edited(tokens, sweep, source)
    count, columns = len(made.tokens), len(sweep.factors)
    pictures = models.renderer.render(
        made.tokens,
        made.null,
        models.settings,
        seeds=[sweep.seed + number // columns for number in range(count)],
        progress=None if progress is None else lambda done, total: progress("drawing", done, total),
    )
    grid = sweep_grid(pictures, sweep.labels(), sweep.title())
    with folder.writing():
        return _write(folder, pictures, grid, made, sweep)


def edited(tokens: IPTokens, sweep: Sweep, source: Source | None = None) -> IPTokens:
    """The tokens of every picture of the sweep, in the grid's order. Raises PitError as `edit` does."""
    if not sweep.moves.moves:
        raise PitError("Expected a direction to move along, got none; name one with --direction FILE:0.8.")
    return swept(
        tokens,
        sweep.moves.moves,
        sweep.factors,
        mask=parse_mask(sweep.mask, tokens.unit),
        orthogonal=sweep.moves.orthogonal,
        source=source,
    )


def _write(
    folder: RunFolder,
    pictures: Sequence[Image.Image],
    grid: Image.Image,
    tokens: IPTokens,
    sweep: Sweep,
) -> Output:
    labels = sweep.labels()
    paths = []
    for number, picture in enumerate(pictures):
        row, column = divmod(number, len(labels))
        path = folder.add(f"edit-{row + 1:02d}-{column + 1:02d}.png")
        save_png(picture, path, {"pit direction": sweep.title(), "pit step": labels[column]})
        paths.append(path)
    tokens_path, grid_path = folder.add("tokens.safetensors"), folder.add("sweep.png")
    save_ip_tokens(tokens_path, tokens, {"directions": sweep.title(), "steps": labels})
    save_png(grid, grid_path)
    return Output(grid_path, tuple(paths), tokens_path)
