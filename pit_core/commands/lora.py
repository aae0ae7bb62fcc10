"""`pit lora`: LoRA files looked into, and written in another layout."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PitError
from .common import Dtype, group, plain_errors, shipped_or_own

if TYPE_CHECKING:
    from ..lora.info import LoraInfo

app = group("Look into LoRA files, and write them for ComfyUI or diffusers.")


class Layout(str, Enum):
    kohya = "kohya"
    diffusers = "diffusers"


@app.command("inspect")
@plain_errors
def inspect(
    file: Annotated[Path, typer.Argument(help="A LoRA in any layout.")],
    picture: Annotated[
        Path | None, typer.Option(help="A .png to write the norm of each block to.", show_default=False)
    ] = None,
) -> None:
    """What a LoRA is: IP-LoRA, B4M or plain, its rank, its layers, and how much it changes each block."""
    from ..lora.formats import load_lora
    from ..lora.info import lora_info
    from ..lora.picture import lora_picture
    from ..miniature.assets import IP_LORAS
    from ..pictures import save_png

    if picture is not None and picture.suffix.lower() != ".png":
        raise PitError(f"The picture is written as PNG; name it {picture.stem}.png.")
    info = lora_info(load_lora(shipped_or_own(file, IP_LORAS)))
    typer.echo("\n".join(_lines(info)))
    if picture is not None:
        save_png(lora_picture(info), picture)
        typer.echo(f"The picture: {picture}")


@app.command("convert")
@plain_errors
def convert(
    source: Annotated[Path, typer.Argument(help="A LoRA in any layout.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    layout: Annotated[
        Layout, typer.Option(help="kohya is what ComfyUI's own loader reads completely.")
    ] = Layout.kohya,
    dtype: Annotated[Dtype, typer.Option(help="auto keeps every bit.")] = Dtype.auto,
) -> None:
    """A LoRA in another layout: pit lora convert pytorch_lora_weights.safetensors scene.safetensors"""
    import torch

    from ..lora.formats import load_lora, save_lora
    from ..lora.info import lora_info

    if target.exists() and source.exists() and target.samefile(source):
        raise PitError(f"'{target.name}' is the file being converted; choose another target.")
    lora = load_lora(source)
    wanted: torch.dtype | None = None if dtype is Dtype.auto else getattr(torch, dtype.value)
    save_lora(target, lora, layout=layout.value, dtype=wanted)
    typer.echo(f"{source.name} -> {target} ({layout.value}; {lora_info(load_lora(target))})")
    if of_ip := len(lora.split()[1].layers):
        typer.echo(
            f"note: {of_ip} layers belong to the IP-Adapter; 'Apply IP-LoRA' and pit sample change them, "
            "ComfyUI's own loader leaves them out.",
            err=True,
        )


def _lines(info: LoraInfo) -> list[str]:
    """A summary, and a table of the blocks in the order in which the model runs them."""
    from ..lora.info import GROUPS

    width = max(len("block"), *(len(block.block) for block in info.blocks))
    groups = [name for name in GROUPS if any(name in block.norms for block in info.blocks)]
    head = f"{'block':{width}}  layers  {'norm':>9}" + "".join(f"  {name:>14}" for name in groups)
    rows = [
        f"{block.block:{width}}  {block.layers:6}  {block.norm:9.4g}"
        + "".join(f"  {block.norms.get(name, 0.0):14.4g}" for name in groups)
        for block in info.blocks
    ]
    return [f"{info.name}: {info}", f"{info.layers} layers in {len(info.blocks)} blocks", head, *rows]
