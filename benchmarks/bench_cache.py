"""Training the full-size IP-Prior from cached tokens against encoding every slot at every step.

python benchmarks/bench_cache.py [--quick] [--device cuda]

CLIP ViT-H, the Resampler of IP-Adapter Plus for SDXL and a prior of 270 M, with random weights. Both ways
take the same step (loss, gradients, AdamW, averages) on as many slots. Ours reads its tokens from shards on
disk; the reference encodes the whole and every slot, white ones included, without gradients. Its pictures
are decoded and cropped already, which is in its favour. The bound counts the multiplications of both ways
from the models' shapes and nothing else: neither reading nor the optimizer, whose passes over 270 M numbers
weigh the more the smaller the batch is. 9 GB of memory; on a CPU one step of the reference takes minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ratio import row

from pit_core.ip_adapter.resampler import Resampler
from pit_core.ip_prior.model import IPPrior
from pit_core.parts.augment import Augment
from pit_core.parts.shards import Index, write_index, write_shard, write_white
from pit_core.parts.token_data import TokenData
from pit_core.train.ip_prior import IPPriorObjective
from pit_core.train.loop import Draws

PIXELS, TOKENS, WIDTH = 224, 16, 2048
SLOTS = 3
WHOLES = 64  # in the shards
LEAST = 12.0


class Encoder(nn.Module):
    """Pictures (N, 3, 224, 224) to tokens (N, 16, 2048)."""

    def __init__(self) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        vit_h = CLIPVisionConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=16,
            image_size=PIXELS,
            patch_size=14,
            projection_dim=1024,
        )
        self.vision = CLIPVisionModelWithProjection(vit_h)
        self.resampler = Resampler(
            dim=1280, depth=4, dim_head=64, heads=20, num_queries=TOKENS, embedding_dim=1280, output_dim=WIDTH
        )

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self.resampler(self.features(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        return self.vision(pixels, output_hidden_states=True).hidden_states[-2]


def built(make: Callable[[], nn.Module], device: torch.device, dtype=torch.float32) -> nn.Module:
    """A module with small random weights, without the libraries' slow ways to draw them."""
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.02, 0.02, generator=generator)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]))
    return module


def write_tokens(folder: Path) -> None:
    """Shards as `pit data embed` makes them, of random tokens: each whole with as many parts as slots."""
    generator = torch.Generator().manual_seed(1)

    def whole() -> dict[str, Tensor]:
        tokens = torch.randn(1 + SLOTS, TOKENS, WIDTH, generator=generator).half()
        return {"target": tokens[0], "parts": tokens[1:, None]}

    name, key = "shards/0.tar", "0" * 64
    write_shard(folder / name, [whole() for _ in range(WHOLES)])
    write_white(folder, key, torch.zeros(TOKENS, WIDTH))
    settings = Augment(max_crops=SLOTS, empty_prob=0.0)
    write_index(folder, Index(key, ((name, WHOLES),), TOKENS, WIDTH, 1, settings))


class Trainer:
    """One step of the training loop in one process, on a batch of tokens."""

    def __init__(self, device: torch.device, half: bool) -> None:
        from diffusers.training_utils import EMAModel

        self.device, self.half = device, half
        prior = built(IPPrior, device)
        self.objective = IPPriorObjective(prior, prefix=0.0)
        self.optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-5)
        self.average = EMAModel(list(prior.parameters()), foreach=True)
        self.numbers = count()

    def step(self, batch: dict[str, Tensor]) -> None:
        rows = len(batch["target"])
        draws = Draws(0, next(self.numbers), slice(0, rows), rows, self.device)
        batch = {name: values.to(self.device) for name, values in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss = self.objective(batch, draws)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.objective.prior.parameters())


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def bound() -> float:
    """(training from tokens) / (the same and encoding), in multiplications and additions, from the shapes."""
    with torch.device("meta"):
        prior, encoder = IPPrior(), Encoder().requires_grad_(False)
        x, cond = torch.empty(1, TOKENS, WIDTH), torch.empty(1, TOKENS * SLOTS, WIDTH)
        t, pixels = torch.empty(1), torch.empty(1, 3, PIXELS, PIXELS)
        trained = flops(lambda: prior(x, t, cond).sum().backward())
        features = encoder.features(pixels)
        seen = flops(lambda: encoder.features(pixels))
    # The Resampler asks its device about autocast, and there is no such device as meta for that.
    resampler = built(lambda: encoder.resampler, torch.device("cpu"))
    queried = flops(lambda: resampler(torch.zeros(features.shape)))
    encoded = (1 + SLOTS) * (seen + queried)
    print(f"GFLOP of an example: {trained / 1e9:.1f} to train, {encoded / 1e9:.1f} to encode its pictures")
    return trained / (trained + encoded)


@contextmanager
def tokens() -> Iterator[TokenData]:
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder))
        yield TokenData(Path(folder))


def timed(device: torch.device, step: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Seconds of a step, by the clock and of this process's work: they differ where others work, too."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finish()
    started, worked = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        step()
    finish()
    return (time.perf_counter() - started) / repeats, (time.process_time() - worked) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller batch, and one step of the reference")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="examples of a step")
    options = parser.parse_args()
    device = torch.device(options.device)
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    batch = options.batch or (64 if device.type == "cuda" else 8 if options.quick else 16)
    least = bound()

    trainer = Trainer(device, half)
    encoder = built(Encoder, device, torch.bfloat16 if half else torch.float32).eval()
    dtype = next(encoder.parameters()).dtype
    pixels = torch.randn(batch * (1 + SLOTS), 3, PIXELS, PIXELS).to(device, dtype)
    epoch = count()

    with tokens() as data:

        def ours() -> None:
            number = next(epoch)
            trainer.step(data.fetch([(number, (number + row) % WHOLES) for row in range(batch)]))

        def reference() -> None:
            made = encoder(pixels).float().unflatten(0, (batch, 1 + SLOTS))
            trainer.step({"target": made[:, 0], "cond": made[:, 1:].flatten(1, 2)})

        ours()
        if not options.quick:
            reference()
        fast, fast_work = timed(device, ours, 2 if options.quick else 5)
        slow, slow_work = timed(device, reference, 1 if options.quick else 3)

    kind = "bf16" if half else "float32"
    print(f"batch of {batch}, {SLOTS} slots, {kind}, {device}, {torch.get_num_threads()} threads")
    print(
        f"from tokens {batch / fast:.3f} samples/s, encoding every step {batch / slow:.4f} samples/s: ",
        end="",
    )
    print(f"{slow / fast:.1f}x (at least {LEAST:.0f}; FLOP bound {1 / least:.1f}x)", end="")
    print("" if device.type == "cuda" else f"; by processor time {slow_work / fast_work:.1f}x")
    row(f"IP-Prior step from tokens / encoding, batch {batch}", fast, slow, bound=1 / LEAST)


if __name__ == "__main__":
    main()
