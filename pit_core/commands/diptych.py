"""`pit diptych`: a subject, or a style, in another picture."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PitError
from .common import (
    Device,
    Dtype,
    Precision,
    given_files,
    place_and_dtype,
    plain_errors,
    progress_bars,
    without_loading_bars,
)

if TYPE_CHECKING:
    from ..diptych.pipeline import DiptychModel
    from ..diptychs import Named

MARGIN, SIDE = 8, 768  # the paper's


class Mode(str, Enum):
    subject = "subject"
    style = "style"
    edit = "edit"


class Attention(str, Enum):
    reference = "reference"
    normalized = "normalized"


@plain_errors
def diptych(
    image: Annotated[Path, typer.Option(help="A picture of the subject, or in the style.")],
    subject: Annotated[
        str, typer.Option(help="What the subject is ('a cat'); for a style, what the picture shows.")
    ],
    prompt: Annotated[str, typer.Option(help="What the new picture shows ('a cat on the moon').")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out"),
    mask: Annotated[
        Path | None,
        typer.Option(help="White where the subject is; the rest becomes white paper.", show_default=False),
    ] = None,
    cut_out: Annotated[
        Path | None,
        typer.Option(help="Or a folder with a segmentation model that finds it.", show_default=False),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How hard the new picture looks at the given one; 1.3, for a style 1.", show_default=False
        ),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="The same subject, the same style, or an edit.")] = Mode.subject,
    target: Annotated[
        Path | None, typer.Option(help="With an edit: the picture that is edited.", show_default=False)
    ] = None,
    edit_mask: Annotated[
        Path | None, typer.Option(help="With an edit: white where it changes.", show_default=False)
    ] = None,
    flux: Annotated[
        Path | None,
        typer.Option(
            help="A diffusers folder of Flux Fill, or with --controlnet of FLUX.1-dev; else the miniature.",
            show_default=False,
        ),
    ] = None,
    controlnet: Annotated[
        Path | None,
        typer.Option(help="A folder with an inpainting ControlNet for FLUX.1-dev.", show_default=False),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Side of the picture in pixels; 768, miniature 128.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="30, miniature 20.", show_default=False)] = None,
    guidance: Annotated[
        float | None, typer.Option(help="30, with a ControlNet 3.5.", show_default=False)
    ] = None,
    true_cfg: Annotated[
        float, typer.Option(help="With a ControlNet: guidance against no prompt; 1 is twice as fast.")
    ] = 3.5,
    control: Annotated[float, typer.Option(help="How much the ControlNet counts.")] = 0.95,
    attention: Annotated[
        Attention, typer.Option(help="The published method, or milder, with shares that add up to one.")
    ] = Attention.reference,
    start: Annotated[float, typer.Option(help="Part of the run at which the strength sets in.")] = 0.0,
    end: Annotated[float, typer.Option(help="Part of the run at which it ends.")] = 1.0,
    cond_only: Annotated[
        bool, typer.Option("--cond-only", help="Leave the half without a prompt as it is.")
    ] = False,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
) -> None:
    """A subject in another scene: pit diptych --image cat.png --subject "a cat" --prompt "a cat at sea"

    Writes the picture, the diptych that it is cut from, a sheet of both panels, and a record.
    """
    from .. import diptychs
    from ..backgrounds import load_cut_out
    from ..diptych.layout import DiptychLayout
    from ..diptych.pipeline import DiptychSettings
    from ..sample import checked_device

    if controlnet is not None and flux is None:
        raise PitError("A ControlNet needs its FLUX.1-dev; name its diffusers folder with --flux.")
    folder = diptychs.RunFolder(out)
    place, kind = _place_and_dtype(flux is not None, device, dtype)
    settings = DiptychSettings(
        steps=steps if steps is not None else 20 if flux is None else 30,
        guidance=guidance,
        true_cfg=true_cfg,
        control=control,
        strength=strength if strength is not None else 1.0 if mode is Mode.style else 1.3,
        mode=attention.value,
        start=start,
        end=end,
        cond_only=cond_only,
    )
    side = size if size is not None else 128 if flux is None else SIDE
    layout = DiptychLayout(side, side, margin=0 if flux is None else MARGIN)
    cutter = None if cut_out is None else load_cut_out(cut_out, checked_device(place))
    request = diptychs.Request(image, subject, prompt, mode.value, mask, cutter, target, edit_mask, seed)
    diptychs.prepare(request, layout)  # mistakes in the pictures are told before the model is read
    model, named = _load(flux, controlnet, place, kind)
    with progress_bars() as stage:
        written = diptychs.run(
            model,
            named,
            request,
            layout,
            settings,
            folder,
            command=["pit", *sys.argv[1:]],
            progress=lambda done, total: stage("picture", done, total),
        )
    typer.echo(f"{written.picture}: the picture")
    typer.echo(f"{folder.folder}: {written.canvas.name}, {written.sheet.name}, {written.record.name}")


def _place_and_dtype(own_files: bool, device: str, dtype: Dtype) -> tuple[str, str]:
    """As for other models, but half precision means bfloat16: Flux's text encoder overflows in float16."""
    place, kind = place_and_dtype(own_files, device, dtype)
    return place, "bfloat16" if dtype is Dtype.auto and kind == "float16" else kind


def _load(flux: Path | None, controlnet: Path | None, place: str, kind: str) -> tuple[DiptychModel, Named]:
    from ..diptychs import Named, load_model
    from ..miniature.flux_stack import load_flux
    from ..sample import DTYPES, checked_device

    without_loading_bars()
    device, dtype = checked_device(place), DTYPES[kind]
    if flux is None:
        model, hashes = load_flux(device=device, dtype=dtype)
        return model, Named("miniature", hashes=hashes, device=place, dtype=kind)
    files = given_files(flux=flux, controlnet=controlnet)
    return load_model(flux, controlnet, device=device, dtype=dtype), Named("files", files, {}, place, kind)
