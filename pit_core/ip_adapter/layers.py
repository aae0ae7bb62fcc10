"""Which key of an adapter belongs to which cross-attention layer of a UNet.

Released adapters number the text cross-attention layers (attn2) of diffusers' UNet in the order down, up,
mid; layer n has the key 2n + 1, because the even numbers count the self-attention layers between them. The
map is derived from the UNet's plan, so it holds for SD1.5's 16 layers, SDXL's 70 and any other depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..errors import PitError

ComfyBlock = tuple[str, int, int]
Transformers = list[
    list[tuple[int, int]]
]  # per spatial transformer, per block inside it: (width, context width)

LDM_KEY = re.compile(
    r"(?:^|\.)(input_blocks|output_blocks|middle_block)\.(\d+)\.(?:(\d+)\.)?"
    r"transformer_blocks\.(\d+)\.attn2\.to_k\.weight$"
)


@dataclass(frozen=True)
class AttentionLayer:
    """One text cross-attention layer of a UNet.

    index: n in adapter order (down, up, mid). module: name of the attn2 module. width: its inner width.
    context: width of the text tokens. comfy_block: where ComfyUI's attention patches find it, (block name,
    number, index of the transformer inside). transformer_index: rank of its spatial transformer in execution
    order (down, mid, up; 0 to 10 in SDXL), which is what per-layer weights are written in.
    """

    index: int
    module: str
    width: int
    context: int
    comfy_block: ComfyBlock
    transformer_index: int

    @property
    def key(self) -> int:
        """The number in the adapter's keys, as in `ip_adapter.<key>.to_k_ip.weight`."""
        return 2 * self.index + 1

    @property
    def group(self) -> str:
        """Either "input", "middle" or "output"."""
        return self.comfy_block[0]


@dataclass
class _Block:
    """A down, mid or up block of diffusers' UNet, as far as the numbering needs it."""

    name: str
    resnets: int
    sampler: bool
    transformers: Transformers


def layers_of_unet(unet: nn.Module) -> list[AttentionLayer]:
    """The layers of a diffusers UNet2DConditionModel, read from its modules, in adapter order.

    Raises PitError when it has no text cross-attention.
    """
    down = [
        _read_block(f"down_blocks.{i}", b, "downsamplers")
        for i, b in enumerate(_children(unet, "down_blocks"))
    ]
    up = [_read_block(f"up_blocks.{i}", b, "upsamplers") for i, b in enumerate(_children(unet, "up_blocks"))]
    mid = getattr(unet, "mid_block", None)
    return _numbered(down, up, _read_block("mid_block", mid, "") if mid is not None else None)


def layers_of_config(config: Mapping[str, Any]) -> list[AttentionLayer]:
    """The layers that a UNet with this diffusers config would have; nothing is built.

    `config` has the keys of diffusers' `unet/config.json`; absent ones take diffusers' defaults. Raises
    PitError for block types other than the plain ones of SD1.5 and SDXL.
    """
    plan = _Plan(config)
    return _numbered(plan.down_blocks(), plan.up_blocks(), plan.mid_block())


def layers_of_ldm_shapes(shapes: Mapping[str, Sequence[int]]) -> list[AttentionLayer]:
    """The layers of a UNet in the original layout (ComfyUI, single-file checkpoints), from name -> shape.

    Takes all parameters of the UNet, with any prefix; `module` is then the original name, such as
    `input_blocks.4.1.transformer_blocks.0.attn2`. Raises PitError when there is no text cross-attention.
    """
    found = {}
    for key, shape in shapes.items():
        if match := LDM_KEY.search(key):
            side, number, part, transformer = match.groups()
            order = ("input_blocks", "output_blocks", "middle_block").index(side)
            module = key[match.start() :].lstrip(".").removesuffix(".to_k.weight")
            found[order, int(number), int(part or 0), int(transformer)] = (module, shape)
    _require(found)
    layers = []
    for index, (place, (module, shape)) in enumerate(sorted(found.items())):
        side, number = ("input", "output", "middle")[place[0]], place[1] if place[0] < 2 else 0
        block = (side, number, place[3])
        layers.append(AttentionLayer(index, module, int(shape[0]), int(shape[1]), block, 0))
    return _with_transformer_indices(layers)


def weights_by_layer(layers: Sequence[AttentionLayer], weights: Mapping[int, float]) -> dict[int, float]:
    """Weights given per transformer index -> weights per layer index n; what is not named weighs 0."""
    known = {layer.transformer_index for layer in layers}
    unknown = sorted(set(weights) - known)
    if unknown:
        raise PitError(f"Layer weights name transformer {unknown[0]}, but this model has 0 to {max(known)}.")
    return {layer.index: float(weights.get(layer.transformer_index, 0.0)) for layer in layers}


def describe_layers(layers: Sequence[AttentionLayer]) -> str:
    """The plan in a few words, for messages: "SDXL's plan (70 layers, text width 2048)"."""
    return describe_plan(len(layers), layers[0].context if layers else 0)


def describe_plan(count: int, context: int) -> str:
    """A layer count and text width in a few words; knows SD1.5, SD2 and SDXL by name."""
    names = {(70, 2048): "SDXL", (16, 768): "SD1.5", (16, 1024): "SD2"}
    size = f"{count} layers, text width {context}"
    return f"{names[count, context]} ({size})" if (count, context) in names else f"a UNet with {size}"


# from a built UNet


def _children(unet: nn.Module, name: str) -> Iterable[nn.Module]:
    children = getattr(unet, name, ())
    return children if isinstance(children, nn.ModuleList) else ()


def _read_block(name: str, block: nn.Module, sampler: str) -> _Block:
    transformers: Transformers = []
    for transformer in _children(block, "attentions"):
        attentions = [getattr(b, "attn2", None) for b in _children(transformer, "transformer_blocks")]
        transformers.append([(a.inner_dim, a.to_k.in_features) for a in attentions if a is not None])
    resnets = len(list(_children(block, "resnets")))
    return _Block(name, resnets, getattr(block, sampler or "-", None) is not None, transformers)


# from a config


class _Plan:
    """A diffusers UNet config, read with diffusers' defaults."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.widths = [int(w) for w in config.get("block_out_channels") or (320, 640, 1280, 1280)]
        default = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
        self.down_types = list(config.get("down_block_types") or default)
        default = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
        self.up_types = list(config.get("up_block_types") or default)
        self.mid_type = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
        levels = len(self.widths)
        if not levels == len(self.down_types) == len(self.up_types):
            raise PitError(
                f"This UNet config has {levels} widths, {len(self.down_types)} down blocks and "
                f"{len(self.up_types)} up blocks; the three must be equal."
            )
        self.resnets = _per_level(config.get("layers_per_block", 2), levels)
        self.depths = _per_level(config.get("transformer_layers_per_block", 1), levels)
        reverse = config.get("reverse_transformer_layers_per_block")
        self.up_depths = _per_level(reverse or self.depths[::-1], levels)
        self.contexts = _per_level(config.get("cross_attention_dim", 1280), levels)
        _check_types(self.down_types, ("CrossAttnDownBlock2D", "DownBlock2D"))
        _check_types(self.up_types, ("CrossAttnUpBlock2D", "UpBlock2D"))
        _check_types([self.mid_type], ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None))

    def down_blocks(self) -> list[_Block]:
        return [
            self._block(f"down_blocks.{i}", kind, level=i, resnets=self.resnets[i], depth=self.depths[i])
            for i, kind in enumerate(self.down_types)
        ]

    def up_blocks(self) -> list[_Block]:
        blocks = []
        for i, kind in enumerate(self.up_types):
            level = len(self.widths) - 1 - i
            resnets = self.resnets[level] + 1
            blocks.append(self._block(f"up_blocks.{i}", kind, level, resnets, self.up_depths[i]))
        return blocks

    def mid_block(self) -> _Block | None:
        if self.mid_type is None:
            return None
        return self._block("mid_block", self.mid_type, len(self.widths) - 1, resnets=1, depth=self.depths[-1])

    def _block(self, name: str, kind: str, level: int, resnets: int, depth: Any) -> _Block:
        last = level == (0 if name.startswith("up") else len(self.widths) - 1)
        if "CrossAttn" not in kind:
            return _Block(name, resnets, not last, [])
        depths = _per_level(depth, resnets)[:resnets]
        widths = (self.widths[level], int(self.contexts[level]))
        return _Block(name, resnets, not last, [[widths] * int(d) for d in depths])


def _per_level(value: Any, levels: int) -> list[Any]:
    values = [value] * levels if isinstance(value, int) else list(value)
    if len(values) < levels:
        raise PitError(f"This UNet config gives {len(values)} values, {values}, where {levels} are needed.")
    return values


def _check_types(types: Sequence[str | None], known: Sequence[str | None]) -> None:
    unknown = [kind for kind in types if kind not in known]
    if unknown:
        raise PitError(
            f"This UNet has blocks of type {unknown[0]}; IP-Adapters know only those of SD1.5 and SDXL."
        )


# numbering


def _numbered(down: list[_Block], up: list[_Block], mid: _Block | None) -> list[AttentionLayer]:
    # ComfyUI's input block 0 is the first convolution, and every downsampler is a block of its own.
    inputs = _places("input", down, first=1, sampler_counts=True)
    outputs = _places("output", up, first=0, sampler_counts=False)
    middle = _places("middle", [mid] if mid else [], first=0, sampler_counts=False)
    places = [*inputs, *outputs, *middle]
    _require(places)
    layers = [
        AttentionLayer(index, module, width, context, block, 0)
        for index, (module, width, context, block) in enumerate(places)
    ]
    return _with_transformer_indices(layers)


def _places(
    side: str, blocks: list[_Block], first: int, sampler_counts: bool
) -> Iterator[tuple[str, int, int, ComfyBlock]]:
    for block in blocks:
        for j, transformer in enumerate(block.transformers):
            for i, (width, context) in enumerate(transformer):
                module = f"{block.name}.attentions.{j}.transformer_blocks.{i}.attn2"
                yield module, width, context, (side, first + j, i)
        first += block.resnets + (sampler_counts and block.sampler)


def _with_transformer_indices(layers: list[AttentionLayer]) -> list[AttentionLayer]:
    order = ("input", "middle", "output")
    transformers = sorted(
        {layer.comfy_block[:2] for layer in layers}, key=lambda t: (order.index(t[0]), t[1])
    )
    return [replace(layer, transformer_index=transformers.index(layer.comfy_block[:2])) for layer in layers]


def _require(layers: Any) -> None:
    if not layers:
        raise PitError(
            "This model has no text cross-attention layers, so it is no UNet that an IP-Adapter fits."
        )
