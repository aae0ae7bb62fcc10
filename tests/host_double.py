"""A small stand-in for ComfyUI: just enough of its interface to run the pack's nodes without it.

It is no copy of ComfyUI's code but a sketch of its behaviour, as far as the nodes rely on it. That the sketch
is true is tested by running the same tests on the real one (`tests/nodes/test_on_the_real_host.py`).
"""

from __future__ import annotations

import copy
import math
import os
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# comfy_api.latest


class _Input:
    def __init__(self, id: str, **options: Any) -> None:
        self.id = id
        self.optional = options.pop("optional", False)
        self.template = None
        for name in ("default", "min", "max", "step", "options", "tooltip"):
            setattr(self, name, options.get(name))
        self.__dict__.update(options)


class _Output:
    def __init__(self, **options: Any) -> None:
        self.display_name, self.tooltip = options.get("display_name"), options.get("tooltip")


def _socket(name: str) -> type:
    return type(name, (), {"Input": type("Input", (_Input,), {"io_type": name}),
                           "Output": type("Output", (_Output,), {"io_type": name})})  # fmt: skip


class _Prefix:
    def __init__(self, input: _Input, prefix: str, min: int = 1, max: int = 10) -> None:
        self.input, self.prefix, self.min, self.max = input, prefix, min, max


class _Grown(_Input):
    io_type = "COMFY_AUTOGROW_V3"

    def __init__(self, id: str, template: _Prefix, **options: Any) -> None:
        super().__init__(id, **options)
        self.template = template


@dataclass
class Schema:
    node_id: str
    display_name: str = ""
    category: str = ""
    description: str = ""
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    is_output_node: bool = False


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui

    def __getitem__(self, index: int) -> Any:
        return self.args[index]


class _PreviewImage:
    def __init__(self, image: Tensor, cls: Any = None) -> None:
        self.image = image

    def as_dict(self) -> dict[str, Any]:
        return {"images": [{"filename": "shown.png"}], "animated": (False,)}


class _PreviewText:
    def __init__(self, value: str) -> None:
        self.value = value

    def as_dict(self) -> dict[str, Any]:
        return {"text": (self.value,)}


IO = SimpleNamespace(
    ComfyNode=type("ComfyNode", (), {}),
    Schema=Schema,
    NodeOutput=NodeOutput,
    Custom=_socket,
    Autogrow=SimpleNamespace(Input=_Grown, TemplatePrefix=_Prefix),
    **{
        name: _socket(kind)
        for name, kind in {
            "Model": "MODEL",
            "Clip": "CLIP",
            "Vae": "VAE",
            "ClipVision": "CLIP_VISION",
            "Image": "IMAGE",
            "Latent": "LATENT",
            "Mask": "MASK",
            "Int": "INT",
            "Float": "FLOAT",
            "String": "STRING",
            "Boolean": "BOOLEAN",
            "Combo": "COMBO",
        }.items()
    },
)

# model patching

Lora = tuple[Tensor, Tensor, float]
"""(up, down, alpha)."""


class ModelPatcher:
    def __init__(self, model: Any, load_device: Any = "cpu", offload_device: Any = "cpu") -> None:
        self.model = model
        self.load_device, self.offload_device = torch.device(load_device), offload_device
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.callbacks: dict[str, dict[str, list[Any]]] = {}
        self.patches: dict[str, list[tuple[float, Lora]]] = {}

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model, self.load_device, self.offload_device)
        other.model_options = copy.deepcopy(self.model_options)  # as the oldest supported version does
        other.wrappers = {kind: {k: [*v] for k, v in by.items()} for kind, by in self.wrappers.items()}
        other.callbacks = {kind: {k: [*v] for k, v in by.items()} for kind, by in self.callbacks.items()}
        other.patches = {key: [*changes] for key, changes in self.patches.items()}
        return other

    def add_patches(self, patches: dict[str, Lora], strength: float = 1.0) -> list[str]:
        found = [key for key in patches if key in self.model.state_dict()]
        for key in found:
            self.patches.setdefault(key, []).append((strength, patches[key]))
        return found

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self) -> None:
        """The weights under the patches, and those of other clones without: all share one model."""
        self.unload()
        self.model.unpatched = {key: self.model.get_parameter(key) for key in self.patches}
        for key, weight in self.model.unpatched.items():
            deltas = [s * alpha / len(down) * up @ down for s, (up, down, alpha) in self.patches[key]]
            changed = (weight.float() + sum(deltas)).to(weight.dtype)
            _put(self.model, key, nn.Parameter(changed, requires_grad=False))

    def unload(self) -> None:
        for key, weight in getattr(self.model, "unpatched", {}).items():
            _put(self.model, key, weight)
        self.model.unpatched = {}

    def model_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def set_model_attn2_replace(self, patch: Any, block: str, number: int, index: int) -> None:
        replaced = self.model_options["transformer_options"].setdefault("patches_replace", {})
        replaced["attn2"] = {**replaced.get("attn2", {}), (block, number, index): patch}

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def add_callback_with_key(self, kind: str, key: str, callback: Any) -> None:
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, kind: str, key: str) -> None:
        self.callbacks.get(kind, {}).pop(key, None)

    def all_of(self, table: dict[str, dict[str, list[Any]]], kind: str) -> list[Any]:
        return [each for group in table.get(kind, {}).values() for each in group]


def _put(model: nn.Module, key: str, weight: nn.Parameter) -> None:
    place, _, name = key.rpartition(".")
    setattr(model.get_submodule(place), name, weight)


def percent_to_sigma(percent: float) -> float:
    return 1e9 if percent <= 0 else 0.0 if percent >= 1 else 14.0 * (1 - percent)


def optimized_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_options: Any) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _CastingLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x)
        return nn.functional.linear(x, self.weight.to(x), bias)


class _CastingNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if t is None else t.to(x) for t in (self.weight, self.bias))
        return nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


# a model with SDXL's eleven transformers, reduced to its text cross-attention

PLAN = [
    *(("input", number, 2) for number in (4, 5)),
    *(("input", number, 4) for number in (7, 8)),
    ("middle", 0, 4),
    *(("output", number, 4) for number in (0, 1, 2)),
    *(("output", number, 2) for number in (3, 4, 5)),
]
"""(block, number, how much smaller than the latents), in execution order."""
WIDTH, HEADS, DEPTH = 32, 2, 1


class _Attention(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, WIDTH, bias=False) for _ in range(2))
        self.to_out = nn.Linear(WIDTH, 4)


class Network(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.enter = nn.Linear(4, WIDTH)
        for block, number, _ in PLAN:
            name = "middle_block.1" if block == "middle" else f"{block}_blocks.{number}.1"
            self._at(f"{name}.transformer_blocks.0").attn2 = _Attention(context)

    def _at(self, path: str) -> nn.Module:
        module: nn.Module = self
        for part in path.split("."):
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        return module

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        out = x
        for block, number, shrink in PLAN:
            name = "middle_block.1" if block == "middle" else f"{block}_blocks.{number}.1"
            attention = self.get_submodule(f"{name}.transformer_blocks.0.attn2")
            out = out + self._layer(attention, out, context, options, (block, number), shrink)
        return out

    def _layer(
        self, attention: Any, x: Tensor, context: Tensor, options: dict, place: tuple, shrink: int
    ) -> Tensor:
        size = tuple(math.ceil(side / shrink) for side in x.shape[-2:])
        small = nn.functional.adaptive_avg_pool2d(x, size).flatten(2).transpose(1, 2)
        q, k, v = attention.to_q(self.enter(small)), attention.to_k(context), attention.to_v(context)
        patches = options.get("patches_replace", {}).get("attn2", {})
        patch = patches.get((*place, 0), patches.get(place))
        if patch is None:
            z = optimized_attention(q, k, v, HEADS)
        else:
            extra = {key: value for key, value in options.items() if key != "patches_replace"}
            extra |= {"n_heads": HEADS, "dim_head": WIDTH // HEADS, "attn_precision": None}
            extra |= {"block": place, "block_index": 0, "original_shape": list(x.shape)}
            extra["activations_shape"] = [len(x), WIDTH, *size]
            z = patch(q, k, v, extra)
        z = attention.to_out(z).transpose(1, 2).unflatten(2, size)
        return 0.3 * nn.functional.interpolate(z, size=x.shape[-2:])


class Model(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.diffusion_model = Network(context)
        self.model_sampling = SimpleNamespace(percent_to_sigma=percent_to_sigma)


DIFFUSERS = {
    **{
        ("input", n): f"down_blocks.{i}.attentions.{j}"
        for n, i, j in ((4, 1, 0), (5, 1, 1), (7, 2, 0), (8, 2, 1))
    },
    ("middle", 0): "mid_block.attentions.0",
    **{("output", n): f"up_blocks.{n // 3}.attentions.{n % 3}" for n in range(6)},
}
"""(block, number) -> diffusers' name of the transformer."""


def model_lora_keys_unet(model: Any, key_map: dict[str, str]) -> dict[str, str]:
    keys = [key for key in model.state_dict() if key.endswith(".weight")]
    for key in keys:
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        key_map[f"lora_unet_{name.replace('.', '_')}"] = key
        key_map[key.removesuffix(".weight")] = key
        for (block, number), ours in DIFFUSERS.items():
            theirs = "middle_block.1" if block == "middle" else f"{block}_blocks.{number}.1"
            if name.startswith(f"{theirs}."):
                key_map[f"lora_unet_{(ours + name.removeprefix(theirs)).replace('.', '_')}"] = key
    return key_map


def load_lora(lora: dict[str, Tensor], to_load: dict[str, str]) -> dict[str, Lora]:
    return {
        key: (
            lora[f"{name}.lora_up.weight"],
            lora[f"{name}.lora_down.weight"],
            float(lora[f"{name}.alpha"]),
        )
        for name, key in to_load.items()
        if f"{name}.lora_up.weight" in lora
    }


@torch.no_grad()
def sample(
    patcher: ModelPatcher, noise: Tensor, groups: list[list[dict[str, Any]]], steps: int, cfg: float
) -> Tensor:
    """Euler steps with guidance; groups: [positive, negative], entries with context, area and strength."""
    x = noise
    entries = [[{**e, "uuid": uuid.uuid4()} for e in group] for group in groups]
    patcher.load()
    try:
        for i in range(steps):
            sigma = torch.full((1,), 14.0 * (1 - i / steps))
            told = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}
            options = {**patcher.model_options, "transformer_options": told}
            wrappers = patcher.all_of(patcher.wrappers, "calc_cond_batch")
            cond, uncond = _wrapped(wrappers, _predict)(patcher.model, entries, x, sigma, options)
            v = cond if cfg == 1 else uncond + cfg * (cond - uncond)
            x = x - v / steps
    finally:
        patcher.unload()
        for callback in patcher.all_of(patcher.callbacks, "on_cleanup"):
            callback(patcher)
    return x


def _wrapped(wrappers: list[Any], last: Any) -> Any:
    if not wrappers:
        return last
    return lambda *args: wrappers[0](_wrapped(wrappers[1:], last), *args)


def _predict(model: Model, groups: list[list[dict]], x: Tensor, sigma: Tensor, options: dict) -> list[Tensor]:
    outs, counts = [torch.zeros_like(x) for _ in groups], [torch.zeros_like(x) for _ in groups]
    todo = [(kind, entry) for kind, group in enumerate(groups) for entry in group]
    whole = [each for each in todo if each[1].get("area") is None]
    batches = [whole[::-1]] + [[each] for each in todo if each[1].get("area") is not None]
    for batch in filter(None, batches):
        height, width, top, left = batch[0][1].get("area") or (*x.shape[-2:], 0, 0)
        piece = x[..., top : top + height, left : left + width]
        told = {
            **options["transformer_options"],
            "cond_or_uncond": [kind for kind, _ in batch],
            "uuids": [entry["uuid"] for _, entry in batch],
            "sigmas": sigma,
        }
        context = torch.cat([entry["context"].expand(len(x), -1, -1) for _, entry in batch])
        result = model.diffusion_model(torch.cat([piece] * len(batch)), context, told).chunk(len(batch))
        for (kind, _), part in zip(batch, result, strict=True):
            outs[kind][..., top : top + height, left : left + width] += part
            counts[kind][..., top : top + height, left : left + width] += 1
    return [out / count.clamp_min(1) for out, count in zip(outs, counts, strict=True)]


# the image encoder


class VisionModel(nn.Module):
    """The face of a CLIP vision model: (last, penultimate, embedding, None)."""

    def __init__(self, width: int, projection: int, size: int) -> None:
        super().__init__()
        self.vision_model = nn.Module()
        self.vision_model.patch = nn.Conv2d(3, width, size // 2, stride=size // 2)
        self.vision_model.post_layernorm = nn.LayerNorm(width)
        self.visual_projection = nn.Linear(width, projection, bias=False)
        self.calls: list[int] = []

    def forward(self, pixel_values: Tensor, intermediate_output: int) -> tuple[Any, ...]:
        self.calls.append(len(pixel_values))
        assert intermediate_output == -2
        states = self.vision_model.patch(pixel_values).flatten(2).transpose(1, 2)
        pooled = self.visual_projection(self.vision_model.post_layernorm(states.mean(1)))
        return states, states, pooled, None


class ClipVision:
    def __init__(self, width: int, projection: int, size: int) -> None:
        self.model = VisionModel(width, projection, size).eval()
        self.patcher = ModelPatcher(self.model)
        self.load_device = torch.device("cpu")
        self.image_size = size
        self.image_mean = [0.48145466, 0.4578275, 0.40821073]
        self.image_std = [0.26862954, 0.26130258, 0.27577711]


# the rest


class InterruptedRunError(Exception):
    """What the host raises in a node that the user stopped."""


class State:
    """What tests look at and set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.interrupted = False
        self.progress: list[tuple[int, int]] = []


def install(folder: Path) -> tuple[State, list[str]]:
    """Put the stand-in where imports find it; returns its state and the names of its modules."""
    state = State(folder)

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, done: int, total: int | None = None) -> None:
            state.progress.append((done, self.total))

    def stop_if_asked() -> None:
        if state.interrupted:
            raise InterruptedRunError

    modules = {
        "comfy": {},
        "comfy.clip_vision": {},
        "comfy.lora": {"model_lora_keys_unet": model_lora_keys_unet, "load_lora": load_lora},
        "comfy.model_management": {
            "get_torch_device": lambda: torch.device("cpu"),
            "unet_offload_device": lambda: torch.device("cpu"),
            "load_model_gpu": lambda patcher: patcher.load(),
            "current_loaded_models": [],
            "throw_exception_if_processing_interrupted": stop_if_asked,
        },
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.ops": {"manual_cast": SimpleNamespace(Linear=_CastingLinear, LayerNorm=_CastingNorm)},
        "comfy.patcher_extension": {
            "WrappersMP": SimpleNamespace(
                CALC_COND_BATCH="calc_cond_batch",
                PREDICT_NOISE="predict_noise",
                DIFFUSION_MODEL="diffusion_model",
            ),
            "CallbacksMP": SimpleNamespace(ON_CLEANUP="on_cleanup"),
        },
        "comfy.sd": {},
        "comfy.sd1_clip": {},
        "comfy.supported_models": {},
        "comfy.supported_models_base": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.ldm": {},
        "comfy.ldm.modules": {},
        "comfy.ldm.modules.attention": {"optimized_attention": optimized_attention},
        "comfy_api": {},
        "comfy_api.latest": {
            "io": IO,
            "ui": SimpleNamespace(PreviewImage=_PreviewImage, PreviewText=_PreviewText),
        },
        "folder_paths": _folder_paths(folder),
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        module.__path__ = []  # type: ignore[attr-defined]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return state, list(modules)


def _folder_paths(folder: Path) -> dict[str, Any]:
    known: dict[str, tuple[list[str], set[str]]] = {
        "loras": ([str(folder / "models" / "loras")], {".safetensors", ".bin", ".pt"})
    }

    def add(name: str, path: str, is_default: bool = False) -> None:
        paths, _ = known.setdefault(name, ([], set()))
        if path not in paths:
            paths.append(path)

    def names(name: str) -> list[str]:
        paths, suffixes = known[name]
        files = [(file, Path(path)) for path in paths for file in sorted(Path(path).rglob("*"))]
        return [f.relative_to(p).as_posix() for f, p in files if f.is_file() and f.suffix in suffixes]

    def full_path(name: str, file: str) -> str | None:
        below = os.path.relpath(os.path.join("/", file), "/")  # no name leads out of the folders
        found = (os.path.join(place, below) for place in known[name][0])
        return next((path for path in found if os.path.isfile(path)), None)

    def save_path(prefix: str, output: str) -> tuple[str, str, int, str, str]:
        below, _, name = prefix.rpartition("/")
        place = Path(output) / below
        place.mkdir(parents=True, exist_ok=True)
        numbers = [int(f.stem.removeprefix(f"{name}_").rstrip("_")) for f in place.glob(f"{name}_*_.*")]
        return str(place), name, max(numbers, default=0) + 1, below, prefix

    return {
        "models_dir": str(folder / "models"),
        "folder_names_and_paths": known,
        "add_model_folder_path": add,
        "get_folder_paths": lambda name: list(known[name][0]),
        "get_filename_list": names,
        "get_full_path": full_path,
        "get_output_directory": lambda: str(folder / "output"),
        "get_save_image_path": save_path,
    }
