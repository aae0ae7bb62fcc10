"""`pit direction`: find, edit along and inspect semantic directions."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PitError
from .common import (
    Adapter,
    Device,
    Dtype,
    ImageEncoder,
    Precision,
    Sdxl,
    SdxlConfig,
    given_files,
    group,
    load_encoders,
    load_model,
    place_and_dtype,
    plain_errors,
    progress_bars,
    shipped_or_own,
    with_shipped,
)

if TYPE_CHECKING:
    from ..directions.direction import Direction
    from ..directions.run import Models

app = group("Semantic directions: what one pile of pictures has over another, as a slider.")

TOKEN_FILE = ".safetensors"


class Method(str, Enum):
    auto = "auto"
    mean = "mean"
    ridge = "ridge"


class Space(str, Enum):
    tokens = "tokens"
    clip = "clip"


@app.command("find")
@plain_errors
def find(
    first: Annotated[
        list[Path],
        typer.Option("--from", help="The first pile: pictures, a folder of them, or token files."),
    ],
    second: Annotated[list[Path], typer.Option("--to", help="The second pile, which step 1 leads to.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    method: Annotated[
        Method,
        typer.Option(help="mean is the paper's; ridge damps chance; auto asks held-out pictures."),
    ] = Method.auto,
    space: Annotated[
        Space, typer.Option(help="Where: tokens of the adapter, or the CLIP features it reads.")
    ] = Space.tokens,
    from_name: Annotated[
        str, typer.Option(help="What to call the first pile; its folder's name.", show_default=False)
    ] = "",
    to_name: Annotated[str, typer.Option(help="And the second.", show_default=False)] = "",
    image_encoder: ImageEncoder = None,
    ip_adapter: Adapter = None,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
) -> None:
    """The direction between two piles: pit direction find --from thin/ --to wide/ --out wide.safetensors

    Without --image-encoder and --ip-adapter, those of the miniature.
    """
    from ..directions.checkpoint import save_direction
    from ..directions.piles import Encoders, find_between, pile_of

    _refuse_suffix(out)
    one, two = pile_of(first, from_name), pile_of(second, to_name)
    given = given_files(image_encoder=image_encoder, ip_adapter=ip_adapter)
    encoders: Encoders | None = None
    if one.pictures or two.pictures or given:
        encoders = Encoders(*_encoders(given, device, dtype))
    with progress_bars() as stage:
        found = find_between(one, two, encoders, space=space.value, method=method.value, progress=stage)
    save_direction(out, found)
    _tell(found)
    typer.echo(f"{out}: written")


@app.command("edit")
@plain_errors
def edit(
    direction: Annotated[
        list[str], typer.Option(help="FILE:0.8, a direction and a step along it; several add up.")
    ],
    pictures: Annotated[
        list[Path], typer.Option(help="Pictures or patterns to edit.", show_default=False)
    ] = [],  # noqa: B006 - typer reads it, nobody changes it
    tokens: Annotated[
        Path | None, typer.Option(help="Or a token file, such as `pit sample` writes.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("edits"),
    sweep: Annotated[
        str, typer.Option(help="Factors of the steps, a column each: -1,-0.5,0,0.5,1 and so on.")
    ] = "0,1",
    mask: Annotated[
        str, typer.Option(help="Which tokens move, such as 0-7 or 0-7:0.5; all by default.")
    ] = "",
    orthogonal: Annotated[
        bool, typer.Option("--orthogonal", help="Set several directions at right angles first.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the first row's noise; the others count up.")] = 0,
    sdxl: Sdxl = None,
    sdxl_config: SdxlConfig = None,
    image_encoder: ImageEncoder = None,
    ip_adapter: Adapter = None,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the picture; 50, miniature 25.", show_default=False)
    ] = None,
) -> None:
    """Pictures along directions: pit direction edit --pictures hero.png --direction wide.safetensors:1

    Writes each picture, a labelled grid, and the tokens. Without model files, with the miniature.
    """
    from ..directions import run
    from ..directions.direction import fit_notes, notes
    from ..directions.moves import read_moves
    from ..directions.text import parse_steps
    from ..miniature.assets import DIRECTIONS
    from ..pictures import read_picture
    from ..runs import RunFolder, matched_paths

    if bool(pictures) == (tokens is not None):
        raise PitError("Expected either --pictures or --tokens, one of the two, to say what to edit.")
    moves = read_moves(with_shipped(direction, DIRECTIONS), orthogonal)
    wanted = run.Sweep(moves, parse_steps(sweep), mask, _seed(seed))
    folder = RunFolder(out)
    read = [read_picture(path) for path in matched_paths(pictures)]
    given = given_files(
        sdxl=sdxl, image_encoder=image_encoder, ip_adapter=ip_adapter, sdxl_config=sdxl_config
    )
    models = _models(given, device, dtype, steps)
    for each, _ in wanted.moves.moves:
        for note in (*notes(each), *fit_notes(each, models.adapter.content_hash)):
            typer.echo(f"note: {each.title}: {note}", err=True)
    with progress_bars() as stage:
        if tokens is None:
            found, source = run.encode_pictures(models, read, stage)
            output = run.run(models, found, wanted, folder, source=source, progress=stage)
        else:
            output = run.run(models, run.read_tokens(models, tokens), wanted, folder, progress=stage)
    typer.echo(f"{output.grid}: every step beside each other")
    typer.echo(f"{out}: {output.pictures[0].name} to {output.pictures[-1].name}, {output.tokens.name}")


@app.command("inspect")
@plain_errors
def inspect(
    files: Annotated[list[Path], typer.Argument(help="Direction files, ours or bare tensors.")],
    picture: Annotated[Path | None, typer.Option(help="A PNG to draw them in.", show_default=False)] = None,
) -> None:
    """What direction files hold, how well they hold, and how alike several of them are."""
    from ..directions.checkpoint import load_direction
    from ..directions.picture import direction_picture, similarities
    from ..miniature.assets import DIRECTIONS
    from ..pictures import save_png
    from ..runs import matched_paths

    named = [shipped_or_own(path, DIRECTIONS) for path in files]
    found = [load_direction(path) for path in matched_paths(named)]
    for each in found:
        _tell(each)
    for line in similarities(found):
        typer.echo(line)
    if picture is not None:
        save_png(direction_picture(found), picture)
        typer.echo(f"{picture}: written")


def _tell(direction: Direction) -> None:
    from ..directions.direction import describe, notes

    typer.echo(describe(direction))
    for note in notes(direction):
        typer.echo(f"note: {note}", err=True)


def _refuse_suffix(out: Path) -> None:
    """Before the work rather than after it."""
    if out.suffix != TOKEN_FILE:
        raise PitError(f"Directions are saved as safetensors; name the file {out.stem}.safetensors.")


def _seed(seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise PitError(f"Expected a seed from 0 to 2^32 - 1, got {seed}.")
    return seed


# models


def _encoders(given: dict[str, Path], device: str, dtype: Dtype) -> tuple[Any, Any]:
    """(image encoder, adapter): the named ones, or the miniature's."""
    if given:
        _refuse_gaps(given, ("image_encoder", "ip_adapter"))
    return load_encoders(given, device, dtype)


def _models(given: dict[str, Path], device: str, dtype: Dtype, steps: int | None) -> Models:
    from .. import sample as run
    from ..directions.run import Models
    from ..render import RenderSettings, load_renderer

    place, kind = place_and_dtype(bool(given), device, dtype)
    run.check_render({"steps": steps})
    if not given:
        stack = load_model(run.Model("miniature", None, place, kind))
        settings = run.changed(stack.defaults, {"steps": steps})
        return Models(stack.encoder, stack.adapter, stack.renderer, settings)
    _refuse_gaps(given, ("sdxl", "image_encoder", "ip_adapter"))
    encoder, adapter = _encoders(given, device, dtype)
    renderer = load_renderer(
        given["sdxl"],
        adapter,
        config=given.get("sdxl_config"),
        device=run.checked_device(place),
        dtype=run.DTYPES[kind],
    )
    return Models(encoder, adapter, renderer, run.changed(RenderSettings(), {"steps": steps}))


def _refuse_gaps(given: dict[str, Path], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in given]:
        options = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise PitError(f"Your own models need all files; {options} is missing.")
