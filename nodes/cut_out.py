"""A subject cut out in ComfyUI: by a mask of any kind, or by the user's own local models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..pit_core.errors import PitError
from . import host
from .images import fitted_masks, on_white, to_floats, to_mask, to_pictures
from .sockets import naming, schema

NOTHING = "none"
Find = Callable[[Image.Image], np.ndarray]


class PiTCutOut(io.ComfyNode):
    """Folders below models/cut_out, as transformers writes them; code in them is never run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        folders = [NOTHING, *host.folders_in(host.CUT_OUT)]
        return schema(
            "PiTCutOut",
            "Cut Out Subject",
            "Puts a subject on white paper: what a mask marks, or what models of your own find. Nothing is "
            "downloaded.",
            ["remove background", "grounding dino", "segment anything", "sam", "birefnet"],
            inputs=[
                io.Image.Input("image", tooltip="One picture or a batch."),
                io.String.Input(
                    "subject", default="", tooltip="What a detector looks for, in a few words: a cat."
                ),
                io.Combo.Input(
                    "detector",
                    options=folders,
                    default=NOTHING,
                    tooltip="A folder in models/cut_out with GroundingDINO, OWL-ViT or OWLv2; none where the "
                    "segmenter finds subjects by itself.",
                ),
                io.Combo.Input(
                    "segmenter",
                    options=folders,
                    default=NOTHING,
                    tooltip="A folder in models/cut_out: SAM or SAM 2 beside a detector, else a model that "
                    "tells subjects from backgrounds. None with a mask.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How sure the detector has to be; 0 is what is usual for its kind.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is, from any node, such as Remove Background; no model "
                    "is loaded then.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The subject on white, at the same size."),
                io.Mask.Output(display_name="mask", tooltip="White where the subject is."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        subject: str = "",
        detector: str = NOTHING,
        segmenter: str = NOTHING,
        threshold: float = 0.0,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        pictures, masks = on_white(to_floats(image, "image")), to_mask(mask)
        if masks is None:
            find = _finder(subject.strip(), detector, segmenter, threshold)
            masks = _found(to_pictures(pictures, "image"), find)
        masks = fitted_masks(masks, pictures, "mask")
        return io.NodeOutput(torch.lerp(torch.ones_like(pictures), pictures, masks[..., None]), masks)


def _found(pictures: list[Image.Image], find: Find) -> Tensor:
    """Masks (B, H, W)."""
    report, masks = host.progress(len(pictures)), []
    for done, picture in enumerate(pictures, 1):
        masks.append(torch.from_numpy(find(picture)).float())
        report(done)
    return torch.stack(masks)


def _finder(subject: str, detector: str, segmenter: str, threshold: float) -> Find:
    """What makes a mask of a picture, its models loaded."""
    from ..pit_core import cutout

    if segmenter == NOTHING:
        raise PitError(
            "segmenter is none and there is no mask; connect a mask, or put a model folder into "
            "models/cut_out and choose it."
        )
    with naming("segmenter"):
        load: Any = cutout.load_foreground if detector == NOTHING else cutout.load_segmenter
        segment = load(host.folder_of(host.CUT_OUT, segmenter))
    if detector == NOTHING:
        host.load_module(segment.model)
        return segment.mask
    if not subject:
        raise PitError("subject is empty; say in a few words what the detector is to look for.")
    with naming("detector"):
        detect = cutout.load_detector(host.folder_of(host.CUT_OUT, detector))
    host.load_module(segment.model, detect.model)
    return lambda picture: cutout.subject_mask(picture, subject, detect, segment, threshold or None)
