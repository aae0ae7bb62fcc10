"""`pit data`: pictures of wholes and their parts, as data to train a prior on."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from functools import partial
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
    SdxlConfig,
    given_files,
    group,
    load_encoders,
    plain_errors,
)

if TYPE_CHECKING:
    from ..parts.augment import Augment
    from ..parts.embed import Encoder

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


@app.command("generate")
@plain_errors
def generate(
    domain: Annotated[
        str,
        typer.Argument(
            help="characters, products, toys, a YAML file of your own templates, or critters: the miniature.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and their manifest.")] = Path("data"),
    count: Annotated[
        int | None, typer.Option(help="Wholes in all; 100, or all of --pictures.", min=1, show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and pictures.", min=0)] = 0,
    model: Annotated[
        Path | None,
        typer.Option(help="FLUX.1 or SDXL: a diffusers folder, or an SDXL file.", show_default=False),
    ] = None,
    sdxl_config: SdxlConfig = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="Folder of your own pictures instead of drawn ones.", show_default=False),
    ] = None,
    detector: Annotated[
        Path | None, typer.Option(help="GroundingDINO, OWL-ViT or OWLv2, a folder.", show_default=False)
    ] = None,
    segmenter: Annotated[
        Path | None, typer.Option(help="SAM or SAM 2, a folder.", show_default=False)
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="Folder of masks such as 000003_head.png, instead of both.", show_default=False),
    ] = None,
    drawn: Annotated[
        bool, typer.Option("--drawn", help="critters: drawn by the world itself, not by the miniature.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; the model's usual ones.", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Text guidance; the model's usual one.", show_default=False)
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side in pixels; the model's own.", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="How sure the detector has to be, 0 to 1.", show_default=False)
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Pictures drawn at a time; 1, or 16 critters.", min=1, show_default=False),
    ] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep on the GPU only the part that is at work.")
    ] = False,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
) -> None:
    """Draw wholes, find their parts, and write both with a manifest; goes on where an earlier run stopped.

    The same seed and options give the same files. critters need no model files.
    """
    from ..parts.generate import generate as run
    from ..parts.sources import FolderSource
    from .part_sources import CRITTERS, Options, critters, from_files

    own = given_files(
        model=model,
        pictures=pictures,
        detector=detector,
        segmenter=segmenter,
        masks=masks,
        sdxl_config=sdxl_config,
    )
    painting = {"steps": steps, "guidance": guidance, "size": size, "offload": offload or None}
    tuned = {name: value for name, value in painting.items() if value is not None}
    options = Options(domain, seed, batch, own, tuned, threshold, device, dtype)
    source = critters(options, drawn=drawn) if domain == CRITTERS else from_files(options, drawn=drawn)
    if isinstance(source, FolderSource):
        count = min(count or source.count, source.count)
    done = run(source, count or 100, out)
    typer.echo(f"{out}: {done}")


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
    """Wholes and their parts on a contact sheet; of those chosen, broken ones are named and left out."""
    from ..parts.dataset import PartData
    from ..parts.manifest import read_manifest
    from ..parts.scan import readable
    from ..parts.sheet import choose_rows, part_sheet
    from ..pictures import save_png

    wholes, folder = read_manifest(manifest), manifest.parent
    chosen = choose_rows(len(wholes), count, seed)
    usable = {whole.target: whole for whole in readable([wholes[i] for i in chosen], folder)[0]}
    shown = [i for i in chosen if wholes[i].target in usable]
    data = PartData([usable.get(w.target, w) for w in wholes], folder, _augment(config), seed=seed)
    save_png(part_sheet(data, shown, augmented=augmented), out)
    typer.echo(f"{out}: {len(shown)} of {len(wholes)} wholes")


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
    prune: Annotated[
        bool, typer.Option("--prune", help="Then delete shards of earlier data or settings.")
    ] = False,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    ray: Annotated[
        bool, typer.Option("--ray", help="Decode, encode and write on Ray; needs the extra 'scale'.")
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(help="A running Ray cluster, such as 10.0.0.1:6379; else one is started here."),
    ] = None,
    actors: Annotated[
        int | None, typer.Option(help="On Ray: processes that encode; one for each GPU.", min=1)
    ] = None,
    actor_gpus: Annotated[
        float | None, typer.Option(help="On Ray: GPUs of each of them; 1 where there are any.", min=0)
    ] = None,
) -> None:
    """Encode a data set's pictures to IP tokens, once; goes on where an earlier run stopped.

    Without files, the miniature's models encode. On Ray the shards are the same.
    """
    from ..parts.embed import embed as run
    from ..parts.views import Recipe

    recipe = Recipe(augment=_augment(config), views=views, seed=seed)
    if (image_encoder is None) != (ip_adapter is None):
        raise PitError("Give both --image-encoder and --ip-adapter, or none of them for the miniature's.")
    given = given_files(image_encoder=image_encoder, ip_adapter=ip_adapter)
    if ray or ray_address is not None:
        from ..parts.embed_ray import Cluster, embed_on_ray

        on_cpus = device.startswith("cpu") or (device == "auto" and not given)
        cluster = Cluster(ray_address, actors, 0.0 if on_cpus else actor_gpus, workers or None)
        given = {option: path.resolve() for option, path in given.items()}
        load = partial(_encoder, given, device, dtype, batch)
        done = embed_on_ray(manifest, out, load, recipe, cluster, shard_size=shard_size, prune=prune)
    elif actors is not None or actor_gpus is not None:
        raise PitError("--actors and --actor-gpus are for --ray; add it, or leave them out.")
    else:
        encode = _encoder(given, device, dtype, batch)
        recipe = replace(recipe, pixels=encode.models.pixels)
        done = run(manifest, out, encode, recipe, shard_size=shard_size, workers=workers, prune=prune)
    typer.echo(f"{out}: {done}")


def _encoder(given: dict[str, Path], device: str, dtype: Dtype, batch: int) -> Encoder:
    from ..parts.embed import Encoder

    return Encoder(*load_encoders(given, device, dtype), batch)


def _augment(config: Path | None) -> Augment:
    from ..parts.augment import Augment
    from ..train.config import read_config

    return Augment() if config is None else read_config(config, Augment)
