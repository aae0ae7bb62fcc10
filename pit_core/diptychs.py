"""`pit diptych`: a picture of a subject or of a style in; picture, canvas, sheet and record out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import Linear

from .backgrounds import CutOut
from .cutout import on_white, read_mask
from .diptych.crop import Crop
from .diptych.layout import DiptychLayout
from .diptych.pipeline import DiptychModel, DiptychSettings, Progress, draw_diptych
from .diptych.prompt import diptych_prompt
from .errors import PitError
from .files import check_shapes, load_tensors
from .parts.painter import load_flux
from .pictures import SheetRow, Tile, contact_sheet, read_picture, save_png
from .runs import Record, RunFolder, file_entry, write_record

MODES = ("subject", "style", "edit")
EDIT_CONTEXT = 1.5  # the panel shows this much more of the target than the region that is edited
TEXT_LENGTH = 512  # tokens, as the paper's
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Request:
    """What is asked for. image: the subject, or what has the style; prompt: what the new picture shows.

    mask, cut_out: either may say what the subject is; the rest becomes white paper. target, edit_mask: for
    "edit", the picture that the subject is put into, and where. Raises PitError where they do not fit.
    """

    image: Path
    subject: str
    prompt: str
    mode: str = "subject"
    mask: Path | None = None
    cut_out: CutOut | None = None
    target: Path | None = None
    edit_mask: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise PitError(f"The mode is one of {', '.join(MODES)}, but got '{self.mode}'.")
        if self.mask is not None and self.cut_out is not None:
            raise PitError("--mask and --cut-out both say what the subject is; give one of them.")
        if self.mode == "style" and (self.mask is not None or self.cut_out is not None):
            raise PitError("A style is that of the whole picture; leave out --mask and --cut-out.")
        if (self.mode == "edit") != (self.target is not None) or (self.target is None) != (
            self.edit_mask is None
        ):
            raise PitError("An edit, and nothing else, needs --target, the picture, and --edit-mask, where.")
        if not 0 <= self.seed < 2**63:
            raise PitError(f"Expected a seed of 0 or more, below 2**63, got {self.seed}.")
        self.text()

    def text(self) -> str:
        """The prompt of both panels."""
        return diptych_prompt(self.mode, self.subject, self.prompt)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The canvas (1, H, W, 3) in 0-1 and its mask; for an edit also the picture, where to paste, and how."""

    canvas: Tensor
    mask: Tensor
    crop: Crop | None = None
    target: Tensor | None = None
    edit: Tensor | None = None

    def finished(self, layout: DiptychLayout, drawn: Tensor) -> Tensor:
        """The new picture (1, H, W, 3) out of the drawn canvas; of an edit the whole target."""
        panel = layout.crop(drawn)
        if self.crop is None or self.target is None:
            return panel
        return self.crop.restore(panel, self.target, self.edit)


@dataclass(frozen=True)
class Named:
    """What the record says of the models: name, files or folders, hashes that are known, device and dtype."""

    name: str
    files: Mapping[str, Path] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Output:
    picture: Path
    canvas: Path
    sheet: Path
    record: Path


def prepare(request: Request, layout: DiptychLayout) -> Prepared:
    """The request's pictures on a canvas. Raises PitError for files that are no pictures or do not match."""
    picture = read_picture(request.image)
    if request.mask is not None:
        picture = on_white(picture, read_mask(request.mask))
    elif request.cut_out is not None:
        picture = on_white(picture, request.cut_out.model.mask(picture.convert("RGB")))
    reference = _tensor(picture)
    left = Crop.whole(_size(reference), (layout.height, layout.left_width)).apply(reference)
    if request.target is None or request.edit_mask is None:
        return Prepared(*layout.compose(left))
    target = _tensor(read_picture(request.target))
    edit = torch.from_numpy(read_mask(request.edit_mask)).float()[None]
    if _size(edit) != _size(target):
        height, width = _size(target)
        raise PitError(
            f"The edit's mask is {edit.shape[2]} x {edit.shape[1]} px, but its picture {width} x {height} "
            "px; make it of the picture's size."
        )
    crop = Crop.around(edit[0], (layout.height, layout.width), EDIT_CONTEXT)
    canvas, mask = layout.compose(left, crop.apply(target), crop.apply(edit, fill=0))
    return Prepared(canvas, mask, crop, target, edit)


def run(
    model: DiptychModel,
    named: Named,
    request: Request,
    layout: DiptychLayout,
    settings: DiptychSettings,
    folder: RunFolder,
    *,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> Output:
    """Draw what is asked for and write it, all files or none. Raises PitError as `draw_diptych` does."""
    ready = prepare(request, layout)
    drawn = draw_diptych(
        model, layout, ready.canvas, ready.mask, [request.text()], [request.seed], settings, progress
    )
    if not torch.isfinite(drawn).all():
        raise PitError(
            "The picture came out as NaN: the numbers overflowed; use --dtype bfloat16 or float32."
        )
    picture, canvas = _image(ready.finished(layout, drawn)), _image(drawn)
    tiles = [Tile(_image(layout.left_panel(ready.canvas)), request.subject)]
    if ready.target is not None:
        tiles.append(Tile(_image(ready.target), "target"))
    sheet = contact_sheet([SheetRow(tiles, [Tile(picture, f"seed {request.seed}")], request.prompt)])
    with folder.writing():
        paths = [folder.add(f"{name}.png") for name in ("picture", "canvas", "contact-sheet")]
        for image, path in zip((picture, canvas, sheet), paths, strict=True):
            save_png(image, path)
        record = folder.add("record.json")  # last, because it says that the run is complete
        write_record(record, _record(named, request, layout, settings, folder, command))
    return Output(paths[0], paths[1], paths[2], record)


def _record(
    named: Named,
    request: Request,
    layout: DiptychLayout,
    settings: DiptychSettings,
    folder: RunFolder,
    command: Sequence[str],
) -> Record:
    base = folder.folder
    files = {name: file_entry(path, base) for name, path in named.files.items()}
    model: dict[str, Any] = {
        "name": named.name,
        "device": named.device,
        "dtype": named.dtype,
        "hashes": dict(named.hashes),
        "files": files,
    }
    pictures = {name: getattr(request, name) for name in ("image", "mask", "target", "edit_mask")}
    job: dict[str, Any] = {
        "mode": request.mode,
        "subject": request.subject,
        "prompt": request.prompt,
        "text": request.text(),
        "seed": request.seed,
        "picture": folder.path("picture.png").name,
        **{name: file_entry(path, base) for name, path in pictures.items() if path is not None},
    }
    if request.cut_out is not None:
        job["cut_out"] = file_entry(request.cut_out.folder, base)
    return Record(model, {**asdict(settings), "layout": asdict(layout)}, [job], command)


# models


def load_model(
    flux: Path,
    controlnet: Path | None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DiptychModel:
    """Flux Fill, or with a ControlNet FLUX.1-dev, out of diffusers folders.

    Raises PitError for folders that are damaged or hold something else.
    """
    import diffusers

    pipe: Any = load_flux(flux, dtype)
    if controlnet is None:
        parts = {name: part for name, part in pipe.components.items() if name in FILL_PARTS}
        pipe = diffusers.FluxFillPipeline(**parts)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)

    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        return pipe.encode_prompt(texts, None, max_sequence_length=TEXT_LENGTH)[:2]

    control = None if controlnet is None else load_controlnet(controlnet).to(device, dtype)
    return DiptychModel(pipe, encode, control)


FILL_PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")


def load_controlnet(folder: Path) -> Any:
    """A ControlNet for Flux whose control input may be wider than the picture's, as one for inpainting is.

    Raises PitError for a folder that is not one.
    """
    from diffusers import FluxControlNetModel

    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model: Any = FluxControlNetModel.from_config(config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PitError(
            f"'{folder}' is no folder of a ControlNet for Flux: its config.json is missing or damaged."
        ) from error
    weights, _ = load_tensors(folder / WEIGHTS)
    wide = weights.get("controlnet_x_embedder.weight")
    if wide is None or wide.ndim != 2:
        raise PitError(f"'{folder}' holds no ControlNet for Flux; its controlnet_x_embedder is missing.")
    model.controlnet_x_embedder = Linear(wide.shape[1], model.inner_dim)
    check_shapes({key: t.shape for key, t in model.state_dict().items()}, weights, f"'{folder / WEIGHTS}'")
    model.load_state_dict({key: t.float() for key, t in weights.items()})
    return model.eval().requires_grad_(False)


# pictures


def _tensor(picture: Image.Image) -> Tensor:
    """(1, H, W, 3) in 0-1; what is transparent counts as white."""
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    seen = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return torch.from_numpy(np.asarray(seen).copy())[None].float() / 255


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels[0].clamp(0, 1) * 255).round().byte().cpu().numpy())


def _size(pictures: Tensor) -> tuple[int, int]:
    return int(pictures.shape[1]), int(pictures.shape[2])
