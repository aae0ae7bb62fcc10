"""Tiny models of the Flux family on a bench, and beside them the diptych's attention by its definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flux_double
import host_double
import torch
from benches import CONTEXT, POOLED, Bench, DoubleBench, fill, randn
from torch import Tensor

TEXT = 6  # tokens of the benches' prompts
SIZES = {"width": 48, "height": 32, "reference_width": 16, "margin": 8}
GRID, COLUMNS = (3, 6), 2
LATENT = (1, 16, 6, 12)
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": POOLED,
    "context_in_dim": CONTEXT,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}


def flux(bench: Bench) -> Any:
    """A MODEL with two double and two single blocks."""
    if isinstance(bench, DoubleBench):
        return host_double.ModelPatcher(fill(flux_double.Model(CONTEXT)))
    import comfy.model_patcher
    import comfy.supported_models

    cpu = torch.device("cpu")
    family = comfy.supported_models.Flux(dict(FLUX))
    family.set_inference_dtype(torch.float32, None)
    model = fill(family.get_model({}, "", device=cpu))
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def noise(pictures: int = 1) -> Tensor:
    return randn((pictures, *LATENT[1:]), 7)


def overridden(model: Any, override: Callable[..., Tensor]) -> Any:
    """A clone with an attention override, as other packs put it there."""
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


@dataclass
class Dense:
    """An override by the definition, in float64: probabilities of right queries for left keys, multiplied.

    gains: (left,) or (pictures, left). targets: which of the right tokens. steps: at which steps of a run.
    """

    gains: Tensor
    blocks: Sequence[tuple[str, int]] | None = None
    cond_only: bool = False
    targets: Tensor | None = None
    steps: Sequence[int] | None = None
    normalized: bool = False
    text: int = TEXT

    def __post_init__(self) -> None:
        self.seen: list[float] = []
        self.tokens: set[int] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Dense:
        return self

    def __call__(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        options = named["transformer_options"]
        assert named["skip_reshape"] and mask is None
        self.tokens.add(q.shape[2])
        q, k, v = q.double(), k.double(), v.double()
        probabilities = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        if self._counts(options):
            probabilities = probabilities * self._factors(q.shape[2], options)[:, None]
            if self.normalized:
                probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return (probabilities @ v).transpose(1, 2).flatten(2).float()

    def _counts(self, options: dict[str, Any]) -> bool:
        sigma = float(options["sigmas"].max())
        if sigma not in self.seen:
            self.seen.append(sigma)
        place = options["block_type"], options["block_index"]
        in_step = self.steps is None or self.seen.index(sigma) in self.steps
        return in_step and (self.blocks is None or place in self.blocks)

    def _factors(self, tokens: int, options: dict[str, Any]) -> Tensor:
        """(conditions * pictures, tokens, tokens)."""
        image = torch.arange(self.text, self.text + math.prod(GRID)).view(GRID)
        left, right = image[:, :COLUMNS].flatten(), image[:, COLUMNS:].flatten()
        right = right if self.targets is None else right[self.targets]
        gains, rows = self.gains.double().reshape(-1, len(left)), []
        for half in options["cond_or_uncond"]:
            for gain in gains:
                factor = torch.ones(tokens, tokens, dtype=torch.float64)
                if half == 0 or not self.cond_only:
                    factor[right[:, None], left] = gain
                rows.append(factor)
        return torch.stack(rows)


def strip_overrides(executor: Any, *args: Any, **named: Any) -> Any:
    """A wrapper that makes a model deaf to overrides, as those are that bring an attention of their own."""
    deaf = [
        {key: value for key, value in each.items() if key != "optimized_attention_override"}
        if isinstance(each, dict)
        else each
        for each in args
    ]
    return executor(*deaf, **named)


def controlled(conds: list[Any], strength: float = 1.0) -> list[Any]:
    """[positive, negative] under a ControlNet of Flux's kind, which reads latents."""
    import comfy.controlnet
    import comfy.ldm.flux.controlnet
    import comfy.ops

    network = comfy.ldm.flux.controlnet.ControlNetFlux(
        latent_input=True,
        control_latent_channels=16,
        operations=comfy.ops.manual_cast,
        dtype=torch.float32,
        device=torch.device("cpu"),
        **{**FLUX, "depth": 1, "depth_single_blocks": 0},
    )
    cpu = torch.device("cpu")
    control = comfy.controlnet.ControlNet(
        fill(network), compression_ratio=1, load_device=cpu, extra_conds=["y", "guidance"]
    )
    used = control.set_cond_hint(randn(LATENT, 9), strength)
    added = {"control": used, "control_apply_to_uncond": False}
    return [[[c, {**rest, **added}] for c, rest in group] for group in conds]
