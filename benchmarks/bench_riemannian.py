"""One RiemannianAdamW step for SDXL's 560 attention linears at rank 64 against one layer after the other.

python benchmarks/bench_riemannian.py [--quick] [--device cuda] [--rank 64]

Both train the halves B and D in float32; the reference is the formulas as written. Beside the time, the
operations of our step are counted (views left out): on a GPU each of them is a kernel launch or a few, since
torch cuts operations on long lists of tensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ratio

from pit_core.b4m import riemannian
from pit_core.b4m.riemannian import RiemannianAdamW

LAYERS = {(640, 640): 60, (640, 2048): 20, (1280, 1280): 360, (1280, 2048): 120}  # (m, n): how many
DAMPING = 1e-3


class Operations(TorchDispatchMode):
    """Counts the operations inside the block that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func is not torch.ops.aten._unsafe_view.default
        return func(*args, **(kwargs or {}))


def layers(device: torch.device, rank: int, share: int) -> list[tuple]:
    """Pairs of halves with gradients: every `share`-th of SDXL's layers."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    pairs = []
    for (m, n), count in LAYERS.items():
        for _ in range(count // share):
            d, b = Parameter(randn(rank, n - n // 2)), Parameter(randn(m - m // 2, rank))
            d.grad, b.grad = randn(*d.shape), randn(*b.shape)
            pairs.append(((randn(rank, n // 2), d), (randn(m // 2, rank), b)))
    return pairs


def one_after_the_other(pairs: list[tuple], lr: float = 1e-4, decay: float = 1e-2) -> Callable[[], None]:
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for (_, d), (_, b) in pairs for p in (d, b)}
    count = 0

    def inverse(gram: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(gram + DAMPING * torch.eye(len(gram), device=gram.device))

    @torch.no_grad()
    def step() -> None:
        nonlocal count
        count += 1
        for (c, d), (a, b) in pairs:
            v, u = torch.cat([c, d], 1), torch.cat([a, b])
            for p, gradient in ((b, b.grad @ inverse(v @ v.T)), (d, inverse(u.T @ u) @ d.grad)):
                first, second = moments[p]
                first.mul_(0.9).add_(gradient, alpha=0.1)
                second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                spread = (second.sqrt() / (1 - 0.999**count) ** 0.5).add_(1e-8)
                p.addcdiv_(first, spread, value=-lr / (1 - 0.9**count))
                p.mul_(1 - lr * decay)

    return step


def finished(device: torch.device, step: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def operations_per_group(pairs: list[tuple]) -> float:
    """Of a step that takes all layers of a shape at once, as on a GPU."""
    whole, one_by_one = riemannian.CPU_BATCH, riemannian.ONE_BY_ONE
    riemannian.CPU_BATCH, riemannian.ONE_BY_ONE = sys.maxsize, ()
    optimizer = RiemannianAdamW(pairs, damping=DAMPING)
    optimizer.step()
    with Operations() as operations:
        optimizer.step()
    riemannian.CPU_BATCH, riemannian.ONE_BY_ONE = whole, one_by_one
    return operations.count / len(LAYERS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="every tenth layer, three repeats")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()
    device, share = torch.device(options.device), 10 if options.quick else 1

    pairs = layers(device, options.rank, share)
    print(f"{operations_per_group(layers(device, options.rank, 20)):.1f} operations for each of 4 shapes")
    ours = RiemannianAdamW(pairs, damping=DAMPING)
    reference = one_after_the_other(layers(device, options.rank, share))
    name = f"Riemannian step, {len(pairs)} layers, {device.type}"
    found = ratio.report(
        name,
        finished(device, ours.step),
        finished(device, reference),
        repeats=3 if options.quick else 5,
        bound=0.5,
    )
    print(f"{name}: ratio {found:.2f}")


if __name__ == "__main__":
    main()
