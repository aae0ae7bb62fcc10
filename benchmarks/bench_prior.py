"""Guidance in one batched forward against two: time and memory of the full-size IP-Prior on random weights.

python benchmarks/bench_prior.py [--quick] [--device cuda]

Memory is what a run needs on top of the weights: torch's own count on CUDA, elsewhere the largest sum of
tensors alive at once.
"""

from __future__ import annotations

import argparse
import sys
import time
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pit_core.ip_prior.model import IPPrior
from pit_core.ip_prior.sample import sample_prior


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors made inside the block, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), before)
        return out

    def _add(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        if storage._cdata in known or storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))


def peak_bytes(device: torch.device, run) -> int:
    """Bytes that `run` needs beyond what is allocated already."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - start
    with LiveTensors() as live:
        run()
    return live.peak


def seconds(device: torch.device, run, repeats: int) -> float:
    """The fastest of `repeats` runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two steps and two shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    steps, repeats = (2, 2) if options.quick else (3, 3)
    shapes = [(1, 3), (2, 4)] if options.quick else [(1, 3), (1, 8), (2, 4), (8, 4)]

    torch.manual_seed(0)
    prior = IPPrior(device=device).eval()
    print(f"IP-Prior, {sum(p.numel() for p in prior.parameters()):,} parameters, float32, {device}, ", end="")
    print(f"{torch.get_num_threads()} threads, {steps} steps, best of {repeats}\n")
    print("rows slots | one: s/step    MiB | two: s/step    MiB | time one/two  memory one/two")
    for rows, slots in shapes:
        generator = torch.Generator().manual_seed(1)
        cond, white = torch.randn(2, rows, 16 * slots, 2048, generator=generator).to(device)

        def run(mode: str, count: int = steps, cond=cond, white=white, rows=rows) -> torch.Tensor:
            return sample_prior(prior, cond, white, steps=count, seeds=range(rows), cfg_batch=mode)

        run("one", 1)  # warm up
        taken = {m: seconds(device, lambda m=m: run(m), repeats) / steps for m in ("one", "two")}
        memory = {m: peak_bytes(device, lambda m=m: run(m, 1)) / 2**20 for m in ("one", "two")}
        cells = " | ".join(f"{taken[m]:11.3f} {memory[m]:6.1f}" for m in ("one", "two"))
        ratio = f"{taken['one'] / taken['two']:12.2f} {memory['one'] / memory['two']:15.2f}"
        print(f"{rows:4d} {slots:5d} | {cells} | {ratio}")


if __name__ == "__main__":
    main()
