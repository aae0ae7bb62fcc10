"""`pit convert`, `pit download` and `pit verify`: model files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import PitError
from .common import (
    Adapter,
    Device,
    Dtype,
    ImageEncoder,
    Precision,
    Prior,
    Sdxl,
    SdxlConfig,
    given_files,
    load_model,
    place_and_dtype,
    plain_errors,
    without_loading_bars,
)


@plain_errors
def convert(
    source: Annotated[Path, typer.Argument(help="prior.ckpt (cfg.yaml beside it), or an IP-Adapter .bin.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    dtype: Annotated[Dtype, typer.Option(help="auto keeps every bit.")] = Dtype.auto,
    config: Annotated[
        Path | None, typer.Option(help="The prior's cfg.yaml, where it lies elsewhere.", show_default=False)
    ] = None,
) -> None:
    """An IP-Prior or IP-Adapter as one safetensors file, which carries its settings."""
    from ..convert import convert_file

    typer.echo(convert_file(source, target, None if dtype is Dtype.auto else dtype.value, config))


@plain_errors
def download(
    name: Annotated[str | None, typer.Argument(help="What to fetch.", show_default=False)] = None,
    into: Annotated[Path, typer.Option(help="Folder to put it in.")] = Path("models"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    server: Annotated[
        str | None, typer.Option(help="Another server with the Hub's layout.", hidden=True)
    ] = None,
) -> None:
    """Fetch released model files; without a name, list what there is. Nothing is fetched unasked."""
    from ..download import HUB, RELEASES
    from ..download import download as fetch

    if name is None:
        width = max(map(len, RELEASES))
        for key, release in RELEASES.items():
            typer.echo(f"{key:{width}}  {release.about}")
        return
    paths = fetch(
        name, into, confirm=lambda plan: _agreed(plan, yes), base_url=server or HUB, tell=typer.echo
    )
    if not paths:
        typer.echo("Nothing was downloaded.")
        raise typer.Exit(1)
    typer.echo("\n".join(map(str, paths)))


def _agreed(plan: str, yes: bool) -> bool:
    typer.echo(plan)
    if yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        raise PitError("Nothing was downloaded: there is no terminal to ask on; add --yes to agree to it.")
    return typer.confirm("Go on?")


@plain_errors
def verify(
    sdxl: Sdxl = None,
    sdxl_config: SdxlConfig = None,
    image_encoder: ImageEncoder = None,
    ip_adapter: Adapter = None,
    prior: Prior = None,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the picture; 10, miniature 25.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the picture verify.png.", show_default=False)
    ] = None,
) -> None:
    """Check model files and print a report for a bug report; without files, check the miniature.

    Exit code 0 when everything is in order, 2 when something is not.
    """
    from .. import sample as run
    from .. import verify as check

    given = given_files(
        sdxl=sdxl, image_encoder=image_encoder, ip_adapter=ip_adapter, prior=prior, sdxl_config=sdxl_config
    )
    place, kind = place_and_dtype(bool(given), device, dtype)
    if given:
        without_loading_bars()
        report = check.verify(
            given, out=out, steps=steps, device=run.checked_device(place), dtype=run.DTYPES[kind]
        )
    else:
        stack = load_model(run.Model("miniature", None, place, kind))
        report = check.verify_stack(stack, out=out, steps=steps)
    typer.echo(str(report))
    if report.picture is not None:
        typer.echo(f"The picture: {report.picture}")
    if not report.ok:
        raise typer.Exit(2)
