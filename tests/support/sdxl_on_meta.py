"""SDXL's UNet at its own size in diffusers, and an adapter for it, without their numbers."""

from __future__ import annotations

from typing import Any

import torch

from pit_core.ip_adapter.adapter import IPAdapter, new_ip_adapter
from pit_core.ip_adapter.resampler import ImageProjection


def sdxl_on_meta() -> tuple[Any, IPAdapter]:
    """On the meta device, where weights take neither time nor memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
        return unet, new_ip_adapter(unet, ImageProjection(1280, 2048, 4))
