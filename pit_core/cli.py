"""The `pit` command: wires the rest together, and turns errors into one sentence and exit code 2.

Everything heavy is imported inside the commands, so that `pit --help` answers at once.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from functools import wraps
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from . import __version__
from .errors import PitError

if TYPE_CHECKING:
    from .concepts import Stack
    from .sample import Model, Output, Settings

Command = TypeVar("Command", bound=Callable[..., Any])

MANY = ("--parts", "--reference")
"""Options that take several values after one name, as in `--parts wing.png horns.png`."""

app = typer.Typer(
    name="pit",
    help="Design concepts out of parts: pictures of parts in, pictures of whole concepts out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
train_app = typer.Typer(no_args_is_help=True, help="Train models on your own data.", rich_markup_mode=None)
miniature_app = typer.Typer(
    no_args_is_help=True, help="The small trained stack that comes with the pack.", rich_markup_mode=None
)
evaluate_app = typer.Typer(
    no_args_is_help=True, help="Measure the methods on the miniature's world.", rich_markup_mode=None
)
app.add_typer(train_app, name="train")
app.add_typer(miniature_app, name="miniature")
app.add_typer(evaluate_app, name="evaluate")


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Solver(str, Enum):
    euler = "euler"
    heun = "heun"
    ab2 = "ab2"


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


def plain_errors(command: Command) -> Command:
    """What is wrong with the input is said in one sentence on stderr, without a traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with _plain_warnings():
                return command(*args, **kwargs)
        except PitError as error:
            raise _failed(str(error)) from None
        except (KeyboardInterrupt, typer.Abort):  # the latter at a question
            typer.echo("pit: interrupted.", err=True)
            raise typer.Exit(130) from None
        except OSError as error:
            named = f"'{error.filename}': " if error.filename else ""
            raise _failed(f"{named}{error.strerror or error}.") from None
        except (MemoryError, RuntimeError) as error:
            if not _is_memory_full(error):
                raise
            raise _failed(
                "The memory is full; try --batch 1, --dtype float16, or a smaller --size."
            ) from None

    return wrapped  # type: ignore[return-value]


def _is_memory_full(error: Exception) -> bool:
    """On the CPU torch says so in words alone, which differ between systems."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "DefaultCPUAllocator" in str(error)


def _failed(sentence: str) -> typer.Exit:
    typer.echo(f"pit: {sentence}", err=True)
    return typer.Exit(2)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """The pack's own warnings as one line; other libraries' do not concern the user."""

    def show(message: Warning | str, category: type[Warning], *_rest: Any, **_options: Any) -> None:
        if issubclass(category, UserWarning) and not issubclass(category, DeprecationWarning | FutureWarning):
            typer.echo(f"note: {message}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning, module=r"pit_core(\.|$)")
        warnings.showwarning = show
        # diffusers and transformers log at length while they are imported; our own notes are printed.
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


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


# the main job

Paths = list[Path]
Sdxl = Annotated[
    Path | None, typer.Option(help="SDXL: a diffusers folder or a .safetensors file.", show_default=False)
]
SdxlConfig = Annotated[
    Path | None,
    typer.Option(help="A diffusers folder with SDXL's tokenizers, for a single file.", show_default=False),
]
ImageEncoder = Annotated[
    Path | None, typer.Option(help="CLIP ViT-H: a folder or a file.", show_default=False)
]
Adapter = Annotated[Path | None, typer.Option(help="IP-Adapter Plus for SDXL.", show_default=False)]
Prior = Annotated[
    Path | None,
    typer.Option(help="IP-Prior: prior.ckpt with cfg.yaml, or a safetensors file.", show_default=False),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")]
Precision = Annotated[Dtype, typer.Option(help="auto: float16 on a GPU, else float32.")]


@app.command()
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
    strength: Annotated[
        float | None,
        typer.Option(help="With --init: 0 keeps it, 1 forgets it; 0.6 by default.", show_default=False),
    ] = None,
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
    from . import sample as run

    if repeat is not None:
        _refuse_all_but(context, ("repeat", "out", "device"))
        _tell(_repeat(repeat, out, device))
        return
    each = count if count is not None else 8 if random is None else 1
    matched = run.matched_paths
    request = run.Request(matched(parts), each, seed, matched(reference), init, random)
    request.check()
    folder = run.RunFolder(out)
    files = _given(
        sdxl=sdxl, image_encoder=image_encoder, ip_adapter=ip_adapter, prior=prior, sdxl_config=sdxl_config
    )
    named = _model(model, files, device, dtype)
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
    stack = _load(named)
    jobs = request.jobs(stack.prior_info.max_crops)
    settings = run.Settings(prior_settings, run.changed(stack.defaults, changes), as_sketch)
    _tell(_run(stack, jobs, settings, folder, named))


@app.command()
@plain_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the first concept.")] = 7,
) -> None:
    """A first run with the parts that come with the pack, in half a minute."""
    from . import sample as run

    folder = run.RunFolder(out)
    typer.echo(
        f"The pictures will be in {out.resolve()}: open {folder.path('contact-sheet.png').name} first."
    )
    shipped = Path(__file__).parent / "miniature" / "parts"
    if not shipped.is_dir():
        raise PitError("The part pictures are missing from this installation; install the complete package.")
    named = _model("miniature", {}, "cpu", Dtype.float32)
    stack = _load(named)
    settings = run.Settings(run.PriorSettings(), stack.defaults)
    wings, ears, tail = (run.picture_files(shipped / kind)[0] for kind in ("wings", "ears", "tail"))
    first = run.Request([wings, ears, tail], 8, seed).jobs(3)
    _run(stack, first, settings, folder, named)
    several = run.Request([shipped], 3, seed, random=4).jobs(stack.prior_info.max_crops)
    _run(stack, several, settings, run.RunFolder(out), named)
    typer.echo(f"Done: {len(list(out.glob('*.png')))} pictures in {out.resolve()}")


def _repeat(record: Path, out: Path, device: str) -> Output:
    from . import sample as run

    found = run.repeat_of(record)
    folder = run.RunFolder(out)
    model = found.model if device == "auto" else replace(found.model, device=device)
    if found.note:
        typer.echo(f"note: {found.note}", err=True)
    stack = _load(model)
    run.check_same_weights(stack, found.hashes)
    return _run(stack, found.jobs, found.settings, folder, model)


def _refuse_all_but(context: typer.Context, allowed: Sequence[str]) -> None:
    """A record names everything, so an option that changed something would be silently ignored."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name not in allowed and source is not None and source.name == "COMMANDLINE":
            raise PitError(
                "--repeat takes parts and settings from the record alone, with --out and --device at most; "
                f"leave out {parameter.opts[0]}."
            )


def _run(stack: Stack, jobs: Sequence[Any], settings: Settings, folder: Any, model: Model) -> Output:
    from . import sample as run

    for note in run.notes(stack, jobs, settings):
        typer.echo(f"note: {note}", err=True)
    with _bars() as stage:
        return run.run(
            stack, jobs, settings, folder, model=model, command=["pit", *sys.argv[1:]], stage=stage
        )


def _tell(output: Output) -> None:
    names = (
        f"{output.concepts[0].name} to {output.concepts[-1].name}"
        if output.concepts[1:]
        else output.concepts[0].name
    )
    typer.echo(f"{output.sheet}: parts and concepts together")
    typer.echo(f"{output.folder}: {names}, {output.tokens.name}, {output.record.name}")


def _given(**files: Path | None) -> dict[str, Path]:
    """The files that were named, by option."""
    return {option: path for option, path in files.items() if path is not None}


def _model(name: str, given: dict[str, Path], device: str, dtype: Dtype) -> Model:
    """The model that the options name, checked as far as that goes without loading it."""
    from . import sample as run

    place, kind = _place_and_dtype(bool(given), device, dtype)
    if not given:
        if name != "miniature":
            raise PitError(
                f"There is no model '{name}'; it is 'miniature', or your own files with --sdxl, "
                "--image-encoder, --ip-adapter and --prior."
            )
        return run.Model(name, None, place, kind)
    missing = [option for option in ("sdxl", "image_encoder", "ip_adapter", "prior") if option not in given]
    if missing:
        wanted = ", ".join("--" + option.replace("_", "-") for option in missing)
        raise PitError(f"Your own models need all four files; {wanted} is missing.")
    return run.Model("files", run.StackFiles(**given), place, kind)


def _place_and_dtype(own_files: bool, device: str, dtype: Dtype) -> tuple[str, str]:
    """What "auto" means: the best device for full-size files, the CPU for the miniature."""
    from .sample import best_device

    place = device if device != "auto" else best_device() if own_files else "cpu"
    half = own_files and not place.startswith("cpu")
    return place, dtype.value if dtype is not Dtype.auto else "float16" if half else "float32"


def _most_parts(model: Model) -> int:
    """The most parts that the model's prior was trained with, known before anything is loaded."""
    from .ip_prior.checkpoint import recorded_max_crops
    from .miniature.models import WEIGHTS

    return recorded_max_crops(model.files.prior if model.files else WEIGHTS / "ip_prior.safetensors")


def _load(model: Model) -> Stack:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from . import sample as run

    for each in (diffusers_logging, transformers_logging):
        each.disable_progress_bar()
    if model.name != "miniature":
        return model.load()
    from .miniature.models import load_stack

    return load_stack(device=run.checked_device(model.device), dtype=run.DTYPES[model.dtype])


def _strength(strength: float | None, has_init: bool) -> float:
    if strength is None:
        return 0.6 if has_init else 1.0
    return strength


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """One progress bar a stage, where somebody watches."""
    from tqdm.auto import tqdm

    bars: dict[str, Any] = {}

    def stage(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = tqdm(total=total, desc=what, unit="step", disable=None, leave=False)
        bars[what].update(done - bars[what].n)

    try:
        yield stage
    finally:
        for bar in bars.values():
            bar.close()


# files


@app.command()
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
    from .convert import convert_file

    typer.echo(convert_file(source, target, None if dtype is Dtype.auto else dtype.value, config))


@app.command()
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
    from .download import HUB, RELEASES
    from .download import download as fetch

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


@app.command()
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
    from . import sample as run
    from . import verify as check

    given = _given(
        sdxl=sdxl, image_encoder=image_encoder, ip_adapter=ip_adapter, prior=prior, sdxl_config=sdxl_config
    )
    place, kind = _place_and_dtype(bool(given), device, dtype)
    if given:
        report = check.verify(
            given, out=out, steps=steps, device=run.checked_device(place), dtype=run.DTYPES[kind]
        )
    else:
        stack = _load(run.Model("miniature", None, place, kind))
        report = check.verify_stack(stack, out=out, steps=steps)
    typer.echo(str(report))
    if report.picture is not None:
        typer.echo(f"The picture: {report.picture}")
    if not report.ok:
        raise typer.Exit(2)


# training and measuring


@train_app.command("ip-adapter")
@plain_errors
def train_ip_adapter(
    config: Annotated[Path, typer.Option(help="A YAML file: models, rows of pictures and texts, settings.")],
) -> None:
    """Train an IP-Adapter for SD1.5 or SDXL; goes on where an earlier run stopped."""
    from .train.ip_adapter_run import run

    run(config)


@miniature_app.command("train")
@plain_errors
def miniature_train(
    stage: Annotated[
        str | None, typer.Argument(help="One stage; all in order without it.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and logs.")] = Path("runs/miniature"),
    minutes: Annotated[float | None, typer.Option(help="Stop after that time.", show_default=False)] = None,
    processes: Annotated[int, typer.Option(help="Processes that share each batch.")] = 1,
    from_shipped: Annotated[
        bool, typer.Option("--from-shipped", help="Let the shipped weights stand in for untrained stages.")
    ] = False,
) -> None:
    """Train the miniature from nothing, stage by stage; goes on where an earlier run stopped."""
    from .miniature.train import main as train

    for name, result in train(stage, out, minutes, processes, from_shipped=from_shipped):
        typer.echo(f"{name}: {'finished' if result.finished else 'stopped'} at step {result.step}")


@miniature_app.command("export")
@plain_errors
def miniature_export(
    stage: Annotated[
        str | None, typer.Argument(help="One stage; all that are trained without it.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the training.")] = Path("runs/miniature"),
    weights: Annotated[
        Path | None, typer.Option(help="Where to; the pack's own weights by default.", show_default=False)
    ] = None,
) -> None:
    """Write the trained miniature as fp16 files in the released layouts, with their manifest."""
    from .miniature.export import export
    from .miniature.models import WEIGHTS

    manifest = export(out, weights or WEIGHTS, stage)
    for name, entry in manifest["files"].items():
        typer.echo(f"{name}: {entry['bytes'] / 1e6:.2f} MB, {entry['steps']} steps")
    typer.echo(f"together {manifest['bytes'] / 2**20:.1f} MB")


@evaluate_app.command("concepts")
@plain_errors
def evaluate_concepts(
    count: Annotated[int, typer.Option(help="Held-out critters.")] = 200,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the table and pictures.", show_default=False)
    ] = None,
) -> None:
    """Parts kept and valid creatures: the IP-Prior against averaging and concatenating tokens."""
    from . import evaluate
    from .miniature.models import load_reader, load_stack

    rows = evaluate.concepts(
        load_stack(),
        load_reader("judge"),
        count=count,
        seed=seed,
        out=out,
        progress=lambda text: typer.echo(text, err=True),
    )
    typer.echo(evaluate.table(rows))


if __name__ == "__main__":
    main()
