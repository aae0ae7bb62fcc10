"""A file of our trainer in ComfyUI's own LoRA loader: every layer of a full-size SDXL, and by how much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import real_host
import torch
from sdxl_on_meta import sdxl_on_meta

from pit_core.files import save_tensors
from pit_core.train.ip_lora import IPLoRAObjective

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(900)]

RANK, STRENGTH = 4, 0.7


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What the trainer saves, and the factors that it has in memory, by layer."""
    folder = tmp_path_factory.mktemp("trained")
    objective = IPLoRAObjective(*sdxl_on_meta(), alphas_cumprod=torch.ones(1), rank=RANK)
    _fill(objective)
    objective.save(folder / "trained.safetensors")
    layers = objective.lora().layers
    downs = {f"{module}.down": layer.down for module, layer in layers.items()}
    ups = {f"{module}.up": layer.up for module, layer in layers.items()}
    save_tensors(folder / "factors.safetensors", downs | ups)
    return folder / "trained.safetensors", folder / "factors.safetensors"


def _fill(objective: IPLoRAObjective) -> None:
    """Numbers for what is trained; the rest stays without any."""
    generator = torch.Generator().manual_seed(0)
    for module in list(objective.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator) / 10
                setattr(module, name, torch.nn.Parameter(values))


def test_every_layer_of_sdxl_becomes_w_plus_s_b_a(comfyui: Path, files: tuple[Path, Path]) -> None:
    """Through ComfyUI's own loader and through our node alike."""
    script = Path(__file__).with_name("host_trained_ip_lora.py")
    done = real_host.run(comfyui, str(script), *map(str, files), str(STRENGTH), timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found)  # noqa: T201
    for way in ("core", "ours"):
        assert found[way]["patched"] == 560
        assert found[way]["worst"] < 1e-6
    assert "model: 560 of 560 layers patched" in found["report"]
