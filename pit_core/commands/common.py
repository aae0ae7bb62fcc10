"""What the commands share: plain errors, progress bars, and the options that name models."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import PitError

if TYPE_CHECKING:
    from ..concepts import Stack
    from ..ip_adapter.adapter import IPAdapter
    from ..ip_adapter.encoder import ImageEncoder as ImageEncoderModel
    from ..sample import Model

Command = TypeVar("Command", bound=Callable[..., Any])


def group(about: str) -> typer.Typer:
    """A group of commands under one name."""
    return typer.Typer(no_args_is_help=True, help=about, rich_markup_mode=None)


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
                "The memory is full; take a smaller batch, smaller pictures or half precision, in this "
                "command's options or in its settings file."
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


# models


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


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


def given_files(**files: Path | None) -> dict[str, Path]:
    """The files that were named, by option."""
    return {option: path for option, path in files.items() if path is not None}


SHIPPED = "miniature/"


def with_shipped(named: Sequence[str], assets: Mapping[str, str]) -> list[str]:
    """What an option names, the miniature's own files in place of "miniature/scene" or "miniature/scene:0.5".

    assets: from `miniature.assets`. Raises PitError for a name that there is not, and for a file of it that
    is missing or damaged.
    """
    return [_with_shipped(each, assets) for each in named]


def shipped_or_own(path: Path, assets: Mapping[str, str]) -> Path:
    """The same for a file alone."""
    return Path(_with_shipped(path.as_posix(), assets))


def _with_shipped(named: str, assets: Mapping[str, str]) -> str:
    name, colon, number = named.removeprefix(SHIPPED).partition(":")
    if not named.startswith(SHIPPED) or Path(SHIPPED, name).exists():
        return named
    from ..miniature import assets as shipped
    from ..miniature.models import check_weights

    if name not in assets:
        known = ", ".join(SHIPPED + each for each in assets)
        raise PitError(f"There is no '{SHIPPED}{name}'; there are {known}.")
    check_weights(shipped.WEIGHTS, [assets[name]])
    return f"{shipped.WEIGHTS / assets[name]}{colon}{number}"


def named_model(name: str, given: dict[str, Path], device: str, dtype: Dtype) -> Model:
    """The model that the options name, checked as far as that goes without loading it."""
    from .. import sample as run

    place, kind = place_and_dtype(bool(given), device, dtype)
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


def place_and_dtype(own_files: bool, device: str, dtype: Dtype) -> tuple[str, str]:
    """What "auto" means: the best device for full-size files, the CPU for the miniature."""
    from ..sample import best_device

    place = device if device != "auto" else best_device() if own_files else "cpu"
    half = own_files and not place.startswith("cpu")
    return place, dtype.value if dtype is not Dtype.auto else "float16" if half else "float32"


def without_loading_bars() -> None:
    """The libraries' own bars while files are read would stand between our lines."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for each in (diffusers_logging, transformers_logging):
        each.disable_progress_bar()


def load_model(model: Model) -> Stack:
    from .. import sample as run

    without_loading_bars()
    if model.name != "miniature":
        return model.load()
    from ..miniature.models import load_stack

    return load_stack(device=run.checked_device(model.device), dtype=run.DTYPES[model.dtype])


def load_encoders(given: dict[str, Path], device: str, dtype: Dtype) -> tuple[ImageEncoderModel, IPAdapter]:
    """What turns pictures into tokens: the named image encoder and adapter, or else the miniature's.

    Raises PitError as the files' loaders, and when the two are not made for each other.
    """
    from ..ip_adapter.checkpoint import check_encoder, load_ip_adapter
    from ..ip_adapter.encode import load_image_encoder
    from ..sample import DTYPES, checked_device

    place, kind = place_and_dtype(bool(given), device, dtype)
    if not given:
        from ..miniature.models import WEIGHTS, check_weights

        names = {"image_encoder": "image_encoder.safetensors", "ip_adapter": "ip_adapter_plus.safetensors"}
        check_weights(WEIGHTS, list(names.values()))
        given = {option: WEIGHTS / name for option, name in names.items()}
    options: dict[str, Any] = {"dtype": DTYPES[kind], "device": checked_device(place)}
    without_loading_bars()
    adapter = load_ip_adapter(given["ip_adapter"], **options)
    encoder = load_image_encoder(given["image_encoder"], **options)
    check_encoder(adapter, encoder.hidden_width, encoder.projection_dim)
    return encoder, adapter


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
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
