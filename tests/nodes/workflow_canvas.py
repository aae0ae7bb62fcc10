"""What the diptychs' workflows give to Flux, for thumbnails: drawn here, as Flux itself is run nowhere."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pit_core.diptych.layout import DiptychLayout
from pit_core.miniature.critters import Critter, Part, render

SIDE, MASKED = 240, 0.5  # pixels of a panel; the grey of what is to be made
SUBJECT = Critter(
    body=Part("box", "blue"),
    eyes=Part("round", "orange"),
    ears=Part("bunny", "cyan"),
    wings=Part("bat", "purple"),
)
OTHER = Critter(
    body=Part("pear", "green"),
    eyes=Part("sleepy", "red"),
    ears=Part("horn", "yellow"),
    scene="beach",
    scene_seed=3,
)


def canvas_of(name: str) -> tuple[list[Image.Image], list[Image.Image]]:
    """The pictures that go in, and the canvas of both panels, what is to be made in grey."""
    pictures = [replace(SUBJECT, style="pixel") if "style" in name else SUBJECT]
    target = edit = None
    if "edit" in name:
        pictures.append(OTHER)
        target, edit = _image(OTHER), torch.zeros(1, SIDE, SIDE)
        edit[:, SIDE // 6 :, SIDE // 5 : 4 * SIDE // 5] = 1
    canvas, mask = DiptychLayout(SIDE, SIDE).compose(_image(pictures[0]), target, edit)
    canvas = torch.lerp(canvas, torch.full_like(canvas, MASKED), mask[..., None])
    return [render(each, SIDE) for each in pictures], [_picture(canvas)]


def _image(critter: Critter) -> Tensor:
    return torch.from_numpy(np.asarray(render(critter, SIDE).convert("RGB"), dtype=np.float32) / 255)[None]


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy())
