"""The miniature in ComfyUI: the pack's own trained models at 1/500 scale, as ordinary sockets."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..pit_core.errors import PitError
from ..pit_core.files import load_tensors
from . import host
from .sockets import schema

WEIGHTS = Path(__file__).resolve().parent.parent / "pit_core" / "miniature" / "weights"
UNET = "diffusion_pytorch_model.safetensors"
TEXT_HEADS = 4


class PiTMiniatureSDXL(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTMiniatureSDXL",
            "Miniature SDXL",
            "A complete tiny SDXL that draws critters of 128 x 128 pixels within seconds on any laptop. It "
            "ships with this pack; nothing is downloaded.",
            ["demo model", "tiny sdxl", "critters"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The tiny SDXL, for samplers."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder, which knows about critters."),
                io.Vae.Output(display_name="vae", tooltip="Turns its latents into pictures and back."),
                io.ClipVision.Output(
                    display_name="clip_vision", tooltip="The image encoder of the miniature's IP-Adapter."
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_miniature(WEIGHTS))


def load_miniature(weights: Path) -> tuple[Any, Any, Any, Any]:
    """(MODEL, CLIP, VAE, CLIP_VISION). Raises PitError when the weights are not there."""
    if not (weights / "manifest.json").is_file():
        raise PitError(
            "The miniature's weights are missing from this installation; install the complete pack again."
        )
    model = host.build_sdxl(_config(weights / "unet"), partial(_tensors, weights / "unet" / UNET))
    vae = host.build_vae(_config(weights / "vae"), _tensors(weights / "vae" / UNET))
    return model, _clip(weights / "text_encoder.safetensors"), vae, _vision(weights)


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
