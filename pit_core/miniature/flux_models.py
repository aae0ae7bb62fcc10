"""The miniature's second half: a Flux-family fill model and its 16-channel VAE, in diffusers' own classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .critters import CANVAS
from .models import PROJECTION, TEXT_WIDTH

LATENT_CHANNELS = 16
PATCH = 2  # latents along a token's side
# Flux's own: (latents - shift) * scale is standard. Hosts know them by the family and read no config.
FLUX_LATENT_SHIFT = 0.1159
FLUX_LATENT_SCALE = 0.3611
CANVAS_SIZE = (CANVAS, 2 * CANVAS)  # of a diptych, in pixels, without margins


def build_flux_vae() -> Any:
    """diffusers' AutoencoderKL as Flux has it: 8x down, 16 channels, no quant convolutions."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=CANVAS,
        scaling_factor=FLUX_LATENT_SCALE,
        shift_factor=FLUX_LATENT_SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def normalise_flux_latents(vae: Any, std: Tensor) -> None:
    """Scale each channel's latents from ``std`` (C,) to Flux's deviation, and make the posterior a point.

    Their means are left alone, as the decoder pads with zeros; training keeps them near zero, where Flux's
    shift is a twenty-fifth of a deviation. A point, so that a host that samples the posterior and one that
    takes its mode see the same.
    """
    gain = 1.0 / (FLUX_LATENT_SCALE * std)
    with torch.no_grad():
        last, first = vae.encoder.conv_out, vae.decoder.conv_in
        last.weight[:LATENT_CHANNELS] *= gain[:, None, None, None]
        last.bias[:LATENT_CHANNELS] *= gain
        last.weight[LATENT_CHANNELS:] = 0
        last.bias[LATENT_CHANNELS:] = -30  # log-variance
        first.weight /= gain[None, :, None, None]


def build_fill() -> Any:
    """diffusers' FluxTransformer2DModel with Flux Fill's inputs: noisy and masked latents, and the mask."""
    from diffusers import FluxTransformer2DModel

    fill = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS * 2 + 4 * 64,
        out_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=5,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=PROJECTION,
        guidance_embeds=True,
        axes_dims_rope=(4, 10, 10),
    )
    _start_as_identity(fill)
    return fill


def _start_as_identity(fill: Any) -> None:
    """Modulations and the output begin at zero, so that every block passes its input on at first.

    Peebles and Xie 2023, "Scalable Diffusion Models with Transformers", adaLN-Zero (arXiv 2212.09748).
    """
    starts = [fill.norm_out.linear, fill.proj_out]
    for block in fill.transformer_blocks:
        starts += [block.norm1.linear, block.norm1_context.linear]
    starts += [block.norm.linear for block in fill.single_transformer_blocks]
    for linear in starts:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def build_flux_scheduler() -> Any:
    """Flux's Euler steps, shifted towards noise by the number of tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256
    )


def fill_pipeline(vae: Any, fill: Any) -> Any:
    """diffusers' FluxFillPipeline around both; prompts come as embeddings, see ``models.encode_text``."""
    from diffusers import FluxFillPipeline

    return FluxFillPipeline(
        scheduler=build_flux_scheduler(),
        vae=vae,
        transformer=fill,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )


def flux_shift(tokens: int) -> float:
    """mu for this many tokens: linear, 0.5 at 256 and 1.15 at 4096, as Flux samples."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def encode_flux(vae: Any, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> scaled latents (B, 16, H / 8, W / 8)."""
    return (vae.encode(pixels).latent_dist.mode() - FLUX_LATENT_SHIFT) * FLUX_LATENT_SCALE


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> tokens (B, h / 2 * w / 2, 4 C), as Flux packs 2 x 2 patches."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def pack_mask(mask: Tensor) -> Tensor:
    """A mask (B, H, W) of pixels, 1 where to fill -> tokens (B, H / 16 * W / 16, 256), as Flux Fill's."""
    batch, height, width = mask.shape
    cells = mask.view(batch, height // 8, 8, width // 8, 8).permute(0, 2, 4, 1, 3)
    return pack(cells.reshape(batch, 64, height // 8, width // 8))


def image_ids(height: int, width: int) -> Tensor:
    """Positions (height * width, 3) of a grid of tokens, row by row: zero, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
