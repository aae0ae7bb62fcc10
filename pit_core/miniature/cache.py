"""What frozen models made of picture sets, kept on disk, because every epoch needs it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..files import write_text_atomic
from .batches import Pictures, to_pixels
from .data import PictureSet

SAVE_EVERY = 50  # chunks


@torch.no_grad()
def cached(
    folder: Path,
    name: str,
    sets: Sequence[PictureSet],
    make: Callable[[Tensor], Tensor],
    rows: np.ndarray | None = None,
    *,
    of: str = "",
    chunk: int = 100,
) -> np.ndarray:
    """``make(pixels)`` of the sets' pictures, as fp16 on disk; continues where it was interrupted.

    The array has a row for each picture; where ``rows`` are given only these are filled in. ``of`` names the
    weights behind ``make``: what other weights made is made anew.
    """
    path, mark = folder / f"{name}.npy", folder / f"{name}.json"
    pictures = Pictures(sets, rows=rows)
    done = _rows_done(path, mark, of)
    if done < len(pictures):
        folder.mkdir(parents=True, exist_ok=True)
        row_shape = make(to_pixels(sets[0].pixels[:1])).shape[1:]
        shape = (sum(map(len, sets)), *row_shape)
        values = np.lib.format.open_memmap(path, mode="r+" if done else "w+", dtype=np.float16, shape=shape)
        starts = range(done, len(pictures), chunk)
        for number, start in enumerate(tqdm(starts, desc=f"caching {name}"), 1):
            stop = min(start + chunk, len(pictures))
            pixels = pictures.fetch([(0, index) for index in range(start, stop)])["pixels"]
            values[pictures.rows[start:stop]] = make(pixels).half().numpy()
            if number % SAVE_EVERY == 0 or stop == len(pictures):
                values.flush()
                write_text_atomic(mark, json.dumps({"rows": stop, "of": of}))
    return np.load(path, mmap_mode="r")


def _rows_done(path: Path, mark: Path, of: str) -> int:
    if not (path.exists() and mark.exists()):
        return 0
    state = json.loads(mark.read_text("utf-8"))
    return int(state["rows"]) if state.get("of", of) == of else 0
