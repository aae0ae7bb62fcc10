"""A scene that the prompt names, at every image weight: the adapter alone, and with an IP-LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..concepts import Stack, picture_seed
from ..lora.model import Lora
from ..lora.placing import Strengths
from ..miniature import reader
from ..miniature.critters import SCENES, Critter
from ..miniature.data import Picture
from ..miniature.pairs import pair_critter, pair_prompt
from ..pictures import SheetRow, Tile, contact_sheet, save_png
from ..render import RenderSettings, for_ip_lora
from .common import EVALUATION, MOST, check_whole, margin, own_tokens, pixels_of, write_table

WEIGHTS = (0.2, 0.4, 0.6, 0.8, 1.0)
SHOWN = 8  # critters in the picture


@dataclass(frozen=True)
class Row:
    """One line of the table: shares in [0, 1] with the half width of their 95% interval.

    followed: pictures that show the scene of the prompt. kept: the reference's parts found again, shape and
    colour. likeness: kept, as a share of what the adapter alone keeps at weight 1.0.
    """

    method: str
    weight: float
    followed: float
    followed_margin: float
    kept: float
    kept_margin: float
    likeness: float


@dataclass(frozen=True)
class _Method:
    name: str
    weight: float
    settings: RenderSettings
    lora: Lora | None = None


def run(
    stack: Stack,
    judge: torch.nn.Module,
    lora: Lora,
    *,
    count: int = 200,
    seed: int = 0,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """The adapter alone over its weight, and with the IP-LoRA at weight 1.0, on the same noise.

    References are held-out critters on white; the prompt names another scene. With ``out`` a table
    (scenes.json, scenes.txt) and a picture grid (scenes.png) are written. Raises PitError for a count or a
    seed out of range, and for a LoRA that does not fit.
    """
    check_whole("count", count, 1, MOST)
    check_whole("seed", seed, 0, 2**32)
    critters = [pair_critter("scene", EVALUATION + seed, index, held_out=True) for index in range(count)]
    tokens = own_tokens(stack, [replace(critter, scene="plain") for critter in critters])
    noise = [picture_seed(MOST * seed + index) for index in range(count)]
    pictures = []
    for method in (methods := _methods(stack.defaults, lora)):
        progress(f"drawing {count} pictures: {method.name}, weight {method.weight:g}")
        pictures.append(_drawn(stack, method, critters, tokens, noise))
    rows = _rows(judge, methods, pictures, critters)
    if out is not None:
        _write(out, rows, pictures, critters, count, seed)
    return rows


def _methods(defaults: RenderSettings, lora: Lora) -> list[_Method]:
    alone = [_Method("adapter alone", w, replace(defaults, weight=w)) for w in WEIGHTS]
    return [*alone, _Method("with the IP-LoRA", 1.0, replace(for_ip_lora(defaults), weight=1.0), lora)]


def _drawn(
    stack: Stack, method: _Method, critters: Sequence[Critter], tokens: Sequence[Tensor], noise: Sequence[int]
) -> list[Image.Image]:
    """In the critters' order; those of one scene share a prompt, and so batches."""
    images: dict[int, Image.Image] = {}
    loras = [] if method.lora is None else [(method.lora, Strengths())]
    with stack.renderer.under_loras(loras) if loras else nullcontext():
        for scene in SCENES:
            rows = [index for index, critter in enumerate(critters) if critter.scene == scene]
            if not rows:
                continue
            made = stack.renderer.render(
                torch.stack([tokens[row] for row in rows]),
                stack.null("grey"),
                replace(method.settings, prompt=pair_prompt("scene", critters[rows[0]])),
                seeds=[noise[row] for row in rows],
            )
            images |= dict(zip(rows, made, strict=True))
    return [images[index] for index in range(len(critters))]


def _rows(
    judge: torch.nn.Module,
    methods: Sequence[_Method],
    pictures: Sequence[Sequence[Image.Image]],
    critters: Sequence[Critter],
) -> list[Row]:
    wanted = np.array([SCENES.index(critter.scene) for critter in critters])
    parts = [tuple(critter.parts()) for critter in critters]
    read = [reader.read(judge, pixels_of(made)) for made in pictures]
    kept = [readings.kept(critters, parts) for readings in read]
    full = float(kept[WEIGHTS.index(1.0)].mean())
    return [
        Row(
            method.name,
            method.weight,
            float((readings.scene == wanted).mean()),
            margin(readings.scene == wanted),
            float(found.mean()),
            margin(found),
            float(found.mean()) / full if full else 0.0,
        )
        for method, readings, found in zip(methods, read, kept, strict=True)
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, for a terminal and for a file."""
    lines = [f"{'method':20}{'weight':>8}{'scene followed':>18}{'parts kept':>18}{'likeness':>10}"]
    for row in rows:
        followed = f"{row.followed:.3f} +- {row.followed_margin:.3f}"
        kept = f"{row.kept:.3f} +- {row.kept_margin:.3f}"
        lines.append(f"{row.method:20}{row.weight:>8.1f}{followed:>18}{kept:>18}{row.likeness:>10.3f}")
    return "\n".join(lines)


def _write(
    out: Path,
    rows: Sequence[Row],
    pictures: Sequence[Sequence[Image.Image]],
    critters: Sequence[Critter],
    count: int,
    seed: int,
) -> None:
    heading = f"{count} held-out critters on white, each with a prompt for another scene, seed {seed}"
    settings = {"count": count, "seed": seed}
    write_table(out, "scenes", settings, rows, f"{heading}\n{table(rows)}")
    lines = []
    for index, critter in enumerate(critters[:SHOWN]):
        reference = Picture(replace(critter, scene="plain")).draw()
        made = [
            Tile(of[index], f"{row.method}, {row.weight:g}") for row, of in zip(rows, pictures, strict=True)
        ]
        lines.append(SheetRow([Tile(Image.fromarray(reference), critter.scene)], made))
    save_png(contact_sheet(lines), out / "scenes.png")
