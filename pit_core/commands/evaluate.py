"""`pit evaluate`: measured on the miniature's world."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import group, plain_errors, shipped_or_own

if TYPE_CHECKING:
    from torch.nn import Module

    from ..concepts import Stack

app = group("Measure the methods on the miniature's world.")


@app.command("concepts")
@plain_errors
def concepts(
    count: Annotated[int, typer.Option(help="Held-out critters.")] = 200,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the table and pictures.", show_default=False)
    ] = None,
) -> None:
    """Parts kept and valid creatures: the IP-Prior against averaging and concatenating tokens."""
    from ..evaluate import concepts as table

    rows = table.run(
        *_measured(),
        count=count,
        seed=seed,
        out=out,
        progress=_say,
    )
    typer.echo(table.table(rows))


@app.command("directions")
@plain_errors
def directions(
    attribute: Annotated[
        list[str], typer.Option(help="build, style or scene; all by default.", show_default=False)
    ] = [],  # noqa: B006 - typer reads it, nobody changes it
    count: Annotated[int, typer.Option(help="Held-out critters.")] = 100,
    pile: Annotated[int, typer.Option(help="Pictures a side that each direction is found from.")] = 50,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the table and pictures.", show_default=False)
    ] = None,
) -> None:
    """An attribute against the step along its direction, found in IP+ space and in CLIP's."""
    from ..evaluate import directions as table
    from ..miniature.attributes import ATTRIBUTES

    rows = table.run(
        *_measured(),
        attributes=attribute or tuple(ATTRIBUTES),
        count=count,
        seed=seed,
        pile=pile,
        out=out,
        progress=_say,
    )
    typer.echo(table.table(rows))


@app.command("scenes")
@plain_errors
def scenes(
    ip_lora: Annotated[Path, typer.Option(help="The IP-LoRA to measure; miniature/scene ships.")],
    count: Annotated[int, typer.Option(help="Held-out critters.")] = 200,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the table and pictures.", show_default=False)
    ] = None,
) -> None:
    """A scene that the prompt names, over the image weight: the adapter alone, and with an IP-LoRA."""
    from ..evaluate import scenes as table
    from ..lora.formats import load_lora
    from ..miniature.assets import IP_LORAS

    lora = load_lora(shipped_or_own(ip_lora, IP_LORAS))
    rows = table.run(
        *_measured(),
        lora,
        count=count,
        seed=seed,
        out=out,
        progress=_say,
    )
    typer.echo(table.table(rows))


@app.command("b4m")
@plain_errors
def b4m(
    weights: Annotated[Path, typer.Option(help="Folder with b4m_content_1.safetensors and the others.")],
    pair: Annotated[
        list[str],
        typer.Option(help="Content-style, such as 1-2; all six by default.", show_default=False),
    ] = [],  # noqa: B006 - typer reads it, nobody changes it
    count: Annotated[int, typer.Option(help="Pictures of each pair and method.")] = 100,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the tables and pictures.", show_default=False)
    ] = None,
) -> None:
    """A critter in a surface style, in new scenes: B4M spliced and joined against ordinary LoRAs."""
    from ..evaluate import b4m as table

    pairs = [table.parse_pair(each) for each in pair] or table.PAIRS
    rows = table.run(*_measured(), weights, pairs=pairs, count=count, seed=seed, out=out, progress=_say)
    typer.echo(table.table(rows))


@app.command("diptych")
@plain_errors
def diptych(
    count: Annotated[int, typer.Option(help="Held-out critters.")] = 100,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the table and pictures.", show_default=False)
    ] = None,
) -> None:
    """The subject kept and the scene followed over Diptych Prompting's strength, cut out and not."""
    from ..evaluate import diptych as table
    from ..miniature.flux_stack import load_flux
    from ..miniature.models import load_reader

    model, _ = load_flux()
    rows = table.run(model, load_reader("judge"), count=count, seed=seed, out=out, progress=_say)
    typer.echo(table.table(rows))


def _measured() -> tuple[Stack, Module]:
    """The miniature, and the reader that judges its pictures."""
    from ..miniature.models import load_reader, load_stack

    return load_stack(), load_reader("judge")


def _say(text: str) -> None:
    typer.echo(text, err=True)
