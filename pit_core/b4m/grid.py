"""Pictures of one prompt over content and style: a grid of dials, each row and column from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from ..errors import PitError
from ..lora.placing import Strengths
from ..pictures import SheetRow, Tile, contact_sheet, save_png
from ..render import Renderer, RenderSettings
from ..runs import RunFolder
from .dials import Dialled, Dials, Source

MOST = 400  # pictures

Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all); raise to interrupt."""


@dataclass(frozen=True)
class Grid:
    """The dials' values, all combinations of which are drawn, and what they have in common."""

    content: tuple[float, ...] = (1.0,)
    style: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    common: Dials = field(default_factory=Dials)

    def __post_init__(self) -> None:
        count = len(self.content) * len(self.style) * len(self.seeds)
        if not 1 <= count <= MOST:
            raise PitError(f"Expected 1 to {MOST} pictures, got {count}; take fewer values or a lower count.")
        list(self.dials())

    def dials(self) -> Iterator[Dials]:
        """Row by row: a content for each row, a style for each column."""
        for content in self.content:
            for style in self.style:
                yield replace(self.common, content=content, style=style)


def draw_grid(
    renderer: Renderer,
    source: Source,
    grid: Grid,
    settings: RenderSettings,
    progress: Progress | None = None,
) -> list[list[Image.Image]]:
    """For each of the grid's dials a picture per seed. Raises PitError as `Source.dialled` and placing."""
    dials = list(grid.dials())
    made = []
    for number, each in enumerate(dials):

        def step(done: int, total: int, number: int = number) -> None:
            if progress is not None:
                progress("drawing", number * total + done, len(dials) * total)

        made.append(draw_under(renderer, source, source.dialled(each), settings, grid.seeds, step))
    return made


def draw_under(
    renderer: Renderer,
    source: Source,
    dialled: Dialled,
    settings: RenderSettings,
    seeds: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Pictures of the settings' prompt under a dialled LoRA, one for each seed."""
    lora = source.lora(dialled.factors, dialled.method)
    with renderer.under_loras([(lora, Strengths())] if lora.layers else []):
        return renderer.draw(settings, seeds=seeds, progress=progress)


def grid_sheet(pictures: Sequence[Sequence[Image.Image]], grid: Grid, title: str) -> Image.Image:
    """All pictures on one sheet: for each seed the contents from top to bottom, the styles side by side."""
    rows, columns = [], len(grid.style)
    for number, seed in enumerate(grid.seeds):
        for row, content in enumerate(grid.content):
            tiles = [
                Tile(pictures[row * columns + i][number], f"content {content:g}, style {style:g}")
                for i, style in enumerate(grid.style)
            ]
            rows.append(SheetRow([], tiles, "" if row else f"{title}, seed {seed}"))
    return contact_sheet(rows, columns=columns)


def write_grid(
    folder: RunFolder, pictures: Sequence[Sequence[Image.Image]], grid: Grid, title: str
) -> tuple[Path, list[Path]]:
    """The sheet and each picture as PNG files, numbered as the folder's next run; or nothing at all."""
    paths = []
    with folder.writing():
        for dials, made in zip(grid.dials(), pictures, strict=True):
            for seed, picture in zip(grid.seeds, made, strict=True):
                name = f"content-{dials.content:g}-style-{dials.style:g}-seed-{seed}.png"
                paths.append(folder.add(name))
                save_png(picture, paths[-1], {"pit b4m": title, "pit seed": str(seed)})
        sheet = folder.add("grid.png")
        save_png(grid_sheet(pictures, grid, title), sheet)
    return sheet, paths
