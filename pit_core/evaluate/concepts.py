"""Parts kept and valid creatures: the IP-Prior against averaging and concatenating the parts' tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..concepts import Job, PriorSettings, Stack, picture_seed, prepare_parts, sample_jobs
from ..miniature import critters, reader
from ..miniature.critters import Critter
from ..miniature.data import concept_critter, part_view
from ..miniature.painting import from_captions
from ..pictures import SheetRow, Tile, contact_sheet, save_png
from .common import (
    EVALUATION,
    MOST,
    check_whole,
    drawn,
    margin,
    own_tokens,
    pixels_of,
    write_table,
)

PART_SIZE = 256


@dataclass(frozen=True)
class Row:
    """One line of the concepts table: shares in [0, 1] with the half width of their 95% interval."""

    method: str
    kept: float
    kept_margin: float
    valid: float
    valid_margin: float
    shape_kept: float
    colour_kept: float


@dataclass(frozen=True)
class ConceptCase:
    """A held-out critter, the kinds given, and their pictures."""

    critter: Critter
    given: tuple[str, ...]
    parts: tuple[Image.Image, ...]


def concept_cases(count: int, seed: int) -> list[ConceptCase]:
    """Critters of held-out combinations, each with one to three given parts (uniform), in random order.

    Raises PitError for a count or a seed out of range.
    """
    check_whole("count", count, 1, MOST)
    check_whole("seed", seed, 0, 2**32)
    return [_concept_case(EVALUATION + seed, index) for index in range(count)]


def _concept_case(seed: int, index: int) -> ConceptCase:
    critter = concept_critter(seed, index, held_out=True)
    rng = np.random.default_rng([seed, index, 3])
    kinds = list(critter.parts())
    number = min(int(rng.integers(1, 4)), len(kinds))
    given = tuple(str(kind) for kind in rng.choice(kinds, size=number, replace=False))
    views = [part_view(critter, kind, rng) for kind in given]
    parts = tuple(critters.cut_out_part(view.critter, view.view, PART_SIZE) for view in views)
    return ConceptCase(critter, given, parts)


def run(
    stack: Stack,
    judge: torch.nn.Module,
    *,
    count: int = 200,
    seed: int = 0,
    out: Path | None = None,
    prior: PriorSettings | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Parts kept and valid creatures: IP-Prior against averaging and concatenating the parts' tokens.

    The ceiling decodes the true concept's own tokens. All methods use the same noise per case. With ``out`` a
    table (concepts.json, concepts.txt) and a picture grid (concepts.png) are written. Raises PitError for a
    count or a seed out of range.
    """
    cases = concept_cases(count, seed)
    seeds = [MOST * seed + index for index in range(count)]
    rows, grids = [], []
    progress("sampling the prior")
    for method, tokens in _methods(stack, cases, seeds, prior or PriorSettings()):
        progress(f"drawing {count} pictures: {method}")
        images = drawn(stack, tokens, [picture_seed(s) for s in seeds])
        rows.append(_row(method, judge, images, cases))
        grids.append(images)
    if out is not None:
        _write(out, rows, grids, cases, count, seed)
    return rows


def of_prior(stack: Stack, judge: torch.nn.Module, *, count: int, seed: int) -> Row:
    """The IP-Prior's line of `run` alone."""
    cases = concept_cases(count, seed)
    seeds = [MOST * seed + index for index in range(count)]
    tokens = _sampled(stack, cases, seeds, PriorSettings())
    return _row("IP-Prior", judge, drawn(stack, tokens, [picture_seed(s) for s in seeds]), cases)


def accepted(
    stack: Stack, judge: torch.nn.Module, *, count: int = 200, seed: int = 0
) -> dict[str, dict[str, float]]:
    """By weight file, what the second reader reads off its pictures of held-out critters.

    The UNet draws from captions, the adapter from the critters' own tokens, the prior from some of the parts;
    the adapter and the UNet have to keep every part. Raises PitError for a count or a seed out of range.
    """
    cases = concept_cases(count, seed)
    wholes = [replace(case, given=tuple(case.critter.parts())) for case in cases]
    seeds = [MOST * seed + index for index in range(count)]
    noise = [picture_seed(s) for s in seeds]
    whole = [case.critter for case in cases]
    sampled, own = _sampled(stack, cases, seeds, PriorSettings()), own_tokens(stack, whole)
    pictures = {
        "ip_prior.safetensors": (drawn(stack, sampled, noise), cases),
        "ip_adapter_plus.safetensors": (drawn(stack, own, noise), wholes),
        "unet/diffusion_pytorch_model.safetensors": (from_captions(stack, whole, noise), wholes),
    }
    rows = {name: _row(name, judge, images, shown) for name, (images, shown) in pictures.items()}
    return {
        name: {"parts_kept": row.kept, "valid": row.valid, "accepted_on": count, "accepted_seed": seed}
        for name, row in rows.items()
    }


def _methods(
    stack: Stack,
    cases: Sequence[ConceptCase],
    seeds: Sequence[int],
    settings: PriorSettings,
) -> list[tuple[str, list[Tensor]]]:
    """Each method's name and its tokens (T, D) for every case."""
    given = [stack.encode(prepare_parts(stack, case.parts)) for case in cases]
    return [
        ("IP-Prior", _sampled(stack, cases, seeds, settings)),
        ("average of the parts' tokens", [tokens.mean(0) for tokens in given]),
        ("parts' tokens side by side", [tokens.flatten(0, 1) for tokens in given]),
        ("ceiling: the true concept's tokens", own_tokens(stack, [case.critter for case in cases])),
    ]


def _sampled(
    stack: Stack, cases: Sequence[ConceptCase], seeds: Sequence[int], settings: PriorSettings
) -> list[Tensor]:
    """The prior's tokens (T, D) out of each case's parts."""
    jobs = [Job(case.parts, [seed]) for case, seed in zip(cases, seeds, strict=True)]
    return list(torch.cat(sample_jobs(stack, jobs, settings)))


def _row(
    method: str, judge: torch.nn.Module, images: Sequence[Image.Image], cases: Sequence[ConceptCase]
) -> Row:
    pixels = pixels_of(images)
    readings = reader.read(judge, pixels)
    whole, given = [case.critter for case in cases], [case.given for case in cases]
    kept, valid = readings.kept(whole, given), readings.valid()
    shape, colour = readings.matches(whole, given)
    return Row(
        method=method,
        kept=float(kept.mean()),
        kept_margin=margin(kept),
        valid=float(valid.mean()),
        valid_margin=margin(valid),
        shape_kept=float(shape.mean()),
        colour_kept=float(colour.mean()),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text, for a terminal and for a file."""
    lines = [f"{'method':36}{'parts kept':>16}{'valid creature':>18}{'shape':>9}{'colour':>9}"]
    for row in rows:
        kept = f"{row.kept:.3f} +- {row.kept_margin:.3f}"
        valid = f"{row.valid:.3f} +- {row.valid_margin:.3f}"
        lines.append(f"{row.method:36}{kept:>16}{valid:>18}{row.shape_kept:>9.3f}{row.colour_kept:>9.3f}")
    return "\n".join(lines)


def _write(
    out: Path,
    rows: Sequence[Row],
    grids: Sequence[Sequence[Image.Image]],
    cases: Sequence[ConceptCase],
    count: int,
    seed: int,
) -> None:
    given = sum(len(case.given) for case in cases)
    heading = f"{count} held-out critters, 1 to 3 given parts ({given} in all), seed {seed}"
    settings = {"count": count, "given_parts": given, "seed": seed}
    write_table(out, "concepts", settings, rows, f"{heading}\n{table(rows)}")
    save_png(_grid(rows, grids, cases), out / "concepts.png")


def _grid(
    rows: Sequence[Row], grids: Sequence[Sequence[Image.Image]], cases: Sequence[ConceptCase], shown: int = 12
) -> Image.Image:
    """A line per case: its parts, then what each method made of them."""
    lines = []
    for index, case in enumerate(cases[:shown]):
        parts = [Tile(part, kind) for part, kind in zip(case.parts, case.given, strict=True)]
        made = [Tile(images[index], row.method) for row, images in zip(rows, grids, strict=True)]
        lines.append(SheetRow(parts, made))
    return contact_sheet(lines)
