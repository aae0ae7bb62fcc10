"""LoRA files in the layouts that are about, over all attention layers of SDXL's UNet."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SDXL_CSV = Path(__file__).parents[1] / "goldens" / "sdxl_attention_modules.csv"

LAYOUTS = {
    "released": "unet.{module}.lora.{down}.weight",
    "bare": "{module}.lora.{down}.weight",
    "b4m": "unet.unet.{module}.lora.{down}.weight",
    "peft": "unet.{module}.lora_{A}.weight",
    "peft bare": "{module}.lora_{A}.weight",
    "peft default": "unet.{module}.lora_{A}.default.weight",
    "peft model": "base_model.model.{module}.lora_{A}.weight",
    "processor": "unet.{processor}_lora.{down}.weight",
    "processor peft": "unet.{dotted}.lora_{A}.weight",
    "kohya": "lora_unet_{flat}.lora_{down}.weight",
}


def sdxl_shapes(shrink: int = 1, ip: bool = False) -> dict[str, tuple[int, int]]:
    """Module -> shape of its weight: 560 projections, and with `ip` the adapter's 140. Widths / `shrink`."""
    shapes = {}
    with SDXL_CSV.open(newline="") as file:
        for row in csv.DictReader(file):
            inner, context = int(row["inner"]) // shrink, int(row["kv_in"]) // shrink
            names = {"to_q": inner, "to_k": context, "to_v": context, "to_out.0": inner}
            if ip and row["ip_adapter_key"]:
                names |= {"to_k_ip": context, "to_v_ip": context}
            shapes |= {f"{row['module']}.{name}": (inner, width) for name, width in names.items()}
    return shapes


def unet_shapes(unet: Any, ip: bool = False) -> dict[str, tuple[int, int]]:
    """As sdxl_shapes, for any UNet of diffusers."""
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0")
    shapes = {name: tuple(each.weight.shape) for name, each in unet.named_modules() if name.endswith(ends)}
    if ip:
        ends = (".attn2.to_k", ".attn2.to_v")
        shapes |= {f"{name}_ip": shape for name, shape in shapes.items() if name.endswith(ends)}
    return shapes


def lora_file(
    shapes: Mapping[str, tuple[int, int]], rank: int = 4, layout: str = "released", alpha: float | None = None
) -> dict[str, Tensor]:
    """The content of a trained LoRA over these layers, the same numbers in every layout."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for module, (out, width) in shapes.items():
        made[lora_key(module, "down", layout)] = torch.randn(rank, width, generator=generator) / rank
        made[lora_key(module, "up", layout)] = torch.randn(out, rank, generator=generator) / width
        if alpha is not None:
            made[lora_key(module, "alpha", layout)] = torch.tensor(float(alpha))
    return made


def lora_key(module: str, part: str, layout: str) -> str:
    """One key: `part` is "down", "up" or "alpha"."""
    block, _, name = module.removesuffix(".0").rpartition(".")
    key = LAYOUTS[layout].format(
        module=module,
        down=part,
        A={"down": "A", "up": "B"}.get(part, part),
        flat=module.replace(".", "_"),
        processor=f"{block}.processor.{name}",
        dotted=f"{block}.processor.{name}" + (".0" if name.endswith("_ip") else ""),
    )
    return (
        key if part != "alpha" else key[: key.rindex(".lora" if "_lora." not in key else "_lora")] + ".alpha"
    )
