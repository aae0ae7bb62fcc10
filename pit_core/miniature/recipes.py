"""How long, how fast and from which seed every stage of the miniature is trained."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..train.loop import LoopConfig
from . import b4m

SNR_LIMIT = 10.0  # of the stages that learn what is drawn where, once fine detail is there

# Rows of a step: one picture of the own side, and one of each set of the other side.
_B4M = LoopConfig(
    steps=400, batch_size=4, lr=2e-3, warmup=10, weight_decay=1e-2, ema_decay=0.98, save_every=100
)
# Of each method so many steps that a joined entity (content + style + join), the sum of two ordinary LoRAs,
# and a shared LoRA take equally many together.
_B4M_OF: dict[str, LoopConfig] = {
    "content": replace(_B4M, lr=4e-3),
    "style": replace(_B4M, steps=600, lr=6e-3),  # slower to learn than a content is
    "join": replace(_B4M, steps=300, lr=3e-3),
    "plain-content": replace(_B4M, steps=550),
    "plain-style": replace(_B4M, steps=750),
    "shared": replace(_B4M, steps=1300, batch_size=8),  # as many pictures as in the rows of "join"
}

RECIPES: dict[str, LoopConfig] = {
    "encoders": LoopConfig(
        steps=900,
        batch_size=128,
        lr=1.2e-3,
        schedule="cosine",
        warmup=60,
        weight_decay=0.02,
        betas=(0.9, 0.98),
        ema_decay=0.99,
        precision="bf16",
        seed=2,
        save_every=100,
    ),
    "vision": LoopConfig(
        steps=2400,
        batch_size=96,
        lr=1e-3,
        schedule="cosine",
        warmup=60,
        weight_decay=0.02,
        betas=(0.9, 0.98),
        ema_decay=0.995,
        precision="bf16",
        seed=9,
        save_every=200,
    ),
    "vae": LoopConfig(
        steps=10000,
        batch_size=8,
        lr=1e-3,
        schedule="cosine",
        warmup=200,
        weight_decay=0.0,
        betas=(0.9, 0.99),
        ema_decay=0.998,
        precision="bf16",
        seed=1,
        save_every=250,
    ),
    "decoder": LoopConfig(
        steps=2000,
        batch_size=6,
        lr=4e-4,
        schedule="cosine",
        warmup=50,
        weight_decay=0.0,
        betas=(0.9, 0.99),
        ema_decay=0.995,
        precision="bf16",
        seed=5,
        save_every=250,
    ),
    "reader-tuning": LoopConfig(
        steps=3000,
        batch_size=64,
        lr=1e-3,
        schedule="cosine",
        warmup=150,
        weight_decay=0.02,
        ema_decay=0.998,
        precision="bf16",
        seed=3,
        save_every=500,
    ),
    "reader-judge": LoopConfig(
        steps=6000,
        batch_size=64,
        lr=1.5e-3,
        schedule="cosine",
        warmup=150,
        weight_decay=0.03,
        ema_decay=0.998,
        seed=4,
        save_every=500,
    ),
    "unet": LoopConfig(
        steps=4000,
        batch_size=64,
        lr=1.2e-3,
        schedule="cosine",
        warmup=150,
        weight_decay=0.01,
        ema_decay=0.998,
        seed=6,
        save_every=200,
    ),
    "unet-further": LoopConfig(
        steps=3200,
        batch_size=64,
        lr=8e-4,
        schedule="cosine",
        warmup=50,
        weight_decay=0.01,
        ema_decay=0.998,
        seed=16,
        save_every=200,
    ),
    "unet-finish": LoopConfig(
        steps=3400,
        batch_size=64,
        lr=8e-4,
        schedule="cosine",
        warmup=50,
        weight_decay=0.01,
        ema_decay=0.998,
        seed=26,
        save_every=200,
    ),
    "adapter": LoopConfig(
        steps=3400,
        batch_size=48,
        lr=1e-3,
        schedule="cosine",
        warmup=100,
        weight_decay=0.01,
        ema_decay=0.995,
        seed=7,
        save_every=200,
    ),
    "adapter-further": LoopConfig(
        steps=3600,
        batch_size=48,
        lr=8e-4,
        schedule="cosine",
        warmup=50,
        weight_decay=0.01,
        ema_decay=0.998,
        seed=17,
        save_every=200,
    ),
    "adapter-finish": LoopConfig(
        steps=3600,
        batch_size=48,
        lr=8e-4,
        schedule="cosine",
        warmup=50,
        weight_decay=0.01,
        ema_decay=0.998,
        seed=27,
        save_every=200,
    ),
    "prior": LoopConfig(
        steps=3200,
        batch_size=96,
        lr=1e-3,
        schedule="cosine",
        warmup=150,
        weight_decay=0.01,
        ema_decay=0.998,
        precision="bf16",
        seed=8,
        save_every=250,
    ),
    "prior-further": LoopConfig(
        steps=3400,
        batch_size=96,
        lr=8e-4,
        schedule="cosine",
        warmup=100,
        weight_decay=0.01,
        ema_decay=0.998,
        precision="bf16",
        seed=18,
        save_every=250,
    ),
    "prior-finish": LoopConfig(
        steps=3400,
        batch_size=96,
        lr=8e-4,
        schedule="cosine",
        warmup=100,
        weight_decay=0.01,
        ema_decay=0.998,
        precision="bf16",
        seed=28,
        save_every=250,
    ),
    "ip-lora-scene": LoopConfig(
        steps=1200,
        batch_size=32,
        lr=2e-3,
        schedule="cosine",
        warmup=50,
        weight_decay=0.0,
        ema_decay=0.99,
        seed=31,
        save_every=200,
    ),
    "ip-lora-sheet": LoopConfig(
        steps=1200,
        batch_size=32,
        lr=2e-3,
        schedule="cosine",
        warmup=50,
        weight_decay=0.0,
        ema_decay=0.99,
        seed=32,
        save_every=200,
    ),
    "flux-vae": LoopConfig(
        steps=8000,
        batch_size=8,
        lr=1e-3,
        schedule="cosine",
        warmup=200,
        weight_decay=0.0,
        betas=(0.9, 0.99),
        ema_decay=0.998,
        seed=51,
        save_every=250,
    ),
    "flux-fill": LoopConfig(
        steps=4500,
        batch_size=32,
        lr=1.2e-3,
        schedule="cosine",
        warmup=200,
        weight_decay=0.01,
        ema_decay=0.998,
        seed=52,
        save_every=250,
    ),
    "flux-fill-further": LoopConfig(
        steps=5000,
        batch_size=32,
        lr=1e-3,
        schedule="cosine",
        warmup=50,
        weight_decay=0.01,
        ema_decay=0.998,
        seed=62,
        save_every=250,
    ),
    **{
        name: replace(_B4M_OF[run.method], seed=71 + number)
        for number, (name, run) in enumerate(b4m.RUNS.items())
    },
}


def quick_precision(config: LoopConfig) -> LoopConfig:
    """Full precision instead of bf16 on a processor that has to imitate bf16, many times slower."""
    quick = torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return config if quick or config.precision != "bf16" else replace(config, precision="no")
