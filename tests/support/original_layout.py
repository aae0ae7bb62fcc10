"""A diffusers SDXL pipeline as one file in the original layout: the other way round than diffusers goes."""

import re
from collections.abc import Sequence
from typing import Any

import torch

Rules = Sequence[tuple[str, str]]

RESNET: Rules = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
]
UNET: Rules = [
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"),
    (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
]
VAE: Rules = [
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
]
OPEN_CLIP: Rules = [
    (r"^text_model\.", ""),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"layer_norm1", "ln_1"),
    (r"layer_norm2", "ln_2"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
]


def original_layout(pipe: Any) -> dict[str, torch.Tensor]:
    """All weights of an SDXL pipeline under the names of the original single file."""
    made: dict[str, torch.Tensor] = {}
    for key, tensor in pipe.unet.state_dict().items():
        made["model.diffusion_model." + _unet_key(key, pipe.unet.config.layers_per_block)] = tensor
    blocks = len(pipe.vae.config.block_out_channels)
    for key, tensor in pipe.vae.state_dict().items():
        attention = re.search(r"mid_block\.attentions.*(to_|proj).*weight", key)
        made["first_stage_model." + _vae_key(key, blocks)] = tensor[..., None, None] if attention else tensor
    for key, tensor in pipe.text_encoder.state_dict().items():
        made["conditioner.embedders.0.transformer.text_model." + key.removeprefix("text_model.")] = tensor
    for key, tensor in _open_clip(pipe.text_encoder_2.state_dict()).items():
        made["conditioner.embedders.1.model." + key] = tensor
    return {key: tensor.contiguous().clone() for key, tensor in made.items()}


def _renamed(key: str, rules: Rules) -> str:
    for pattern, new in rules:
        key = re.sub(pattern, new, key)
    return key


def _unet_key(key: str, layers: int) -> str:
    if "resnets" in key:
        key = _renamed(key, RESNET)
    if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.*)", key):
        block, kind, layer, rest = int(match[1]), match[2], int(match[3]), match[4]
        index = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else layer)
        inner = {"resnets": f"0.{rest}", "attentions": f"1.{rest}"}.get(kind, rest.replace("conv", "0.op"))
        return f"input_blocks.{index}.{inner}"
    if match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.*)", key):
        block, kind, layer, rest = int(match[1]), match[2], int(match[3]), match[4]
        index = block * (layers + 1) + (layers if kind == "upsamplers" else layer)
        inner = {"resnets": f"0.{rest}", "attentions": f"1.{rest}"}.get(kind, f"2.{rest}")
        return f"output_blocks.{index}.{inner}"
    return _renamed(key, UNET)


def _vae_key(key: str, blocks: int) -> str:
    if match := re.match(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(.*)", key):
        number = int(match[3]) if match[2] == "down" else blocks - 1 - int(match[3])
        rest = match[4].replace("resnets", "block")
        rest = re.sub(r"(down|up)samplers\.0", r"\1sample", rest).replace("conv_shortcut", "nin_shortcut")
        return f"{match[1]}.{match[2]}.{number}.{rest}"
    return _renamed(key, VAE)


def _open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {}
    for key, tensor in state.items():
        if match := re.match(r"(.*)self_attn\.q_proj\.(weight|bias)", key):
            parts = [state[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            made[_renamed(match[1], OPEN_CLIP) + f"attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif key == "text_projection.weight":
            made["text_projection"] = tensor.T
        elif not re.search(r"self_attn\.[kv]_proj|position_ids", key):
            made[_renamed(key, OPEN_CLIP)] = tensor
    return made
