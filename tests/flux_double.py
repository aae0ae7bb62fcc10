"""A stand-in for ComfyUI's Flux: joint attention over text and image, as far as the diptych's nodes need it.

A sketch of its behaviour and no copy of its code, as host_double.py is; the tests run on the real one, too.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import host_double
import torch
from torch import Tensor, nn

PATCH, CHANNELS, WIDTH, HEADS, DEPTH = 2, 16, 32, 2, 2


class Executor:
    """What a wrapper is handed: the wrappers behind it and, at last, the function."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Any]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **named: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **named)
        first, *rest = self.wrappers
        return first(Executor(self.original, self.class_obj, rest), *args, **named)


def plain(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **_options: Any) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def attention(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    named = {"skip_reshape": True, "mask": None, "transformer_options": options}
    override = options.get("optimized_attention_override")
    return override(plain, q, k, v, HEADS, **named) if override else plain(q, k, v, HEADS, **named)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor, options: dict[str, Any]) -> Tensor:
        normal = nn.functional.layer_norm(tokens, (WIDTH,))
        q, k, v = self.qkv(normal).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return tokens + self.proj(attention(q, k, v, options))


class Network(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.patch_size = PATCH
        self.img_in = nn.Linear(CHANNELS * PATCH**2, WIDTH)
        self.txt_in = nn.Linear(context, WIDTH)
        self.double_blocks = nn.ModuleList([_Block() for _ in range(DEPTH)])
        self.single_blocks = nn.ModuleList([_Block() for _ in range(DEPTH)])
        self.final_layer = nn.Linear(WIDTH, CHANNELS * PATCH**2)

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        groups = options.get("wrappers", {}).get("diffusion_model", {}).values()
        executor = Executor(self._forward, self, [each for group in groups for each in group])
        return executor(x, options["sigmas"], context, None, None, None, None, options)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **_others: Any,
    ) -> Tensor:
        options = dict(transformer_options or {})
        height, width = x.shape[-2:]
        padded = nn.functional.pad(x, (0, -width % PATCH, 0, -height % PATCH))
        tokens = nn.functional.pixel_unshuffle(padded, PATCH).flatten(2).transpose(1, 2)
        args = {"img": self.img_in(tokens), "txt": self.txt_in(context)}
        for patch in options.get("patches", {}).get("post_input", ()):
            args = patch(args)
        joined, text = torch.cat([args["txt"], args["img"]], 1), args["txt"].shape[1]
        for kind in ("double", "single"):
            for index, block in enumerate(getattr(self, f"{kind}_blocks")):
                joined = block(joined, {**options, "block_type": kind, "block_index": index})
        image = self.final_layer(joined[:, text : text + tokens.shape[1]]).transpose(1, 2)
        grid = (padded.shape[-2] // PATCH, padded.shape[-1] // PATCH)
        return nn.functional.pixel_shuffle(image.unflatten(2, grid), PATCH)[..., :height, :width]


class Model(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.diffusion_model = Network(context)
        self.model_sampling = SimpleNamespace(percent_to_sigma=host_double.percent_to_sigma)
