"""Fully sharded training: weights, gradients, the optimiser's state and averages spread over processes.

torch's own `fully_shard` does it (FSDP2; Zhao et al. 2023, arXiv 2304.11277), on CPUs as on GPUs. accelerate
starts the processes and is where it is switched on; its own FSDP, which leaves CPUs out, is not used, so that
what is tested is what runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PitError

SWITCH = "ACCELERATE_USE_FSDP"  # `accelerate launch` sets it for a config of `distributed_type: FSDP`
REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params is not supported; set it to false.",
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing is not supported; set it to false, and gradient_checkpointing: true "
        "in the training's own settings."
    ),
}


@dataclass(frozen=True)
class Copies:
    """Whole tensors to be saved: weights and their averages by name, and the optimiser's state dict."""

    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    optimizer: dict[str, Any]


def wanted(precision: str) -> bool:
    """Whether the processes were launched for it. Raises PitError for settings that it cannot follow."""
    if not _says("true", SWITCH):
        return False
    for setting, sentence in REFUSED.items():
        if _says("true", setting):
            raise PitError(sentence)
    if precision == "fp16":
        raise PitError("fp16 and FSDP do not go together here; set precision to bf16 or no.")
    return True


def kept_from_accelerate() -> Any:
    """Inside, accelerate does not see the switch, so that it does not shard as well."""
    from accelerate.utils import patch_environment

    return patch_environment(**{SWITCH: "false"})


def spread(
    objective: nn.Module,
    blocks: Sequence[str],
    optimizer: torch.optim.Optimizer,
    ema: Any,
    device: torch.device,
) -> Any:
    """A sharded copy of the objective on `device`, to which optimiser and averages are handed over.

    `blocks` names the submodules that are gathered one at a time. Frozen parameters stay whole. The objective
    is left as it is, to take the averages when they are looked at. All processes hold the same values before.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = copy.deepcopy(objective).to(device)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "ignored_params": {p for p in model.parameters() if not p.requires_grad},
    }
    again = not _says("false", "FSDP_RESHARD_AFTER_FORWARD")
    for name in blocks:
        fully_shard(model.get_submodule(name), reshard_after_forward=again, **options)
    fully_shard(model, **options)
    new = [p for p in model.parameters() if p.requires_grad]
    ema.shadow_params = [_part(shadow, p) for shadow, p in zip(ema.shadow_params, new, strict=True)]
    group = optimizer.param_groups[0]
    for old, p in zip(group["params"], new, strict=True):
        state = optimizer.state.pop(old, {})
        optimizer.state[p] = {k: _part(v, p) if v.shape == p.shape else v for k, v in state.items()}
    group["params"] = new
    return model


def whole(tensor: Tensor) -> Tensor:
    """All of a spread tensor, which every process must ask for; another tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(named: Mapping[str, nn.Parameter], ema: Any, optimizer: Any, *, keep: bool) -> Copies:
    """What is to be saved, whole. All processes take part; those that do not `keep` it are handed nothing."""
    weights = _gathered(((name, p.detach()) for name, p in named.items()), keep)
    state = optimizer.state_dict()
    numbered = {number: _gathered(values.items(), keep) for number, values in state["state"].items()}
    return Copies(weights, averages(named, ema, keep=keep), {**state, "state": numbered})


def averages(named: Mapping[str, nn.Parameter], ema: Any, *, keep: bool = True) -> dict[str, Tensor]:
    """The averaged weights by name, whole; as `gather`."""
    return _gathered(zip(named, ema.shadow_params, strict=True), keep)


def _gathered(tensors: Iterable[tuple[str, Any]], keep: bool) -> dict[str, Any]:
    found = {}
    for name, tensor in tensors:
        value = whole(tensor)
        if keep:
            found[name] = value.cpu() if value is not tensor else value
    return found


def _part(full: Tensor, like: Any) -> Tensor:
    """This process's share of a tensor that all processes hold, cut as `like` is."""
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    return distribute_tensor(full.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def _says(value: str, name: str) -> bool:
    from accelerate.utils import parse_choice_from_env

    return parse_choice_from_env(name, "").lower() == value
