"""Partly learnable projections: a LoRA whose factors are each half frozen (arXiv 2403.19456).

dW = U V with U = [A ; B] and V = [C | D]. A and C are buffers that depend on seed, rank and layer alone; B
(style) and D (content) are parameters. [A ; C^T] has orthonormal columns, and the rank's channels are divided
between A and C, so that A C = 0: with B = D = 0 training starts at dW = 0, while gradients reach D through A
and B through C.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PitError
from ..files import hash_tensors
from .factors import Factors, Lora, layer_name
from .riemannian import Member

Learns = Literal["content", "style", "both"]
"""Which learnable halves a gradient reaches."""

TARGET = re.compile(r"(^|\.)attn[12]\.to_(q|k|v|out\.0)$")


def attention_linears(unet: nn.Module) -> dict[str, nn.Linear]:
    """Module path -> layer, for the q, k, v and out of all self- and cross-attentions of a diffusers UNet.

    560 in SDXL. Raises PitError when there is none.
    """
    found = {n: m for n, m in unet.named_modules() if TARGET.search(n) and isinstance(m, nn.Linear)}
    if not found:
        raise PitError(
            f"{type(unet).__name__} has no attention layers named attn1 or attn2 with to_q, to_k, to_v and "
            "to_out.0; a diffusers UNet is expected."
        )
    return found


class SplitProjection(nn.Module):
    """One layer's dW out of a frozen half and a learnable half of each factor.

    Buffers `a` (m // 2, r) and `c` (r, n // 2); parameters `b` (m - m // 2, r), the style, and
    `d` (r, n - n // 2), the content. Input (..., n), output (..., m).
    """

    a: Tensor
    c: Tensor

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        a, b, c, d = (half.detach().clone() for half in factors.halves())
        self.register_buffer("a", a)
        self.register_buffer("c", c)
        self.b = nn.Parameter(b)
        self.d = nn.Parameter(d)

    def forward(self, x: Tensor, learns: Learns = "both") -> Tensor:
        down, up = self.factors(learns)
        return F.linear(F.linear(x, down), up)

    def factors(self, learns: Learns = "both") -> Factors:
        """`down` [C | D] and `up` [A ; B]; gradients reach D (content), B (style), or both."""
        b = self.b.detach() if learns == "content" else self.b
        d = self.d.detach() if learns == "style" else self.d
        return Factors(torch.cat([self.c, d], 1), torch.cat([self.a, b]))

    def pair(self) -> tuple[Member, Member]:
        """What the Riemannian optimizers take: (frozen, learnable) halves of down and up."""
        return (self.c, self.d), (self.a, self.b)


class SplitAdapter(nn.Module):
    """The projections of all layers of a model, and their basis.

    `SplitAdapter.new(unet, rank, seed)` starts at dW = 0; `SplitAdapter(lora, seed)` goes on from the
    factors of a file or a splice, bit for bit. B and D are separate lists, `style` and `content`, so that the
    gradients of one loss can be taken for one of them alone.
    """

    def __init__(self, lora: Lora, seed: int | None = None) -> None:
        super().__init__()
        self.seed = seed
        self.layers = nn.ModuleDict({name: SplitProjection(Factors(*pair)) for name, pair in lora.items()})

    @classmethod
    def new(cls, unet: nn.Module, rank: int = 64, seed: int = 0) -> SplitAdapter:
        """Zero dW for all attention layers. Raises PitError for a rank that a layer is too narrow for."""
        lora = {}
        for path, linear in attention_linears(unet).items():
            name = layer_name(path)
            lora[name] = _start(name, linear.out_features, linear.in_features, rank, seed)
        return cls(lora, seed).to(next(unet.parameters()).device)

    @property
    def projections(self) -> dict[str, SplitProjection]:
        return {n: layer for n, layer in self.layers.items() if isinstance(layer, SplitProjection)}

    @property
    def content(self) -> list[nn.Parameter]:
        """D of every layer."""
        return [layer.d for layer in self.projections.values()]

    @property
    def style(self) -> list[nn.Parameter]:
        """B of every layer."""
        return [layer.b for layer in self.projections.values()]

    def pairs(self) -> list[tuple[Member, Member]]:
        """For `RiemannianAdamW(pairs=...)`."""
        return [layer.pair() for layer in self.projections.values()]

    def factors(self) -> dict[str, Factors]:
        """Copies of all layers' factors, for merging and saving."""
        return {
            name: Factors(*(factor.detach() for factor in layer.factors()))
            for name, layer in self.projections.items()
        }

    def metadata(self) -> dict[str, str]:
        """The basis: `basis_hash` over all A and C, `rank`, and `basis_seed` if it was drawn here."""
        frozen = {f"{n}.{half}": getattr(p, half) for n, p in self.projections.items() for half in "ac"}
        known = {} if self.seed is None else {"basis_seed": str(self.seed)}
        ranks = {str(p.c.shape[0]) for p in self.projections.values()}
        return {"kind": "b4m", "rank": ",".join(sorted(ranks)), "basis_hash": hash_tensors(frozen), **known}

    def places(self, unet: nn.Module) -> list[tuple[SplitProjection, nn.Linear]]:
        """Each layer with the one of `unet` that it changes; PitError when they are not the model's."""
        linears = {layer_name(path): linear for path, linear in attention_linears(unet).items()}
        _check_fit(self.projections, linears)
        return [(layer, linears[name]) for name, layer in self.projections.items()]

    @contextmanager
    def attached(self, unet: nn.Module) -> Iterator[None]:
        """Inside the block every target layer of `unet` adds its dW; afterwards the model is as it was.

        Raises PitError when the layers are not those of the model.
        """
        handles = [linear.register_forward_hook(_adding(layer)) for layer, linear in self.places(unet)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _adding(layer: SplitProjection) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + layer(inputs[0].to(layer.d.dtype)).to(output.dtype)

    return hook


def _start(name: str, m: int, n: int, rank: int, seed: int) -> Factors:
    """A in the first half of the rank's channels, C in the second, zeros elsewhere."""
    first, second = rank - rank // 2, rank // 2
    if rank < 2 or first > m // 2 or second > n // 2:
        raise PitError(
            f"Rank {rank} does not fit the layer '{name}' ({n} -> {m}); "
            f"take one from 2 to {min(m // 2, n // 2) * 2}."
        )
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode())) % 2**63)
    up, down = torch.zeros(m, rank), torch.zeros(rank, n)
    up[: m // 2, :first] = _orthonormal(m // 2, first, generator)
    down[first:, : n // 2] = _orthonormal(n // 2, second, generator).T
    return Factors(down, up)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random matrix with orthonormal columns, in double precision so that machines agree on the result."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def _check_fit(layers: Mapping[str, SplitProjection], linears: Mapping[str, nn.Linear]) -> None:
    if strangers := sorted(layers.keys() - linears.keys()):
        raise PitError(
            f"The model has no layer '{strangers[0][:100]}' ({len(strangers)} such); it is another one."
        )
    for name, layer in layers.items():
        down, up = layer.factors()
        if tuple(linears[name].weight.shape) != (up.shape[0], down.shape[1]):
            raise PitError(
                f"The layer '{name}' maps {down.shape[1]} to {up.shape[0]} in the adapter, but "
                f"{linears[name].in_features} to {linears[name].out_features} in the model."
            )
