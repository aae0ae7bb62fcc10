"""The two projections from image features to IP tokens: the Plus adapter's Resampler and the base one.

Source: IP-Adapter (arXiv 2308.06721); the Resampler is Flamingo's Perceiver Resampler (arXiv 2204.14198) with
learned queries. Parameter names are those of the released checkpoints below `image_proj.`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PitError

HALF = (torch.float16, torch.bfloat16)


class Resampler(nn.Module):
    """Plus projection: (B, N, embedding_dim) hidden states -> (B, num_queries, output_dim) tokens.

    The released SDXL file has dim 1280, depth 4, 20 heads of 64, 16 queries, embedding_dim 1280, output_dim
    2048, ff_mult 4. `operations` is the namespace that the layers come from (ComfyUI passes its own).
    Half precision features are projected in fp32, because their sums overflow in fp16.
    """

    kind = "plus"

    def __init__(
        self,
        dim: int,
        depth: int,
        dim_head: int,
        heads: int,
        num_queries: int,
        embedding_dim: int,
        output_dim: int,
        ff_mult: int = 4,
        *,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = {
            "dim": dim,
            "depth": depth,
            "dim_head": dim_head,
            "heads": heads,
            "num_queries": num_queries,
            "embedding_dim": embedding_dim,
            "output_dim": output_dim,
            "ff_mult": ff_mult,
        }
        _check_positive("Resampler", self.config)
        make = _factory(operations, dtype, device)
        self.latents = nn.Parameter(torch.randn(1, num_queries, dim, dtype=dtype, device=device) / dim**0.5)
        self.proj_in = make.Linear(embedding_dim, dim)
        self.proj_out = make.Linear(dim, output_dim)
        self.norm_out = make.LayerNorm(output_dim)
        self.layers = nn.ModuleList(
            ResamplerLayer(
                [PerceiverAttention(dim, dim_head, heads, make), _feed_forward(dim, ff_mult, make)]
            )
            for _ in range(depth)
        )

    @property
    def num_tokens(self) -> int:
        return self.config["num_queries"]

    @property
    def output_dim(self) -> int:
        return self.config["output_dim"]

    @property
    def embedding_dim(self) -> int:
        return self.config["embedding_dim"]

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, embedding_dim) -> (B, num_queries, output_dim); fp32 also for half precision input."""
        return _project_in_fp32(self, self._project, x)

    def _project(self, x: Tensor) -> Tensor:
        latents = self.latents.to(x).expand(x.shape[0], -1, -1)
        x = self.proj_in(x)
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm_out(self.proj_out(latents))


class ResamplerLayer(nn.ModuleList):
    """Attention and feed-forward, each added to the queries; a list, as the released keys number them."""

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = latents + self[0](x, latents)
        return latents + self[1](latents)


class PerceiverAttention(nn.Module):
    """The queries look at the features and at themselves."""

    def __init__(self, dim: int, dim_head: int, heads: int, make: Any) -> None:
        super().__init__()
        inner = dim_head * heads
        self.heads = heads
        self.norm1 = make.LayerNorm(dim)
        self.norm2 = make.LayerNorm(dim)
        self.to_q = make.Linear(dim, inner, bias=False)
        self.to_kv = make.Linear(dim, inner * 2, bias=False)
        self.to_out = make.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """x (B, N, dim), latents (B, Q, dim) -> (B, Q, dim)."""
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(latents), k, v))
        scale = q.shape[-1] ** -0.25  # on q and k each, so that their product cannot overflow
        weights = ((q * scale) @ (k * scale).transpose(-2, -1)).float().softmax(dim=-1).to(v.dtype)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


def _feed_forward(dim: int, ff_mult: int, make: Any) -> nn.Sequential:
    inner = dim * ff_mult
    return nn.Sequential(
        make.LayerNorm(dim),
        make.Linear(dim, inner, bias=False),
        nn.GELU(),
        make.Linear(inner, dim, bias=False),
    )


class ImageProjection(nn.Module):
    """Base projection: (B, embedding_dim) image embedding -> (B, num_tokens, output_dim) tokens.

    Half precision embeddings are projected in fp32.
    """

    kind = "base"

    def __init__(
        self,
        embedding_dim: int = 1024,
        output_dim: int = 2048,
        num_tokens: int = 4,
        *,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = {"embedding_dim": embedding_dim, "output_dim": output_dim, "num_tokens": num_tokens}
        _check_positive("ImageProjection", self.config)
        make = _factory(operations, dtype, device)
        self.proj = make.Linear(embedding_dim, num_tokens * output_dim)
        self.norm = make.LayerNorm(output_dim)

    @property
    def num_tokens(self) -> int:
        return self.config["num_tokens"]

    @property
    def output_dim(self) -> int:
        return self.config["output_dim"]

    @property
    def embedding_dim(self) -> int:
        return self.config["embedding_dim"]

    def forward(self, image_embeds: Tensor) -> Tensor:
        """(B, embedding_dim) -> (B, num_tokens, output_dim); fp32 also for half precision input."""
        return _project_in_fp32(self, self._project, image_embeds)

    def _project(self, image_embeds: Tensor) -> Tensor:
        return self.norm(self.proj(image_embeds).unflatten(-1, (self.num_tokens, self.output_dim)))


def _factory(
    operations: Any, dtype: torch.dtype | None, device: torch.device | str | None
) -> SimpleNamespace:
    """The two layer classes of `operations`, with dtype and device filled in."""

    def linear(features: int, out: int, bias: bool = True) -> nn.Module:
        return operations.Linear(features, out, bias=bias, dtype=dtype, device=device)

    def norm(features: int) -> nn.Module:
        return operations.LayerNorm(features, dtype=dtype, device=device)

    return SimpleNamespace(Linear=linear, LayerNorm=norm)


def _project_in_fp32(module: nn.Module, project: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run `project` with fp32 input, unless under autocast; plain half weights are converted for it."""
    if torch.is_autocast_enabled(x.device.type):
        return project(x)
    x = x.float() if x.dtype in HALF else x
    if not _has_plain_half_weights(module):  # layers from ComfyUI convert their weights to the input's dtype
        return project(x)
    weights = {key: value.to(x.dtype) for key, value in module.named_parameters()}
    return torch.func.functional_call(module, weights, (x,))


def _has_plain_half_weights(module: nn.Module) -> bool:
    return any(type(m) in (nn.Linear, nn.LayerNorm) and m.weight.dtype in HALF for m in module.modules())


def _check_positive(name: str, config: dict[str, int]) -> None:
    wrong = {key: value for key, value in config.items() if value < 1}
    if wrong:
        raise PitError(f"{name} needs positive sizes, but got {wrong}.")
