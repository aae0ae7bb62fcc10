"""The names that LoRA files give to a layer, and the one that we give it.

Ours is the dotted name of diffusers, without a prefix: `down_blocks.1.attentions.0.transformer_blocks.0.
attn1.to_q`. Layers of a text encoder keep `text_encoder.` or `text_encoder_2.` in front; layers named after
the original layout (`input_blocks.4.1...`) keep those names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_KEY = 400  # characters; real ones stay below 130

PREFIX = re.compile(r"(?:(?:unet|diffusion_model|base_model\.model)\.)+")
MODULE = re.compile(r"\w+(?:\.\w+)*", re.ASCII)
FACTOR = re.compile(
    r"(?P<layer>.+?)(?:\.lora\.|_lora\.|\.lora_linear_layer\.|\.lora_)(?P<part>down|up|A|B)"
    r"(?:\.default(?:_\d{1,3})?)?\.weight"
)
ALPHA = re.compile(r"(?P<layer>.+?)(?:\.lora|_lora)?\.alpha")
KOHYA = re.compile(r"lora_(?P<where>unet|te1|te2|te)_(?P<name>.+)")

ENCODERS = {"te": "text_encoder.", "te1": "text_encoder.", "te2": "text_encoder_2.", "unet": ""}
PARTS = {"A": "down", "B": "up"}

# Names with underscores of their own; every other underscore of a kohya name was a dot.
WORDS = re.compile(
    r"(?:(?<=_)|^)(?:"
    r"(?:down|up|transformer|input|output|middle|mid)_blocks?|(?:in|out|emb)_layers|to_[kv]_ip|to_(?:q|k|v|out)|"
    r"(?:q|k|v|out)_proj|time_emb_proj|proj_(?:in|out)|conv_(?:in|out|shortcut|norm_out)|linear_[12]|"
    r"skip_connection|time_embed(?:ding)?|add_embedding|label_emb|text_model|text_projection|self_attn|"
    r"layer_norm[12]|final_layer_norm|(?:token|position)_embedding"
    r")(?=_|$)|_"
)


@dataclass(frozen=True)
class LoraKey:
    """One key of a file: the layer (our name), what it holds ("down", "up" or "alpha"), and how often the
    prefix `unet.` stands before it."""

    module: str
    part: str
    prefixes: int


def parse_key(key: str) -> LoraKey | None:
    """The key in our words; None when it is not one that a low-rank pair has."""
    if len(key) > MAX_KEY:
        return None
    match = FACTOR.fullmatch(key) or ALPHA.fullmatch(key)
    if match is None:
        return None
    part = match.groupdict().get("part") or "alpha"
    module = module_name(match["layer"])
    if not MODULE.fullmatch(module):
        return None
    prefix = PREFIX.match(key)
    return LoraKey(module, PARTS.get(part, part), prefix[0].count("unet.") if prefix else 0)


def module_name(name: str) -> str:
    """Our name of a layer out of anybody's: prefixes, `processor` and underscores for dots are undone."""
    name = PREFIX.sub("", name, count=1) if PREFIX.match(name) else name
    if match := KOHYA.fullmatch(name):
        name = ENCODERS[match["where"]] + _dotted(match["name"])
    name = name.replace(".processor.", ".")
    name = re.sub(r"\.to_out$", ".to_out.0", name)
    return re.sub(r"\.(to_[kv]_ip)\.0$", r".\1", name)  # diffusers lists them, one for each adapter


def kohya_name(module: str) -> str:
    """The layer's name in kohya's layout, which ComfyUI reads: `lora_unet_down_blocks_1_...`."""
    for short in ("te2", "te1"):  # both programs read te1 for te
        if module.startswith(ENCODERS[short]):
            return f"lora_{short}_{module.removeprefix(ENCODERS[short]).replace('.', '_')}"
    return f"lora_unet_{module.replace('.', '_')}"


def diffusers_name(module: str) -> str:
    """The layer's name in diffusers' layout: `unet.` before layers of the UNet."""
    return module if module.startswith(("text_encoder.", "text_encoder_2.")) else f"unet.{module}"


def is_ip_layer(module: str) -> bool:
    """Whether the layer belongs to an IP-Adapter (`to_k_ip`, `to_v_ip`) rather than to the UNet."""
    return module.endswith((".to_k_ip", ".to_v_ip"))


def is_original(module: str) -> bool:
    """Whether the layer is named as in the original layout, as kohya's SDXL scripts do."""
    return module.startswith(("input_blocks.", "middle_block.", "output_blocks."))


def _dotted(name: str) -> str:
    return WORDS.sub(lambda match: "." if match[0] == "_" else match[0], name)
