"""`pit miniature`: the small trained stack that comes with the pack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import group, plain_errors, progress_bars, without_loading_bars

app = group("The small trained stack that comes with the pack.")


@app.command("train")
@plain_errors
def train(
    stage: Annotated[
        str | None, typer.Argument(help="One stage; without it all that ship, in order.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and logs.")] = Path("runs/miniature"),
    minutes: Annotated[float | None, typer.Option(help="Stop after that time.", show_default=False)] = None,
    processes: Annotated[int, typer.Option(help="Processes that share each batch.")] = 1,
    from_shipped: Annotated[
        bool, typer.Option("--from-shipped", help="Let the shipped weights stand in for untrained stages.")
    ] = False,
) -> None:
    """Train the miniature from nothing, stage by stage; goes on where an earlier run stopped."""
    from ..miniature.train import main as train

    for name, result in train(stage, out, minutes, processes, from_shipped=from_shipped):
        typer.echo(f"{name}: {'finished' if result.finished else 'stopped'} at step {result.step}")


@app.command("export")
@plain_errors
def export(
    stage: Annotated[
        str | None, typer.Argument(help="One stage; all that are trained without it.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the training.")] = Path("runs/miniature"),
    weights: Annotated[
        Path | None, typer.Option(help="Where to; the pack's own weights by default.", show_default=False)
    ] = None,
) -> None:
    """Write the trained miniature as fp16 files in the released layouts, with their manifest."""
    from ..miniature.export import export
    from ..miniature.models import WEIGHTS

    manifest = export(out, weights or WEIGHTS, stage)
    for name, entry in manifest["files"].items():
        typer.echo(f"{name}: {', '.join(_made(entry))}")
    typer.echo(f"together {manifest['bytes'] / 1e6:.1f} MB")


def _made(entry: dict[str, Any]) -> list[str]:
    stages = [f"{stage['steps']} steps {stage['stage']}" for stage in entry["stages"]]
    piles = [f"piles of {entry['piles']['pictures']}"] if "piles" in entry else []
    return [f"{entry['bytes'] / 1e6:.2f} MB", *stages, *piles]


@app.command("directions")
@plain_errors
def directions(
    pile: Annotated[int, typer.Option(help="Pictures a side that each direction is found from.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the piles.")] = 51,
    piles: Annotated[
        Path | None, typer.Option(help="A new folder to keep the piles' pictures in.", show_default=False)
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder; the pack's own weights by default.", show_default=False)
    ] = None,
) -> None:
    """Find the directions that ship with the exported miniature, between piles that it draws."""
    from ..miniature.assets import DIRECTIONS, WEIGHTS
    from ..miniature.directions import export_directions
    from ..miniature.models import load_stack

    folder = weights or WEIGHTS
    without_loading_bars()
    stack = load_stack(folder)
    with progress_bars() as stage:
        manifest = export_directions(stack, folder, piles=piles, count=pile, seed=seed, progress=stage)
    for name in DIRECTIONS.values():
        figures = manifest["files"][name]["figures"]
        typer.echo(f"{name}: {', '.join(f'{key} {value:.3f}' for key, value in figures.items())}")


@app.command("accept")
@plain_errors
def accept(
    count: Annotated[int, typer.Option(help="Held-out critters.")] = 200,
    seed: Annotated[int, typer.Option()] = 0,
    weights: Annotated[
        Path | None, typer.Option(help="Folder; the pack's own weights by default.", show_default=False)
    ] = None,
) -> None:
    """Note in the manifest what the exported weights' pictures show: parts kept, valid creatures."""
    from ..evaluate.concepts import accepted
    from ..miniature.export import note_figures
    from ..miniature.models import WEIGHTS, load_reader, load_stack

    folder = weights or WEIGHTS
    figures = accepted(load_stack(folder), load_reader("judge", folder), count=count, seed=seed)
    note_figures(figures, folder)
    for name, found in figures.items():
        typer.echo(f"{name}: {found['parts_kept']:.3f} of the parts kept, {found['valid']:.3f} valid")
