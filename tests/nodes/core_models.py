"""Small models in the host's own classes that the pack has no use for; for tests that run in ComfyUI."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

CPU = torch.device("cpu")


def sd15(host: ModuleType, config: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """A MODEL of SD1.5's family, its weights yet to be filled in, and diffusers' names -> the host's."""
    plan = host._sdxl_plan({**config, "projection_class_embeddings_input_dim": None})
    plan.update(num_classes=None, use_linear_in_transformer=False)
    family = comfy.supported_models.SD15(plan)
    family.set_inference_dtype(torch.float32, None)
    model = family.get_model({}, "", device=CPU)
    host.set_groups(model.diffusion_model, config["norm_num_groups"])
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)
    return patcher, comfy.utils.unet_to_diffusers(plan)


def controlnet(host: ModuleType, config: dict[str, Any]) -> Any:
    """A core ControlNet for the SDXL family UNet that `config` describes, its weights yet to be filled in."""
    plan = host._sdxl_plan(config)
    plan.pop("out_channels")
    network = comfy.cldm.cldm.ControlNet(
        **plan,
        hint_channels=3,
        num_head_channels=host._head_width(config),
        dtype=torch.float32,
        device=CPU,
        operations=comfy.ops.manual_cast,
    )
    host.set_groups(network, config["norm_num_groups"])
    return comfy.controlnet.ControlNet(network, load_device=CPU)


def controlled(conds: list[Any], control: Any, hint: Tensor, strength: float) -> list[Any]:
    """[positive, negative] under a ControlNet; hint: (1, 3, H, W) in 0-1, eight times the latents."""
    used = control.copy().set_cond_hint(hint, strength)
    added = {"control": used, "control_apply_to_uncond": False}
    return [[[c, {**rest, **added}] for c, rest in group] for group in conds]


def control_names(host: ModuleType, config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers ControlNet's weights under the names of core's class."""
    names = comfy.utils.unet_to_diffusers(host._sdxl_plan(config))
    stages = 1 + max(int(m[1]) for k in weights if (m := re.match(r"\S+_cond_embedding\.blocks\.(\d+)", k)))
    rules = [
        (r"controlnet_down_blocks\.(\d+)\.", lambda m: f"zero_convs.{m[1]}.0."),
        (r"controlnet_mid_block\.", lambda m: "middle_block_out.0."),
        (r"controlnet_cond_embedding\.conv_in\.", lambda m: "input_hint_block.0."),
        (
            r"controlnet_cond_embedding\.blocks\.(\d+)\.",
            lambda m: f"input_hint_block.{2 * int(m[1]) + 2}.",
        ),
        (r"controlnet_cond_embedding\.conv_out\.", lambda m: f"input_hint_block.{2 * stages + 2}."),
    ]
    renamed = {}
    for key, tensor in weights.items():
        rule = next(((p, r) for p, r in rules if re.match(p, key)), None)
        renamed[re.sub(*rule, key) if rule else names[key]] = tensor
    return renamed


def with_lora(model: Any, weights: dict[str, Tensor], strength: float = 1.0) -> Any:
    """A clone under a LoRA in kohya's format, as core's loader node makes it; every weight has to match."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(weights, names)
    patched = model.clone()
    added = patched.add_patches(patches, strength)
    assert len(added) == len(patches) == sum(key.endswith("lora_down.weight") for key in weights)
    return patched
