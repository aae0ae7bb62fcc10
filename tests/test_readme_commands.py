"""Every `pit` command of the README exists, with its options, and names files where downloads put them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import typer

from pit_core.cli import app, several_values
from pit_core.download import RELEASES

SHELLS = ("", "sh", "bash", "console", "bat", "powershell")
INTO = "models"  # where `pit download` puts things unless told otherwise
MODELS = ("sdxl", "sdxl_config", "image_encoder", "ip_adapter", "prior")
WRITTEN = ("out", "into", "target")
UsageError: Any = typer.BadParameter.__base__


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """What stands after `pit ` in code blocks, tables and the text, and whether it is meant to be typed."""
    blocks = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for block in blocks.finditer(text):
        lines = re.sub(r"[\\^]\n", " ", block[2]).splitlines() if block[1] in SHELLS else []
        for piece in (piece for line in lines for piece in re.split(r"&&|;", line)):
            if typed := re.match(r"\s*(?:[$>] )?(?:\S*[\\/])?pit(?:\.exe)? (.*)", piece):
                yield typed[1], True
    for line in blocks.sub("", text).splitlines():
        yield from ((found, line.startswith("|")) for found in re.findall(r"`pit ([^`]+)`", line))


def problem(line: str, typed: bool = True) -> str | None:
    """What is wrong with the words after `pit`. In the text they may be the start of a command."""
    try:
        context = _parsed(several_values(shlex.split(line, comments=True)))
    except typer.Exit:  # --version
        return None
    except UsageError as error:
        incomplete = type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError")
        return None if incomplete and not typed else error.format_message()
    name = context.params.get("name")
    if context.info_name == "download" and name and not str(name).isupper() and name not in RELEASES:
        return f"there is no release named {name}"
    found = [_misplaced(option, value) for option, value in _values(context)] if typed else []
    return next((each for each in found if each), None)


def _parsed(words: list[str]) -> Any:
    """The context of the innermost command, with its parameters' values; raises UsageError."""
    command, context, name = typer.main.get_command(app), None, "pit"
    while True:
        context = command.make_context(name, words, parent=context)
        if not hasattr(command, "get_command"):
            return context
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])


def _values(context: Any) -> Iterator[tuple[str, str]]:
    """The texts and paths on the command line that name what is there already, by parameter."""
    for option, value in context.params.items():
        if context.get_parameter_source(option).name == "COMMANDLINE" and option not in WRITTEN:
            values = value if isinstance(value, list | tuple) else [value]
            yield from ((option, str(each)) for each in values if isinstance(each, str | Path))


def _misplaced(option: str, value: str) -> str | None:
    """A released file or folder that is not where its download lies."""
    path = PurePosixPath(value.replace("\\", "/"))
    released = {PurePosixPath(file).name for release in RELEASES.values() for file in release.files}
    released -= {"config.json", "model.safetensors"}
    ours = path.parts[:1] == (INTO,)
    if not ours and (path.name in released or (option in MODELS and not path.suffix)):
        return f"{value} is not where a download puts it"
    return f"no download brings {value}" if ours and not _brought(path) else None


def _brought(path: PurePosixPath) -> bool:
    release = RELEASES.get(path.parts[1]) if len(path.parts) > 1 else None
    if release is None:
        return False
    inner = PurePosixPath(*path.parts[2:])
    if release.folder is not None or inner == PurePosixPath():
        return True
    return any(inner == file or inner in file.parents for file in map(PurePosixPath, release.files))


def test_every_command_of_the_readme_works(root: Path) -> None:
    found = list(commands((root / "README.md").read_text("utf-8")))
    assert len(found) > 5
    assert [f"pit {line}: {wrong}" for line, typed in found if (wrong := problem(line, typed))] == []


def test_every_file_of_the_repository_that_a_command_names_is_there(root: Path) -> None:
    text = (root / "README.md").read_text("utf-8")
    named = [word for line, _ in commands(text) for word in line.split() if word.startswith("docs/")]
    assert [path for path in named if not (root / path).exists()] == []


def test_commands_are_found_in_blocks_tables_and_text() -> None:
    text = (
        "```sh\nmake demo\npit sample --parts a.png \\\n    --count 2  # two\ncd x && pit demo\n```\n"
        "```bat\n.venv\\Scripts\\pit demo\n```\n```text\npit is a word here\n```\n"
        "| random | `pit sample --random 3`, or so |\n\nThe `pit` command; `pit verify` checks.\n"
    )
    assert [(line.split("  #")[0].split(), typed) for line, typed in commands(text)] == [
        (["sample", "--parts", "a.png", "--count", "2"], True),
        (["demo"], True),
        (["demo"], True),
        (["sample", "--random", "3"], True),
        (["verify"], False),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("smaple --parts a.png", "smaple"),
        ("sample --partz a.png", "--partz"),
        ("demo wing.png", "wing.png"),
        ("train", ""),
        ("train ip-adapter", "--config"),
        ("download plush-prior", "no release named plush-prior"),
        ("verify --prior characters/prior.ckpt", "characters/prior.ckpt is not where"),
        ("verify --sdxl sdxl", "sdxl is not where"),
        ("verify --prior models/characters-prior/cfg.yml", "no download brings models/characters-prior"),
        ("verify --prior models/characters/prior.ckpt", "no download brings models/characters/prior.ckpt"),
        ("convert prior.ckpt prior.safetensors", "prior.ckpt is not where"),
    ],
)
def test_wrong_lines_are_found(line: str, words: str) -> None:
    assert words in (problem(line) or pytest.fail("let pass"))


@pytest.mark.parametrize(
    "line",
    [
        "sample --parts wing.png horns.png --count 8 --seed 7 --out concepts  # eight",
        "sample --sdxl my.safetensors --sdxl-config models/sdxl-config --parts parts/*.png",
        "verify --image-encoder models/image-encoder-vit-h --prior models/toys-prior/prior.ckpt",
        "convert models/toys-prior/prior.ckpt toys.safetensors",
        "download toys-prior",
        "--version",
    ],
)
def test_right_lines_pass(line: str) -> None:
    assert problem(line) is None


def test_the_text_may_name_the_start_of_a_command() -> None:
    for line in ("train ip-adapter", "download NAME", "miniature", "sample --parts ..."):
        assert problem(line, typed=False) is None
    assert "--repet" in (problem("sample --repet", typed=False) or "")
