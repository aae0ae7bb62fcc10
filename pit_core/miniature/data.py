"""Picture sets of the critter world: drawn once from a seed, kept on disk as plain arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..errors import PitError
from ..files import write_text_atomic
from . import critters
from .critters import CANVAS, COLOUR_NAMES, KINDS, SCENES, SHAPES, STYLES, Critter

# What a reader says of a part, after its four shapes.
ABSENT, DOUBLED, GARBLED = 4, 5, 6
NO_COLOUR = -1
LABELS = 2 * len(KINDS) + 4  # state and colour of each kind, then style, scene, build (per mille), view
VIEWS = ("whole", *KINDS)


def labels_of(critter: Critter, view: str = "whole") -> np.ndarray:
    """What is to be seen: (LABELS,) int64; a part picture shows that part alone."""
    states, colours = [], []
    for kind in KINDS:
        part = critter.part(kind) if view in ("whole", kind) else None
        states.append(ABSENT if part is None else SHAPES[kind].index(part.shape))
        colours.append(NO_COLOUR if part is None else COLOUR_NAMES.index(part.colour))
    rest = [
        STYLES.index(critter.style),
        SCENES.index(critter.scene),
        round(1000 * critter.build),
        VIEWS.index(view),
    ]
    return np.array(states + colours + rest, dtype=np.int64)


@dataclass(frozen=True)
class Picture:
    """One picture of a set: which critter, and whether it is seen whole or one part alone."""

    critter: Critter
    view: str = "whole"
    fill: float = 0.92

    def draw(self) -> np.ndarray:
        """(CANVAS, CANVAS, 3) uint8."""
        if self.view == "whole":
            return np.asarray(critters.render(self.critter))
        return np.asarray(critters.render_part(self.critter, self.view, fill=self.fill))

    def drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and labels."""
        return self.draw(), labels_of(self.critter, self.view)

    def caption(self, rng: np.random.Generator | None = None) -> str:
        """The picture in words; ``rng`` varies them."""
        if self.view == "whole":
            return critters.caption(self.critter, rng)
        return critters.part_caption(self.critter, self.view)


def world_picture(seed: int, index: int, *, held_out: bool = False) -> Picture:
    """Anything that the base models should know: critters in all styles and scenes, and parts alone."""
    rng = np.random.default_rng([seed, index])
    styles = STYLES if rng.random() < 0.4 else ("flat",)
    scenes = SCENES[1:] if rng.random() < 0.45 else ("plain",)
    critter = critters.random_critter(
        rng, styles=styles, scenes=scenes, posed=float(rng.random() ** 2), held_out=held_out
    )
    if rng.random() < 0.78:
        return Picture(critter)
    kind = str(rng.choice(list(critter.parts())))
    return part_view(replace(critter, scene="plain"), kind, rng)


def part_view(critter: Critter, kind: str, rng: np.random.Generator) -> Picture:
    """A part picture as artists bring them: sometimes turned by up to 30 degrees, with any margin."""
    turn = float(rng.uniform(-30, 30)) if rng.random() < 0.2 else 0.0
    pose = replace(critter.pose, rotation=critter.pose.rotation + turn)
    return Picture(replace(critter, pose=pose), kind, float(rng.uniform(0.8, 0.95)))


def concept_critter(seed: int, index: int, *, held_out: bool = False) -> Critter:
    """A whole concept as the prior learns them: flat, on white, nearly upright."""
    rng = np.random.default_rng([seed, index])
    return critters.random_critter(rng, posed=0.35, held_out=held_out)


def concept_pictures(seed: int, index: int) -> list[Picture]:
    """A concept and its parts, the whole one first."""
    critter = concept_critter(seed, index)
    rng = np.random.default_rng([seed, index, 1])
    return [Picture(critter), *(part_view(critter, kind, rng) for kind in critter.parts())]


# sets on disk

Drawn = tuple[np.ndarray, np.ndarray]
"""Pixels (128, 128, 3) uint8 and labels (LABELS,)."""

Maker = Callable[[int], list[Drawn]]
"""A group's number -> its pictures; a function of a module, because other processes call it."""

Job = tuple[Path, Maker, Sequence[int]]
"""A chunk of a set: its file, and which groups it holds."""


def draw_set(
    folder: Path,
    name: str,
    make: Maker,
    count: int,
    *,
    chunk: int = 500,
    workers: int | None = None,
    quiet: bool = False,
) -> PictureSet:
    """Draw ``count`` groups of pictures into ``folder/name``, or open them when they are there already.

    Work that was interrupted goes on with the chunks that are missing; ``workers`` processes share it (None:
    one per core). Raises PitError when a set of another size is there.
    """
    target = folder / name
    if not _is_drawn(target, count):
        target.mkdir(parents=True, exist_ok=True)
        starts = range(0, count, chunk)
        jobs: list[Job] = [
            (target / f"chunk-{number:05d}.npz", make, range(start, min(start + chunk, count)))
            for number, start in enumerate(starts)
        ]
        with tqdm(total=len(jobs), desc=f"drawing {name}", disable=quiet) as bar:
            _draw_missing(jobs, workers or os.cpu_count() or 1, bar)
        _join(target, [path for path, _, _ in jobs])
        write_text_atomic(target / "done.json", json.dumps({"count": count}))
        for path, _, _ in jobs:
            path.unlink()
    return PictureSet(target)


def _is_drawn(target: Path, count: int) -> bool:
    mark = target / "done.json"
    if not mark.exists():
        return False
    there = json.loads(mark.read_text("utf-8"))["count"]
    if there != count:
        raise PitError(
            f"'{target}' holds {there} groups of pictures, but {count} were asked for; take another folder."
        )
    return True


def _draw_missing(jobs: Sequence[Job], workers: int, bar: tqdm) -> None:
    missing = [job for job in jobs if not job[0].exists()]
    bar.update(len(jobs) - len(missing))
    if min(workers, len(missing)) <= 1:
        for job in missing:
            _draw_chunk(job)
            bar.update()
        return
    with ProcessPoolExecutor(min(workers, len(missing))) as pool:
        for _ in pool.map(_draw_chunk, missing):
            bar.update()


def _draw_chunk(job: Job) -> None:
    path, make, groups = job
    drawn = [(*each, group) for group in groups for each in make(group)]
    pixels, labels, numbers = zip(*drawn, strict=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, pixels=np.stack(pixels), labels=np.stack(labels), groups=np.array(numbers))
    os.replace(part, path)


def _join(target: Path, paths: Sequence[Path]) -> None:
    """The chunks as one array each for pixels, labels and groups; pixels are copied a chunk at a time."""
    labels, groups = [], []
    for path in paths:
        with np.load(path) as chunk:
            labels.append(chunk["labels"])
            groups.append(chunk["groups"])
    total = sum(map(len, groups))
    pixels = np.lib.format.open_memmap(
        target / "pixels.npy", mode="w+", dtype=np.uint8, shape=(total, CANVAS, CANVAS, 3)
    )
    start = 0
    for path in paths:
        with np.load(path) as chunk:
            rows = chunk["pixels"]
        pixels[start : start + len(rows)] = rows
        start += len(rows)
    pixels.flush()
    np.save(target / "labels.npy", np.concatenate(labels))
    np.save(target / "groups.npy", np.concatenate(groups))


class PictureSet:
    """A drawn set: ``pixels`` (N, 128, 128, 3) uint8 on disk, ``labels`` (N, LABELS), ``groups`` (N,)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy")
        self.groups = np.load(folder / "groups.npy")

    def __len__(self) -> int:
        return len(self.labels)
