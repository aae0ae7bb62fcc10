"""The miniature in ComfyUI: the pack's own trained models at 1/500 scale, as ordinary sockets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..pit_core.errors import PitError
from ..pit_core.files import load_tensors
from ..pit_core.parts.canvas import on_white_square
from . import host
from .images import to_image
from .sockets import schema

MINIATURE_FOLDER = Path(__file__).resolve().parent.parent / "pit_core" / "miniature"
WEIGHTS, PARTS = MINIATURE_FOLDER / "weights", MINIATURE_FOLDER / "parts"
PART_PIXELS = 256
UNET = "diffusion_pytorch_model.safetensors"
TEXT_HEADS = 4


class PiTMiniatureSDXL(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTMiniatureSDXL",
            "Miniature SDXL",
            "A complete tiny SDXL that draws critters of 128 x 128 pixels within seconds on any laptop, and "
            "pictures to try it on. It ships with this pack; nothing is downloaded.",
            ["demo model", "tiny sdxl", "critters"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The tiny SDXL, for samplers."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder, which knows about critters."),
                io.Vae.Output(display_name="vae", tooltip="Turns its latents into pictures and back."),
                io.ClipVision.Output(
                    display_name="clip_vision", tooltip="The image encoder of the miniature's IP-Adapter."
                ),
                io.Image.Output(
                    display_name="sample parts",
                    tooltip="Ten parts of critters: bodies 0 and 1, ears 2 and 3, eyes 4 and 5, tails 6 and "
                    "7, wings 8 and 9. 'Get Image from Batch' takes one out.",
                ),
                io.Image.Output(
                    display_name="sample pictures",
                    tooltip="Four critters: on the beach 0, of pixels 1, a blue one 2, a green one 3.",
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_miniature(WEIGHTS), sample_parts(PARTS), sample_pictures())


class PiTMiniatureFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTMiniatureFlux",
            "Miniature Flux",
            "A complete tiny Flux Fill that fills in one half of a diptych of two critters, 256 x 128 "
            "pixels, within seconds on any laptop. It ships with this pack; nothing is downloaded.",
            ["demo model", "tiny flux", "critters", "diptych"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The tiny Flux Fill, for samplers."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder, which knows about critters."),
                io.Vae.Output(display_name="vae", tooltip="Turns its latents into pictures and back."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_miniature_flux(WEIGHTS))


def load_miniature_flux(weights: Path) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE). Raises PitError when the weights are not there."""
    fill, vae, text = (weights / name for name in ("flux_fill", "flux_vae", "text_encoder.safetensors"))
    if not all(path.is_file() for path in (fill / UNET, vae / UNET, text)):
        raise PitError(
            "The miniature Flux's weights are missing from this installation; install the complete pack "
            "again."
        )
    from ..pit_core.miniature.flux_models import CANVAS_SIZE, flux_shift

    shift = flux_shift(CANVAS_SIZE[0] * CANVAS_SIZE[1] // 16**2)
    model = host.build_flux(_config(fill), shift, partial(_tensors, fill / UNET))
    return model, _clip(text), host.build_vae(_config(vae), _tensors(vae / UNET))


def load_miniature(weights: Path) -> tuple[Any, Any, Any, Any]:
    """(MODEL, CLIP, VAE, CLIP_VISION). Raises PitError when the weights are not there."""
    if not (weights / "manifest.json").is_file():
        raise PitError(
            "The miniature's weights are missing from this installation; install the complete pack again."
        )
    model = host.build_sdxl(_config(weights / "unet"), partial(_tensors, weights / "unet" / UNET))
    vae = host.build_vae(_config(weights / "vae"), _tensors(weights / "vae" / UNET))
    return model, _clip(weights / "text_encoder.safetensors"), vae, _vision(weights)


# what ships beside the models


def shipped_names(assets: Mapping[str, str]) -> list[str]:
    """How drop-downs name files of `pit_core.miniature.assets`: "miniature: thin to wide"."""
    return [_shipped_name(name) for name in assets]


def _shipped_name(name: str) -> str:
    return f"miniature: {name.replace('_', ' ')}"


def shipped_or_own(assets: Mapping[str, str], folder: str, file: str) -> Path:
    """The file that a drop-down's entry stands for: one that ships, or one in a folder of the host.

    Raises PitError where it is gone.
    """
    shipped = {_shipped_name(name): path for name, path in assets.items()}
    if file not in shipped:
        return host.path_of(folder, file)
    if not (WEIGHTS / shipped[file]).is_file():
        raise PitError(
            f"The file of '{file}' is missing from this installation; install the complete pack again."
        )
    return WEIGHTS / shipped[file]


def state_of_either(assets: Mapping[str, str], folder: str, file: str | None) -> str:
    """What changes when the file does, for the host's cache; one that ships does not."""
    return "" if file in shipped_names(assets) else host.state_of(folder, file)


def sample_parts(folder: Path) -> Tensor:
    """The pack's part pictures as IMAGE (10, 256, 256, 3), each on white, in the order of kinds and names."""
    files = sorted(folder.glob("*/*.png"))
    if not files:
        raise PitError(
            "The miniature's part pictures are missing from this installation; install the complete pack "
            "again."
        )
    return torch.cat([to_image(on_white_square(Image.open(file), PART_PIXELS, 1.0)) for file in files])


def sample_pictures() -> Tensor:
    """Four whole critters as IMAGE (4, 256, 256, 3): on the beach, of pixels, a blue one, a green one."""
    from ..pit_core.miniature.critters import Critter, Part, render

    critters = (
        Critter(
            body=Part("turnip", "orange"),
            eyes=Part("round", "blue"),
            ears=Part("cat", "orange"),
            wings=Part("feather", "cyan"),
            tail=Part("bushy", "red"),
            scene="beach",
            scene_seed=3,
        ),
        Critter(
            body=Part("round", "purple"),
            eyes=Part("cyclops", "green"),
            ears=Part("antenna", "pink"),
            tail=Part("fin", "cyan"),
            style="pixel",
        ),
        Critter(
            body=Part("box", "blue"),
            eyes=Part("round", "orange"),
            ears=Part("bunny", "cyan"),
            wings=Part("bat", "purple"),
        ),
        Critter(
            body=Part("pear", "green"),
            eyes=Part("sleepy", "red"),
            ears=Part("horn", "yellow"),
            wings=Part("leaf", "yellow"),
            build=0.9,
        ),
    )
    return torch.cat([to_image(render(critter, PART_PIXELS)) for critter in critters])


def _clip(path: Path) -> Any:
    from ..pit_core.miniature.tokenizer import END, PAD, START, WordTokenizer

    tensors = {key: value.float() for key, value in _tensors(path).items()}
    positions = tensors["text_model.embeddings.position_embedding.weight"]
    words = tensors["text_model.embeddings.token_embedding.weight"]
    config = {
        "vocab_size": words.shape[0],
        "hidden_size": positions.shape[1],
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len({key.split(".")[3] for key in tensors if ".layers." in key}),
        "num_attention_heads": TEXT_HEADS,
        "max_position_embeddings": positions.shape[0],
        "hidden_act": "gelu",
        "eos_token_id": END,
    }

    def tokenize(text: str) -> list[int]:
        words = WordTokenizer(0).split(text)
        return WordTokenizer(len(words) + 2)([text])[0, 1:-1].tolist()

    return host.build_clip(config, tensors, tokenize, {"start": START, "end": END, "pad": PAD})


def _vision(weights: Path) -> Any:
    tensors, metadata = load_tensors(weights / "image_encoder.safetensors")
    own = json.loads(metadata["pit_config"])
    patch = tensors["vision_model.embeddings.patch_embedding.weight"]
    places = tensors["vision_model.embeddings.position_embedding.weight"].shape[0]
    config = {
        "hidden_size": patch.shape[0],
        "intermediate_size": tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "projection_dim": tensors["visual_projection.weight"].shape[0],
        "num_hidden_layers": len({key.split(".")[3] for key in tensors if ".layers." in key}),
        "num_attention_heads": own["num_attention_heads"],
        "hidden_act": own["hidden_act"],
        "image_mean": own["image_mean"],
        "image_std": own["image_std"],
        "patch_size": patch.shape[-1],
        "image_size": round((places - 1) ** 0.5) * patch.shape[-1],
    }
    return host.build_clip_vision(config, {key: value.float() for key, value in tensors.items()})


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))


def _tensors(path: Path) -> dict[str, Tensor]:
    return load_tensors(path)[0]
