"""A whole stack of real classes at toy size with seeded random weights, in memory and as files."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from pit_core.concepts import Stack, StackFiles
from pit_core.ip_adapter.adapter import IPAdapter, new_ip_adapter
from pit_core.ip_adapter.checkpoint import save_ip_adapter
from pit_core.ip_adapter.encode import ImageEncoder
from pit_core.ip_adapter.resampler import Resampler
from pit_core.ip_prior.info import PriorInfo
from pit_core.ip_prior.model import IPPrior
from pit_core.render import Renderer, RenderSettings

FIRST, TEXT = 8, 24  # widths of the two text encoders; the second also gives the pooled embedding
CONTEXT = FIRST + TEXT
PIXELS = 32  # of the pictures, and of what the image encoder sees
VISION = 24
TOKENS = 4
QUICK = RenderSettings(steps=2, guidance=3.0)


def unet() -> Any:
    """SDXL's block plan: no attention at the top, then one and two transformers."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=PIXELS // 4,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 4),
        cross_attention_dim=CONTEXT,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT + 6 * 8,
        use_linear_projection=True,
        norm_num_groups=8,
    ).eval()


def vae() -> Any:
    torch.manual_seed(2)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=PIXELS,
        scaling_factor=0.13025,
    ).eval()


def scheduler() -> Any:
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
    )


def image_encoder(width: int = VISION) -> Any:
    torch.manual_seed(3)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=PIXELS,
            patch_size=8,
            projection_dim=20,
        )
    ).eval()


def adapter(of: Any, width: int = VISION) -> IPAdapter:
    torch.manual_seed(4)
    projector = Resampler(
        dim=64,
        depth=1,
        dim_head=64,
        heads=1,
        num_queries=TOKENS,
        embedding_dim=width,
        output_dim=CONTEXT,
    )
    return new_ip_adapter(of, projector, "'tiny adapter'").eval()


def prior(tokens: int = TOKENS) -> IPPrior:
    torch.manual_seed(5)
    return IPPrior(CONTEXT, 64, 1, 1, tokens).eval()


def encode_prompt(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A text encoder of one line: characters seed the embeddings."""
    rows = [torch.randn(5, CONTEXT, generator=torch.Generator().manual_seed(sum(map(ord, t)))) for t in texts]
    embeds = torch.stack(rows)
    return embeds, embeds.mean(1)[:, :TEXT]


def pipe(of: Any | None = None) -> Any:
    """SDXL without text encoders."""
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(
        vae=vae(), unet=of or unet(), scheduler=scheduler(), add_watermarker=False, **nothing
    )


def stack(**changes: Any) -> Stack:
    """A stack in memory; `changes` replace what the prior's info says (use_ref, max_crops, sketch_prob)."""
    model = unet()
    ours, its_prior = adapter(model), prior()
    info = PriorInfo(its_prior.config, **({"max_crops": 3, "sketch_prob": 0.5} | changes))
    renderer = Renderer(pipe(model), ours, encode_prompt=encode_prompt)
    return Stack(ImageEncoder(image_encoder()), ours, its_prior, info, renderer, "tiny", QUICK, {"tiny": "0"})


# as files


def save(folder: Path) -> StackFiles:
    """The released layouts: diffusers folder, encoder folder, adapter file, prior.ckpt with cfg.yaml."""
    files = StackFiles(
        folder / "sdxl",
        folder / "image_encoder",
        folder / "adapter.safetensors",
        folder / "prior" / "prior.ckpt",
    )
    model = unet()
    StableDiffusionXLPipeline(
        vae=vae(),
        unet=model,
        scheduler=scheduler(),
        text_encoder=_text_encoder(CLIPTextModel, FIRST),
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection, TEXT),
        tokenizer=tokenizer(folder / "words"),
        tokenizer_2=tokenizer(folder / "words"),
        add_watermarker=False,
    ).save_pretrained(files.sdxl)
    image_encoder().save_pretrained(files.image_encoder)
    save_ip_adapter(files.ip_adapter, adapter(model))
    save_prior(files.prior)
    return files


def save_prior(path: Path, tokens: int = TOKENS) -> None:
    """As released: a torch checkpoint, and its settings in cfg.yaml beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(prior(tokens).state_dict(), path)
    settings = {
        "hidden_dim": 64,
        "num_layers": 1,
        "num_attention_heads": 1,
        "num_tokens": tokens,
        "use_ref": True,
        "max_crops": 3,
        "sketch_prob": 0.5,
    }
    (path.parent / "cfg.yaml").write_text(yaml.safe_dump(settings), "utf-8")


def tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with letters for words."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [","]
    words = [*letters, "ab", *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\na b\n", "utf-8")
    vocabulary, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizer(vocabulary, merges, model_max_length=12)


def _text_encoder(kind: Any, width: int) -> Any:
    torch.manual_seed(6)
    return kind(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=12,
            projection_dim=width,
            bos_token_id=55,
            eos_token_id=56,
            pad_token_id=56,
        )
    ).eval()


def same(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference; NaN counts as infinite."""
    worst = float((a - b).abs().max())
    return math.inf if math.isnan(worst) else worst
