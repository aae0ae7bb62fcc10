"""The IP-LoRA's objective: low-rank changes of a UNet's attention, learned with an IP-Adapter in place.

"Piece it Together" (arXiv 2503.10365), section on text adherence: UNet and adapter are frozen, the image
tokens count fully, and the LoRA learns to hear the text again. LoRA: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PitError
from ..ip_adapter.adapter import IPAdapter
from ..ip_adapter.layers import layers_of_unet
from ..ip_adapter.processor import install_ip_adapter
from ..lora.formats import save_lora
from ..lora.kinds import IP_LORA, KIND_KEY
from ..lora.model import Lora, LoraLayer
from .ip_adapter import Dropout, add_noise, check_batch, drop_rows, noise_loss, predict_noise, reads_sizes
from .loop import Draws, Objective

NAME = "default"
"""peft's name of the one LoRA that a layer has here."""

OF_UNET = r".+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
OF_ADAPTER = r"\d+\.to_[kv]_ip"
NO_DROPOUT = Dropout(0.0, 0.0, 0.0)


class IPLoRAObjective(Objective):
    """MSE between the noise and its prediction by a UNet with LoRA, text and image tokens, at uniform steps.

    A batch holds "latents" (B, C, h, w), already scaled; "text" (B, T, D); "tokens" (B, T', D), the image
    tokens of the adapter; and for a UNet of SDXL's kind "pooled" (B, P) and "time_ids" (B, 6).

    Only the LoRA learns: `rank` on the queries, keys, values and outputs of all attention layers, with
    `lora_on_ip_adapter` also on the adapter's own keys and values. Its alpha is the rank, `down` starts as
    normals of deviation 1 / rank drawn by `seed`, `up` as zeros, so that it changes nothing at first. UNet
    and adapter are changed in place (they keep peft's layers), frozen, and run in their own dtypes; the
    adapter's layers should have the UNet's. The LoRA is float32.

    `alphas_cumprod` (steps,) is the noise schedule's. `min_snr`: see `min_snr_loss`; `snr_limit`: see
    `noise_loss`; not both. `dropout` replaces rows by `null_tokens` (T', D), `null_text` (T, D) and
    `null_pooled` (P,), which it then needs.

    Raises PitError when the adapter does not fit the UNet, for options that do not go together, and for a
    batch without the expected entries.
    """

    alphas_cumprod: Tensor
    null_tokens: Tensor | None
    null_text: Tensor | None
    null_pooled: Tensor | None

    def __init__(
        self,
        unet: nn.Module,
        adapter: IPAdapter,
        *,
        alphas_cumprod: Tensor,
        rank: int = 64,
        lora_on_ip_adapter: bool = False,
        seed: int = 0,
        min_snr: float | None = None,
        snr_limit: float | None = None,
        dropout: Dropout = NO_DROPOUT,
        null_tokens: Tensor | None = None,
        null_text: Tensor | None = None,
        null_pooled: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_options(rank, min_snr, snr_limit)
        self.unet = unet.requires_grad_(False)
        self.adapter = adapter.requires_grad_(False)
        self.context = install_ip_adapter(unet, adapter)
        self.context.train = True
        self.rank, self.min_snr, self.snr_limit, self.dropout = rank, min_snr, snr_limit, dropout
        self.lora_on_ip_adapter = lora_on_ip_adapter
        # Not persistent: all of this belongs to the base model.
        self.register_buffer("alphas_cumprod", alphas_cumprod.detach().float().clone(), persistent=False)
        for name, null in (("tokens", null_tokens), ("text", null_text), ("pooled", null_pooled)):
            copy = None if null is None else null.detach().clone()
            self.register_buffer(f"null_{name}", copy, persistent=False)
        self._check_nulls()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_lora(unet, OF_UNET, rank)
            if lora_on_ip_adapter:
                inject_lora(adapter.layers, OF_ADAPTER, rank)
        self.eval()

    @property
    def nulls(self) -> dict[str, Tensor | None]:
        """What the rows of each entry turn into when they are dropped."""
        return {"tokens": self.null_tokens, "text": self.null_text, "pooled": self.null_pooled}

    def train_mode(self) -> None:
        """Nothing here behaves otherwise while it learns; the frozen models' dropout stays off."""
        self.eval()

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """{"loss"}: the mean over rows, channels and pixels, in float32."""
        check_batch(batch, self.unet, {"tokens": (self.adapter.num_tokens, self.adapter.cross_attention_dim)})
        batch = drop_rows(batch, draws.rand(), self.dropout, self.nulls)
        latents = batch["latents"].float()
        noise = draws.randn(*latents.shape[1:])
        t = draws.randint(len(self.alphas_cumprod))
        alphas = self.alphas_cumprod[t]
        # Not cleared afterwards: gradient checkpointing runs the UNet once more on the way back.
        self.context.set_tokens(batch["tokens"], adapter=self.adapter)
        predicted = predict_noise(self.unet, add_noise(latents, noise, alphas), t, batch)
        if self.min_snr is not None:
            return {"loss": min_snr_loss(predicted, noise, alphas, self.min_snr)}
        return {"loss": noise_loss(predicted, noise, alphas, self.snr_limit)}

    def lora(self) -> Lora:
        """The LoRA as it is now, by diffusers' names of the layers; the factors are the parameters' own."""
        layers = {}
        for module, layer in self._peft_layers():
            down, up = layer.lora_A[NAME].weight.data, layer.lora_B[NAME].weight.data
            layers[module] = LoraLayer(module, down, up, self.rank)
        return Lora(layers, name="This IP-LoRA", metadata={KIND_KEY: IP_LORA})

    def save(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, object] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write the LoRA in kohya's layout, which ComfyUI's own loader reads; PitError as `save_lora`."""
        save_lora(path, self.lora(), dtype=dtype, metadata={"rank": self.rank, **(metadata or {})})

    def _peft_layers(self) -> Iterator[tuple[str, Any]]:
        yield from _with_lora(self.unet)
        modules = {str(layer.key): layer.module for layer in layers_of_unet(self.unet)}
        for name, layer in _with_lora(self.adapter.layers):
            key, _, projection = name.partition(".")
            yield f"{modules[key]}.{projection}", layer

    def _check_nulls(self) -> None:
        p = self.dropout
        needed = {"tokens"} if p.image + p.both else set()
        if p.text + p.both:
            needed |= {"text", "pooled"} if reads_sizes(self.unet) else {"text"}
        missing = sorted(f"null_{name}" for name in needed if self.nulls[name] is None)
        if missing:
            raise PitError(f"Dropout needs {', '.join(missing)}, which rows turn into; give them as well.")


def min_snr_loss(predicted: Tensor, noise: Tensor, alphas_cumprod: Tensor, limit: float) -> Tensor:
    """The mean squared error, each row times min(SNR, limit) / SNR, so that the fine steps count less.

    Hang et al. 2023, "Min-SNR" (arXiv 2303.09556), section 3.4, for predicted noise; the paper's limit is 5.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    errors = (predicted.float() - noise).pow(2).mean(dim=(1, 2, 3))
    return (errors * snr.clamp(max=limit) / snr).mean()


def inject_lora(model: nn.Module, layers: str, rank: int) -> None:
    """Put peft's LoRA on the layers whose names match; in float32, whatever the model is in.

    Its alpha is the rank, and it changes nothing at first.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers)
    inject_adapter_in_model(config, model, NAME)
    for _name, layer in _with_lora(model):
        for factors in (layer.lora_A, layer.lora_B):
            factors.float()


def lora_factors(model: nn.Module) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """The layers that `inject_lora` has changed, by name, with the parameters' own (down, up)."""
    for name, layer in _with_lora(model):
        yield name, (layer.lora_A[NAME].weight.data, layer.lora_B[NAME].weight.data)


def _with_lora(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer as PeftLayer

    for name, module in model.named_modules():
        if isinstance(module, PeftLayer):
            yield name, module


def _check_options(rank: int, min_snr: float | None, snr_limit: float | None) -> None:
    if isinstance(rank, bool) or rank < 1:
        raise PitError(f"rank must be at least 1 (64 is usual), got {rank}.")
    if min_snr is not None and not min_snr > 0:
        raise PitError(f"min_snr must be a positive number (5 is usual), got {min_snr}.")
    if min_snr is not None and snr_limit is not None:
        raise PitError("min_snr and snr_limit are two weightings of the same steps; give one of them.")
