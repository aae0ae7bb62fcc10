"""`pit data`: pictures of wholes and their parts, as data to train a prior on."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PitError
from .common import (
    Adapter,
    Device,
    Dtype,
    ImageEncoder,
    Precision,
    given_files,
    group,
    load_encoders,
    plain_errors,
)

if TYPE_CHECKING:
    from ..parts.augment import Augment

app = group("Pictures of wholes and their parts, as data to train a prior on.")

Manifest = Annotated[Path, typer.Argument(help="The data set's manifest, JSON lines.", show_default=False)]
Settings = Annotated[
    Path | None,
    typer.Option("--config", help="A YAML file with settings of the augmentation.", show_default=False),
]


class Layout(str, Enum):
    auto = "auto"
    released = "released"
    readme = "readme"


@app.command("import")
@plain_errors
def import_folder(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures.", show_default=False)],
    layout: Annotated[
        Layout, typer.Option(help="released: a_b.jpg, a_b_0.jpg; readme: name.jpg, name_0.jpg.")
    ] = Layout.auto,
    name: Annotated[str, typer.Option(help="The manifest's name, inside the folder.")] = "parts.jsonl",
) -> None:
    """Write the manifest of a folder whose file names tell wholes and parts apart."""
    from ..files import inside
    from ..parts.layouts import import_folder
    from ..parts.manifest import write_manifest

    wholes, skipped = import_folder(folder, layout.value)
    target = inside(folder, name)
    if target.exists():
        raise PitError(f"'{target}' is already there; delete it, or choose another --name.")
    write_manifest(target, wholes)
    for item in skipped:
        typer.echo(f"left out: {item.reason}", err=True)
    parts = sum(len(whole.parts) for whole in wholes)
    typer.echo(f"{target}: {len(wholes)} wholes with {parts} parts, {len(skipped)} files left out")


@app.command("show")
@plain_errors
def show(
    manifest: Manifest,
    out: Annotated[Path, typer.Option(help="The picture to write, a PNG.")] = Path("parts.png"),
    count: Annotated[int, typer.Option(help="How many wholes.")] = 8,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 0,
    augmented: Annotated[bool, typer.Option("--augmented", help="Parts as training sees them.")] = False,
    config: Settings = None,
) -> None:
    """Wholes and their parts on a contact sheet."""
    from ..ip_adapter.pixels import preprocess
    from ..parts.dataset import PartData
    from ..parts.manifest import read_manifest
    from ..parts.scan import readable
    from ..parts.sheet import part_sheet
    from ..pictures import save_png

    wholes, _ = readable(read_manifest(manifest), manifest.parent)
    data = PartData(wholes, manifest.parent, _augment(config), preprocess, seed=seed)
    sheet = part_sheet(data, count, seed=seed, augmented=augmented)
    save_png(sheet, out)
    typer.echo(f"{out}: {min(count, len(wholes))} of {len(wholes)} wholes")


@app.command("embed")
@plain_errors
def embed(
    manifest: Manifest,
    out: Annotated[Path, typer.Option(help="Folder for the shards of tokens.")] = Path("tokens"),
    image_encoder: ImageEncoder = None,
    ip_adapter: Adapter = None,
    config: Settings = None,
    views: Annotated[int, typer.Option(help="Augmented views of each part.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the augmentation.")] = 0,
    shard_size: Annotated[int, typer.Option(help="Wholes in a shard.")] = 32,
    batch: Annotated[int, typer.Option(help="Pictures encoded at a time.")] = 32,
    workers: Annotated[int, typer.Option(help="Processes that decode and crop.")] = 0,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
) -> None:
    """Encode a data set's pictures to IP tokens, once; goes on where an earlier run stopped.

    Without files, the miniature's models encode.
    """
    from ..parts.embed import Encoder
    from ..parts.embed import embed as run
    from ..parts.views import Recipe

    augment = _augment(config)
    if (image_encoder is None) != (ip_adapter is None):
        raise PitError("Give both --image-encoder and --ip-adapter, or none of them for the miniature's.")
    given = given_files(image_encoder=image_encoder, ip_adapter=ip_adapter)
    encoder, adapter = load_encoders(given, device, dtype)
    recipe = Recipe(encoder.image_size, augment, views, seed)
    done = run(
        manifest, out, Encoder(encoder, adapter, batch), recipe, shard_size=shard_size, workers=workers
    )
    typer.echo(f"{out}: {done}")


def _augment(config: Path | None) -> Augment:
    from ..parts.augment import Augment
    from ..train.config import read_config

    return Augment() if config is None else read_config(config, Augment)
