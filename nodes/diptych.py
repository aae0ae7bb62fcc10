"""Diptych prompting in ComfyUI: a subject on the left panel, a picture of it on the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ..pit_core.diptych.attention import MODES
from ..pit_core.diptych.crop import Crop
from ..pit_core.diptych.layout import TOKEN, DiptychLayout
from ..pit_core.diptych.prompt import SUBJECT, TASKS, diptych_prompt
from ..pit_core.errors import PitError
from . import host
from .images import fitted_masks, on_white, resized_masks, to_floats, to_mask
from .panels import ALL, Panels, block_numbers
from .sockets import DiptychSocket, naming, schema

JOBS = ("subject", "style", "edit")
SIDE_MAX, CONTEXT = 4096, 1.5
ABOUT_HALF = 0.5  # a token is a target when at least so much of it is marked


@dataclass(frozen=True, eq=False)
class Diptych:
    """A layout; for edits also the picture (B, H, W, 3), its mask (B, H, W), and where its panel lies."""

    layout: DiptychLayout
    crop: Crop | None = None
    target: Tensor | None = None
    edit: Tensor | None = None

    def __str__(self) -> str:
        height, width = self.layout.canvas
        return f"diptych of {width} x {height} pixels"


class PiTDiptychPrepare(io.ComfyNode):
    """The left panel out of a picture of the subject, and what is to be made beside it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTDiptychPrepare",
            "Diptych Prepare",
            "Puts a picture of a subject, or of a style, on the left half of a canvas, and masks what is to "
            "be made on the right: a new picture, or a region of a given one.",
            ["diptych prompting", "subject driven", "consistent character", "flux reference", "inpaint"],
            inputs=[
                io.Image.Input("image", tooltip="The subject, or the picture whose style is wanted."),
                io.Combo.Input(
                    "mode",
                    options=list(JOBS),
                    default="subject",
                    tooltip="subject: the same thing in a new picture. style: another thing in the same "
                    "style, without cutting out. edit: the same thing in the masked part of a target.",
                ),
                _side("width", 768, "Of the picture to be made."),
                _side("height", 768, "Of both panels."),
                io.Int.Input(
                    "reference_width",
                    default=0,
                    min=0,
                    max=SIDE_MAX,
                    step=TOKEN,
                    tooltip="Of the left panel, in pixels; narrower is faster. 0: the same as width.",
                ),
                io.Int.Input(
                    "margin",
                    default=8,
                    min=0,
                    max=64,
                    tooltip="Pixels around each panel, trimmed afterwards. A side plus two margins has to be "
                    "a multiple of 16.",
                ),
                io.Boolean.Input(
                    "fill_panel",
                    default=False,
                    tooltip="Let what the mask marks fill the left panel; off, the panel shows the whole "
                    "picture.",
                ),
                io.Float.Input(
                    "edit_context",
                    default=CONTEXT,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="For edits: how much of the target the panel shows, as a multiple of the masked "
                    "region. Large enough, it is all of it.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is; the rest becomes white paper, but not for a style. "
                    "The mask of Load Image is the other way round when it shows transparency: invert it.",
                ),
                io.Image.Input("target", optional=True, tooltip="For edits: the picture that is edited."),
                io.Mask.Input(
                    "edit_mask", optional=True, tooltip="For edits: white where the target is to change."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="diptych", tooltip="The canvas: both panels side by side."),
                io.Mask.Output(display_name="mask", tooltip="White where the canvas is to be made."),
                DiptychSocket.Output(
                    display_name="layout", tooltip="Where the panels are, for the nodes that need to know."
                ),
                io.Int.Output(display_name="width", tooltip="Of the canvas, in pixels."),
                io.Int.Output(display_name="height", tooltip="Of the canvas, in pixels."),
                io.Mask.Output(
                    display_name="reference_mask",
                    tooltip="White where the left panel shows the subject; all white without a mask.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        mode: str = "subject",
        width: int = 768,
        height: int = 768,
        reference_width: int = 0,
        margin: int = 8,
        fill_panel: bool = False,
        edit_context: float = CONTEXT,
        mask: Tensor | None = None,
        target: Tensor | None = None,
        edit_mask: Tensor | None = None,
    ) -> io.NodeOutput:
        if mode not in JOBS:
            raise PitError(f"mode is one of {', '.join(JOBS)}, but got '{mode}'.")
        layout = DiptychLayout(width, height, reference_width or None, margin)
        left, seen = _reference(image, mask, layout, mode, fill_panel)
        if mode == "edit":
            diptych, panel, edit = _edited(target, edit_mask, layout, edit_context)
        else:
            diptych, panel, edit = Diptych(layout), None, None
        canvas, made = layout.compose(left, panel, edit)
        rows, columns = layout.canvas
        return io.NodeOutput(canvas, made, diptych, columns, rows, seen)


class PiTDiptychAttention(io.ComfyNode):
    """The reference attention enhancement of arXiv 2411.15466 on a model of the Flux family."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTDiptychAttention",
            "Diptych Attention",
            "Lets the right panel of a diptych look harder at the left one, at the cost of plain attention: "
            "a dial for how closely the subject is kept.",
            ["diptych prompting", "reference attention", "identity", "consistent character", "flux"],
            inputs=[
                io.Model.Input("model", tooltip="A model of the Flux family, with LoRAs or without."),
                DiptychSocket.Input("layout", tooltip="What 'Diptych Prepare' hands out."),
                io.Float.Input(
                    "strength",
                    default=1.3,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much the left panel counts for the right one. 1 changes nothing; 1.3 is the "
                    "paper's; 1 for styles.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="reference: the published method. normalized: shares of attention add up to one "
                    "again, which is milder and takes half as long again.",
                ),
                _share("start_at", 0.0, "Where in the run it begins: 0 is the first step."),
                _share("end_at", 1.0, "Where in the run it ends: 1 is the last step."),
                _blocks("double_blocks", "0 to 18"),
                _blocks("single_blocks", "0 to 37"),
                io.Boolean.Input(
                    "cond_only",
                    default=False,
                    tooltip="Leave the negative half as it is. It makes a difference with a cfg above 1.",
                ),
                io.Mask.Input(
                    "reference_mask",
                    optional=True,
                    tooltip="Look harder only at what is white on the left panel; it is laid on the panel "
                    "without its margin.",
                ),
                io.Mask.Input(
                    "target_mask",
                    optional=True,
                    tooltip="Only what is white on the right panel looks harder; one mask for all pictures.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model for the sampler; the one given stays as it was."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        layout: Diptych,
        strength: float = 1.3,
        mode: str = MODES[0],
        start_at: float = 0.0,
        end_at: float = 1.0,
        double_blocks: str = ALL,
        single_blocks: str = ALL,
        cond_only: bool = False,
        reference_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> io.NodeOutput:
        panels = _checked(layout).layout
        with naming("model"):
            counts = host.flux_blocks(model)
        if not 0 <= strength < float("inf"):
            raise PitError(f"strength is a number of 0 or more (1.3 is usual), but got {strength}.")
        if mode not in MODES:
            raise PitError(f"mode is one of {', '.join(MODES)}, but got '{mode}'.")
        chosen = {"double": double_blocks, "single": single_blocks}
        use = Panels(
            panels.grid,
            panels.columns,
            _strengths(panels, strength, reference_mask),
            mode=mode,
            targets=_targets(panels, target_mask),
            span=(start_at, end_at),
            blocks={k: block_numbers(v, counts[k], f"{k}_blocks") for k, v in chosen.items()},
            cond_only=cond_only,
        )
        return io.NodeOutput(host.apply_panels(model, use))


class PiTDiptychPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTDiptychPrompt",
            "Diptych Prompt",
            "Writes the prompt that describes both panels, as the method was published, with articles put "
            "right.",
            ["diptych prompting", "prompt template", "side by side"],
            inputs=[
                io.Combo.Input(
                    "task",
                    options=list(TASKS),
                    default="subject",
                    tooltip="What 'Diptych Prepare' was told; custom takes the template below.",
                ),
                io.String.Input(
                    "subject",
                    default="a cat",
                    tooltip="What the left panel shows, in a few words; for a style, what its picture shows.",
                ),
                io.String.Input(
                    "target",
                    default="a cat reading a book in a library",
                    multiline=True,
                    tooltip="What the right panel is to show.",
                ),
                io.String.Input(
                    "template",
                    default=SUBJECT,
                    multiline=True,
                    tooltip="For custom: a text with the words subject, a_subject (with its article) and "
                    "target in curly brackets.",
                ),
            ],
            outputs=[io.String.Output(display_name="prompt", tooltip="For the text encoder.")],
        )

    @classmethod
    def execute(
        cls,
        task: str = "subject",
        subject: str = "a cat",
        target: str = "a cat reading a book in a library",
        template: str = SUBJECT,
    ) -> io.NodeOutput:
        return io.NodeOutput(diptych_prompt(task, subject, target, template))


class PiTDiptychCrop(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTDiptychCrop",
            "Diptych Crop",
            "Takes the panels out of a finished diptych, without their margins, and puts an edit back into "
            "its picture at full size.",
            ["diptych prompting", "split image", "stitch back", "paste back", "uncrop"],
            inputs=[
                io.Image.Input("image", tooltip="The finished diptych, one or a batch."),
                DiptychSocket.Input("layout", tooltip="What 'Diptych Prepare' handed out for it."),
                io.Int.Input(
                    "feather",
                    default=16,
                    min=0,
                    max=512,
                    tooltip="For edits: over how many pixels of the target the edit fades in, inwards from "
                    "the mask's edge. What is narrower in the mask fades out; 0 is a hard edge.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="right", tooltip="The right panel: the picture that was made."),
                io.Image.Output(display_name="left", tooltip="The left panel, as the model has drawn it."),
                io.Image.Output(
                    display_name="edited",
                    tooltip="For edits: the target with the edit in it; pixels outside the mask are those of "
                    "the target. Else the right panel.",
                ),
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, layout: Diptych, feather: int = 16) -> io.NodeOutput:
        diptych = _checked(layout)
        canvas = to_floats(image, "image")[..., :3]
        panels = diptych.layout
        right, edited = panels.crop(canvas), None
        if diptych.crop is not None and diptych.target is not None and diptych.edit is not None:
            masks = _faded(_repeated(diptych.edit, len(right), "edit_mask"), feather)
            edited = diptych.crop.restore(right, _repeated(diptych.target, len(right), "target"), masks)
        return io.NodeOutput(right, panels.left_panel(canvas), right if edited is None else edited)


# inputs


def _side(name: str, default: int, what: str) -> Any:
    tooltip = f"{what} In pixels, without the margin; a side plus two margins is a multiple of 16."
    return io.Int.Input(name, default=default, min=TOKEN, max=SIDE_MAX, step=TOKEN, tooltip=tooltip)


def _share(name: str, default: float, tooltip: str) -> Any:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def _blocks(name: str, numbers: str) -> Any:
    tooltip = f"In which of Flux's blocks ({numbers}): all, none, or ranges such as 0-9, 12."
    return io.String.Input(name, default=ALL, tooltip=tooltip)


def _checked(layout: Any) -> Diptych:
    if not isinstance(layout, Diptych):
        raise PitError(f"layout is {type(layout).__name__}; connect 'Diptych Prepare'.")
    return layout


# panels


def _reference(
    image: Any, mask: Any, layout: DiptychLayout, mode: str, fill_panel: bool
) -> tuple[Tensor, Tensor]:
    """The left panel (B, h, w, 3), and where it shows the subject, (B, h, w)."""
    picture = on_white(to_floats(image, "image"))
    panel = (layout.height, layout.left_width)
    masks = to_mask(mask)
    if masks is None:
        crop = Crop.whole(_size(picture), panel)
        return crop.apply(picture), crop.apply(picture.new_ones(picture.shape[:3]), fill=0)
    masks = fitted_masks(masks, picture, "mask")
    with naming("mask"):
        union = masks.amax(0)
        crop = Crop.around(union, panel, 1.0) if fill_panel else Crop.whole(_size(picture), panel)
    if mode != "style":
        picture = torch.lerp(torch.ones_like(picture), picture, masks[..., None])
    return crop.apply(picture), crop.apply(masks, fill=0)


def _edited(
    target: Any, edit_mask: Any, layout: DiptychLayout, context: float
) -> tuple[Diptych, Tensor, Tensor]:
    """What is known of an edit, and the panels of its picture and of its mask."""
    if target is None or edit_mask is None:
        missing = "target" if target is None else "edit_mask"
        raise PitError(
            f"{missing} is missing; an edit needs the picture that is edited and a mask of what is to change."
        )
    picture = on_white(to_floats(target, "target"))
    masks = to_mask(edit_mask, "edit_mask")
    masks = fitted_masks(masks, picture, "edit_mask")
    with naming("edit_mask"):
        crop = Crop.around(masks.amax(0), (layout.height, layout.width), context)
    return Diptych(layout, crop, picture, masks), crop.apply(picture), crop.apply(masks, fill=0)


def _size(pictures: Tensor) -> tuple[int, int]:
    return int(pictures.shape[1]), int(pictures.shape[2])


def _repeated(rows: Tensor, count: int, name: str) -> Tensor:
    if len(rows) not in (1, count):
        raise PitError(f"{name} has {len(rows)} rows, but there are {count} pictures; give 1 or as many.")
    return rows.expand(count, *rows.shape[1:])


def _faded(masks: Tensor, width: int) -> Tensor:
    """Masks (B, H, W) that rise from 0 at their edge to 1 over `width` pixels inside, and nowhere outside."""
    radius = width // 2
    if not radius:
        return masks
    side, planes = 2 * radius + 1, masks[:, None]
    inner = -F.max_pool2d(-planes, side, stride=1, padding=radius)
    ramp = F.avg_pool2d(inner, side, stride=1, padding=radius, count_include_pad=False)
    return torch.minimum(ramp, planes)[:, 0]


def _strengths(layout: DiptychLayout, strength: float, reference_mask: Any) -> float | Tensor:
    """One number, or (B, left tokens) where a mask says what counts."""
    masks = to_mask(reference_mask, "reference_mask")
    if masks is None or strength == 1:
        return strength
    return layout.strength_map(resized_masks(masks, (layout.height, layout.left_width)), strength)


def _targets(layout: DiptychLayout, target_mask: Any) -> Tensor | None:
    """The right panel's tokens that look harder, bool."""
    masks = to_mask(target_mask, "target_mask")
    if masks is None:
        return None
    if len(masks) > 1:
        raise PitError(f"target_mask has {len(masks)} rows; give one mask for all pictures.")
    covered = layout.covered(resized_masks(masks, (layout.height, layout.width)))
    return covered[0] >= ABOUT_HALF
