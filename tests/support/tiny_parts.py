"""A small set of part data, and the models that embed it: real classes at toy size, random weights."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from pit_core.ip_adapter.adapter import IPAdapter, IPLayers
from pit_core.ip_adapter.encoder import ImageEncoder
from pit_core.ip_adapter.resampler import Resampler
from pit_core.parts.manifest import Whole, write_manifest

PIXELS, TOKENS, WIDTH = 32, 4, 12


def image_encoder(seed: int = 3) -> ImageEncoder:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=8,
        projection_dim=20,
    )
    return ImageEncoder(CLIPVisionModelWithProjection(config))


def adapter() -> IPAdapter:
    torch.manual_seed(4)
    sizes: dict[str, Any] = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": TOKENS}
    projector = Resampler(**sizes, embedding_dim=24, output_dim=WIDTH)
    return IPAdapter(projector, IPLayers([8], WIDTH), "'tiny adapter'").eval()


def write_set(folder: Path, count: int = 10) -> Path:
    """The manifest of wholes with 0 to 2 parts each, all pictures different: blobs on white."""
    folder.mkdir(parents=True, exist_ok=True)
    wholes = []
    for i in range(count):
        draw_blob(folder / f"{i}.png", (i * 20 % 256, i, 90))
        parts = tuple(f"{i}_{part}.png" for part in range(i % 3))
        for number, name in enumerate(parts):
            draw_blob(folder / name, (i * 20 % 256, 80 + number * 80, i))
        wholes.append(Whole(f"{i}.png", parts, set="all"))
    write_manifest(folder / "parts.jsonl", wholes)
    return folder / "parts.jsonl"


def draw_blob(path: Path, colour: tuple[int, int, int]) -> None:
    picture = Image.new("RGB", (36, 36), "white")
    ImageDraw.Draw(picture).ellipse([6, 2, 28, 34], fill=colour)
    picture.save(path)
