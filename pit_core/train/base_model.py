"""The frozen models that an adapter is trained beside, from local diffusers and transformers folders.

`load_base` reads a Stable Diffusion 1.5 or SDXL folder; `Encoders` turns pictures and captions into what the
objective reads. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PitError
from ..files import sha256_of
from ..ip_adapter.encode import ImageEncoder, null_pixels
from ..render import load_part

PROBE = 1 << 20  # bytes at either end of a weight file
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OF_PRECISION = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
"""The loop's precision -> the dtype in which frozen models run beside it."""


@dataclass
class BaseModel:
    """A Stable Diffusion folder's parts. `alphas_cumprod` (steps,) is its training noise schedule."""

    unet: nn.Module
    vae: nn.Module
    tokenizers: list[Any]
    text_encoders: list[nn.Module]
    alphas_cumprod: Tensor

    @property
    def sdxl(self) -> bool:
        """Whether the UNet reads a pooled text embedding and picture sizes, as SDXL does."""
        return getattr(self.unet.config, "addition_embed_type", None) == "text_time"


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> BaseModel:
    """A base model out of its folder: unet and text encoders in `dtype`, the VAE in float32.

    (SDXL's VAE overflows in float16.) Raises PitError for a folder without the expected parts, for damaged or
    incomplete weights, and for a model that does not predict epsilon.
    """
    import diffusers
    import transformers

    if not (folder / "unet" / "config.json").is_file():
        raise PitError(
            f"'{folder}' is no diffusers model folder: unet/config.json is missing. Expected a Stable "
            "Diffusion 1.5 or SDXL folder with unet, vae, text_encoder, tokenizer and scheduler."
        )
    unet = load_part(diffusers.UNet2DConditionModel, folder / "unet", torch_dtype=dtype)
    vae = load_part(diffusers.AutoencoderKL, folder / "vae", torch_dtype=torch.float32)
    encoders = [load_part(transformers.CLIPTextModel, folder / "text_encoder", dtype=dtype)]
    tokenizers = [load_part(transformers.CLIPTokenizer, folder / "tokenizer")]
    if getattr(unet.config, "addition_embed_type", None) == "text_time":
        second = load_part(transformers.CLIPTextModelWithProjection, folder / "text_encoder_2", dtype=dtype)
        encoders.append(second)
        tokenizers.append(load_part(transformers.CLIPTokenizer, folder / "tokenizer_2"))
    base = BaseModel(unet, vae, tokenizers, encoders, _schedule(folder / "scheduler"))
    for model in (unet, vae, *encoders):
        model.requires_grad_(False).eval()
    return base


def _schedule(folder: Path) -> Tensor:
    import diffusers

    scheduler = load_part(diffusers.DDPMScheduler, folder)
    predicts = scheduler.config.get("prediction_type", "epsilon")
    if predicts != "epsilon":
        raise PitError(f"'{folder.parent}' predicts {predicts}; adapters are trained on epsilon models only.")
    return scheduler.alphas_cumprod


def encoders_identity(folder: Path, encoders: Encoders) -> list[Any]:
    """What encoded tensors depend on besides pictures, captions and dtype: hashes, for a cache's key."""
    vision = encoders.vision
    return [base_identity(folder), [vision.content_hash, vision.mean, vision.std]]


def base_identity(folder: Path) -> dict[str, str]:
    """As `encoders_identity`, without an image encoder."""
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return {
        f"{name}/{file.name}": sha256_of(file)
        for name in names
        for file in sorted((folder / name).glob("*"))
        if file.suffix in (".safetensors", ".bin", ".json", ".txt") and file.is_file()
    }


def unet_identity(folder: Path) -> str:
    """A hash of the base's UNet for a run's record: its configuration, and of each weight file the size and
    the first and last MiB, since reading gigabytes at every start would take longer than it is worth."""
    digest = sha256()
    for file in sorted((folder / "unet").glob("*")):
        if file.suffix in (".safetensors", ".bin", ".json") and file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(PROBE))
                stream.seek(max(0, size - PROBE))
                digest.update(stream.read(PROBE))
    return digest.hexdigest()


@dataclass(frozen=True)
class Nulls:
    """What a dropped image and a dropped text turn into; pooled is None without SDXL."""

    features: Tensor
    text: Tensor
    pooled: Tensor | None


class CaptionEncoders(nn.Module):
    """Pictures and captions -> latents and text; all frozen, no gradients."""

    def __init__(self, base: BaseModel) -> None:
        super().__init__()
        self.vae, self.sdxl = base.vae, base.sdxl
        self.text_encoders = nn.ModuleList(base.text_encoders)
        self.tokenize = CaptionTokens(base.tokenizers)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """raw: "pixels" (B, 3, H, W) uint8, "ids" (B, encoders, T).

        Returns latents and text; for SDXL also pooled, and raw's "time_ids" (B, 6) as they are.
        """
        with torch.autocast(raw["pixels"].device.type, enabled=False):
            batch = {"latents": self.latents(raw["pixels"]), **self.text(raw["ids"])}
        if self.sdxl:
            batch["time_ids"] = raw["time_ids"]
        return batch

    def latents(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> the posterior's mean, scaled as the UNet expects (B, 4, h, w)."""
        config: Any = self.vae.config
        values = pixels.to(next(self.vae.parameters()).dtype) / 127.5 - 1
        latents = self.vae.encode(values).latent_dist.mode()  # type: ignore[operator]
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def text(self, ids: Tensor) -> dict[str, Tensor]:
        """Token ids (B, encoders, T) -> {"text"} and, for SDXL, {"pooled"}.

        SD1.5 reads the last hidden states; SDXL the penultimate ones of both encoders side by side, and the
        second one's projection.
        """
        if not self.sdxl:
            return {"text": self.text_encoders[0](ids[:, 0])[0]}
        outs = [encoder(ids[:, i], output_hidden_states=True) for i, encoder in enumerate(self.text_encoders)]
        return {
            "text": torch.cat([out.hidden_states[-2] for out in outs], dim=-1),
            "pooled": outs[-1].text_embeds,
        }


class Encoders(CaptionEncoders):
    """Pictures and captions -> the entries of an IP-Adapter's training batch; all frozen, no gradients.

    `plus` reads the image encoder's penultimate hidden states (B, N, W), as Plus adapters do, else its
    projected embedding (B, P).
    """

    def __init__(self, base: BaseModel, vision: ImageEncoder, *, plus: bool) -> None:
        super().__init__(base)
        self.vision_model = vision.model.requires_grad_(False).eval()
        self.vision, self.plus = vision, plus

    @torch.no_grad()
    def forward(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `CaptionEncoders`, and from "clip_pixels" (B, 3, h, w), normalised, also the features."""
        batch = super().forward(raw)
        with torch.autocast(raw["pixels"].device.type, enabled=False):
            batch["features"] = self.features(raw["clip_pixels"])
        return batch

    def features(self, clip_pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, h, w) -> hidden states (B, N, W) or embeddings (B, P)."""
        hidden, embeds = self.vision(clip_pixels)
        return hidden if self.plus else embeds

    @torch.no_grad()
    def nulls(self) -> Nulls:
        """The grey picture's features (base adapters: zeros), and the empty caption's text."""
        device = next(self.parameters()).device
        features = self.features(null_pixels("grey", size=self.vision.image_size).to(device))[0]
        text = self.text(self.tokenize([""]).to(device))
        pooled = text["pooled"][0] if self.sdxl else None
        return Nulls(features if self.plus else torch.zeros_like(features), text["text"][0], pooled)


class CaptionTokens:
    """Captions -> token ids (B, encoders, T), padded and cut to the text encoders' length."""

    def __init__(self, tokenizers: Sequence[Any]) -> None:
        self.tokenizers = list(tokenizers)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return torch.stack([_token_ids(tokenizer, captions) for tokenizer in self.tokenizers], dim=1)


def _token_ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
