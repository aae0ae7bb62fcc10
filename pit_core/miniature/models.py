"""The miniature's models: the real classes at 1/500 scale, and how they are built, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Linear

from ..concepts import Stack
from ..errors import PitError
from ..files import check_shapes, load_tensors, sha256_of
from ..ip_adapter.pixels import CLIP_MEAN, CLIP_STD
from ..render import Renderer, RenderSettings
from .assets import WEIGHTS
from .critters import CANVAS
from .tokenizer import WordTokenizer

STACK_FILES = (
    "vae/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "image_encoder.safetensors",
    "text_encoder.safetensors",
    "ip_adapter_plus.safetensors",
    "ip_prior.safetensors",
)
TEXT_WIDTH = 96
PROJECTION = 96
VISION_WIDTH = 128
TEXT_LENGTH = 40
# ComfyUI scales SDXL latents by this; the miniature's VAE is normalised to it after training.
SDXL_LATENT_SCALE = 0.13025
# Enough for pictures this small, and seconds on a laptop.
DEFAULTS = RenderSettings(steps=25, guidance=3.0, batch=16)


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
        eos_token_id=3,  # 2 would mean "the highest id" to transformers
        pad_token_id=0,
    )
    return CLIPTextModelWithProjection(config)


def normalise_latents(vae: Any, mean: Tensor, std: Tensor, scale: float, shift: float = 0.0) -> None:
    """Fold an affine map into the VAE: then (latents - shift) * scale is standard, as its family expects.

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


class PatchReader(nn.Module):
    """The attribute reader used while tuning: a small vision transformer on overlapping patches."""

    def __init__(self, outputs: int, width: int = 96, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 4, stride=4), nn.GELU(), nn.Conv2d(24, width, 5, stride=4, padding=2)
        )
        self.position = nn.Parameter(0.02 * torch.randn(1, 65, width))
        self.summary = nn.Parameter(torch.zeros(1, 1, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 3 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), Linear(width, outputs))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 128, 128) in [-1, 1] -> (B, outputs)."""
        patches = self.stem(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.summary.expand(len(patches), -1, -1), patches], 1) + self.position
        return self.head(self.layers(x)[:, 0])


class GridReader(nn.Module):
    """The attribute reader that reports figures: a residual convolutional network on a 4 x 4 grid at last."""

    def __init__(self, outputs: int, widths: tuple[int, ...] = (40, 64, 96, 128)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 4, stride=4)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.stages = nn.Sequential(*(_ResidualBlock(before, after) for before, after in pairs))
        # Position matters (a second pair of wings, a tail on the wrong side), so the grid is kept.
        self.head = nn.Sequential(nn.Flatten(), Linear(widths[-1] * 16, 128), nn.GELU(), Linear(128, outputs))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 128, 128) in [-1, 1] -> (B, outputs)."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # quicker on a CPU
        return self.head(self.stages(self.stem(pixels)))


class _ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; a change of width halves the picture."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.norm1, self.norm2 = nn.GroupNorm(8, before), nn.GroupNorm(8, after)
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(before, after, stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(nn.functional.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(nn.functional.silu(self.norm2(y)))


def clip_pixels(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> CLIP's normalised pixels."""
    mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std


def encode_text(text_encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Penultimate states (B, T, TEXT_WIDTH), pooled projection (B, PROJECTION): SDXL's second encoder."""
    out = text_encoder(ids, output_hidden_states=True)
    return out.hidden_states[-2], out.text_embeds


def build_resampler() -> Any:
    """The Plus projection: 65 features of width 128 -> 16 tokens of width 96."""
    from ..ip_adapter.resampler import Resampler

    return Resampler(
        dim=VISION_WIDTH,
        depth=2,
        dim_head=32,
        heads=4,
        num_queries=16,
        embedding_dim=VISION_WIDTH,
        output_dim=TEXT_WIDTH,
        ff_mult=4,
    )


def build_prior() -> Any:
    """The IP-Prior at 2 M parameters."""
    from ..ip_prior.model import IPPrior, init_for_training

    prior = IPPrior(embedding_dim=TEXT_WIDTH, hidden_dim=160, n_layers=4, n_heads=5)
    init_for_training(prior)
    return prior


def build_scheduler() -> Any:
    """SDXL's Euler schedule."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def build_reader(name: str) -> nn.Module:
    """The attribute reader "tuning" or "judge": two architectures, so that their mistakes differ, too.

    Raises PitError for another name.
    """
    from .reader import OUTPUTS

    kinds: dict[str, Callable[[int], nn.Module]] = {"tuning": PatchReader, "judge": GridReader}
    if name not in kinds:
        raise PitError(f"There is no reader '{name}'; the readers are {', '.join(kinds)}.")
    return kinds[name](OUTPUTS)


def image_features(image_encoder: Any, pixels: Tensor) -> Tensor:
    """(B, 3, 128, 128) in [-1, 1] -> penultimate states (B, 65, VISION_WIDTH), what a Plus adapter reads."""
    return image_encoder(clip_pixels(pixels), output_hidden_states=True).hidden_states[-2]


def grey() -> Tensor:
    """The grey null, (1, 3, 128, 128) in [-1, 1]: zero after CLIP's normalisation."""
    return (2 * torch.tensor(CLIP_MEAN) - 1).view(1, 3, 1, 1).expand(1, 3, CANVAS, CANVAS)


def load_stack(
    weights: Path = WEIGHTS, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Stack:
    """The miniature as a whole: the shipped files through the loaders that read the full-size ones.

    Raises PitError when a file is missing or is not what the manifest says.
    """
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

    from ..ip_adapter.checkpoint import load_ip_adapter
    from ..ip_adapter.encode import load_image_encoder
    from ..ip_prior.checkpoint import load_prior

    hashes = check_weights(weights, STACK_FILES)
    adapter = load_ip_adapter(weights / "ip_adapter_plus.safetensors", dtype=dtype, device=device)
    prior, info = load_prior(weights / "ip_prior.safetensors", dtype=torch.float32, device=device)
    encoder = load_image_encoder(weights / "image_encoder.safetensors", dtype=dtype, device=device)
    options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True}
    pipe: Any = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(weights / "vae", **options),
        unet=UNet2DConditionModel.from_pretrained(weights / "unet", **options),
        scheduler=build_scheduler(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )
    pipe.to(device)
    text_encoder = load_text_encoder(weights / "text_encoder.safetensors").to(device, dtype)
    renderer = Renderer(pipe, adapter, encode_prompt=prompt_encoder(text_encoder))
    return Stack(encoder, adapter, prior, info, renderer, "miniature", DEFAULTS, hashes)


def read_manifest(weights: Path = WEIGHTS) -> dict[str, Any]:
    """The shipped weights' record: per file its hash, seed, steps, and the figure it was accepted at.

    Raises PitError when there is none, or a damaged one.
    """
    path = weights / "manifest.json"
    if not path.is_file():
        raise PitError(f"The miniature's weights are missing from '{weights}'; install the complete package.")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        return {**manifest, "files": dict(manifest["files"])}
    except (ValueError, KeyError, TypeError) as error:
        raise PitError(f"'{path}' is damaged; install the complete package again.") from error


def check_weights(weights: Path = WEIGHTS, needed: Sequence[str] | None = None) -> dict[str, str]:
    """SHA-256 by name of the files ``needed``, or of all that the manifest lists.

    Raises PitError when one of them is missing or differs from the manifest.
    """
    listed = {name: entry["sha256"] for name, entry in read_manifest(weights)["files"].items()}
    names = list(listed if needed is None else needed)
    missing = [name for name in names if name not in listed or not (weights / name).is_file()]
    if missing:
        raise PitError(f"The miniature lacks its file '{missing[0]}'; install the complete package.")
    for name in names:
        if sha256_of(weights / name) != listed[name]:
            raise PitError(f"The miniature's file '{name}' is damaged; install the complete package again.")
    return {name: listed[name] for name in names}


def load_text_encoder(path: Path) -> Any:
    """The text tower from one safetensors file."""
    return _filled(build_text_encoder(len(WordTokenizer(TEXT_LENGTH))), path)


def prompt_encoder(text_encoder: Any) -> Callable[[list[str]], tuple[Tensor, Tensor]]:
    """Texts -> (embeddings, pooled), as a Renderer takes them."""
    tokenizer = WordTokenizer(TEXT_LENGTH)

    @torch.no_grad()
    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        return encode_text(text_encoder, tokenizer(texts).to(text_encoder.device))

    return encode


def load_reader(name: str = "judge", weights: Path = WEIGHTS) -> nn.Module:
    """An attribute reader: "judge" ships and reports the figures; "tuning" was looked at while tuning."""
    return _filled(build_reader(name), weights / f"reader_{name}.safetensors")


def _filled(model: nn.Module, path: Path) -> Any:
    """The model with a file's weights, frozen, in float32. Raises PitError when they are not its own."""
    tensors, _ = load_tensors(path)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    check_shapes(expected, tensors, f"'{path.name}'")
    model.load_state_dict({name: value.float() for name, value in tensors.items()})
    return model.eval().requires_grad_(False)
