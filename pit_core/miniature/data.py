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

from . import critters
from .critters import BUILD_WORDS, CANVAS, COLOUR_NAMES, KINDS, SCENES, SHAPES, STYLES, Critter

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
    """A part picture as artists bring them: sometimes turned by up to 30 degrees, filling 0.8 to 0.95 of the square."""
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


Drawn = tuple[np.ndarray, np.ndarray]
"""Pixels (128, 128, 3) uint8 and labels (LABELS,)."""


def draw_set(
    folder: Path, name: str, make: Callable[[int], list[Drawn]], count: int, *, quiet: bool = False
) -> PictureSet:
    """Draw ``count`` groups of pictures into ``folder/name``, or open them when they are there already."""
    target = folder / name
    if not (target / "done.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        chunks = [range(start, min(start + 500, count)) for start in range(0, count, 500)]
        jobs = [(str(target / f"chunk-{n:05d}.npz"), make, chunk) for n, chunk in enumerate(chunks)]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            sizes = list(
                tqdm(pool.map(_draw_chunk, jobs), total=len(jobs), desc=f"drawing {name}", disable=quiet)
            )
        _join(target, [Path(job[0]) for job in jobs], sum(sizes))
        (target / "done.json").write_text(json.dumps({"count": count}))
    return PictureSet(target)


def _draw_chunk(job: tuple[str, Callable[[int], list[Drawn]], Sequence[int]]) -> int:
    path, make, indices = job
    if not os.path.exists(path):
        pixels, labels, groups = [], [], []
        for index in indices:
            for picture, label in make(index):
                pixels.append(picture)
                labels.append(label)
                groups.append(index)
        with open(path + ".part", "wb") as file:
            np.savez(file, pixels=np.stack(pixels), labels=np.stack(labels), groups=np.array(groups))
        os.replace(path + ".part", path)
    with np.load(path) as chunk:
        return len(chunk["groups"])


def _join(target: Path, paths: list[Path], total: int) -> None:
    pixels = np.lib.format.open_memmap(
        target / "pixels.npy", mode="w+", dtype=np.uint8, shape=(total, CANVAS, CANVAS, 3)
    )
    labels, groups, start = [], [], 0
    for path in paths:
        with np.load(path) as chunk:
            rows = len(chunk["groups"])
            pixels[start : start + rows] = chunk["pixels"]
            labels.append(chunk["labels"])
            groups.append(chunk["groups"])
            start += rows
    pixels.flush()
    np.save(target / "labels.npy", np.concatenate(labels))
    np.save(target / "groups.npy", np.concatenate(groups))
    for path in paths:
        path.unlink()


class PictureSet:
    """A drawn set: ``pixels`` (N, 128, 128, 3) uint8 on disk, ``labels`` (N, LABELS), ``groups`` (N,)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy")
        self.groups = np.load(folder / "groups.npy")

    def __len__(self) -> int:
        return len(self.labels)


def build_class(per_mille: np.ndarray) -> np.ndarray:
    """The build word's index of a build given per mille."""
    return np.minimum(per_mille * len(BUILD_WORDS) // 1000, len(BUILD_WORDS) - 1)
