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

    The processes of a shared training take turns at the chunks. The array has a row for each picture; where
    ``rows`` are given only these are filled in. ``of`` names the weights behind ``make``: what other weights
    made is made anew.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    path, mark = folder / f"{name}.npy", folder / f"{name}.json"
    pictures = Pictures(sets, rows=rows)
    done = _rows_done(path, mark, of)
    if done < len(pictures):
        row_shape = make(to_pixels(sets[0].pixels[:1])).shape[1:]
        if state.is_main_process and not done:
            mark.unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            shape = (sum(map(len, sets)), *row_shape)
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        state.wait_for_everyone()
        values = np.lib.format.open_memmap(path, mode="r+")
        starts = range(done, len(pictures), chunk)
        hidden = not state.is_main_process
        for number, start in enumerate(tqdm(starts, desc=f"caching {name}", disable=hidden), 1):
            stop = min(start + chunk, len(pictures))
            if number % state.num_processes == state.process_index:
                pixels = pictures.fetch([(0, index) for index in range(start, stop)])["pixels"]
                values[pictures.rows[start:stop]] = make(pixels).half().numpy()
            if number % SAVE_EVERY == 0 or stop == len(pictures):
                values.flush()
                state.wait_for_everyone()
                if state.is_main_process:
                    write_text_atomic(mark, json.dumps({"rows": stop, "of": of}))
        state.wait_for_everyone()
    return np.load(path, mmap_mode="r")


def _rows_done(path: Path, mark: Path, of: str) -> int:
    if not (path.exists() and mark.exists()):
        return 0
    state = json.loads(mark.read_text("utf-8"))
    return int(state["rows"]) if state.get("of", of) == of else 0
