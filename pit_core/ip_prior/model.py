"""The IP-Prior: a small transformer that completes a concept from some of its parts, in IP+ space.

Richardson et al. 2025, "Piece it Together" (arXiv 2503.10365), section 3. State-dict keys and shapes are
the released ones. All layers come from `operations`, and no forward touches a weight directly, so that
ComfyUI's casting and offloading layers can take torch.nn's place.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import PitError

TIME_FEATURES = 256
THETA = 1e4  # base of both the rotary and the time frequencies

Rotary = tuple[Tensor, Tensor]
"""cos and sin, each (N, d / 2) float32."""


@dataclass(frozen=True)
class IPPriorConfig:
    """Sizes of an IP-Prior; the defaults are the released ones. Raises PitError where they do not fit.

    `n_heads` None means heads of width 64, the released choice: it cannot be read from a checkpoint's shapes.
    """

    embedding_dim: int = 2048
    hidden_dim: int = 2048
    n_layers: int = 4
    n_heads: int | None = None
    num_tokens: int = 16
    qk_norm: bool = True

    def __post_init__(self) -> None:
        if self.n_heads is None:
            object.__setattr__(self, "n_heads", max(1, _whole("hidden_dim", self.hidden_dim) // 64))
        for name in ("embedding_dim", "hidden_dim", "n_layers", "n_heads", "num_tokens"):
            _whole(name, getattr(self, name))
        if self.hidden_dim % (2 * self.heads):
            raise PitError(
                f"IP-Prior: expected hidden_dim to split into n_heads heads of even width, "
                f"got hidden_dim {self.hidden_dim} and n_heads {self.heads}."
            )

    @property
    def heads(self) -> int:
        """n_heads once it is settled, as a plain int."""
        return cast(int, self.n_heads)

    @property
    def time_dim(self) -> int:
        """Width of the time embedding that steers every block."""
        return min(self.hidden_dim, 1024)

    @property
    def ff_dim(self) -> int:
        """SwiGLU's inner width: two thirds of 4x, rounded up to a multiple of 256 (5632 at 2048)."""
        return 256 * math.ceil(int(2 * 4 * self.hidden_dim / 3) / 256)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class TimeEmbedding(nn.Module):
    """t (B,) in [0, 1], unscaled -> (B, time_dim)."""

    def __init__(self, config: IPPriorConfig, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(TIME_FEATURES, config.time_dim, **factory),
            nn.SiLU(),
            operations.Linear(config.time_dim, config.time_dim, **factory),
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(time_features(t).to(dtype))


class Attention(nn.Module):
    """Self-attention with normalised queries and keys and rotary positions; (B, N, dim) -> (B, N, dim)."""

    def __init__(self, config: IPPriorConfig, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.n_heads = config.heads
        self.wq = operations.Linear(dim, dim, bias=False, **factory)
        self.wk = operations.Linear(dim, dim, bias=False, **factory)
        self.wv = operations.Linear(dim, dim, bias=False, **factory)
        self.wo = operations.Linear(dim, dim, bias=False, **factory)
        # Over the full width, before the split into heads.
        self.q_norm = operations.LayerNorm(dim, **factory) if config.qk_norm else nn.Identity()
        self.k_norm = operations.LayerNorm(dim, **factory) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (
            h.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for h in (q, k, v)
        )  # B N HD -> B H N D
        out = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v)
        return self.wo(out.transpose(1, 2).flatten(2))  # B H N D -> B N HD


class FeedForward(nn.Module):
    """SwiGLU without biases (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: IPPriorConfig, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.w1 = operations.Linear(config.hidden_dim, config.ff_dim, bias=False, **factory)
        self.w2 = operations.Linear(config.ff_dim, config.hidden_dim, bias=False, **factory)
        self.w3 = operations.Linear(config.hidden_dim, config.ff_dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by time (adaLN; Peebles, Xie 2022)."""

    def __init__(self, config: IPPriorConfig, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.attention_norm = operations.LayerNorm(dim, eps=1e-5, **factory)
        self.attention = Attention(config, operations, factory)
        self.ffn_norm = operations.LayerNorm(dim, eps=1e-5, **factory)
        self.feed_forward = FeedForward(config, operations, factory)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), operations.Linear(config.time_dim, 6 * dim, **factory)
        )

    def forward(self, x: Tensor, time: Tensor, rotary: Rotary) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.adaLN_modulation(time)[:, None].chunk(6, -1)
        x = x + gate_a * self.attention(modulate(self.attention_norm(x), shift_a, scale_a), rotary)
        return x + gate_f * self.feed_forward(modulate(self.ffn_norm(x), shift_f, scale_f))


class FinalLayer(nn.Module):
    """Hidden width back to embedding width."""

    def __init__(self, config: IPPriorConfig, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.norm_final = operations.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **factory)
        self.linear = operations.Linear(dim, config.embedding_dim, **factory)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), operations.Linear(config.time_dim, 2 * dim, **factory)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class IPPrior(nn.Module):
    """Predicts the flow's velocity for one concept's tokens, given its parts' tokens.

    Noisy tokens and condition tokens form one sequence; rotary positions run over all of it, so the order
    of the parts matters. Any number of condition tokens will do. `gradient_checkpointing = True` trades
    time for memory in training.
    """

    def __init__(
        self,
        embedding_dim: int = 2048,
        hidden_dim: int = 2048,
        n_layers: int = 4,
        n_heads: int | None = None,
        num_tokens: int = 16,
        *,
        qk_norm: bool = True,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        config = IPPriorConfig(embedding_dim, hidden_dim, n_layers, n_heads, num_tokens, qk_norm)
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.config = config
        self.gradient_checkpointing = False
        self.x_embedder = operations.Linear(embedding_dim, hidden_dim, **factory)
        self.t_embedder = TimeEmbedding(config, operations, factory)
        self.layers = nn.ModuleList(Block(config, operations, factory) for _ in range(n_layers))
        self.final_layer = FinalLayer(config, operations, factory)

    @classmethod
    def from_config(
        cls,
        config: IPPriorConfig,
        *,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> IPPrior:
        """An IP-Prior of these sizes, with whatever weights `operations` starts from."""
        return cls(**config.to_dict(), operations=operations, dtype=dtype, device=device)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Velocity (B, num_tokens, D) of noisy tokens x (B, num_tokens, D) at times t (B,).

        cond (B, N, D) holds the parts' tokens, in order. Raises PitError for x or cond of another shape.
        """
        self._check(x, cond)
        h = self.x_embedder(torch.cat([x, cond.to(x.dtype)], dim=1))
        time = self.t_embedder(t, x.dtype)
        rotary = rotary_table(h.shape[1], self.config.hidden_dim // self.config.heads, h.device)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, time, rotary, use_reentrant=False)
            else:
                h = layer(h, time, rotary)
        return self.final_layer(h[:, : self.config.num_tokens], time)

    def _check(self, x: Tensor, cond: Tensor) -> None:
        tokens, dim = self.config.num_tokens, self.config.embedding_dim
        if x.ndim != 3 or tuple(x.shape[1:]) != (tokens, dim):
            raise PitError(f"IP-Prior: expected noisy tokens (B, {tokens}, {dim}), got {tuple(x.shape)}.")
        if cond.ndim != 3 or cond.shape[0] != x.shape[0] or cond.shape[2] != dim:
            raise PitError(
                f"IP-Prior: expected condition tokens ({x.shape[0]}, N, {dim}), got {tuple(cond.shape)}."
            )


def init_for_training(prior: IPPrior, generator: torch.Generator | None = None) -> IPPrior:
    """Fresh weights to train from: Xavier matrices, and zero gates and output (adaLN-zero).

    Every block starts as the identity and the first predicted velocity is 0. Peebles and Xie 2022,
    "Scalable Diffusion Models with Transformers", section 3.2 (arXiv 2212.09748). Returns the same prior.
    """
    for name, parameter in prior.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear") or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)
        elif name.startswith("t_embedder"):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)
    return prior


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale normalised activations; scale 0 leaves them as they are."""
    return x * (1 + scale) + shift


def time_features(t: Tensor) -> Tensor:
    """t (B,) -> (B, 256) float32: cosines, then sines, at 128 frequencies from 1 down to about 1e-4."""
    half = TIME_FEATURES // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(THETA) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_table(length: int, head_dim: int, device: torch.device | str | None = None) -> Rotary:
    """Angles of positions 0..length-1 for head_dim / 2 pairs. Su et al. 2021 (arXiv 2104.09864), eq. 15."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, THETA ** (-pairs / head_dim))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each neighbouring pair of x (B, H, N, d) by its position's angle, in float32."""
    cos, sin = rotary
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PitError(f"IP-Prior: expected {name} to be a whole number of at least 1, got {value!r}.")
    return value
