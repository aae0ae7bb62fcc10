"""The `pit` command: puts the commands of `commands/` together.

Everything heavy is imported inside the commands, so that `pit --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import typer

from . import __version__
from .commands import b4m, data, diptych, direction, evaluate, files, lora, miniature, sample, train

MANY = ("--parts", "--reference", "--mask", "--direction", "--from", "--to", "--pictures")
"""Options that take several values after one name, as in `--parts wing.png horns.png`."""

app = typer.Typer(
    name="pit",
    help="Design concepts out of parts: pictures of parts in, pictures of whole concepts out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _command in (sample.sample, sample.demo, diptych.diptych, files.convert, files.download, files.verify):
    app.command()(_command)
app.add_typer(data.app, name="data")
app.add_typer(direction.app, name="direction")
app.add_typer(train.app, name="train")
app.add_typer(miniature.app, name="miniature")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(lora.app, name="lora")
app.add_typer(b4m.app, name="b4m")


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script; exits with 0, 1 after a no, 2 for a mistake in the input, 130 when interrupted."""
    _print_any_name()
    given = list(sys.argv[1:] if arguments is None else arguments)
    app(args=several_values(given), prog_name="pit")


def _print_any_name() -> None:
    """What a console or a file cannot show of a path is printed as an escape, instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def several_values(arguments: Sequence[str]) -> list[str]:
    """`--parts a b` -> `--parts a --parts b`; everything else as it is."""
    expanded: list[str] = []
    option, fresh = "", False
    for argument in arguments:
        if argument.startswith("-") and argument != "-":
            name = argument.split("=", 1)[0]
            option, fresh = (name, "=" not in argument) if name in MANY else ("", False)
        elif option and not fresh:
            expanded.append(option)
        else:
            fresh = False
        expanded.append(argument)
    return expanded


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Design concepts out of parts: pictures of parts in, pictures of whole concepts out."""


if __name__ == "__main__":
    main()
