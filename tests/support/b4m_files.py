"""B4M files in whole numbers, so that products are exact, and what tests do with a split adapter."""

from collections.abc import Mapping
from typing import Any

import torch
from lora_files import lora_key
from torch import Tensor, nn

WIDTHS = {
    "down_blocks.1.attn1.to_q": (8, 8),
    "mid_block.attn2.to_k": (6, 9),
    "up_blocks.0.attn1.to_out.0": (7, 5),
}
"""Module -> shape of its weight."""


def b4m_file(
    seed: int,
    basis: int = 0,
    layout: str = "b4m",
    rank: int = 3,
    shapes: Mapping[str, tuple[int, int]] = WIDTHS,
) -> dict[str, Tensor]:
    """A file's tensors; the frozen halves belong to `basis`, the others to `seed`."""
    tensors = {}
    for module, (m, n) in shapes.items():
        up, down = whole_numbers(seed, m, rank), whole_numbers(seed + 50, rank, n)
        up[: m // 2] = whole_numbers(basis + 100, m, rank)[: m // 2]
        down[:, : n // 2] = whole_numbers(basis + 150, rank, n)[:, : n // 2]
        tensors[lora_key(module, "up", layout)] = up
        tensors[lora_key(module, "down", layout)] = down
    return tensors


def whole_numbers(seed: int, *shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def quadrants_of(delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Upper left, upper right, lower left, lower right."""
    m, n = delta.shape[0] // 2, delta.shape[1] // 2
    return delta[:m, :n], delta[:m, n:], delta[m:, :n], delta[m:, n:]


def fill(adapter: nn.Module, seed: int = 0) -> None:
    """Random numbers in all learnable halves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def predict(unet: Any) -> Tensor:
    """What `tiny_stack.unet()` makes of some noise."""
    import tiny_stack

    generator = torch.Generator().manual_seed(0)
    side = tiny_stack.PIXELS // 4
    return unet(
        torch.randn(1, 4, side, side, generator=generator).to(unet.dtype),
        500,
        torch.randn(1, 3, tiny_stack.CONTEXT, generator=generator).to(unet.dtype),
        added_cond_kwargs={
            "text_embeds": torch.zeros(1, tiny_stack.TEXT, dtype=unet.dtype),
            "time_ids": torch.ones(1, 6),
        },
    ).sample
