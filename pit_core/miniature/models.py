"""The miniature's models: the real classes at 1/500 scale, and how they are built, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .critters import CANVAS

WEIGHTS = Path(__file__).parent / "weights"
TEXT_WIDTH = 96
PROJECTION = 96
VISION_WIDTH = 128
TEXT_LENGTH = 48
# ComfyUI scales SDXL latents by this; the miniature's VAE is normalised to it after training.
SDXL_LATENT_SCALE = 0.13025


def build_vae(latent_channels: int = 4) -> Any:
    """diffusers' AutoencoderKL: 8x down, 128 x 128 pixels to 16 x 16 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=CANVAS,
        scaling_factor=SDXL_LATENT_SCALE,
        force_upcast=False,
    )


def build_unet() -> Any:
    """An SDXL-family UNet: SDXL's block plan with one transformer where SDXL has two or ten."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=CANVAS // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(4, 4, 4),  # diffusers' name for the number of heads: 16 wide each
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=PROJECTION + 6 * 256,
        use_linear_projection=True,
        norm_num_groups=8,
    )


def build_image_encoder() -> Any:
    """transformers' CLIP vision tower: 65 tokens of width 128."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=CANVAS,
        patch_size=16,
        projection_dim=PROJECTION,
        hidden_act="gelu",
    )
    return CLIPVisionModelWithProjection(config)


def build_text_encoder(vocabulary: int) -> Any:
    """transformers' CLIP text tower, as SDXL's second encoder: penultimate states and a pooled projection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=PROJECTION,
        hidden_act="gelu",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return CLIPTextModelWithProjection(config)


def normalise_latents(vae: Any, mean: Tensor, std: Tensor, scale: float, shift: float = 0.0) -> None:
    """Fold an affine map into the VAE so that (latents - shift) * scale is standard per channel, as its family expects.

    ``mean`` and ``std`` (C,) are those of the posterior's mean over the training pictures.
    """
    channels = len(mean)
    gain = 1.0 / (scale * std)
    with torch.no_grad():
        quant, post = vae.quant_conv, vae.post_quant_conv
        quant.weight[:channels] *= gain[:, None, None, None]
        quant.bias[:channels] = (quant.bias[:channels] - mean) * gain + shift
        quant.bias[channels:] += 2 * torch.log(gain)  # the log-variance moves with the scale
        post.bias += (post.weight[:, :, 0, 0] * (mean - shift / gain)[None]).sum(1)
        post.weight /= gain[None, :, None, None]


class ConvReader(nn.Module):
    """The attribute reader used while tuning: a small residual convolutional network."""

    def __init__(self, outputs: int, widths: tuple[int, ...] = (24, 48, 80, 112)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, stride=2, padding=2)
        stages: list[nn.Module] = []
        for before, after in zip((widths[0], *widths), widths, strict=False):
            stages.append(_ConvBlock(before, after))
        self.stages = nn.Sequential(*stages)
        # Position matters (a second pair of wings, a tail on the wrong side), so the grid is kept.
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(widths[-1] * 16, 192), nn.GELU(), nn.Linear(192, outputs)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 128, 128) in [-1, 1] -> (B, outputs)."""
        return self.head(self.stages(self.stem(pixels)))


class _ConvBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, before), nn.GroupNorm(8, after)
        self.conv1 = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(nn.functional.silu(self.norm1(x)))
        return self.down(x) + self.conv2(nn.functional.silu(self.norm2(y)))


class PatchReader(nn.Module):
    """The attribute reader that reports figures: a small vision transformer on overlapping patches."""

    def __init__(self, outputs: int, width: int = 96, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 4, stride=4), nn.GELU(), nn.Conv2d(24, width, 5, stride=2, padding=2)
        )
        self.position = nn.Parameter(0.02 * torch.randn(1, 257, width))
        self.summary = nn.Parameter(torch.zeros(1, 1, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 3 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 128, 128) in [-1, 1] -> (B, outputs)."""
        patches = self.stem(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.summary.expand(len(patches), -1, -1), patches], 1) + self.position
        return self.head(self.layers(x)[:, 0])
