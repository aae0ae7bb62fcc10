"""A critter in a surface style, in scenes that neither was learned in: B4M against ordinary LoRAs.

Content and style are kept only together, so a method's figure is the harmonic mean of both shares, taken for
each pair of a content and a style, and averaged over the pairs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..b4m.dials import Dials, Source, load_source
from ..b4m.grid import draw_under
from ..concepts import Stack, picture_seed
from ..errors import PitError
from ..files import write_text_atomic
from ..miniature import reader
from ..miniature.b4m import CONTENTS, STYLES, SUBJECTS, SURFACES, UNSEEN, Run, joint_prompt
from ..miniature.critters import STYLES as READ_STYLES
from ..miniature.critters import Critter
from ..miniature.data import Picture
from ..pictures import SheetRow, Tile, contact_sheet, save_png
from .common import MOST, check_whole, pixels_of, write_table

JOINED = "joined"
METHODS = {"splice": "splice", JOINED: "auto", "summed LoRAs": "sum", "one shared LoRA": "auto"}
"""Method -> how its files are joined."""
RESAMPLES = 2000  # of the bootstrap
PAIRS = tuple((content, style) for content in CONTENTS for style in STYLES)

Pair = tuple[int, int]
"""Numbers of a content and a style, from 1."""


@dataclass(frozen=True)
class Row:
    """One line of the table: shares in [0, 1], over all pairs.

    content: the critter's parts found again, shape and colour. style: pictures in the surface style. gain:
    how much higher the joined entities' harmonic mean is, with its 95% interval (paired bootstrap).
    """

    method: str
    content: float
    style: float
    harmonic: float
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class PairRow:
    """The same shares for one pair."""

    method: str
    pair: str
    content: float
    style: float
    harmonic: float


@dataclass(frozen=True)
class Scores:
    """What was found in each picture of a pair, noise by noise: content in [0, 1], style 0 or 1."""

    content: np.ndarray  # (N,)
    style: np.ndarray  # (N,)

    def harmonic(self, which: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The harmonic mean of both means over the last axis; 0 where one of them is 0."""
        content, style = self.content[which].mean(-1), self.style[which].mean(-1)
        total = content + style
        return np.divide(2 * content * style, total, out=np.zeros_like(total), where=total > 0)


def run(
    stack: Stack,
    judge: torch.nn.Module,
    folder: Path,
    *,
    pairs: Sequence[Pair] = PAIRS,
    count: int = 100,
    seed: int = 0,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """All methods on the same noise and prompts, ``count`` pictures for each pair.

    ``folder`` holds the runs' files as `pit miniature export` writes them (b4m_content_1.safetensors). With
    ``out`` a table (b4m.json, b4m.txt), all readings (b4m.csv) and a picture grid (b4m.png) are written.
    Raises PitError for a count, a seed or a pair out of range, and for files that are missing or do not fit.
    """
    check_whole("count", count, len(UNSEEN), MOST)
    check_whole("seed", seed, 0, 2**32)
    _check_pairs(pairs)
    sources = {pair: _sources(folder, *pair) for pair in dict.fromkeys(pairs)}
    seeds = [picture_seed(MOST * seed + index) for index in range(count)]
    scores: dict[str, list[Scores]] = {method: [] for method in METHODS}
    shown = []
    for (content, style), methods in sources.items():
        tiles = []
        for method, source in methods.items():
            progress(f"drawing {count} pictures: content {content}, style {style}, {method}")
            pictures = _drawn(stack, source, METHODS[method], seeds)
            scores[method].append(_read(judge, pictures, content, style))
            tiles.append(Tile(pictures[0], method))
        shown.append(SheetRow([_target(content, style)], tiles, f"content {content}, style {style}"))
    rows = [_row(method, scores) for method in METHODS]
    if out is not None:
        _write(out, rows, _pair_rows(scores, list(sources)), scores, list(sources), count, seed)
        save_png(contact_sheet(shown), out / "b4m.png")
    return rows


def parse_pair(text: str) -> Pair:
    """ "1-2" -> (1, 2). Raises PitError for anything else."""
    content, dash, style = text.partition("-")
    if not (dash and content.isdecimal() and style.isdecimal()):
        raise PitError(f"Expected a pair of a content and a style such as 1-2, got '{text[:40]}'.")
    return int(content), int(style)


def _check_pairs(pairs: Sequence[Pair]) -> None:
    wrong = [f"{content}-{style}" for content, style in pairs if (content, style) not in PAIRS]
    if wrong or not pairs:
        known = ", ".join(f"{content}-{style}" for content, style in PAIRS)
        got = wrong[0] if wrong else "none"
        raise PitError(f"Expected pairs of a content and a style out of {known}, got {got}.")


def _sources(folder: Path, content: int, style: int) -> dict[str, Source]:
    """Method -> the files that make a content in a style. Raises PitError for one that is missing."""

    def path(run: Run) -> Path:
        found = folder / f"{run.name.replace('-', '_')}.safetensors"
        if not found.is_file():
            raise PitError(
                f"'{folder}' lacks {found.name}; make it with 'pit miniature train {run.name}', then "
                f"'pit miniature export {run.name} --weights {folder}'."
            )
        return found

    files = {
        "splice": (Run("content", content), Run("style", style=style)),
        JOINED: (Run("join", content, style),),
        "summed LoRAs": (Run("plain-content", content), Run("plain-style", style=style)),
        "one shared LoRA": (Run("shared", content, style),),
    }
    return {method: load_source(*map(path, files[method])) for method in METHODS}


def _drawn(stack: Stack, source: Source, mode: str, seeds: Sequence[int]) -> list[Image.Image]:
    """One picture for each noise; the scenes take turns."""
    dialled = source.dialled(Dials(mode=mode))
    images: dict[int, Image.Image] = {}
    for number, scene in enumerate(UNSEEN):
        rows = range(number, len(seeds), len(UNSEEN))
        settings = replace(stack.defaults, prompt=joint_prompt(scene))
        made = draw_under(stack.renderer, source, dialled, settings, [seeds[row] for row in rows])
        images |= dict(zip(rows, made, strict=True))
    return [images[index] for index in range(len(seeds))]


def _read(judge: torch.nn.Module, pictures: Sequence[Image.Image], content: int, style: int) -> Scores:
    subject = SUBJECTS[content - 1]
    parts = tuple(subject.parts())
    readings = reader.read(judge, pixels_of(pictures))
    kept = readings.kept([subject] * len(pictures), [parts] * len(pictures))
    right = readings.style == READ_STYLES.index(SURFACES[style - 1])
    return Scores(kept.reshape(len(pictures), len(parts)).mean(1), right.astype(float))


def _row(method: str, scores: Mapping[str, Sequence[Scores]]) -> Row:
    mine, best = scores[method], scores[JOINED]
    low, high = paired_interval(best, mine)
    harmonic = mean_harmonic(mine)
    return Row(
        method,
        float(np.mean([pair.content.mean() for pair in mine])),
        float(np.mean([pair.style.mean() for pair in mine])),
        harmonic,
        mean_harmonic(best) - harmonic,
        low,
        high,
    )


def mean_harmonic(pairs: Sequence[Scores]) -> float:
    """Each pair's harmonic mean of content and style, averaged."""
    return float(np.mean([pair.harmonic() for pair in pairs]))


def paired_interval(better: Sequence[Scores], worse: Sequence[Scores]) -> tuple[float, float]:
    """The 95% interval of the difference of two methods' mean harmonics.

    A bootstrap over pictures within each pair; both methods' pictures of one noise are drawn together.
    """
    rng = np.random.default_rng(0)
    differences = np.zeros(RESAMPLES)
    for ours, theirs in zip(better, worse, strict=True):
        chosen = rng.integers(0, len(ours.content), (RESAMPLES, len(ours.content)))
        differences += (ours.harmonic(chosen) - theirs.harmonic(chosen)) / len(better)
    low, high = np.quantile(differences, (0.025, 0.975))
    return float(low), float(high)


def table(rows: Sequence[Row]) -> str:
    """The rows as text, for a terminal and for a file."""
    head = f"{'content kept':>14}{'style kept':>12}{'harmonic':>10}{'joined is ahead by':>28}"
    lines = [f"{'method':18}{head}"]
    for row in rows:
        ahead = "" if row.method == JOINED else f"{row.gain:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        lines.append(f"{row.method:18}{row.content:>14.3f}{row.style:>12.3f}{row.harmonic:>10.3f}{ahead:>28}")
    return "\n".join(lines)


def _pair_rows(scores: Mapping[str, Sequence[Scores]], pairs: Sequence[Pair]) -> list[PairRow]:
    return [
        PairRow(
            method,
            f"{content}-{style}",
            float(found.content.mean()),
            float(found.style.mean()),
            float(found.harmonic()),
        )
        for method, all_found in scores.items()
        for (content, style), found in zip(pairs, all_found, strict=True)
    ]


def _write(
    out: Path,
    rows: Sequence[Row],
    pair_rows: Sequence[PairRow],
    scores: Mapping[str, Sequence[Scores]],
    pairs: Sequence[Pair],
    count: int,
    seed: int,
) -> None:
    named = ", ".join(f"{content}-{style}" for content, style in pairs)
    heading = f"{count} pictures of each pair ({named}) in the scenes {', '.join(UNSEEN)}, seed {seed}"
    settings = {"count": count, "seed": seed, "pairs": [asdict(row) for row in pair_rows]}
    write_table(out, "b4m", settings, rows, f"{heading}\n{table(rows)}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "content", "style", "picture", "content_kept", "style_kept"])
    for method, all_found in scores.items():
        for pair, found in zip(pairs, all_found, strict=True):
            for index, kept in enumerate(zip(found.content, found.style, strict=True)):
                writer.writerow([method, *pair, index, *(f"{value:g}" for value in kept)])
    write_text_atomic(out / "b4m.csv", text.getvalue())


def _target(content: int, style: int) -> Tile:
    """What is asked for, drawn by the world itself."""
    critter: Critter = replace(SUBJECTS[content - 1], style=SURFACES[style - 1], scene=UNSEEN[0])
    return Tile(Image.fromarray(Picture(critter).draw()), "as it should be")
