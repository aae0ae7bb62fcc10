"""Panel attention against the dense form and plain attention: one layer at 1568 x 784 with 512 of text.

    python benchmarks/bench_diptych.py [--quick] [--device cuda] [--heads 4] [--dtype float32]

Without --dtype it is bfloat16 on a GPU and float32 on a CPU: many CPUs have no bfloat16 arithmetic, and
there the dense form takes an order of magnitude longer, so that the ratio to it says nothing.

Memory is what a call needs on top of its inputs: torch's own count on CUDA, elsewhere the largest sum of
tensors alive at once, without what kernels use inside. It is printed at half the tokens too: linear is twice.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from bench_prior import peak_bytes
from ratio import report

from pit_core.diptych.attention import panel_attention
from pit_core.diptych.layout import DiptychLayout

STRENGTH = 1.3


def dense(q, k, v, text, grid, columns):
    """The definition: all probabilities, those of right queries for left keys scaled."""
    probabilities = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    places = torch.arange(text, text + grid[0] * grid[1], device=q.device).view(grid)
    left, right = places[:, :columns].flatten(), places[:, columns:].flatten()
    factor = q.new_ones(q.shape[2], q.shape[2])
    factor[right[:, None], left] = STRENGTH
    return probabilities.mul_(factor) @ v


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two repeats")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=int, default=4, help="Flux has 24")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    device, layout = torch.device(options.device), DiptychLayout()
    dtype = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    columns, text = layout.columns, 512

    def calls(rows: int, text: int):
        grid = (rows, layout.grid[1])
        shape = (3, 1, options.heads, text + grid[0] * grid[1], 128)
        generator = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(shape, generator=generator).to(device, getattr(torch, dtype))
        how = {"text_tokens": text, "grid": grid, "columns": columns, "strength": STRENGTH}
        return {
            "reference": timed(lambda: panel_attention(q, k, v, **how)),
            "normalized": timed(lambda: panel_attention(q, k, v, mode="normalized", **how)),
            "dense": timed(lambda: dense(q, k, v, text, grid, columns)),
            "plain": timed(lambda: F.scaled_dot_product_attention(q, k, v)),
        }

    def timed(function):
        def run():
            out = function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return out

        return run

    with torch.inference_mode():
        full, half = calls(layout.grid[0], text), calls(layout.grid[0] // 2, text // 2)
        tokens = text + layout.grid[0] * layout.grid[1]
        print(f"One layer, {tokens} tokens, {options.heads} heads of 128, {dtype}, {device}, ", end="")
        print(f"{torch.get_num_threads()} threads")
        repeats = 2 if options.quick else 7
        for ours, against, bound in (
            ("reference", "dense", 0.45),
            ("reference", "plain", 1.5),
            ("normalized", "plain", None),
        ):
            name = f"panel attention, {ours} / {against}"
            ratio = report(name, full[ours], full[against], repeats=repeats, bound=bound)
            print(f"{name}: {ratio:.2f}" + (f" (target at most {bound})" if bound else ""))
        for name in full:
            whole, part = (peak_bytes(device, form[name]) / 2**20 for form in (full, half))
            print(f"peak memory, {name}: {whole:.1f} MiB, {whole / part:.2f} times that of half the tokens")


if __name__ == "__main__":
    main()
