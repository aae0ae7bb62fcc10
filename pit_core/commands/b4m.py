"""`pit b4m`: content and style of LoRA files joined, taken apart, looked into, and drawn."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PitError
from .common import (
    Device,
    Dtype,
    Precision,
    Sdxl,
    SdxlConfig,
    given_files,
    group,
    place_and_dtype,
    plain_errors,
    progress_bars,
    without_loading_bars,
)

if TYPE_CHECKING:
    from ..b4m.dials import Source
    from ..render import Renderer, RenderSettings

app = group("Content and style in one LoRA: join them, take them apart, look into them, draw with them.")

TOKEN_FILE = ".safetensors"


class Mode(str, Enum):
    auto = "auto"
    splice = "splice"
    sum = "sum"


Files = Annotated[list[Path], typer.Argument(help="A content and a style file; or one entity of both.")]
Swap = Annotated[bool, typer.Option("--swap", help="Content is in the up halves, style in the down halves.")]
JoinMode = Annotated[
    Mode, typer.Option(help="auto: splice what was made for each other, else add up and say so.")
]
Blocks = Annotated[
    str, typer.Option(help="B-LoRA, or shares such as 'up_blocks.0: 1 0; *: 0' (content, then style).")
]
Factor = Annotated[Dtype, typer.Option(help="auto keeps every bit.")]


@app.command("merge")
@plain_errors
def merge(
    files: Files,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write, for any LoRA loader.")],
    content: Annotated[float, typer.Option(help="How much the content counts.")] = 1.0,
    style: Annotated[float, typer.Option(help="How much the style counts.")] = 1.0,
    base: Annotated[float, typer.Option(help="How much the frozen part counts.")] = 1.0,
    gains: Annotated[
        str | None,
        typer.Option(
            help="Instead: strengths of all four quadrants, 'UL,UR,DL,DR', at twice the rank.",
            show_default=False,
        ),
    ] = None,
    mode: JoinMode = Mode.auto,
    swap: Swap = False,
    blocks: Blocks = "",
    dtype: Factor = Dtype.auto,
) -> None:
    """One LoRA out of two: pit b4m merge content.safetensors style.safetensors --out joined.safetensors

    Of one entity alone, the same at other strengths.
    """
    from ..b4m.blocks import parse_blocks
    from ..b4m.dials import Dials
    from ..b4m.merge import quadrant_lora
    from ..lora.formats import save_lora

    _refuse_target(out, files)
    four = None if gains is None else _numbers("--gains", gains, 4)
    if four and ((content, style, base) != (1, 1, 1) or blocks):
        raise PitError("--gains says everything; leave out --content, --style, --base and --blocks with it.")
    dials = Dials(content, style, base, swap, mode.value, parse_blocks(blocks))
    source = _source(files)
    dialled = source.dialled(dials)
    if four:
        if dialled.method == "sum":
            raise PitError("--gains weigh the quadrants of a splice, but these files can only be added up.")
        dialled = dialled._replace(
            factors=quadrant_lora(dialled.whole, gains=(four[0], four[1], four[2], four[3]))
        )
    _note(dialled.notes)
    if not dialled.factors:
        raise PitError("All strengths are 0, so there is nothing to write.")
    made = {"gains": gains} if gains else {}
    save_lora(out, source.saved(dialled, dials), dtype=_torch_dtype(dtype), metadata=made)
    typer.echo(f"{out}: {source}, {dialled.method}, {_size(dialled.factors)}")


@app.command("split")
@plain_errors
def split(
    file: Annotated[Path, typer.Argument(help="An entity, or any B4M file.")],
    out: Annotated[Path, typer.Option(help="Folder for the four files.")],
    swap: Swap = False,
    dtype: Factor = Dtype.auto,
) -> None:
    """One entity as four LoRAs, which add up to it: base, content, style, and both (where the two meet)."""
    from ..b4m.merge import split_entity
    from ..lora.formats import save_lora

    source = _source([file])
    whole, _, note = source.join()
    _note([note] if note else [])
    quadrants = split_entity(whole, swap)
    for name, factors in quadrants._asdict().items():
        path = out / f"{file.stem}_{name}.safetensors"
        save_lora(path, source.lora(factors, "entity"), dtype=_torch_dtype(dtype))
        typer.echo(f"{path}: {_size(factors)}")


@app.command("inspect")
@plain_errors
def inspect(files: Files) -> None:
    """What files hold, how strong each quadrant is in which block, and whether two fit each other."""
    from ..b4m.info import basis_of, quadrant_norms

    source = _source(files)
    typer.echo(source.report())
    for lora, factors in zip((source.content, source.style), source.factors, strict=True):
        if lora is None:
            continue
        _refuse_convolutions(factors)
        typer.echo(f"\n{lora.name}: {basis_of(factors, lora.metadata)}")
        norms = quadrant_norms(factors)
        width = max(5, *map(len, norms))
        head = "".join(f"{name:>11}" for name in ("base", "content", "style", "both"))
        typer.echo(f"{'block':{width}}{head}")
        for block, found in norms.items():
            typer.echo(f"{block:{width}}" + "".join(f"{number:11.4g}" for number in found))


@app.command("sample")
@plain_errors
def sample(
    files: Files,
    prompt: Annotated[str, typer.Option(help="What to draw, in the words of both trainings.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out"),
    content: Annotated[str, typer.Option(help="How much the content counts; '0,0.5,1' for rows.")] = "1",
    style: Annotated[str, typer.Option(help="How much the style counts; '0,0.5,1' for columns.")] = "1",
    base: Annotated[float, typer.Option(help="How much the frozen part counts.")] = 1.0,
    count: Annotated[int, typer.Option(help="Pictures at each setting.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first picture; the others count up.")] = 0,
    mode: JoinMode = Mode.auto,
    swap: Swap = False,
    blocks: Blocks = "",
    negative: Annotated[
        str | None, typer.Option(help="What the picture should not be.", show_default=False)
    ] = None,
    sdxl: Sdxl = None,
    sdxl_config: SdxlConfig = None,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the picture; 50, miniature 25.", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Of the picture; 5, miniature 3.", show_default=False)
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the pictures in pixels.", show_default=False)
    ] = None,
) -> None:
    """Pictures over content and style: pit b4m sample content.safetensors style.safetensors --prompt "..."

    Writes each picture and a grid of them all. Without --sdxl, with the miniature.
    """
    from ..b4m.blocks import parse_blocks
    from ..b4m.dials import Dials
    from ..b4m.grid import Grid, draw_grid, write_grid
    from ..runs import RunFolder
    from ..sample import check_render

    common = Dials(base=base, swap=swap, mode=mode.value, blocks=parse_blocks(blocks))
    if not 0 <= seed < 2**32 or not 1 <= count <= 1000:
        raise PitError(f"Expected a seed from 0 to 2^32 - 1 and a count from 1 to 1000, got {seed}, {count}.")
    grid = Grid(
        _numbers("--content", content), _numbers("--style", style), tuple(range(seed, seed + count)), common
    )
    changes = {
        "prompt": prompt,
        "negative": negative,
        "steps": steps,
        "guidance": guidance,
        "size": None if size is None else (size, size),
    }
    check_render(changes)
    folder = RunFolder(out)
    source = _source(files)
    whole, method, note = source.join(swap, mode.value)
    _note([note] if note else [])
    renderer, settings = _renderer(given_files(sdxl=sdxl, sdxl_config=sdxl_config), device, dtype, changes)
    warning = renderer.placed(source.lora(whole, method)).warning
    _note([warning] if warning else [])
    with progress_bars() as stage:
        pictures = draw_grid(renderer, source, grid, settings, stage)
    sheet, paths = write_grid(folder, pictures, grid, f"{source}: {prompt}")
    typer.echo(f"{sheet}: content by row, style by column")
    typer.echo(f"{out}: {paths[0].name} to {paths[-1].name}")


def _source(files: list[Path]) -> Source:
    from ..b4m.dials import load_source

    if len(files) > 2:
        raise PitError(f"Expected a content and a style file, or one entity, got {len(files)} files.")
    return load_source(*files)


def _renderer(
    given: dict[str, Path], device: str, dtype: Dtype, changes: dict[str, Any]
) -> tuple[Renderer, RenderSettings]:
    """SDXL from the named files, or the miniature; and the settings that suit it."""
    from .. import sample as run
    from ..render import RenderSettings, load_renderer

    if given and "sdxl" not in given:
        raise PitError("--sdxl-config goes with --sdxl, which is missing.")
    place, kind = place_and_dtype(bool(given), device, dtype)
    options: dict[str, Any] = {"device": run.checked_device(place), "dtype": run.DTYPES[kind]}
    without_loading_bars()
    if given:
        renderer = load_renderer(given["sdxl"], None, config=given.get("sdxl_config"), **options)
        return renderer, run.changed(RenderSettings(), changes)
    from ..miniature.models import load_stack

    stack = load_stack(**options)
    return stack.renderer, run.changed(stack.defaults, changes)


def _numbers(option: str, text: str, count: int | None = None) -> tuple[float, ...]:
    """ "0, 0.5, 1" -> (0.0, 0.5, 1.0)."""
    try:
        found = tuple(float(number) for number in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)) or (count and len(found) != count):
        wanted = f"{count} numbers" if count else "numbers"
        raise PitError(f"Expected {option} to be {wanted} with commas between them, got '{text[:80]}'.")
    return found


def _refuse_target(out: Path, files: list[Path]) -> None:
    """Before the work rather than after it."""
    if out.suffix != TOKEN_FILE:
        raise PitError(f"LoRAs are saved as safetensors; name the file {out.stem}.safetensors.")
    if any(out.exists() and file.exists() and out.samefile(file) for file in files):
        raise PitError(f"'{out.name}' is one of the files being merged; choose another target.")


def _refuse_convolutions(factors: Any) -> None:
    if strange := [name for name, (down, up) in factors.items() if down.dim() != 2 or up.dim() != 2]:
        raise PitError(
            f"The layer '{strange[0]}' is a convolution, which has no quadrants; see pit lora inspect."
        )


def _torch_dtype(dtype: Dtype) -> Any:
    import torch

    return None if dtype is Dtype.auto else getattr(torch, dtype.value)


def _note(notes: Any) -> None:
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def _size(factors: Any) -> str:
    ranks = sorted({layer.rank for layer in factors.values()})
    return f"rank {' and '.join(map(str, ranks))}, {len(factors)} layers"
