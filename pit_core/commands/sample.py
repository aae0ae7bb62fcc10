"""`pit sample` and `pit demo`: the main job."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
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
    Prior,
    Sdxl,
    SdxlConfig,
    given_files,
    load_model,
    named_model,
    plain_errors,
    progress_bars,
    with_shipped,
)

if TYPE_CHECKING:
    from ..concepts import Stack
    from ..sample import CutOut, LoraFile, Model, Moves, Output, Settings

Paths = list[Path]


class Solver(str, Enum):
    euler = "euler"
    heun = "heun"
    ab2 = "ab2"


@plain_errors
def sample(
    context: typer.Context,
    parts: Annotated[
        Paths,
        typer.Option(
            help="Part pictures or patterns, in order; with --random also folders.", show_default=False
        ),
    ] = [],  # noqa: B006 - typer reads it, nobody changes it
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out"),
    count: Annotated[
        int | None,
        typer.Option(help="Concepts of each set of parts; 8, or 1 with --random.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first concept; the others count up.")] = 0,
    random: Annotated[
        int | None,
        typer.Option(help="Try this many random sets of parts out of folders.", show_default=False),
    ] = None,
    as_sketch: Annotated[
        bool, typer.Option("--as-sketch", help="Turn the parts into sketches first.")
    ] = False,
    reference: Annotated[
        Paths, typer.Option(help="One picture, or four, that set the style.", show_default=False)
    ] = [],  # noqa: B006
    init: Annotated[
        Path | None,
        typer.Option(
            help="A concept to start from, with or without parts (see --strength).", show_default=False
        ),
    ] = None,
    mask: Annotated[
        Paths,
        typer.Option(
            help="Masks of --parts, --reference and --init, in that order: what is white stays, the rest "
            "becomes white paper.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    cut_out: Annotated[
        Path | None,
        typer.Option(
            help="Or a folder with a segmentation model: the subjects stay, the rest becomes white paper.",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="With --init: 0 keeps it, 1 forgets it; 0.6 by default.", show_default=False),
    ] = None,
    direction: Annotated[
        list[str],
        typer.Option(
            help="FILE:0.8, a direction and how far to move the concepts along it; several add up. "
            "miniature/thin_to_wide and so on are the miniature's.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    orthogonal: Annotated[
        bool, typer.Option("--orthogonal", help="Set several directions at right angles first.")
    ] = False,
    repeat: Annotated[
        Path | None, typer.Option(help="The record of a run to repeat.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="'miniature', unless files are named below.")] = "miniature",
    sdxl: Sdxl = None,
    sdxl_config: SdxlConfig = None,
    image_encoder: ImageEncoder = None,
    ip_adapter: Adapter = None,
    prior: Prior = None,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    prior_steps: Annotated[int, typer.Option(help="Steps of the prior.")] = 25,
    prior_guidance: Annotated[float, typer.Option(help="How closely the prior keeps to the parts.")] = 2.0,
    solver: Annotated[Solver, typer.Option(help="Of the prior.")] = Solver.euler,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the picture; 50, miniature 25.", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Of the picture; 5, miniature 3.", show_default=False)
    ] = None,
    weight: Annotated[
        float | None, typer.Option(help="Of the concept's tokens; 1.", show_default=False)
    ] = None,
    ip_lora: Annotated[
        list[str],
        typer.Option(
            help="An IP-LoRA, which makes the prompt heard: FILE or FILE:strength; again for another one. "
            "miniature/scene and miniature/sheet are the miniature's.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    prompt: Annotated[str | None, typer.Option(help="Text beside the parts.", show_default=False)] = None,
    negative: Annotated[
        str | None, typer.Option(help="What the picture should not be.", show_default=False)
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the pictures in pixels.", show_default=False)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures drawn at a time.", show_default=False)] = None,
) -> None:
    """Parts in, concepts out: pit sample --parts wing.png horns.png --count 8 --seed 7 --out DIR

    Writes each concept as PNG, a contact sheet, the sampled tokens, and a record that --repeat takes.
    """
    from .. import sample as run
    from ..miniature.assets import DIRECTIONS, IP_LORAS

    if repeat is not None:
        _refuse_all_but(context, ("repeat", "out", "device"))
        _tell(_repeat(repeat, out, device))
        return
    each = count if count is not None else 8 if random is None else 1
    matched = run.matched_paths
    request = run.Request(matched(parts), each, seed, matched(reference), init, random, matched(mask))
    request.check()
    if mask and cut_out is not None:
        raise PitError("--mask and --cut-out both say what to keep of the pictures; give one of them.")
    moves = run.read_moves(with_shipped(direction, DIRECTIONS), orthogonal).for_tokens()
    folder = run.RunFolder(out)
    files = given_files(
        sdxl=sdxl, image_encoder=image_encoder, ip_adapter=ip_adapter, prior=prior, sdxl_config=sdxl_config
    )
    named = named_model(model, files, device, dtype)
    prior_settings = run.PriorSettings(
        prior_steps, prior_guidance, solver.value, _strength(strength, init is not None)
    )
    changes = {
        "steps": steps,
        "guidance": guidance,
        "weight": weight,
        "prompt": prompt,
        "negative": negative,
        "size": None if size is None else (size, size),
        "batch": batch,
    }
    run.check_render(changes)
    run.read_jobs(request.jobs(_most_parts(named)))
    loras = [run.lora_file(each) for each in with_shipped(ip_lora, IP_LORAS)]
    cutter = _cut_out(cut_out, named)
    stack = load_model(named)
    jobs = request.jobs(stack.prior_info.max_crops)
    defaults = run.lora_defaults(stack.defaults, loras)
    settings = run.Settings(prior_settings, run.changed(defaults, changes), as_sketch)
    _tell(_run(stack, jobs, settings, folder, named, loras, moves, cutter))


@plain_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the first concept.")] = 7,
) -> None:
    """A first run with the parts that come with the pack, in half a minute."""
    from .. import sample as run

    folder = run.RunFolder(out)
    typer.echo(
        f"The pictures will be in {out.resolve()}: open {folder.path('contact-sheet.png').name} first."
    )
    shipped = Path(__file__).parents[1] / "miniature" / "parts"
    if not shipped.is_dir():
        raise PitError("The part pictures are missing from this installation; install the complete package.")
    named = named_model("miniature", {}, "cpu", Dtype.float32)
    stack = load_model(named)
    settings = run.Settings(run.PriorSettings(), stack.defaults)
    wings, ears, tail = (run.picture_files(shipped / kind)[0] for kind in ("wings", "ears", "tail"))
    first = run.Request([wings, ears, tail], 8, seed).jobs(3)
    _run(stack, first, settings, folder, named)
    several = run.Request([shipped], 3, seed, random=4).jobs(stack.prior_info.max_crops)
    _run(stack, several, settings, run.RunFolder(out), named)
    typer.echo(f"Done: {len(list(out.glob('*.png')))} pictures in {out.resolve()}")


def _repeat(record: Path, out: Path, device: str) -> Output:
    from .. import sample as run

    found = run.repeat_of(record)
    folder = run.RunFolder(out)
    model = found.model if device == "auto" else replace(found.model, device=device)
    if found.note:
        typer.echo(f"note: {found.note}", err=True)
    cut_out = _cut_out(found.cut_out, model)
    stack = load_model(model)
    run.check_same_weights(stack, found.hashes)
    return _run(stack, found.jobs, found.settings, folder, model, found.loras, found.moves, cut_out)


def _cut_out(folder: Path | None, model: Model) -> CutOut | None:
    from .. import sample as run

    return None if folder is None else run.load_cut_out(folder, run.checked_device(model.device))


def _refuse_all_but(context: typer.Context, allowed: Sequence[str]) -> None:
    """A record names everything, so an option that changed something would be silently ignored."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name not in allowed and source is not None and source.name == "COMMANDLINE":
            raise PitError(
                "--repeat takes parts and settings from the record alone, with --out and --device at most; "
                f"leave out {parameter.opts[0]}."
            )


def _run(
    stack: Stack,
    jobs: Sequence[Any],
    settings: Settings,
    folder: Any,
    model: Model,
    loras: Sequence[LoraFile] = (),
    moves: Moves | None = None,
    cut_out: CutOut | None = None,
) -> Output:
    from .. import sample as run

    for note in run.notes(stack, jobs, settings, loras, moves):
        typer.echo(f"note: {note}", err=True)
    with progress_bars() as stage:
        return run.run(
            stack,
            jobs,
            settings,
            folder,
            model=model,
            loras=loras,
            moves=moves,
            cut_out=cut_out,
            command=["pit", *sys.argv[1:]],
            stage=stage,
        )


def _tell(output: Output) -> None:
    names = (
        f"{output.concepts[0].name} to {output.concepts[-1].name}"
        if output.concepts[1:]
        else output.concepts[0].name
    )
    typer.echo(f"{output.sheet}: parts and concepts together")
    typer.echo(f"{output.folder}: {names}, {output.tokens.name}, {output.record.name}")


def _most_parts(model: Model) -> int:
    """The most parts that the model's prior was trained with, known before anything is loaded."""
    from ..ip_prior.checkpoint import recorded_max_crops
    from ..miniature.models import WEIGHTS

    return recorded_max_crops(model.files.prior if model.files else WEIGHTS / "ip_prior.safetensors")


def _strength(strength: float | None, has_init: bool) -> float:
    if strength is None:
        return 0.6 if has_init else 1.0
    return strength
