"""What node tests stand on: the pack loaded as ComfyUI loads it, tiny models, and a sampler to run them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import zlib
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import host_double
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent.parent
PACK = "custom_nodes.piece-it-together"
CONTEXT, TOKENS, POOLED = 32, 4, 16
VISION, PROJECTION, PIXELS = 32, 20, 32

FOLDERS = ("models/ipadapter", "models/ip_prior", "models/loras", "output/ip_tokens", "output/loras")

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 32, 64],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 2, 4],
    "cross_attention_dim": CONTEXT,
    "projection_class_embeddings_input_dim": POOLED + 6 * 256,
    "norm_num_groups": 8,
}
"""diffusers' words for an SDXL family UNet with SDXL's eleven transformers."""

SDXL = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
    "norm_num_groups": 32,
}
"""SDXL itself."""

SD15 = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 32, 64, 64],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "norm_num_groups": 8,
}
"""A narrow SD1.5, with its sixteen layers and its text width."""


class Bench:
    """What both benches share. folder: holds models/ and output/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.pack = load_pack()
        self.host = self.part("nodes.host")

    def close(self) -> None:
        for name in [name for name in sys.modules if name == PACK or name.startswith(f"{PACK}.")]:
            del sys.modules[name]

    def part(self, name: str) -> ModuleType:
        """A module of the pack, by its name below the root."""
        return importlib.import_module(f"{PACK}.{name}")

    @property
    def error(self) -> type[Exception]:
        return self.part("pit_core.errors").PitError

    def run(self, node: str, **inputs: Any) -> Any:
        """Execute a node the way the host does, gradients off."""
        with torch.inference_mode():
            return self.pack.NODE_CLASS_MAPPINGS[node].execute(**inputs)

    def first(self, node: str, **inputs: Any) -> Any:
        return self.run(node, **inputs)[0]

    # files

    def adapter_file(self, name: str = "tiny.safetensors", *, salt: str = "", **sizes: int) -> str:
        """A random Plus adapter for `model()`, in the folder where nodes look for it."""
        parts = {k: self.part(f"pit_core.ip_adapter.{k}") for k in ("adapter", "resampler", "checkpoint")}
        sizes = {"embedding_dim": VISION, "output_dim": CONTEXT, "num_queries": TOKENS, **sizes}
        projector = parts["resampler"].Resampler(dim=64, depth=1, dim_head=64, heads=1, **sizes)
        widths = [layer.width for layer in self.host.layers_of_model(self.model())]
        layers = parts["adapter"].IPLayers(widths, sizes["output_dim"])
        adapter = fill(parts["adapter"].IPAdapter(projector, layers), salt)
        parts["checkpoint"].save_ip_adapter(self.folder / "models/ipadapter" / name, adapter)
        return name

    def adapter(self, **options: Any) -> Any:
        return self.first("PiTLoadIPAdapter", file=self.adapter_file(**options))

    def prior_file(self, name: str = "tiny.safetensors", **settings: Any) -> str:
        """A random prior for the adapter's tokens."""
        model, info, files = (
            self.part(f"pit_core.ip_prior.{name}") for name in ("model", "info", "checkpoint")
        )
        prior = fill(model.IPPrior(CONTEXT, 64, 1, 1, TOKENS))
        files.save_prior(
            self.folder / "models/ip_prior" / name, prior, info.PriorInfo(prior.config, **settings)
        )
        return name

    def lora_file(
        self,
        name: str = "tiny.safetensors",
        *,
        layout: str = "released",
        ip: bool = False,
        seed: int = 0,
        **more: tuple[int, int],
    ) -> str:
        """A random LoRA of rank 4 over q, k and v of every text cross-attention of `model()`.

        ip: also over the layers of `adapter()`. more: further modules and the shapes of their weights.
        """
        path = self.folder / "models/loras" / name
        file = lora_tensors({**self.lora_shapes(ip), **more}, layout, seed)
        self.part("pit_core.files").save_tensors(path, file, {})
        return name

    def lora_shapes(self, ip: bool = False) -> dict[str, tuple[int, int]]:
        """diffusers' name of a module -> shape of its weight."""
        shapes: dict[str, tuple[int, int]] = {}
        for layer in self._layers:
            block, number, index = layer.comfy_block
            attention = f"{host_double.DIFFUSERS[block, number]}.transformer_blocks.{index}.attn2"
            shapes[f"{attention}.to_q"] = (layer.width, layer.width)
            for part in ("to_k", "to_v", *(("to_k_ip", "to_v_ip") if ip else ())):
                shapes[f"{attention}.{part}"] = (layer.width, layer.context)
        return shapes

    @cached_property
    def _layers(self) -> list[Any]:
        return self.host.layers_of_model(self.model())

    def tokens(self, seed: int = 0, rows: int = 1, count: int = TOKENS, **extras: Any) -> Any:
        """Random IP tokens with a null and a white."""
        generator = torch.Generator().manual_seed(seed)
        nulls = torch.randn(2, 1, TOKENS, CONTEXT, generator=torch.Generator().manual_seed(99))
        extras = {"null": nulls[0], "white": nulls[1], **extras}
        made = torch.randn(rows, count, CONTEXT, generator=generator)
        return self.part("pit_core.ip_adapter.tokens").IPTokens(made, TOKENS, **extras)

    # to be had from either host

    def model(self) -> Any:
        raise NotImplementedError

    def clip_vision(self, width: int = VISION, projection: int = PROJECTION) -> Any:
        raise NotImplementedError

    def sample(self, model: Any, **options: Any) -> Tensor:
        raise NotImplementedError

    def loaded(self, model: Any) -> dict[str, Tensor]:
        """A MODEL's weights as they are while it runs."""
        raise NotImplementedError


def lora_tensors(shapes: dict[str, tuple[int, int]], layout: str, seed: int = 0) -> dict[str, Tensor]:
    """A LoRA's content; the factors of the same seed are the same in every layout."""
    from lora_files import lora_key

    made = {}
    for module, (out, width) in shapes.items():
        salt = zlib.crc32(module.encode()) + seed
        made[lora_key(module, "down", layout)] = randn((4, width), salt) / 2
        made[lora_key(module, "up", layout)] = randn((out, 4), salt + 1) / width**0.5
    return made


def conditions(groups: list[list[tuple[int, Any]]] | None) -> list[list[tuple[Tensor, Any]]]:
    """[positive, negative] of (seed, area) -> of (context (1, 6, C), area)."""
    made = groups or [[(1, None)], [(2, None)]]
    return [[(randn((1, 6, CONTEXT), seed), area) for seed, area in group] for group in made]


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(module: nn.Module, salt: str = "") -> Any:
    """Seeded weights for every parameter, by name."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32((salt + name).encode()))
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                values /= parameter[0].numel() ** 0.5
            else:
                values = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(values)
    return module.eval().requires_grad_(False)


def load_pack() -> ModuleType:
    """By its path, under a name that no import statement could say."""
    parent = sys.modules.setdefault("custom_nodes", ModuleType("custom_nodes"))
    parent.__path__ = getattr(parent, "__path__", [])
    spec = importlib.util.spec_from_file_location(
        PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    pack = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = pack
    spec.loader.exec_module(pack)
    return pack


class DoubleBench(Bench):
    def __init__(self, folder: Path) -> None:
        self.state, self._modules = host_double.install(folder)
        super().__init__(folder)

    def close(self) -> None:
        super().close()
        for name in [*self._modules, "custom_nodes"]:
            sys.modules.pop(name, None)

    def model(self) -> Any:
        return host_double.ModelPatcher(fill(host_double.Model(CONTEXT)))

    def clip_vision(self, width: int = VISION, projection: int = PROJECTION) -> Any:
        encoder = host_double.ClipVision(width, projection, PIXELS)
        fill(encoder.model)
        return encoder

    def sample(
        self,
        model: Any,
        *,
        noise: Tensor | None = None,
        steps: int = 2,
        cfg: float = 3.0,
        groups: list[list[tuple[int, Any]]] | None = None,
    ) -> Tensor:
        noise = randn((1, 4, 8, 8), 7) if noise is None else noise
        named = [[{"context": c, "area": a} for c, a in group] for group in conditions(groups)]
        return host_double.sample(model, noise, named, steps, cfg)

    def loaded(self, model: Any) -> dict[str, Tensor]:
        model.load()
        weights = {name: value.clone() for name, value in model.model.state_dict().items()}
        model.unload()
        return weights


class RealBench(Bench):
    """ComfyUI itself, in this process and on the CPU."""

    def __init__(self, comfyui: Path, folder: Path) -> None:
        sys.path.insert(0, str(comfyui))
        sys.argv = ["main.py", "--cpu"]
        import comfy.options

        comfy.options.enable_args_parsing()
        import folder_paths

        importlib.import_module("utils.extra_config")  # like main.py: `import nodes` hides these `utils`

        folder_paths.models_dir = str(folder / "models")
        folder_paths.set_output_directory(str(folder / "output"))
        folder_paths.set_temp_directory(str(folder / "temp"))
        known = folder_paths.folder_names_and_paths
        known["loras"] = ([str(folder / "models/loras")], known["loras"][1])
        super().__init__(folder)

    def model(self, salt: str = "", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        patcher, _ = self.host.empty_sdxl({**UNET, **changes})
        fill(patcher.model, salt)
        patcher.model.diffusion_model.to(dtype).dtype = dtype
        return patcher

    def sdxl(self) -> Any:
        """The host's model of SDXL at its own size, its keys and shapes without their numbers."""
        import comfy.model_management

        with pytest.MonkeyPatch.context() as patch:
            meta = torch.device("meta")
            patch.setattr(comfy.model_management, "unet_offload_device", lambda: meta)
            return self.host.empty_sdxl(SDXL)[0]

    def clip_vision(self, width: int = VISION, projection: int = PROJECTION) -> Any:
        import comfy.clip_vision

        config = {
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_channels": 3,
            "hidden_act": "gelu",
            "image_size": PIXELS,
            "patch_size": 8,
            "projection_dim": projection,
        }
        path = self.folder / "clip_vision.json"
        path.write_text(json.dumps(config), "utf-8")
        encoder = comfy.clip_vision.ClipVisionModel(str(path))
        fill(encoder.model)
        return encoder

    def sample(
        self,
        model: Any,
        *,
        noise: Tensor | None = None,
        steps: int = 2,
        cfg: float = 3.0,
        groups: list[list[tuple[int, Any]]] | None = None,
        conds: list[Any] | None = None,
        latent: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """options: the host's own, such as denoise, noise_mask and callback."""
        import comfy.sample

        noise = randn((1, 4, 8, 8), 7) if noise is None else noise
        positive, negative = conds or self.conds(groups)
        with torch.inference_mode():
            return comfy.sample.sample(
                model,
                noise,
                steps,
                cfg,
                "euler",
                "normal",
                positive,
                negative,
                torch.zeros_like(noise) if latent is None else latent,
                disable_pbar=True,
                seed=0,
                **options,
            )

    def loaded(self, model: Any) -> dict[str, Tensor]:
        import comfy.model_management

        comfy.model_management.load_model_gpu(model)
        return {name: value.clone() for name, value in model.model.state_dict().items()}

    def conds(self, groups: list[list[tuple[int, Any]]] | None = None, **extras: Any) -> list[Any]:
        """[positive, negative] as the host has them; extras go into every condition."""
        pooled = {"pooled_output": randn((1, POOLED), 5)}
        return [
            [[c, {**pooled, **({"area": a} if a else {}), **extras}] for c, a in group]
            for group in conditions(groups)
        ]
