"""A critter again, in a scene that the prompt names: over Diptych Prompting's strength, cut out and not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..concepts import picture_seed
from ..diptych.pipeline import DiptychModel, DiptychSettings, draw_diptych
from ..miniature import reader
from ..miniature.critters import SCENES, Critter, random_critter, render
from ..miniature.diptychs import full_prompt
from ..miniature.flux_stack import DEFAULTS, LAYOUT
from ..pictures import SheetRow, Tile, contact_sheet, save_png
from .common import EVALUATION, MOST, check_whole, margin, write_table

STRENGTHS = (1.0, 1.15, 1.3, 1.5)
BATCH = 10
SHOWN = 8  # critters in the picture


@dataclass(frozen=True)
class Row:
    """One line of the table: shares in [0, 1] with the half width of their 95% interval.

    kept: the subject's parts found again, shape and colour. followed: pictures that show the prompt's scene.
    """

    cut_out: bool
    strength: float
    kept: float
    kept_margin: float
    followed: float
    followed_margin: float


@dataclass(frozen=True)
class _Case:
    """A critter in a scene of its own, and the scene that the prompt names."""

    critter: Critter
    scene: str


def run(
    model: DiptychModel,
    judge: torch.nn.Module,
    *,
    count: int = 100,
    seed: int = 0,
    settings: DiptychSettings = DEFAULTS,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Held-out critters at every strength, on white and as they are, on the same noise.

    With ``out`` a table (diptych.json, diptych.txt) and a picture grid (diptych.png) are written. Raises
    PitError for a count or a seed out of range.
    """
    check_whole("count", count, 1, MOST)
    check_whole("seed", seed, 0, 2**32)
    cases = [_case(EVALUATION + seed, index) for index in range(count)]
    noise = [picture_seed(MOST * seed + index) for index in range(count)]
    rows: list[Row] = []
    pictures: list[Tensor] = []
    for cut_out in (True, False):
        for strength in STRENGTHS:
            how = "cut out" if cut_out else "as they are"
            progress(f"drawing {count} pictures: critters {how}, strength {strength:g}")
            made = _drawn(model, cases, noise, cut_out, replace(settings, strength=strength))
            rows.append(_row(judge, cases, made, cut_out, strength))
            pictures.append(made[:SHOWN])
    if out is not None:
        write_table(
            out,
            "diptych",
            {"count": count, "seed": seed, "steps": settings.steps},
            rows,
            f"{count} held-out critters, each with a prompt for another scene, seed {seed}\n{table(rows)}",
        )
        save_png(_sheet(cases, rows, pictures), out / "diptych.png")
    return rows


def _case(seed: int, index: int) -> _Case:
    rng = np.random.default_rng([seed, index])
    critter = random_critter(rng, scenes=SCENES[1:], held_out=True)
    others = [scene for scene in SCENES[1:] if scene != critter.scene]
    return _Case(critter, others[int(rng.integers(len(others)))])


def _reference(case: _Case, cut_out: bool) -> Image.Image:
    return render(replace(case.critter, scene="plain") if cut_out else case.critter)


def _drawn(
    model: DiptychModel,
    cases: Sequence[_Case],
    noise: Sequence[int],
    cut_out: bool,
    settings: DiptychSettings,
) -> Tensor:
    """The new pictures (B, H, W, 3) in 0-1, in the cases' order."""
    made = []
    for start in range(0, len(cases), BATCH):
        few, seeds = cases[start : start + BATCH], noise[start : start + BATCH]
        panels = np.stack([np.asarray(_reference(case, cut_out)) for case in few])
        canvas, mask = LAYOUT.compose(torch.from_numpy(panels).float() / 255)
        prompts = [full_prompt(case.scene) for case in few]
        made.append(LAYOUT.crop(draw_diptych(model, LAYOUT, canvas, mask, prompts, seeds, settings)))
    return torch.cat(made)


def _row(
    judge: torch.nn.Module, cases: Sequence[_Case], pictures: Tensor, cut_out: bool, strength: float
) -> Row:
    readings = reader.read(judge, pictures.movedim(-1, 1) * 2 - 1)
    critters = [case.critter for case in cases]
    kept = readings.kept(critters, [tuple(critter.parts()) for critter in critters])
    followed = readings.scene == np.array([SCENES.index(case.scene) for case in cases])
    return Row(cut_out, strength, float(kept.mean()), margin(kept), float(followed.mean()), margin(followed))


def table(rows: Sequence[Row]) -> str:
    """The rows as text, for a terminal and for a file."""
    lines = [f"{'subject':14}{'strength':>10}{'parts kept':>18}{'scene followed':>18}"]
    for row in rows:
        subject = "cut out" if row.cut_out else "as it is"
        kept = f"{row.kept:.3f} +- {row.kept_margin:.3f}"
        followed = f"{row.followed:.3f} +- {row.followed_margin:.3f}"
        lines.append(f"{subject:14}{row.strength:>10.2f}{kept:>18}{followed:>18}")
    return "\n".join(lines)


def _sheet(cases: Sequence[_Case], rows: Sequence[Row], pictures: Sequence[Tensor]) -> Image.Image:
    """A line for each of the first critters: its picture, then one for each row of the table."""
    lines = []
    for index, case in enumerate(cases[:SHOWN]):
        tiles = [
            Tile(_image(made[index]), f"{'cut out' if row.cut_out else 'as it is'}, {row.strength:g}")
            for row, made in zip(rows, pictures, strict=True)
        ]
        lines.append(SheetRow([Tile(_reference(case, False), f"to be: {case.scene}")], tiles))
    return contact_sheet(lines)


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())
